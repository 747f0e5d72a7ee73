"""How the cross-modal weights of an SAE's features are distributed, and which features have none."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmfilter.core.scores.crossmodal import FeatureWeights

QUANTILES = {"min": 0.0, "p10": 0.1, "p25": 0.25, "median": 0.5, "p75": 0.75, "p90": 0.9, "max": 1.0}


@dataclass(frozen=True)
class WeightSpread:
    """Every feature in one of five groups, and the weights of the first."""

    n_features: int
    n_weighted: int
    """With a weight ω: of the 30 strongest tokens at least 5 are image and 5 caption tokens"""
    n_one_sided: int
    """On both sides, but the strongest tokens are nearly all of one"""
    n_text_only: int
    """On caption tokens only"""
    n_image_only: int
    """On image tokens only"""
    n_never: int
    """On no token of the sample"""
    mean: float
    """Of ω; NaN where no feature has a weight"""
    quantiles: dict[str, float]
    """Of ω, by the names of `QUANTILES`; empty where no feature has a weight"""
    n_pairs: int
    """Pairs of the sample"""


def weight_spread(weights: FeatureWeights) -> WeightSpread:
    """The distribution of fitted weights."""
    on_image, on_text = weights.image_tokens > 0, weights.text_tokens > 0
    omega = weights.omega[~weights.omega.isnan()].double()
    places = torch.tensor(list(QUANTILES.values()), dtype=torch.float64)
    quantiles = dict(zip(QUANTILES, torch.quantile(omega, places).tolist(), strict=True)) if len(omega) else {}
    n_both, n_text, n_image, n_never = (
        int(group.sum())
        for group in (on_image & on_text, on_text & ~on_image, on_image & ~on_text, ~on_image & ~on_text)
    )
    return WeightSpread(
        n_features=len(weights.omega),
        n_weighted=len(omega),
        n_one_sided=n_both - len(omega),
        n_text_only=n_text,
        n_image_only=n_image,
        n_never=n_never,
        mean=float(omega.mean()),
        quantiles=quantiles,
        n_pairs=weights.n_samples,
    )
