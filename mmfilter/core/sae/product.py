"""The encoder's matrix product: where an SAE spends its time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

LENGTHS = 8
"""Numbers of rows that inputs of any length are filled up to"""


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x · weightᵀ + bias for x (tokens, d_in), weight (d_out, d_in) in any strides, bias (d_out,).

    In float32 on a CPU by oneDNN, which PyTorch itself calls for bfloat16 only: on an AMD EPYC it is twice as
    fast as the MKL behind `F.linear`, as exact, and a row's result does not depend on how many rows there are.
    It keeps a program of up to a megabyte for each number of rows that it meets: see `linear_of_any_length`.
    """
    if by_onednn(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # noqa: SLF001 (has no other name)
    return F.linear(x, weight, bias)


def linear_of_any_length(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, longest: int) -> torch.Tensor:
    """The same for x whose number of rows, mostly up to `longest`, differs from call to call: a few programs serve them
    all."""
    more = -len(x) % max(1, longest // LENGTHS)
    if not more or not by_onednn(x):
        return linear(x, weight, bias)
    return linear(F.pad(x, (0, 0, 0, more)), weight, bias)[: len(x)]


def by_onednn(x: torch.Tensor) -> bool:
    """Whether products with x are oneDNN's."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


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
