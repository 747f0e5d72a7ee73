"""How much the mean codes of both sides point the same way."""

from __future__ import annotations

import torch
from torch.nn.functional import cosine_similarity

from mmfilter.core.scores.pooled_pairs import PooledPairs


def similarity(pairs: PooledPairs) -> torch.Tensor:
    """Cosine of idf_j·ū_j and idf_j·v̄_j; 0 where a side has no active feature."""
    idf = pairs.weights.idf
    return cosine_similarity(pairs.image.mean * idf, pairs.text.mean * idf, dim=1)
