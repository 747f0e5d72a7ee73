"""The encoder's matrix product: where an SAE spends its time."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x · weightᵀ + bias for x (tokens, d_in), weight (d_out, d_in) in any strides, bias (d_out,).

    In float32 on a CPU by oneDNN, which PyTorch itself calls for bfloat16 only: on an AMD EPYC it is twice as
    fast as the MKL behind `F.linear`, as exact, and a row's result does not depend on how many rows there are.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
