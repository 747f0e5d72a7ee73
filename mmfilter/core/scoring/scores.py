"""SCORES: what each score column means.

For a pair, u_j and v_j are the maxima of SAE feature j over its image and its text tokens, ū_j and v̄_j
the means, τ the card's threshold, ω_j the cross-modal weight and idf_j the rarity of `crossmodal`.
The first three follow SAE-V (Lou et al., ICML 2025, arXiv 2502.17514); the rest are ours or controls.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import cosine_similarity

from mmfilter.core.model.codes import PooledCodes
from mmfilter.core.scoring.crossmodal import FeatureWeights


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


def saev(pairs: PooledPairs) -> torch.Tensor:
    """Σ over C(s) of ω_j; features without a weight count 0 (SAE-V, Algorithm 1)."""
    return pairs.cooccurring.float() @ pairs.weights.omega.nan_to_num(0)


def cooccurrence(pairs: PooledPairs) -> torch.Tensor:
    """|C(s)| (SAE-V, Algorithm 3)."""
    return pairs.cooccurring.sum(1).float()


def similarity(pairs: PooledPairs) -> torch.Tensor:
    """Cosine of idf_j·ū_j and idf_j·v̄_j; 0 where a side has no active feature."""
    idf = pairs.weights.idf
    return cosine_similarity(pairs.image.mean * idf, pairs.text.mean * idf, dim=1)


def support(pairs: PooledPairs) -> torch.Tensor:
    """Σ min(u_j, v_j) / Σ v_j: the share of the caption's activation that the image has too."""
    shared = torch.minimum(pairs.image.maximum, pairs.text.maximum).sum(1)
    return shared / pairs.text.maximum.sum(1).clamp(min=1e-12)


def raw(pairs: PooledPairs) -> torch.Tensor:
    """Cosine of the mean residual states of both sides: no SAE, the baseline."""
    return cosine_similarity(pairs.image_state, pairs.text_state, dim=1)


def _per_token(total: Callable[[PooledCodes], torch.Tensor], *sides: str) -> Callable[[PooledPairs], torch.Tensor]:
    def score(pairs: PooledPairs) -> torch.Tensor:
        pooled = [getattr(pairs, side) for side in sides]
        tokens = sum(side.n_tokens for side in pooled)
        return sum(total(side) for side in pooled) / tokens.clamp(min=1)

    return score


SCORES: dict[str, Callable[[PooledPairs], torch.Tensor]] = {
    "saev": saev,
    "cooccurrence": cooccurrence,
    "l0": _per_token(lambda side: side.l0, "image", "text"),
    "l0_image": _per_token(lambda side: side.l0, "image"),
    "l0_text": _per_token(lambda side: side.l0, "text"),
    "l1": _per_token(lambda side: side.l1, "image", "text"),
    "l1_image": _per_token(lambda side: side.l1, "image"),
    "l1_text": _per_token(lambda side: side.l1, "text"),
    "similarity": similarity,
    "support": support,
    "raw": raw,
}
"""Name -> function from a batch of pairs to (samples,). l0 is the mean number of active features a token
(SAE-V, Algorithm 2), l1 the mean sum of activations a token."""


def random_score(seed: int, key: str, row: int) -> float:
    """A seeded uniform number in [0, 1) that depends on the sample alone: the control to beat."""
    digest = hashlib.sha256(f"{seed}\0{key}\0{row}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:3], "big") / 2**24
