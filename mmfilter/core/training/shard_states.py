"""Residual states for training: shards through the model, over and over, from where a checkpoint left off."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch

from mmfilter.core.input.decode import DecodeSettings
from mmfilter.core.input.sample import RawSample
from mmfilter.core.input.shards import stamps
from mmfilter.core.input.source import Kind, Source
from mmfilter.core.model.backbone import Activations, Backbone
from mmfilter.core.pipeline.feed import Batch
from mmfilter.core.pipeline.model_pass import ModelPass
from mmfilter.errors import SAEError, ShardError


@dataclass
class Position:
    """Up to where the input has been used."""

    epoch: int = 0
    shard: int = 0
    """Place in the epoch's order of shards"""
    samples: int = 0
    """Samples of it in finished windows"""
    batches: int = 0
    """Batches of the window at hand"""

    def mapping(self) -> dict[str, int]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class States:
    """States of one batch of pairs."""

    states: torch.Tensor
    """(tokens, d_model)"""
    side: torch.Tensor
    """(tokens,) IMAGE or TEXT"""
    origin: str
    """Shard and samples, for errors"""
    n_pairs: int


class ShardStates:
    """Batches of states of the shards, without end: every epoch in another order of shards.

    `position` is what has been handed out; a new source that is given it goes on with the next batch.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        backbone: Backbone,
        decoding: DecodeSettings,
        *,
        batch_size: int,
        workers: int,
        seed: int,
        position: Position | None = None,
    ) -> None:
        if not sources:
            raise SAEError("training has fewer shards than processes: split the shards, or start fewer processes")
        self._sources, self._backbone, self._decoding = sources, backbone, decoding
        self._batch_size, self._workers, self._seed = batch_size, workers, seed
        self.position = position or Position()
        self.reasons: Counter[str] = Counter()
        """Kind of problem -> samples left out in the first epoch"""
        self.failures: list[ShardError] = []

    def _pass(self) -> ModelPass:
        return ModelPass(self._backbone, self._decoding, batch_size=self._batch_size, workers=self._workers)

    def __iter__(self) -> Iterator[States]:
        with self._pass() as model_pass:
            while True:
                used = False
                for states in self._epoch(model_pass):
                    used = True
                    yield states
                if not used and self.position.shard == 0:
                    raise SAEError(f"the shards hold no usable pair to train on ({self._why()})")
                self.position = Position(self.position.epoch + 1)

    def once(self) -> Iterator[States]:
        """One epoch, in order."""
        with self._pass() as model_pass:
            yield from self._epoch(model_pass)

    def _why(self) -> str:
        return (
            ", ".join(f"{count:,}: {reason}" for reason, count in self.reasons.items())
            or "; ".join(map(str, self.failures))
            or "they are empty"
        )

    def _epoch(self, model_pass: ModelPass) -> Iterator[States]:
        order = list(range(len(self._sources)))
        random.Random(f"{self._seed} {self.position.epoch}").shuffle(order)
        while self.position.shard < len(order):
            source = self._sources[order[self.position.shard]]
            try:
                yield from self._windows(model_pass, source)
            except ShardError as error:  # the rest of the shards is worth training on
                if self.position.epoch == 0:
                    self.failures.append(error)
            self.position.shard, self.position.samples, self.position.batches = self.position.shard + 1, 0, 0

    def _windows(self, model_pass: ModelPass, source: Source) -> Iterator[States]:
        samples = itertools.islice(source.samples(), self.position.samples, None)
        take = partial(_states, source.path)
        for window in model_pass.windows(samples, source.path):
            skip = self.position.batches
            for number, batch in enumerate(window.batches):
                if number < skip:
                    continue
                states = model_pass.through(batch, take)
                self.position.batches = number + 1
                yield states
            if self.position.epoch == 0:
                self.reasons.update(window.reasons)
            self.position.samples, self.position.batches = self.position.samples + len(window.pairs), 0


def _states(shard: str, batch: Batch, activations: Activations) -> States:
    keys = [pair.columns["key"] for pair in batch.pairs]
    check_finite(activations, shard, keys)
    origin = f"shard {shard!r}, samples {keys[0]!r} to {keys[-1]!r}"
    return States(activations.states, activations.side, origin, len(keys))


def check_finite(activations: Activations, shard: str, keys: list[str]) -> None:
    """Raise `SAEError` that names the sample whose states are not finite."""
    bad = (~torch.isfinite(activations.states).all(1)).nonzero()[:, 0]
    if len(bad):
        key = keys[int(activations.sample[bad[0]])]
        raise SAEError(
            f"shard {shard!r}, sample {key!r} gives states that are not finite: use --dtype float32, or leave the "
            "sample out; checkpoints are kept"
        )


def sizes_of(sources: Sequence[Source]) -> list[int | None]:
    """Size of each shard, None where it is unknown; raises `ShardError` for one that is gone."""
    sizes: list[int | None] = []
    for stamp in stamps(sources):
        if isinstance(stamp, ShardError):
            raise stamp
        sizes.append(stamp.size)
    return sizes


def estimated_pairs(sources: Sequence[Source]) -> float | None:
    """How many pairs shards hold, by their sizes and those of the first pairs; None where a size is unknown.

    Of shards of one kind a pair takes what it takes in the first of them that has any. Parquet whose
    images shrink by its compression, as JPEGs hardly do, is taken to hold fewer.
    """
    per_pair: dict[Kind, float] = {}
    total = 0.0
    for source, size in zip(sources, sizes_of(sources), strict=True):
        if size is None:
            return None
        per_pair[source.kind] = per_pair.get(source.kind) or _bytes_per_pair(source)
        total += size / (per_pair[source.kind] or 1)
    return total


def _bytes_per_pair(source: Source) -> float:
    sizes = [_share(source, raw) for raw in itertools.islice(source.samples(), 100)]
    return sum(sizes) / len(sizes) if sizes else 0.0


def _share(source: Source, raw: RawSample) -> int:
    """Bytes of a shard's size that a sample takes; the images of LLaVA JSON are elsewhere."""
    if raw.nbytes is not None:
        return raw.nbytes
    alone = source.kind == "llava-json"
    return sum(len(content) for name, content in raw.members.items() if name == "json" or not alone)


def pilot(states: Iterator[States], tokens: int, advance: Callable[[int, int], None]) -> tuple[torch.Tensor, float]:
    """States (n, d_model) of the first pairs, some `tokens` of them, and the mean number of tokens a pair."""
    parts: list[torch.Tensor] = []
    n_tokens = n_pairs = 0
    for part in states:
        parts.append(part.states.float().cpu())
        n_tokens, n_pairs = n_tokens + len(part.states), n_pairs + part.n_pairs
        advance(part.n_pairs, 0)
        if n_tokens >= tokens:
            break
    if not parts:
        raise SAEError("the shards hold no usable pair to train on")
    return torch.cat(parts), n_tokens / max(1, n_pairs)
