"""A training as a whole: on what, of what shape, where to, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mmfilter.core.training.settings import ResolvedTrainSettings
from mmfilter.core.training.statistics import StepStats
from mmfilter.errors import ShardError


class TrainProgress(Protocol):
    """What a training tells while it runs."""

    def start(self, phase: str, total_bytes: int | None) -> None: ...

    def advance(self, samples: int, nbytes: int) -> None: ...

    def note(self, text: str) -> None: ...

    def step(self, name: str, stats: StepStats, total_tokens: int, tokens_per_second: float) -> None: ...


@dataclass(frozen=True)
class Trained:
    """What came of one SAE."""

    folder: Path
    settings: ResolvedTrainSettings
    last: StepStats | None
    """Of the last step that this command took; None when the training was finished before"""


@dataclass(frozen=True)
class TrainSummary:
    """What came of the training."""

    saes: list[Trained]
    seconds: float
    """Of the steps that this command took, states included"""
    tokens: int
    """Trained on by this command"""
    left_out: dict[str, int]
    """Why samples of the first pass were left out -> how many"""
    sinks: tuple[int, int]
    """Image and text tokens left out as attention sinks"""
    failures: list[ShardError]


def flat(stats: StepStats) -> dict[str, float | int]:
    """A step's figures as one level of names, for the log."""
    row: dict[str, float | int] = {
        "step": stats.step,
        "tokens": stats.tokens,
        "loss": stats.loss,
        "auxiliary": stats.auxiliary,
        "fvu": stats.fvu,
        "l0": stats.l0,
        "dead": stats.dead,
        "rate": stats.rate,
        "gradient_norm": stats.gradient_norm,
    }
    for side, quality in (("image", stats.image), ("text", stats.text)):
        if quality is not None and quality.tokens:
            row |= {f"{side}_fvu": quality.fvu, f"{side}_l0": quality.l0, f"{side}_tokens": quality.tokens}
    return row
