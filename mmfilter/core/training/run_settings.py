"""A training as a whole: on what, of what shape, and where to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from mmfilter.core.cards.card_choice import TrainedModel
from mmfilter.core.input.source import InputOptions
from mmfilter.core.pipeline.pass_settings import DeviceSettings
from mmfilter.core.training.settings import TrainSettings
from mmfilter.core.typed import check_fields, setting
from mmfilter.errors import SAEError


@dataclass(frozen=True)
class TrainRunSettings(DeviceSettings, InputOptions, TrainedModel):
    """A training: on what, of what shape, and where to."""

    GROUP: ClassVar[str] = "Training"

    output: Path = setting(flag="-o,--output", required=True)
    """Folder to write, or to continue"""
    train: TrainSettings = setting(default_factory=TrainSettings)
    """Architecture and optimisation; its `tokens` are used when `tokens` says so"""
    widths: tuple[int, ...] = setting((), metavar="N,N")
    """Features, or several numbers with commas to train several SAEs from one pass (default: 8 x the states' width)"""
    ks: tuple[int, ...] = setting((), flag="--k", metavar="N,N")
    """Active features a token, or several numbers with commas (default: 32)"""
    tokens: int | None = setting(None, least=1)
    """Training tokens (default: ten passes over the shards, at most 100 million)"""
    capacity: int = setting(131_072, least=1)
    """Tokens in the shuffle buffer, of each process"""
    image_fraction: float | None = setting(0.5, metavar="SHARE")
    """Share of image tokens in every batch, or none to take them as they come"""
    sink_factor: float | None = setting(10.0, metavar="N")
    """Leave out states whose norm is more than this many times the median of their side (attention sinks); none keeps
    all"""
    cache: Path | None = None
    """Folder for the states on disk: the model runs once, for later trainings too"""
    pairs: int = setting(32, least=1)
    """Pairs that go through the model together"""
    workers: int = setting(4, least=1)
    """Threads that decode and pre-process"""
    checkpoint_every: float = 600.0
    """Seconds between checkpoints"""
    weights: bool = setting(default=True, flag="--weights/--no-weights")
    """Fit cross-modal weights at the end and write them beside the SAE"""
    tensorboard: Path | None = None
    """Folder for TensorBoard (needs the extra tensorboard)"""
    seed: int = 0
    """Seed of everything"""

    def __post_init__(self) -> None:
        check_fields(self, SAEError)

    def variants(self) -> dict[str, TrainSettings]:
        """Folder name -> settings, one for each width and k; "" when there is one."""
        shapes = [(width, k) for width in self.widths or (self.train.n_features,) for k in self.ks or (self.train.k,)]
        if len(shapes) == 1:
            return {"": replace(self.train, n_features=shapes[0][0], k=shapes[0][1])}
        return {
            f"{f'width-{width}-' if width else ''}k-{k}": replace(self.train, n_features=width, k=k)
            for width, k in shapes
        }
