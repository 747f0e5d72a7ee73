"""How much of what the caption says the image has too."""

from __future__ import annotations

import torch

from mmfilter.core.scores.pooled_pairs import PooledPairs


def support(pairs: PooledPairs) -> torch.Tensor:
    """Σ min(u_j, v_j) / Σ v_j: the share of the caption's activation that the image has too."""
    shared = torch.minimum(pairs.image.maximum, pairs.text.maximum).sum(1)
    return shared / pairs.text.maximum.sum(1).clamp(min=1e-12)
