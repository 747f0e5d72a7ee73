"""Trains one SAE, a batch of states at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from mmfilter import __version__
from mmfilter.core.sae.autoencoder import SAE
from mmfilter.core.sides import IMAGE
from mmfilter.core.training import collective
from mmfilter.core.training.code_products import decode
from mmfilter.core.training.dense_step import dense_step
from mmfilter.core.training.optimiser import Optimiser
from mmfilter.core.training.outcome import Outcome
from mmfilter.core.training.settings import TrainSettings
from mmfilter.core.training.sparse_step import active_codes, sparse_step
from mmfilter.core.training.statistics import FeatureStatistics, StepStats, Sums
from mmfilter.core.training.topk import BatchTopK
from mmfilter.core.training.weights import initial_weights
from mmfilter.errors import SAEError

SAE_LENS_VERSION = "6.54.12"
"""The release of SAELens whose layout is exported"""


class Trainer:
    """Weights, optimiser and counters of an SAE in training.

    States are raw; inside they are multiplied by `scale`, so that rates and coefficients mean the same for
    every model, and `export` divides it out again. Under torch.distributed each process gives its own part of
    the batch to `step`, and all keep the same weights.
    """

    def __init__(
        self,
        settings: TrainSettings,
        d_model: int,
        mean: torch.Tensor,
        device: torch.device | str = "cpu",
        *,
        scale: float = 1.0,
    ) -> None:
        """`mean` (d_model,) is where b_dec starts, in raw units; `Trainer.fitted` measures it and the scale."""
        if mean.shape != (d_model,) or not torch.isfinite(mean).all():
            raise SAEError(f"training needs a mean of {d_model} finite numbers; it was given {tuple(mean.shape)}")
        self.settings = settings.resolved(d_model)
        self.d_model, self.scale, self.device = d_model, float(scale), torch.device(device)
        self.weights = initial_weights(self.settings, d_model, mean * scale, self.device)
        collective.broadcast_(*self.weights.named().values())
        self._optimiser = Optimiser(self.weights, self.settings)
        self._batch_topk = BatchTopK()
        self.step_count = 0
        self.tokens = 0
        self.since_fired = torch.zeros(self.settings.n_features, dtype=torch.int64, device=self.device)
        """(n_features,) tokens since each feature fired last"""
        self.statistics = FeatureStatistics.empty(self.settings.n_features, self.device)
        self._threshold_sum = self._threshold_weight = 0.0

    @staticmethod
    def fitted(settings: TrainSettings, states: torch.Tensor, device: torch.device | str = "cpu") -> Trainer:
        """A trainer with the mean of a sample of states (tokens, d_model), scaled so that a centred one has mean square
        d_model."""
        mean = states.double().mean(0)
        square = (states.double() - mean).square().sum(1).mean()
        if not square > 0:
            raise SAEError(
                f"training needs a sample of states that differ; it was given {tuple(states.shape)} without variance"
            )
        return Trainer(settings, states.shape[1], mean.float(), device, scale=float((states.shape[1] / square).sqrt()))

    @property
    def done(self) -> bool:
        """Whether all tokens of the settings have been trained on."""
        return self.tokens >= self.settings.tokens

    @property
    def dead(self) -> torch.Tensor:
        """(n_features,) which features have not fired for `dead_tokens`."""
        return self.since_fired >= self.settings.dead_tokens

    @property
    def threshold(self) -> float:
        """`batchtopk`: the running mean of the smallest activation kept, scaled units; 0 before the first step."""
        return self._threshold_sum / self._threshold_weight if self._threshold_weight else 0.0

    @torch.no_grad()
    def step(self, states: torch.Tensor, side: torch.Tensor | None = None) -> StepStats:
        """Train on raw states (tokens, d_model) of any float type; `side` (tokens,) is IMAGE or TEXT, for the figures
        only.

        Raises `SAEError`, with the weights as they were, when the loss is not finite.
        """
        if states.ndim != 2 or states.shape[1] != self.d_model or not len(states):
            raise SAEError(
                f"training takes states of shape (tokens, {self.d_model}); it was given {tuple(states.shape)}"
            )
        x = states.to(self.device, torch.float32) * self.scale
        sides = torch.full((len(x),), IMAGE, device=self.device) if side is None else side.to(self.device, torch.int64)
        batch_tokens = collective.total(len(x), self.device)
        if self.settings.architecture != "relu" and not self.step_count:
            self.fit_start(x)
        outcome = self._outcome(x, sides, batch_tokens)
        sums = Sums(x - self.weights.b_dec, sides, outcome)
        collective.sum_(*outcome.gradients.named().values(), outcome.firing.counts)
        collective.maximum_(outcome.firing.maximum)
        (quality, image, text), (loss, auxiliary) = sums.shared(outcome.loss, outcome.auxiliary)
        if not math.isfinite(loss):
            raise SAEError(
                f"training has a loss of {loss} at step {self.step_count + 1}: the batch holds states that are not "
                "finite, or lr is too high"
            )
        rate = self.settings.rate(self.tokens)
        norm = self._optimiser.update(outcome.gradients, rate)
        self._count(outcome, [image.tokens, text.tokens])
        by_side = side is not None
        return StepStats(
            step=self.step_count,
            tokens=self.tokens,
            loss=loss,
            auxiliary=auxiliary,
            all=quality,
            image=image if by_side else None,
            text=text if by_side else None,
            dead=float(self.dead.float().mean()),
            rate=rate,
            gradient_norm=float(norm),
        )

    def _outcome(self, x: torch.Tensor, side: torch.Tensor, batch_tokens: int) -> Outcome:
        if self.settings.sparse:
            return sparse_step(
                x,
                side,
                self.weights,
                self.settings,
                dead=self.dead,
                batch_tokens=batch_tokens,
                batch_topk=self._batch_topk,
            )
        return dense_step(
            x,
            side,
            self.weights,
            self.settings,
            sparsity=self.settings.sparsity(self.tokens),
            batch_tokens=batch_tokens,
        )

    def _count(self, outcome: Outcome, tokens: list[int]) -> None:
        self.step_count += 1
        self.tokens += sum(tokens)
        self.since_fired += sum(tokens)
        self.since_fired[outcome.firing.counts.sum(0) > 0] = 0
        self.statistics.add(outcome.firing, tokens)
        if outcome.threshold is not None:
            decay = self.settings.threshold_decay
            self._threshold_sum = decay * self._threshold_sum + (1 - decay) * float(outcome.threshold)
            self._threshold_weight = decay * self._threshold_weight + (1 - decay)

    def fit_start(self, x: torch.Tensor) -> None:
        """Scale the encoder so that what it chooses in the first batch reconstructs that best, by least squares.

        Without biases a scale changes no choice, so x̂ − b_dec is proportional to it. As W_decᵀ alone, a wide encoder
        starts far too strong or too weak, which depends on the states. `jumprelu` begins with the one threshold
        at which that batch has k active features a token.
        """
        inputs = x - self.weights.b_dec if self.settings.subtract_b_dec else x
        kind = self.settings if self.settings.sparse else replace(self.settings, architecture="batchtopk")
        codes, threshold = active_codes(inputs, self.weights, kind, BatchTopK())
        parts = decode(codes, self.weights.W_dec)
        products = torch.stack([(parts * (x - self.weights.b_dec)).sum(), parts.square().sum()])
        collective.sum_(products)
        if not products.isfinite().all():
            return  # the step will say so
        factor = float(products[0] / products[1]) if min(products) > 0 else 1.0
        self.weights.W_enc *= factor
        if self.weights.log_threshold is not None and threshold is not None:
            self.weights.log_threshold.fill_(math.log(max(factor * float(threshold), 1e-3)))

    def export(self) -> SAE:
        """The SAE on raw states, decoder rows of norm 1, so that activations are in units of the states.

        `batchtopk` becomes a jumprelu with its frozen threshold. Without a step taken it has none, and
        `SAEError` is raised.
        """
        w, settings = (
            {name: tensor.detach().float().cpu().clone() for name, tensor in self.weights.named().items()},
            self.settings,
        )
        if settings.architecture == "relu":
            norms = torch.linalg.vector_norm(w["W_dec"], dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            w |= {"W_enc": w["W_enc"] * norms, "b_enc": w["b_enc"] * norms[:, 0], "W_dec": w["W_dec"] / norms}
        options: dict[str, Any] = {"activation": settings.architecture}
        if settings.architecture == "topk":
            options["k"] = settings.k
        if settings.architecture == "batchtopk":
            if not self.step_count:
                raise SAEError("training has no threshold to export before its first step; train it first")
            options = {
                "activation": "jumprelu",
                "threshold": torch.full((settings.n_features,), self.threshold / self.scale),
            }
        if settings.architecture == "jumprelu":
            options["threshold"] = w["log_threshold"].exp() / self.scale
        return SAE(
            w["W_enc"].T.contiguous(),
            w["b_enc"] / self.scale,
            w["W_dec"],
            w["b_dec"] / self.scale,
            subtract_b_dec=settings.subtract_b_dec,
            metadata=self._metadata(),
            **options,
        )

    def _metadata(self) -> dict[str, Any]:
        return {
            "sae_lens_version": SAE_LENS_VERSION,
            "architecture_origin": self.settings.architecture,
            "training_tokens": self.tokens,
            "training_settings": self.settings.to_mapping(),
            "training_scale": self.scale,
            "versions": {"mmfilter": __version__, "torch": torch.__version__},
        }

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors, plain values): all that the next step depends on besides the settings."""
        tensors = {f"weights.{name}": tensor for name, tensor in self.weights.named().items()}
        tensors |= {f"adam.{name}": tensor for name, tensor in self._optimiser.state().items()}
        tensors["since_fired"] = self.since_fired
        tensors |= {f"statistics.{name}": tensor for name, tensor in vars(self.statistics).items()}
        return tensors, {
            "d_model": self.d_model,
            "scale": self.scale,
            "step_count": self.step_count,
            "tokens": self.tokens,
            "threshold_sum": self._threshold_sum,
            "threshold_weight": self._threshold_weight,
        }

    @torch.no_grad()
    def restore(self, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        """Take over what `state` returned, in a trainer of the same settings and width."""
        for name, tensor in self.weights.named().items():
            tensor.copy_(tensors[f"weights.{name}"])
        self._optimiser.restore(
            {name.removeprefix("adam."): tensor for name, tensor in tensors.items() if name.startswith("adam.")}
        )
        self.since_fired.copy_(tensors["since_fired"])
        for name, tensor in vars(self.statistics).items():
            tensor.copy_(tensors[f"statistics.{name}"])
        self.scale, self.step_count, self.tokens = values["scale"], values["step_count"], values["tokens"]
        self._threshold_sum, self._threshold_weight = values["threshold_sum"], values["threshold_weight"]
