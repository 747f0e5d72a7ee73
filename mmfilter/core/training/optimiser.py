"""From gradients to new weights: decoder rows of norm 1, clipping, Adam with a schedule.

Adam is the plain dense one. At 4,096 tokens of 32 features and up to some tens of thousands of features
nearly every row has a gradient in every step, so a lazy Adam that skips untouched rows would save little and
would no longer be Adam. And dense costs little: PyTorch's fused kernel reads and writes each weight once,
which is about 4 % of a step on a CPU, whatever the number of features, since the encoder's product grows
with it too.
"""

from __future__ import annotations

import torch

from mmfilter.core.training.settings import ResolvedTrainSettings
from mmfilter.core.training.weights import Weights

BETAS = (0.9, 0.999)
EPSILON = 6.25e-10
"""Gao et al. 2024 (arXiv 2406.04093), A; gradients of rare features are tiny"""
ROWS = 512
"""Rows at a time, so that they stay in the cache between passes over them"""
MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimiser:
    """Changes weights in place."""

    def __init__(self, weights: Weights, settings: ResolvedTrainSettings) -> None:
        self._weights, self._settings = weights, settings
        self._unit_rows = settings.architecture != "relu"
        self._adam = torch.optim.Adam(
            list(weights.named().values()), lr=settings.lr, betas=BETAS, eps=EPSILON, fused=True
        )

    def update(self, gradients: Weights, rate: float) -> torch.Tensor:
        """One step at learning rate `rate`; returns the norm of the gradient before clipping.

        Where decoder rows have norm 1, the part of their gradient along them is removed first (it would only
        turn into another norm, through Adam's moments into noise), and the rows are scaled back afterwards.
        """
        if self._unit_rows:
            _remove_parallel(gradients.W_dec, self._weights.W_dec)
        by_name = gradients.named()
        norm: torch.Tensor = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(gradient) for gradient in by_name.values()])
        )
        factor = (self._settings.clip / norm.clamp(min=self._settings.clip)).to(norm.dtype)
        for name, weight in self._weights.named().items():
            weight.grad = by_name[name]
        if factor < 1:
            torch._foreach_mul_(list(by_name.values()), factor)
        self._adam.param_groups[0]["lr"] = rate
        self._adam.step()
        self._adam.zero_grad()
        if self._unit_rows:
            _scale_to_unit(self._weights.W_dec)
        return norm

    def state(self) -> dict[str, torch.Tensor]:
        """Adam's moments and step counts by the weights' names; empty before the first step."""
        states = {name: self._adam.state.get(weight, {}) for name, weight in self._weights.named().items()}
        return {f"{part}.{name}": tensor for name, state in states.items() for part, tensor in state.items()}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `state` returned."""
        for name, weight in self._weights.named().items():
            parts = {part: state[f"{part}.{name}"] for part in (*MOMENTS, "step") if f"{part}.{name}" in state}
            if parts:
                self._adam.state[weight] = {part: tensor.to(weight.device, copy=True) for part, tensor in parts.items()}


def _remove_parallel(gradient: torch.Tensor, rows: torch.Tensor) -> None:
    for g, w in zip(torch.split(gradient, ROWS), torch.split(rows, ROWS), strict=True):
        g.addcmul_((g * w).sum(1, keepdim=True), w, value=-1)


def _scale_to_unit(rows: torch.Tensor) -> None:
    for w in torch.split(rows, ROWS):
        w.div_(torch.linalg.vector_norm(w, dim=1, keepdim=True))
