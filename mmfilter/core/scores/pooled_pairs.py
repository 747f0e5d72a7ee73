"""A batch of pairs as the scores see it.

For a pair, u_j and v_j are the maxima of SAE feature j over its image and its text tokens, ū_j and v̄_j the means, τ
the card's threshold, ω_j the cross-modal weight and idf_j the rarity of `crossmodal`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmfilter.core.sae.token_codes import PooledCodes
from mmfilter.core.scores.crossmodal import FeatureWeights


@dataclass(frozen=True)
class PooledPairs:
    """A batch of pairs, pooled over tokens."""

    image: PooledCodes
    text: PooledCodes
    image_state: torch.Tensor
    """(samples, d_model), mean residual state of the image tokens"""
    text_state: torch.Tensor
    """(samples, d_model), mean residual state of the text tokens"""
    weights: FeatureWeights
    threshold: float
    """τ, in units of SAE activation"""

    @property
    def cooccurring(self) -> torch.Tensor:
        """C(s), (samples, n_features): features above τ on both sides."""
        return (self.image.maximum > self.threshold) & (self.text.maximum > self.threshold)
