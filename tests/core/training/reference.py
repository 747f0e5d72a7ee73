"""The losses once more: dense, with autograd, in float64, straight from the definitions."""

from __future__ import annotations

import torch

from mmfilter.core.training.settings import ResolvedTrainSettings
from mmfilter.core.training.weights import Weights


class Step(torch.autograd.Function):
    """[h > θ] with the rectangle of width ε as its derivative by θ, and none by h."""

    @staticmethod
    def forward(ctx, pre, threshold, width):
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        kernel = ((pre - threshold).abs() < ctx.width / 2).to(pre.dtype) / ctx.width
        return None, -(grad * kernel).sum(0), None


class Jump(torch.autograd.Function):
    """h·[h > θ] with the derivative −θ·rectangle by θ."""

    @staticmethod
    def forward(ctx, pre, threshold, width):
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        kernel = ((pre - threshold).abs() < ctx.width / 2).to(pre.dtype) / ctx.width
        return grad * (pre > threshold), -(grad * threshold * kernel).sum(0), None


def keep(pre: torch.Tensor, settings: ResolvedTrainSettings) -> torch.Tensor:
    """Mask of the features that a top-k kind keeps."""
    if settings.architecture == "topk":
        return torch.zeros_like(pre).scatter_(1, pre.topk(settings.k, dim=1).indices, 1) * (pre > 0)
    least = pre.flatten().sort(descending=True).values[settings.k * len(pre) - 1]
    return (pre >= least) * (pre > 0)


def loss(
    x: torch.Tensor, w: Weights, settings: ResolvedTrainSettings, dead: torch.Tensor, sparsity: float
) -> torch.Tensor:
    """The loss of a batch of scaled states; gradients flow into the weights."""
    tokens, d = x.shape
    pre = (x - w.b_dec if settings.subtract_b_dec else x) @ w.W_enc.T + w.b_enc
    if settings.sparse:
        f = pre * keep(pre.detach(), settings)
        outputs = [f[:, :size] @ w.W_dec[:size] + w.b_dec for size in settings.groups]
        total = sum((x - out).square().sum() for out in outputs) / (tokens * d * len(settings.groups))
        if dead.any() and settings.aux_coefficient:
            silent = pre.relu() * dead
            chosen = silent.topk(min(settings.aux_k, int(dead.sum())), dim=1)
            again = torch.zeros_like(pre).scatter(1, chosen.indices, chosen.values) @ w.W_dec
            total = total + settings.aux_coefficient * ((x - outputs[-1]).detach() - again).square().sum() / (
                tokens * d
            )
        return total
    if settings.architecture == "relu":
        f = pre.relu()
        extra = sparsity * settings.l1_coefficient * (f * w.W_dec.norm(dim=1)).sum() / (tokens * d)
    else:
        theta, width = w.log_threshold.exp(), settings.bandwidth * d**0.5
        f = Jump.apply(pre, theta, width)
        l0 = Step.apply(pre, theta, width).sum() / tokens
        penalty = (l0 / settings.target_l0 - 1) ** 2 if settings.l0_penalty == "target" else l0 / d
        extra = sparsity * settings.l0_coefficient * penalty
    return (x - f @ w.W_dec - w.b_dec).square().sum() / (tokens * d) + extra
