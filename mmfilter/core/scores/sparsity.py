"""How many features are active, and how strongly.

l0 is the mean number of active features a token (SAE-V, Lou et al., ICML 2025, arXiv 2502.17514, Algorithm 2), l1 the
mean sum of activations a token; of both sides together, and of each.
"""

from __future__ import annotations

import torch

from mmfilter.core.sae.token_codes import PooledCodes
from mmfilter.core.scores.pooled_pairs import PooledPairs


def l0(pairs: PooledPairs) -> torch.Tensor:
    """Active features a token of either side."""
    return _l0(pairs.image, pairs.text)


def l0_image(pairs: PooledPairs) -> torch.Tensor:
    """Active features an image token."""
    return _l0(pairs.image)


def l0_text(pairs: PooledPairs) -> torch.Tensor:
    """Active features a caption token."""
    return _l0(pairs.text)


def l1(pairs: PooledPairs) -> torch.Tensor:
    """Sum of activations a token of either side."""
    return _l1(pairs.image, pairs.text)


def l1_image(pairs: PooledPairs) -> torch.Tensor:
    """Sum of activations an image token."""
    return _l1(pairs.image)


def l1_text(pairs: PooledPairs) -> torch.Tensor:
    """Sum of activations a caption token."""
    return _l1(pairs.text)


def _l0(first: PooledCodes, *others: PooledCodes) -> torch.Tensor:
    return _a_token([side.l0 for side in (first, *others)], [side.n_tokens for side in (first, *others)])


def _l1(first: PooledCodes, *others: PooledCodes) -> torch.Tensor:
    return _a_token([side.l1 for side in (first, *others)], [side.n_tokens for side in (first, *others)])


def _a_token(totals: list[torch.Tensor], tokens: list[torch.Tensor]) -> torch.Tensor:
    """Totals (samples,) of some sides over the tokens of these sides."""
    return torch.stack(totals).sum(0) / torch.stack(tokens).sum(0).clamp(min=1)
