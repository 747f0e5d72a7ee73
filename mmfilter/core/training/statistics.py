"""What a training knows of itself: figures of a step, and how often each feature fires on each side."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmfilter.core.sides import IMAGE, TEXT
from mmfilter.core.training import collective
from mmfilter.core.training.outcome import SIDES, Firing, Outcome


@dataclass(frozen=True)
class Quality:
    """How well a set of tokens is reconstructed."""

    tokens: int
    fvu: float
    """Fraction of variance unexplained: Σ‖x̂ − x‖² / Σ‖x − mean of these tokens‖²; NaN without variance"""
    l0: float
    """Mean number of active features a token; NaN without tokens"""


@dataclass(frozen=True)
class StepStats:
    """Of one step, over all processes, before its update."""

    step: int
    tokens: int
    """Trained on so far, this step's included"""
    loss: float
    auxiliary: float
    """Part of the loss that is AuxK"""
    all: Quality
    image: Quality | None
    """None where the step was not told which token is of which side"""
    text: Quality | None
    dead: float
    """Share of the features that count as dead after the step"""
    rate: float
    """Learning rate"""
    gradient_norm: float
    """Before clipping"""

    @property
    def fvu(self) -> float:
        return self.all.fvu

    @property
    def l0(self) -> float:
        return self.all.l0


class Sums:
    """Sums over a batch from which its `Quality` follows, one exchange between processes for all of them."""

    def __init__(self, centred: torch.Tensor, side: torch.Tensor, outcome: Outcome) -> None:
        """`centred` (tokens, d_model) are the states around any fixed point, `side` (tokens,) is IMAGE or TEXT."""
        d = centred.shape[1]
        sums = torch.zeros(SIDES, d + 4, dtype=torch.float64, device=centred.device)
        for which in range(SIDES):
            mask = (side == which).to(centred.dtype)
            sums[which, :d] = mask @ centred
            sums[which, d] = mask.sum()
            sums[which, d + 1] = mask @ _square_norms(centred)
            sums[which, d + 2] = mask @ _square_norms(outcome.error)
        sums[:, d + 3] = outcome.firing.counts.sum(1)
        self._sums = sums

    def shared(self, *scalars: torch.Tensor) -> tuple[list[Quality], list[float]]:
        """Quality of all tokens, image and text, and the sums of more numbers, over all processes."""
        flat = torch.cat([self._sums.flatten(), torch.stack([scalar.double() for scalar in scalars])])
        collective.sum_(flat)
        sums = flat[: self._sums.numel()].view_as(self._sums)
        groups = torch.stack([sums.sum(0), sums[IMAGE], sums[TEXT]])
        means = groups[:, :-4].square().sum(1)
        rows = torch.cat([groups[:, -4:], means.unsqueeze(1)], 1).tolist()
        return [_quality(*row) for row in rows], flat[self._sums.numel() :].tolist()


def _square_norms(rows: torch.Tensor) -> torch.Tensor:
    """‖row‖² of each, without an array of squares."""
    norms: torch.Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.square()


def _quality(tokens: float, squares: float, errors: float, active: float, sum_squared: float) -> Quality:
    variance = squares - sum_squared / tokens if tokens else 0.0
    return Quality(
        int(tokens), errors / variance if variance > 0 else float("nan"), active / tokens if tokens else float("nan")
    )


@dataclass
class FeatureStatistics:
    """How often and how strongly each feature fired since the last reset, over all processes."""

    counts: torch.Tensor
    """(2, n_features) int64, image tokens and text tokens on which it fired"""
    maximum: torch.Tensor
    """(n_features,) strongest activation, scaled units"""
    tokens: torch.Tensor
    """(2,) int64, image and text tokens seen"""

    @staticmethod
    def empty(n_features: int, device: torch.device) -> FeatureStatistics:
        """Of no tokens."""
        firing = Firing.none(n_features, torch.zeros(0, device=device))
        return FeatureStatistics(firing.counts, firing.maximum, torch.zeros(SIDES, dtype=torch.int64, device=device))

    def add(self, firing: Firing, tokens: list[int]) -> None:
        """Take up what fired on more tokens, so many of each side."""
        self.counts += firing.counts
        torch.maximum(self.maximum, firing.maximum, out=self.maximum)
        self.tokens += torch.tensor(tokens, device=self.tokens.device)

    def reset(self) -> None:
        """Begin anew."""
        for tensor in (self.counts, self.maximum, self.tokens):
            tensor.zero_()

    @property
    def frequency(self) -> torch.Tensor:
        """(2, n_features) share of the image tokens and of the text tokens on which each fired; 0 where there were
        none."""
        return self.counts / self.tokens.clamp(min=1).unsqueeze(1)
