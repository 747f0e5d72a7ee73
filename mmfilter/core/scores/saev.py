"""Features that image and text share, as SAE-V counts them (Lou et al., ICML 2025, arXiv 2502.17514)."""

from __future__ import annotations

import torch

from mmfilter.core.scores.pooled_pairs import PooledPairs


def saev(pairs: PooledPairs) -> torch.Tensor:
    """Σ over C(s) of ω_j; features without a weight count 0 (SAE-V, Algorithm 1)."""
    return pairs.cooccurring.float() @ pairs.weights.omega.nan_to_num(0)


def cooccurrence(pairs: PooledPairs) -> torch.Tensor:
    """|C(s)| (SAE-V, Algorithm 3)."""
    return pairs.cooccurring.sum(1).float()
