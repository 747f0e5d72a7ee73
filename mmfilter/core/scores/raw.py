"""The baseline without an SAE."""

from __future__ import annotations

import torch
from torch.nn.functional import cosine_similarity

from mmfilter.core.scores.pooled_pairs import PooledPairs


def raw(pairs: PooledPairs) -> torch.Tensor:
    """Cosine of the mean residual states of both sides: no SAE, the baseline."""
    return cosine_similarity(pairs.image_state, pairs.text_state, dim=1)
