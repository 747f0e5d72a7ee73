"""Sparse codes: the features active at each token, and pooled over the two sides of a pair.

Everything is a set of (token, feature, value) triples; a dense (tokens × features) array never leaves
the SAE's chunk. Pooled codes are dense per *sample* and side, (samples, n_features).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

IMAGE, TEXT = 0, 1
"""The two sides, as indices."""


@dataclass(frozen=True)
class TokenCodes:
    """Active features of a list of tokens, as triples sorted by token."""

    token: torch.Tensor
    """(entries,) int64, which token"""
    feature: torch.Tensor
    """(entries,) int64, which feature"""
    value: torch.Tensor
    """(entries,) float, always positive"""
    n_tokens: int
    n_features: int

    @staticmethod
    def active(pre: torch.Tensor, active: torch.Tensor, at_most: int) -> TokenCodes:
        """The entries of `pre` (tokens, features) where `active`, at most the strongest `at_most` a token."""
        crowded = (active.sum(1, dtype=torch.int32) > at_most).nonzero()[:, 0]
        if len(crowded):
            strongest = _strongest_mask(pre[crowded].masked_fill(~active[crowded], -torch.inf), at_most)
            active = active.index_copy(0, crowded, strongest)
        token, feature = active.nonzero(as_tuple=True)
        return TokenCodes(token, feature, pre[token, feature], *pre.shape)

    @staticmethod
    def strongest(pre: torch.Tensor, k: int) -> TokenCodes:
        """The positive entries among the `k` largest of each row of `pre` (tokens, features)."""
        value, feature = pre.topk(k, dim=1, sorted=False)
        feature, order = feature.sort(1)
        value = value.gather(1, order)
        token, place = (value > 0).nonzero(as_tuple=True)
        return TokenCodes(token, feature[token, place], value[token, place], *pre.shape)

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

    def dense(self) -> torch.Tensor:
        """(n_tokens, n_features); for tests and small inputs."""
        out = self.value.new_zeros(self.n_tokens, self.n_features)
        out[self.token, self.feature] = self.value
        return out


def _strongest_mask(values: torch.Tensor, k: int) -> torch.Tensor:
    _, feature = values.topk(k, dim=1)
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, feature, True)


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


def pool(codes: TokenCodes, sample: torch.Tensor, side: torch.Tensor, n_samples: int) -> tuple[PooledCodes, PooledCodes]:
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
