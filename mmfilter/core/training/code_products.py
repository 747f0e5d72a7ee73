"""The three products that training needs of the codes of a batch.

With A the codes as a sparse (tokens × features) matrix, W (features, d) and T (tokens, d):

    decode          A @ W                 reconstruction
    dots            (T @ Wᵀ) where A is   derivative of a loss by the values of A
    feature_sums    Aᵀ @ T                derivative by W

All three run in PyTorch's embedding-bag kernels, which gather rows and write no (entries × d) array.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mmfilter.core.sae.token_codes import TokenCodes


def decode(codes: TokenCodes, W: torch.Tensor) -> torch.Tensor:
    """A @ W, (n_tokens, d)."""
    return _bags(codes.feature, W, codes.token_offsets, codes.value)


def dots(codes: TokenCodes, table: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """table[token] · W[feature] for each entry, (entries,); `table` is (n_tokens, d)."""
    with torch.enable_grad():
        value = codes.value.detach().to(W.dtype).requires_grad_()
        return torch.autograd.grad(_bags(codes.feature, W, codes.token_offsets, value), value, table)[0]


def decode_with_dots(codes: TokenCodes, W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(A @ W, the leaf of the values): `torch.autograd.grad` of the first by the second is `dots`, without a second
    pass."""
    with torch.enable_grad():
        value = codes.value.detach().requires_grad_()
        return _bags(codes.feature, W, codes.token_offsets, value), value


def feature_sums(
    codes: TokenCodes, table: torch.Tensor, weight: torch.Tensor, token: torch.Tensor | None = None
) -> torch.Tensor:
    """Σ weight · table[token] over the entries of each feature, (n_features, d); `token` replaces the codes' own."""
    order, offsets = codes.by_feature
    return _bags((codes.token if token is None else token)[order], table, offsets, weight[order])


def per_feature(codes: TokenCodes, weight: torch.Tensor) -> torch.Tensor:
    """Σ weight over the entries of each feature, (n_features,), summed in a fixed order."""
    order, offsets = codes.by_feature
    return torch.segment_reduce(weight[order], "sum", offsets=offsets, initial=0)


def _bags(index: torch.Tensor, table: torch.Tensor, offsets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if not len(index):
        return table.new_zeros(len(offsets) - 1, table.shape[1]) + weight.sum()
    return F.embedding_bag(index, table, offsets, mode="sum", per_sample_weights=weight, include_last_offset=True)
