"""States with known features: sparse positive combinations of directions around a mean, with noise."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class Synthetic:
    """`directions` (n, d) of norm 1; each token has `active` of them."""

    def __init__(self, n: int, d: int, active: int, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.directions = F.normalize(torch.randn(n, d, generator=g), dim=1)
        self.mean = 2 * torch.randn(d, generator=g)
        self._active, self._generator = active, g

    def states(self, tokens: int) -> torch.Tensor:
        n, d = self.directions.shape
        which = torch.rand(tokens, n, generator=self._generator).topk(self._active, dim=1).indices
        size = 1 + torch.rand(tokens, self._active, generator=self._generator)
        noise = 0.02 * torch.randn(tokens, d, generator=self._generator)
        return F.embedding_bag(which, self.directions, per_sample_weights=size, mode="sum") + self.mean + noise


def mean_max_cosine(directions: torch.Tensor, W_dec: torch.Tensor) -> float:
    """How well each true direction is found: its largest cosine with a decoder row, in the mean."""
    return float((directions @ F.normalize(W_dec, dim=1).T).amax(1).mean())
