"""Active features of a batch as (row, feature, value) triples, and the three products that training needs of them.

With A the sparse (rows × features) matrix of the triples, W (features, d) and T (rows, d):

    decode          A @ W                 reconstruction
    dots            (T @ Wᵀ) where A is   derivative of a loss by the values of A
    feature_sums    Aᵀ @ T                derivative by W

All three run in PyTorch's embedding-bag kernels, which gather rows and write no (entries × d) array.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Entries:
    """Triples sorted by row."""

    row: torch.Tensor
    """(entries,) int64"""
    feature: torch.Tensor
    """(entries,) int64"""
    value: torch.Tensor
    """(entries,) float"""
    n_rows: int
    n_features: int

    def __len__(self) -> int:
        return len(self.row)

    def where(self, mask: torch.Tensor) -> Entries:
        """Those for which `mask` (entries,) is true, or those at the given places."""
        return Entries(self.row[mask], self.feature[mask], self.value[mask], self.n_rows, self.n_features)

    def positive(self) -> Entries:
        """Those above 0."""
        return self.where(self.value > 0)

    def with_values(self, value: torch.Tensor) -> Entries:
        """The same places with other values."""
        return Entries(self.row, self.feature, value, self.n_rows, self.n_features)

    @cached_property
    def row_offsets(self) -> torch.Tensor:
        """(n_rows + 1,) where each row begins."""
        return _offsets(self.row, self.n_rows)

    @cached_property
    def by_feature(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(order, offsets): the entries sorted by feature, and where each feature begins in that order."""
        narrow = self.feature.int() if self.n_features < 2**31 else self.feature
        return narrow.argsort(stable=True), _offsets(self.feature, self.n_features)

    def decode(self, W: torch.Tensor) -> torch.Tensor:
        """A @ W, (n_rows, d)."""
        return _bags(self.feature, W, self.row_offsets, self.value)

    def dots(self, table: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
        """table[row] · W[feature] for each entry, (entries,); `table` is (n_rows, d)."""
        with torch.enable_grad():
            value = self.value.detach().to(W.dtype).requires_grad_()
            return torch.autograd.grad(_bags(self.feature, W, self.row_offsets, value), value, table)[0]

    def decode_with_dots(self, W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(A @ W, the leaf of the values): `torch.autograd.grad` of the first by the second is `dots`, without a second
        pass."""
        with torch.enable_grad():
            value = self.value.detach().requires_grad_()
            return _bags(self.feature, W, self.row_offsets, value), value

    def feature_sums(self, table: torch.Tensor, weight: torch.Tensor, row: torch.Tensor | None = None) -> torch.Tensor:
        """Σ weight · table[row] over the entries of each feature, (n_features, d); `row` replaces the entries' own."""
        order, offsets = self.by_feature
        return _bags((self.row if row is None else row)[order], table, offsets, weight[order])

    def per_feature(self, weight: torch.Tensor) -> torch.Tensor:
        """Σ weight over the entries of each feature, (n_features,), summed in a fixed order."""
        order, offsets = self.by_feature
        return torch.segment_reduce(weight[order], "sum", offsets=offsets, initial=0)


def _offsets(index: torch.Tensor, n: int) -> torch.Tensor:
    return F.pad(torch.bincount(index, minlength=n).cumsum(0), (1, 0))


def _bags(index: torch.Tensor, table: torch.Tensor, offsets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if not len(index):
        return table.new_zeros(len(offsets) - 1, table.shape[1]) + weight.sum()
    return F.embedding_bag(index, table, offsets, mode="sum", per_sample_weights=weight, include_last_offset=True)
