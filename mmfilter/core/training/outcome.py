"""What one step found out, before anything is changed by it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmfilter.core.sae.token_codes import TokenCodes
from mmfilter.core.training.weights import Weights

SIDES = 2
"""Image and text, as `IMAGE` and `TEXT` in `core/sides.py`"""


@dataclass
class Firing:
    """How often and how strongly each feature fired."""

    counts: torch.Tensor
    """(sides, n_features) int64, tokens on which it did"""
    maximum: torch.Tensor
    """(n_features,) strongest activation"""

    @staticmethod
    def none(n_features: int, like: torch.Tensor) -> Firing:
        """Of no tokens."""
        return Firing(torch.zeros(SIDES, n_features, dtype=torch.int64, device=like.device), like.new_zeros(n_features))

    @staticmethod
    def of(codes: TokenCodes, side: torch.Tensor) -> Firing:
        """Of the codes of tokens; `side` (tokens,) is IMAGE or TEXT."""
        n = codes.n_features
        counts = torch.bincount(side[codes.token] * n + codes.feature, minlength=SIDES * n).view(SIDES, n)
        maximum = codes.value.new_zeros(n).scatter_reduce_(0, codes.feature, codes.value, "amax")
        return Firing(counts, maximum)

    def add_dense(self, active: torch.Tensor, side: torch.Tensor) -> None:
        """Activations (tokens, n_features) of more tokens."""
        fires = active > 0
        for which in range(SIDES):
            self.counts[which] += fires[side == which].sum(0)
        torch.maximum(self.maximum, active.amax(0), out=self.maximum)


@dataclass
class Outcome:
    """Loss and gradients of a batch; sums over this process' tokens only."""

    gradients: Weights
    error: torch.Tensor
    """(tokens, d_model) x̂ − x, scaled"""
    firing: Firing
    loss: torch.Tensor
    """The sum over processes is the loss of the batch"""
    auxiliary: torch.Tensor
    """Part of it that is AuxK"""
    threshold: torch.Tensor | None = None
    """Smallest activation that the whole batch kept, `batchtopk` only"""
