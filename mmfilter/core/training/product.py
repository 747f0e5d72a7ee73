"""The encoder's matrix product, a chunk of tokens at a time: the only dense (tokens × features) array of a step."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mmfilter.core.model.product import linear

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Elements of a chunk: on a CPU it stays in the last-level cache while features are chosen from it"""


class EncoderProduct:
    """h = x · W_encᵀ + b_enc for chunks of x, in float32 or bfloat16."""

    def __init__(self, W_enc: torch.Tensor, b_enc: torch.Tensor, dtype: torch.dtype) -> None:
        self._W, self._b, self._dtype = W_enc.to(dtype), b_enc.to(dtype), dtype
        elements = CHUNK_ELEMENTS.get(W_enc.device.type, CHUNK_ELEMENTS["cuda"])
        self.chunk_tokens = max(1, elements // len(W_enc))

    def chunks(self, x: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """(first token, h of the chunk (tokens, features)) for x of (tokens, d_model)."""
        for start in range(0, len(x), self.chunk_tokens):
            yield start, linear(x[start : start + self.chunk_tokens].to(self._dtype), self._W, self._b)
