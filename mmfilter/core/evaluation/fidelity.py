"""How faithfully an SAE reconstructs states, for image tokens and caption tokens apart.

    FVU = Σ |x − x̂|² / Σ |x − x̄|²

the fraction of variance unexplained, with x̄ the mean of that side's own tokens: 0 is exact, 1 is as
good as saying the mean every time, and more is worse than that. Explained variance is 1 − FVU, as SAELens
6 counts it: all dimensions together, so a few dimensions of large variance decide it. Beside it stands
the mean over dimensions of each one's own explained variance, in which all count alike.

Every active feature takes part, not only the 50 that scores use. A side's tokens are gone through once;
sums are in float64, and the spread about the mean is merged batch by batch (Chan, Golub and LeVeque 1979),
so that a large mean costs no digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmfilter.core.sae.autoencoder import DENSE_CHUNK_ELEMENTS, SAE
from mmfilter.core.sides import IMAGE, TEXT

HARDLY = 0.9
"""FVU above which an SAE hardly reconstructs a side: it leaves nine tenths of the variance unexplained."""
DENSE = 0.1
"""Share of a side's tokens above which a feature that fires on them is called dense."""


@dataclass(frozen=True)
class SideFidelity:
    """How the SAE does on the tokens of one side; the means are NaN where there is no token."""

    n_tokens: int
    fvu: float
    """Fraction of variance unexplained; NaN where the states do not vary"""
    cosine: float
    """Mean cosine of state and reconstruction"""
    l0: float
    """Mean number of active features per token"""
    n_active: int
    """Features that fire on at least one token"""
    n_dense: int
    """Features that fire on more than `DENSE` of the tokens"""
    explained_by_dimension: float
    """Mean of the dimensions' own explained variance, those that do not vary left out"""

    @property
    def explained_variance(self) -> float:
        """1 − FVU."""
        return 1 - self.fvu


@dataclass(frozen=True)
class Fidelity:
    """How the SAE does on both sides."""

    image: SideFidelity
    text: SideFidelity
    n_features: int
    n_dead: int
    """Features that fire on no token of either side"""
    n_shared: int
    """Features that fire on tokens of both sides"""

    @property
    def fraction_dead(self) -> float:
        return self.n_dead / self.n_features

    @property
    def fraction_shared(self) -> float:
        """Share of the features that fire at all which fire on both sides; NaN where none fires."""
        return self.n_shared / (self.n_features - self.n_dead) if self.n_dead < self.n_features else float("nan")

    @property
    def fraction_silent(self) -> dict[str, float]:
        """Share of the features that fire on no token of the side."""
        return {name: 1 - side.n_active / self.n_features for name, side in self.sides.items()}

    @property
    def sides(self) -> dict[str, SideFidelity]:
        return {"image": self.image, "text": self.text}

    @property
    def hardly_reconstructed(self) -> list[str]:
        """The sides, `image` or `text`, of which the SAE leaves more than `HARDLY` unexplained."""
        return [name for name, side in self.sides.items() if side.fvu > HARDLY]


class FidelityMeter:
    """Adds up states as they come."""

    def __init__(self, sae: SAE) -> None:
        self._sae = sae
        self._sides = [_Side(sae), _Side(sae)]
        self._chunk = max(1, DENSE_CHUNK_ELEMENTS // sae.n_features)

    @torch.inference_mode()
    def add(self, states: torch.Tensor, side: torch.Tensor) -> None:
        """States (tokens, d_model) of tokens whose `side` (tokens,) is IMAGE or TEXT; states that are not finite are
        passed over."""
        finite = states.isfinite().all(1)
        for which, total in enumerate(self._sides):
            for part in states[finite & (side == which)].split(self._chunk):
                if len(part):
                    self._add(part, total)

    def _add(self, states: torch.Tensor, total: _Side) -> None:
        codes = self._sae.encode(states, max_active=self._sae.n_features)
        total.add(states.double(), self._sae.decode(codes, states).double())
        total.entries += len(codes.feature)
        total.fired += torch.bincount(codes.feature, minlength=codes.n_features)

    @property
    def fidelity(self) -> Fidelity:
        """What all states so far come to."""
        image, text = self._sides[IMAGE], self._sides[TEXT]
        on_image, on_text = image.fired > 0, text.fired > 0
        dead, shared = ~(on_image | on_text), on_image & on_text
        return Fidelity(image.result(), text.result(), self._sae.n_features, int(dead.sum()), int(shared.sum()))


class _Side:
    """Running sums over the tokens of one side, in float64."""

    def __init__(self, sae: SAE) -> None:
        self.n = self.entries = 0
        self.mean = torch.zeros(sae.d_model, dtype=torch.float64, device=sae.W_enc.device)
        self.spread, self.error = self.mean.clone(), self.mean.clone()
        self.cosines = self.mean.new_zeros(())
        self.fired = torch.zeros(sae.n_features, dtype=torch.int64, device=sae.W_enc.device)

    def add(self, x: torch.Tensor, again: torch.Tensor) -> None:
        n, mean = len(x), x.mean(0)
        apart = mean - self.mean
        self.spread += (x - mean).square().sum(0) + apart.square() * (self.n * n / (self.n + n))
        self.mean += apart * (n / (self.n + n))
        self.n += n
        self.error += (x - again).square().sum(0)
        self.cosines += torch.nn.functional.cosine_similarity(x, again, dim=1).sum()

    def result(self) -> SideFidelity:
        n, varies = self.n or float("nan"), self.spread > 0
        fvu = float(self.error.sum() / self.spread.sum()) if varies.any() else float("nan")
        by_dimension = float((1 - self.error[varies] / self.spread[varies]).mean())
        n_active, n_dense = int((self.fired > 0).sum()), int((self.fired > DENSE * self.n).sum())
        return SideFidelity(self.n, fvu, float(self.cosines) / n, self.entries / n, n_active, n_dense, by_dimension)
