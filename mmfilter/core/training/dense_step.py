"""Loss and gradients of `relu` and `jumprelu`, by hand, a chunk of tokens at a time.

Many of their features are active early in training, so a chunk is dense. With B scaled states x of width d,
h = (x − b_dec)·W_encᵀ + b_enc and f the activations:

    relu      f = relu(h)           L = 1/(B·d) Σ (‖x̂ − x‖² + λ Σ_j f_j ‖W_dec_j‖)
    jumprelu  f = h where h > θ     L = 1/(B·d) Σ ‖x̂ − x‖² + c · penalty(L0),   θ = exp(log θ)

with L0 the mean number of active features a token and penalty (L0/target − 1)² or L0/d. A step has no useful
derivative; for θ, and only for it, a rectangle of width ε stands in (Rajamanoharan et al. 2024,
arXiv 2407.14435, section 4): ∂f/∂θ = −θ/ε and ∂[h > θ]/∂θ = −1/ε where |h − θ| < ε/2, else 0.
"""

from __future__ import annotations

import torch

from mmfilter.core.sae.product import EncoderProduct
from mmfilter.core.training import collective
from mmfilter.core.training.outcome import Firing, Outcome
from mmfilter.core.training.settings import ResolvedTrainSettings
from mmfilter.core.training.weights import Weights


def dense_step(
    x: torch.Tensor,
    side: torch.Tensor,
    weights: Weights,
    settings: ResolvedTrainSettings,
    *,
    sparsity: float,
    batch_tokens: int,
) -> Outcome:
    """The outcome for scaled states x (tokens, d_model), this process' part of a batch of `batch_tokens`.

    `side` (tokens,) is IMAGE or TEXT; `sparsity` is the share of the sparsity coefficient that counts by now.
    """
    d = x.shape[1]
    inputs = x - weights.b_dec if settings.subtract_b_dec else x
    dtype = torch.bfloat16 if settings.dtype == "bfloat16" else x.dtype
    decoder = weights.W_dec.to(dtype)
    kind = (
        _JumpReLU(weights, settings)
        if settings.architecture == "jumprelu"
        else _ReLU(weights, settings, sparsity / (batch_tokens * d))
    )
    gradients, firing, errors = weights.zeros(), Firing.none(settings.n_features, x), []
    for start, pre in EncoderProduct(weights.W_enc, weights.b_enc, dtype).chunks(inputs):
        part = slice(start, start + len(pre))
        pre = pre.to(x.dtype)
        active = kind.activate(pre)
        firing.add_dense(active, side[part])
        error = (active.to(dtype) @ decoder).to(x.dtype) + (weights.b_dec - x[part])
        slope = error * (2 / (batch_tokens * d))
        by_active = (slope.to(dtype) @ decoder.T).to(x.dtype)
        gradients.W_dec += active.to(dtype).T @ slope.to(dtype)
        by_pre = kind.pull(by_active, pre, active)
        gradients.W_enc += by_pre.to(dtype).T @ inputs[part].to(dtype)
        gradients.b_enc += by_pre.sum(0)
        gradients.b_dec += slope.sum(0)
        errors.append(error)
    error = torch.cat(errors)
    loss = error.square().sum() / (batch_tokens * d) + kind.finish(gradients, firing, sparsity, batch_tokens)
    if settings.subtract_b_dec:
        gradients.b_dec -= gradients.b_enc @ weights.W_enc
    return Outcome(gradients, error, firing, loss, loss.new_zeros(()))


class _ReLU:
    """The activation, its derivative and its L1 term with `factor` = (share of λ) / (B·d)."""

    def __init__(self, weights: Weights, settings: ResolvedTrainSettings, factor: float) -> None:
        self._norms: torch.Tensor = torch.linalg.vector_norm(weights.W_dec, dim=1)
        self._directions = weights.W_dec / self._norms.unsqueeze(1)
        self._factor = factor * settings.l1_coefficient
        self._total = torch.zeros_like(weights.b_enc)

    def activate(self, pre: torch.Tensor) -> torch.Tensor:
        return pre.relu()

    def pull(self, by_active: torch.Tensor, pre: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """Derivative by h."""
        self._total += active.sum(0)
        return (by_active + self._factor * self._norms) * (pre > 0)

    def finish(self, gradients: Weights, _firing: Firing, _sparsity: float, _batch_tokens: int) -> torch.Tensor:
        """Add what is known only after all chunks; returns the L1 term."""
        gradients.W_dec.addcmul_(self._directions, self._total.unsqueeze(1), value=self._factor)
        return self._factor * (self._total * self._norms).sum()


class _JumpReLU:
    """The activation, its derivatives and its L0 term."""

    def __init__(self, weights: Weights, settings: ResolvedTrainSettings) -> None:
        self._settings = settings
        self._threshold = weights.named()["log_threshold"].exp()
        self._width = settings.bandwidth * weights.W_dec.shape[1] ** 0.5
        self._by_threshold = torch.zeros_like(self._threshold)
        self._near = torch.zeros_like(self._threshold)

    def activate(self, pre: torch.Tensor) -> torch.Tensor:
        return pre * (pre > self._threshold)

    def pull(self, by_active: torch.Tensor, pre: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """Derivative by h; that by θ is summed on the way."""
        near = (pre - self._threshold).abs() < self._width / 2
        self._near += near.sum(0)
        self._by_threshold -= (by_active * near).sum(0) * self._threshold / self._width
        return by_active * (active > 0)

    def finish(self, gradients: Weights, firing: Firing, sparsity: float, batch_tokens: int) -> torch.Tensor:
        """Add what is known only after all chunks; returns this process' part of the L0 term."""
        settings, d = self._settings, gradients.W_dec.shape[1]
        count = firing.counts.sum().to(self._threshold.dtype)
        mine = count / batch_tokens
        collective.sum_(count)
        l0, coefficient = count / batch_tokens, sparsity * settings.l0_coefficient
        if settings.l0_penalty == "target":
            excess = l0 / settings.target_l0 - 1
            term, by_l0 = (
                coefficient * excess.square() / collective.world()[1],
                2 * coefficient * excess / settings.target_l0,
            )
        else:
            term, by_l0 = coefficient * mine / d, torch.full_like(l0, coefficient / d)
        self._by_threshold -= by_l0 / batch_tokens * self._near / self._width
        gradients.named()["log_threshold"].copy_(self._by_threshold * self._threshold)
        return term
