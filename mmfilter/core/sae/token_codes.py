"""Sparse codes: the features active at each token, and pooled over the two sides of a pair.

Everything is a set of (token, feature, value) triples; a dense (tokens × features) array never leaves
the SAE's chunk. Pooled codes are dense per *sample* and side, (samples, n_features).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from mmfilter.core.sides import IMAGE, TEXT


@dataclass(frozen=True)
class TokenCodes:
    """Active features of a list of tokens, as triples sorted by token: a sparse (tokens, features) matrix."""

    token: torch.Tensor
    """(entries,) int64, which token"""
    feature: torch.Tensor
    """(entries,) int64, which feature"""
    value: torch.Tensor
    """(entries,) float; positive, but for candidates of which a training has yet to choose"""
    n_tokens: int
    n_features: int

    @staticmethod
    def strongest(pre: torch.Tensor, k: int) -> TokenCodes:
        """The positive entries among the `k` largest of each row of `pre` (tokens, features).

        Exact, and the same on every machine: of equal values at the cut the lower feature ids are kept.
        """
        value, feature = _largest(pre, min(k, pre.shape[1]))
        token, place = (value > 0).nonzero(as_tuple=True)
        return TokenCodes(token, feature[token, place], value[token, place], *pre.shape)

    @staticmethod
    def above(pre: torch.Tensor, threshold: torch.Tensor, k: int) -> TokenCodes:
        """The positive entries of `pre` (tokens, features) above their feature's `threshold`, (features,), of each row
        at most the `k` largest.

        As exact as `strongest`. Where a threshold leaves few, to find these costs less than to look for the largest.
        """
        n_features = pre.shape[1]
        entries = _true(pre > threshold.clamp(min=0))
        if len(entries) > MANY * k * len(pre):
            return TokenCodes.strongest(pre.masked_fill(pre <= threshold, 0), k)
        token = entries.div(n_features, rounding_mode="floor")
        feature, value = entries - token * n_features, pre.view(-1)[entries]
        inside = _first_of_each(token, value, k)
        if inside is not None:
            token, feature, value = token[inside], feature[inside], value[inside]
        return TokenCodes(token, feature, value, *pre.shape)

    @staticmethod
    def concatenate(parts: list[TokenCodes], n_features: int) -> TokenCodes:
        """One list of tokens after the other."""
        if len(parts) == 1:
            return parts[0]
        starts, total = [], 0
        for part in parts:
            starts.append(total)
            total += part.n_tokens
        return TokenCodes(
            torch.cat([part.token + start for part, start in zip(parts, starts, strict=True)]),
            torch.cat([part.feature for part in parts]),
            torch.cat([part.value for part in parts]),
            total,
            n_features,
        )

    def __len__(self) -> int:
        return len(self.token)

    def where(self, mask: torch.Tensor) -> TokenCodes:
        """The entries for which `mask` (entries,) is true, or those at the given places."""
        return TokenCodes(self.token[mask], self.feature[mask], self.value[mask], self.n_tokens, self.n_features)

    def positive(self) -> TokenCodes:
        """The entries above 0."""
        return self.where(self.value > 0)

    def with_values(self, value: torch.Tensor) -> TokenCodes:
        """The same places with other values."""
        return TokenCodes(self.token, self.feature, value, self.n_tokens, self.n_features)

    @cached_property
    def token_offsets(self) -> torch.Tensor:
        """(n_tokens + 1,) where the entries of each token begin."""
        return _offsets(self.token, self.n_tokens)

    @cached_property
    def by_feature(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(order, offsets): the entries sorted by feature, and where each feature begins in that order."""
        narrow = self.feature.int() if self.n_features < 2**31 else self.feature
        return narrow.argsort(stable=True), _offsets(self.feature, self.n_features)

    def dense(self) -> torch.Tensor:
        """(n_tokens, n_features); for tests and small inputs."""
        out = self.value.new_zeros(self.n_tokens, self.n_features)
        out[self.token, self.feature] = self.value
        return out


def _offsets(index: torch.Tensor, n: int) -> torch.Tensor:
    return F.pad(torch.bincount(index, minlength=n).cumsum(0), (1, 0))


GROUP = 8
"""Columns whose maximum stands for them when the largest entries of wide rows are looked for."""


MANY = 4
"""Times the wanted number of entries, on average, above which ordering them costs more than looking for the largest"""


def _true(mask: torch.Tensor) -> torch.Tensor:
    """Places of the true entries of a mask, counted through all its rows; numpy finds a few among many faster than
    torch."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.view(-1).nonzero()[:, 0]


def _first_of_each(token: torch.Tensor, value: torch.Tensor, k: int) -> torch.Tensor | None:
    """Which entries, ascending by token, are among the `k` largest of their token, of equals the earlier; None if all
    are."""
    counts = torch.bincount(token)
    crowded = (counts > k)[token].nonzero()[:, 0]
    if not len(crowded):
        return None
    order = value[crowded].argsort(descending=True, stable=True)
    order = order[token[crowded][order].argsort(stable=True)]
    sizes = counts[counts > k]
    first = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    inside = torch.ones(len(token), dtype=torch.bool, device=token.device)
    inside[crowded[order[torch.arange(len(order), device=token.device) - first >= k]]] = False
    return inside


def _largest(rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, columns) of the `k` largest of each row, by column; ties at the cut go to lower columns."""
    if k == rows.shape[1]:
        return rows, torch.arange(k, device=rows.device).expand_as(rows)
    value, column = _top(rows, k + 1)
    tied = ((value[:, k - 1] == value[:, k]) & (value[:, k] > 0)).nonzero()[:, 0]
    column, order = column[:, :k].sort(1)
    value = value[:, :k].gather(1, order)
    if len(tied):
        column[tied], value[tied] = _break_ties(rows[tied], k)
    return value, column


def _top(rows: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, columns) of the `n` largest of each row, largest first, ties in any order.

    Selecting from wide rows is slow, so only the maxima of groups of columns are compared. The n groups
    with the largest maxima hold n largest entries: what lies outside them is at most the smallest of
    these n maxima.
    """
    stride = rows.shape[1] // GROUP
    if stride < 2 * n:
        return rows.topk(n, dim=1)
    whole = GROUP * stride
    # a group is every stride-th column, so that its maximum is one of whole slices of the row
    group = _top(rows[:, :whole].view(len(rows), GROUP, stride).amax(1), n)[1]
    columns = (group[:, :, None] + torch.arange(0, whole, stride, device=rows.device)).flatten(1)
    if whole < rows.shape[1]:
        columns = torch.cat([columns, torch.arange(whole, rows.shape[1], device=rows.device).expand(len(rows), -1)], 1)
    value, place = rows.gather(1, columns).topk(n, dim=1)
    return value, columns.gather(1, place)


def _break_ties(rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(columns, values) of the `k` largest of rows with a tie at the cut, lower columns first among equals."""
    cut = rows.topk(k, dim=1).values[:, -1:]
    above, equal = rows > cut, rows == cut
    taken = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
    return taken.nonzero()[:, 1].view(len(rows), k), rows[taken].view(len(rows), k)


@dataclass(frozen=True)
class PooledCodes:
    """One side of a batch of samples, pooled over its tokens."""

    maximum: torch.Tensor
    """(samples, n_features), u_j or v_j of the definitions"""
    mean: torch.Tensor
    """(samples, n_features), over all tokens of the side, silent ones count 0"""
    n_tokens: torch.Tensor
    """(samples,) int64"""
    l0: torch.Tensor
    """(samples,) sum over tokens of the number of active features"""
    l1: torch.Tensor
    """(samples,) sum over tokens of the activations"""


def pool(
    codes: TokenCodes, sample: torch.Tensor, side: torch.Tensor, n_samples: int
) -> tuple[PooledCodes, PooledCodes]:
    """Pool token codes over the image side and the text side of each sample.

    `sample` (n_tokens,) says which sample a token belongs to, `side` (n_tokens,) is IMAGE or TEXT.
    """
    segment = sample * 2 + side
    entry = segment[codes.token]
    shape = (2 * n_samples, codes.n_features)
    flat = entry * codes.n_features + codes.feature
    value = codes.value.float()
    maximum = value.new_zeros(shape[0] * shape[1]).scatter_reduce_(0, flat, value, "amax").view(shape)
    total = value.new_zeros(shape[0] * shape[1]).index_add_(0, flat, value).view(shape)
    n_tokens = torch.bincount(segment, minlength=shape[0])
    l0 = torch.bincount(entry, minlength=shape[0]).float()
    l1 = value.new_zeros(shape[0]).index_add_(0, entry, value)
    mean = total / n_tokens.clamp(min=1)[:, None]

    def of(which: int) -> PooledCodes:
        return PooledCodes(maximum[which::2], mean[which::2], n_tokens[which::2], l0[which::2], l1[which::2])

    return of(IMAGE), of(TEXT)
