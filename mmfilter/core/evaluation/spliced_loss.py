"""How much of a language model's loss on captions a reconstruction of its states keeps.

    CE recovered = (CE_zero − CE_spliced) / (CE_zero − CE_clean)

1 when the spliced states serve the model as well as its own, 0 when they serve it no better than zeros
(Bricken et al. 2023, "Towards Monosemanticity"; "loss recovered" in dictionary_learning and SAELens).
Each CE is the mean over all predicted caption tokens of all pairs, in nats, and the share is taken of
these means. Which states are replaced, and which tokens count, is in `core/evaluation/splice`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mmfilter.core.evaluation.splice import Replacement, caption_loss, predicted_tokens, sees_ahead, zeros
from mmfilter.core.model.backbone import JointStream

LEAST_RANGE = 0.01
"""Nats a token that zeroing has to cost for a share of them to mean something."""


@dataclass(frozen=True)
class SplicedLoss:
    """Mean cross entropies of caption tokens, in nats."""

    clean: float
    """With the model's own states"""
    zero: float
    """With zeros in place of the states of image and caption tokens"""
    spliced: dict[str, float]
    """With the reconstructions of each SAE, by its name"""
    n_tokens: int
    """Caption tokens predicted"""
    n_left_out: int
    """Pairs of which one of the losses is not finite, or of which no token is predicted"""
    vocabulary: int
    """Tokens that the model chooses among"""
    context_free: float
    """Entropy of the predicted tokens' own frequencies: the least that guessing them without any context can cost"""

    @property
    def uniform(self) -> float:
        """The loss of guessing evenly."""
        return math.log(self.vocabulary)

    @property
    def meaningless(self) -> str:
        """Why no share of the loss can be said to be recovered; empty where one can."""
        if not self.n_tokens:
            return "no caption token has a finite loss"
        if self.clean >= self.uniform:
            return (
                f"the model's own loss on the captions, {self.clean:.2f}, is no better than guessing evenly among "
                f"{self.vocabulary:,} tokens "
                f"({self.uniform:.2f}): it is not a language model of them"
            )
        if self.zero - self.clean < LEAST_RANGE:
            return (
                f"zeroing the states takes the loss from {self.clean:.3f} to {self.zero:.3f}: there is nothing to "
                "recover"
            )
        return ""

    @property
    def caution(self) -> str:
        """Why CE recovered should be read with care; empty where there is no reason."""
        if self.meaningless or self.clean < self.context_free:
            return ""
        return (
            f"the model's own loss, {self.clean:.2f}, is above the {self.context_free:.2f} of guessing by the "
            "frequencies of these tokens alone: "
            "it is a poor language model of these captions"
        )

    @property
    def recovered(self) -> dict[str, float]:
        """CE recovered by each SAE; NaN where it would be meaningless."""
        if self.meaningless:
            return dict.fromkeys(self.spliced, math.nan)
        return {name: (self.zero - loss) / (self.zero - self.clean) for name, loss in self.spliced.items()}


class LossMeter:
    """Adds up losses as batches come."""

    def __init__(self, stream: JointStream, replacements: Mapping[str, Replacement]) -> None:
        self._stream = stream
        self._ways: list[Replacement | None] = [None, zeros, *replacements.values()]
        self._names = list(replacements)
        self._totals = torch.zeros(len(self._ways), dtype=torch.float64)
        self._n_left_out = 0
        self._vocabulary = stream.model.get_output_embeddings().weight.shape[0]
        self._counts = torch.zeros(self._vocabulary, dtype=torch.int64)
        self.sees_ahead: bool | None = None
        """Whether the model sees the tokens that it should predict, so that its losses mean nothing; None until a batch
        can tell"""

    def add(self, tensors: dict[str, torch.Tensor], side: torch.Tensor) -> None:
        """A batch of one of the model's streams: `tensors` and `side` (batch, length) as in `ModelInputs`."""
        if self.sees_ahead is None:
            self.sees_ahead = sees_ahead(self._stream, tensors, side)
        if self.sees_ahead:
            return
        losses = [caption_loss(self._stream, tensors, side, way) for way in self._ways]
        totals, n_tokens = torch.stack([loss.total for loss in losses]), losses[0].n_tokens
        kept = totals.isfinite().all(0) & (n_tokens > 0)
        self._totals += totals[:, kept].sum(1)
        predicted = tensors["input_ids"][kept, 1:][predicted_tokens(side[kept])]
        self._counts += torch.bincount(predicted.cpu(), minlength=self._vocabulary)
        self._n_left_out += int((~kept).sum())

    @property
    def loss(self) -> SplicedLoss:
        """What all batches so far come to."""
        n_tokens = int(self._counts.sum())
        clean, zero, *spliced = (self._totals / (n_tokens or math.nan)).tolist()
        entropy = float(torch.special.entr(self._counts.double() / (n_tokens or math.nan)).sum())
        named = dict(zip(self._names, spliced, strict=True))
        return SplicedLoss(clean, zero, named, n_tokens, self._n_left_out, self._vocabulary, entropy)
