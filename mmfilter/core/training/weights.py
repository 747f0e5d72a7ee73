"""The weights of an SAE in training, and the gradients that go with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mmfilter.core.training.settings import ResolvedTrainSettings

RELU_DECODER_NORM = 0.1
"""Norm of a decoder row of `relu` at the start, as in SAE-V's recipe"""


@dataclass
class Weights:
    """Tensors in scaled units; W_enc is stored with a feature a row, so that its gradient and its update are by
    rows."""

    W_enc: torch.Tensor
    """(n_features, d_model), the transpose of `SAE.W_enc`"""
    b_enc: torch.Tensor
    """(n_features,)"""
    W_dec: torch.Tensor
    """(n_features, d_model)"""
    b_dec: torch.Tensor
    """(d_model,)"""
    log_threshold: torch.Tensor | None = None
    """(n_features,), natural logarithm; jumprelu only"""

    def named(self) -> dict[str, torch.Tensor]:
        """Those there are, by name."""
        tensors = {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        return tensors if self.log_threshold is None else tensors | {"log_threshold": self.log_threshold}

    def zeros(self) -> Weights:
        """As many zeros: where gradients are summed."""
        return Weights(**{name: torch.zeros_like(tensor) for name, tensor in self.named().items()})


def initial_weights(settings: ResolvedTrainSettings, d_model: int, mean: torch.Tensor, device: torch.device) -> Weights:
    """Random decoder rows, the encoder their transpose, b_dec the mean (scaled); the same on every device."""
    generator = torch.Generator().manual_seed(settings.seed)
    rows = F.normalize(torch.randn(settings.n_features, d_model, generator=generator), dim=1)
    if settings.architecture == "relu":
        rows *= RELU_DECODER_NORM
    zeros = torch.zeros(settings.n_features)
    tensors = {"W_enc": rows.clone(), "b_enc": zeros, "W_dec": rows, "b_dec": mean.detach().float().cpu().clone()}
    if settings.architecture == "jumprelu":
        tensors["log_threshold"] = zeros.clone()
    return Weights(**{name: tensor.to(device) for name, tensor in tensors.items()})
