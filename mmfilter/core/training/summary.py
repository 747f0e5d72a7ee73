"""A training as a whole: on what, of what shape, where to, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from mmfilter.core.cards.cards import Card
from mmfilter.core.input.shards import InputOptions
from mmfilter.core.pipeline.engine import DeviceSettings
from mmfilter.core.training.settings import TrainSettings
from mmfilter.core.training.statistics import StepStats
from mmfilter.errors import SAEError, ShardError


@dataclass(frozen=True)
class TrainRunSettings:
    """A training: on what, of what shape, and where to."""

    card: Card
    """Model, layer and prompt; its SAE is not used"""
    output: Path
    """Folder to write, or to go on with"""
    train: TrainSettings = field(default_factory=TrainSettings)
    """Architecture and optimisation; its `tokens` are used when `tokens` says so"""
    tokens: int | None = None
    """Training tokens. None: ten passes over the shards, at most 100 million"""
    widths: tuple[int, ...] = ()
    """Numbers of features to train at once; () is that of `train`"""
    ks: tuple[int, ...] = ()
    """Numbers of active features to train at once; () is that of `train`"""
    capacity: int = 131_072
    """Tokens in the shuffle buffer, of each process"""
    image_fraction: float | None = 0.5
    """Share of image tokens in every batch; None: as they come"""
    sink_factor: float | None = 10.0
    """States with a norm above so many times the median norm of their side are left out; None: none"""
    cache: Path | None = None
    """Folder for the states on disk: the model runs once, for this training and later ones"""
    device: DeviceSettings = field(default_factory=DeviceSettings)
    """Where the model and the trainers run"""
    pairs: int = 32
    """Pairs that go through the model together"""
    workers: int = 4
    """Threads that decode and pre-process"""
    caption: str = "auto"
    """Where the caption is (see `DecodeSettings`)"""
    images: str | None = None
    """Folder that the images of LLaVA JSON are in (see `InputOptions`)"""
    allow_pipe: bool = False
    """Run `pipe:` inputs in a shell"""
    checkpoint_every: float = 600.0
    """Seconds between checkpoints"""
    weights: bool = True
    """Fit cross-modal weights and write them beside the SAE"""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "pairs", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SAEError(f"--{name} is {value}; at least 1 is needed")

    @property
    def inputs(self) -> InputOptions:
        """How the shards are read."""
        return InputOptions(self.caption, self.images, self.allow_pipe)

    def variants(self) -> dict[str, TrainSettings]:
        """Folder name -> settings, one for each width and k; "" when there is one."""
        shapes = [(width, k) for width in self.widths or (self.train.n_features,) for k in self.ks or (self.train.k,)]
        if len(shapes) == 1:
            return {"": replace(self.train, n_features=shapes[0][0], k=shapes[0][1])}
        return {
            f"{f'width-{width}-' if width else ''}k-{k}": replace(self.train, n_features=width, k=k)
            for width, k in shapes
        }


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
    settings: TrainSettings
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
        "step": stats.step, "tokens": stats.tokens, "loss": stats.loss, "auxiliary": stats.auxiliary, "fvu": stats.fvu, "l0": stats.l0,
        "dead": stats.dead, "rate": stats.rate, "gradient_norm": stats.gradient_norm,
    }  # fmt: skip
    for side, quality in (("image", stats.image), ("text", stats.text)):
        if quality is not None and quality.tokens:
            row |= {f"{side}_fvu": quality.fvu, f"{side}_l0": quality.l0, f"{side}_tokens": quality.tokens}
    return row
