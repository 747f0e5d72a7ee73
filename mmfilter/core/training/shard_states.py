"""Residual states for training: shards through the model, over and over, from where a checkpoint left off."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass

import torch

from mmfilter.core.input.decode import DecodeSettings
from mmfilter.core.input.shards import InputOptions, RawSample, read_samples, stamps
from mmfilter.core.model.backbone import Activations, Backbone
from mmfilter.core.pipeline.feed import Batch, Feed
from mmfilter.core.pipeline.scorer import explained_memory
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
        shards: list[str],
        backbone: Backbone,
        inputs: InputOptions,
        *,
        batch_size: int,
        workers: int,
        seed: int,
        position: Position | None = None,
    ) -> None:
        if not shards:
            raise SAEError("training has fewer shards than processes: split the shards, or start fewer processes")
        self._shards, self._backbone, self._inputs = shards, backbone, inputs
        self._batch_size, self._workers, self._seed = batch_size, workers, seed
        self.position = position or Position()
        self.reasons: dict[str, int] = {}
        """Kind of problem -> samples left out in the first epoch"""
        self.failures: list[ShardError] = []

    def __iter__(self) -> Iterator[States]:
        with closing(
            Feed(
                self._backbone, DecodeSettings(self._inputs.caption), batch_size=self._batch_size, workers=self._workers
            )
        ) as feed:
            while True:
                used = False
                for states in self._epoch(feed):
                    used = True
                    yield states
                if not used and self.position.shard == 0:
                    raise SAEError(f"the shards hold no usable pair to train on ({self._why()})")
                self.position = Position(self.position.epoch + 1)

    def once(self) -> Iterator[States]:
        """One epoch, in order."""
        with closing(
            Feed(
                self._backbone, DecodeSettings(self._inputs.caption), batch_size=self._batch_size, workers=self._workers
            )
        ) as feed:
            yield from self._epoch(feed)

    def _why(self) -> str:
        return (
            ", ".join(f"{count:,}: {reason}" for reason, count in self.reasons.items())
            or "; ".join(map(str, self.failures))
            or "they are empty"
        )

    def _epoch(self, feed: Feed) -> Iterator[States]:
        order = list(range(len(self._shards)))
        random.Random(f"{self._seed} {self.position.epoch}").shuffle(order)
        while self.position.shard < len(order):
            shard = self._shards[order[self.position.shard]]
            try:
                yield from self._windows(feed, shard)
            except ShardError as error:  # the rest of the shards is worth training on
                if self.position.epoch == 0:
                    self.failures.append(error)
            self.position.shard, self.position.samples, self.position.batches = self.position.shard + 1, 0, 0

    def _windows(self, feed: Feed, shard: str) -> Iterator[States]:
        samples = itertools.islice(read_samples(shard, options=self._inputs), self.position.samples, None)
        for window in feed.windows(samples, shard):
            skip = self.position.batches
            for number, batch in enumerate(window.batches):
                if number < skip:
                    continue
                states = self._run(batch, shard)
                self.position.batches = number + 1
                yield states
            if self.position.epoch == 0:
                for pair in window.pairs:
                    if pair.reason is not None:
                        kind = pair.reason.split(":")[0]
                        self.reasons[kind] = self.reasons.get(kind, 0) + 1
            self.position.samples, self.position.batches = self.position.samples + len(window.pairs), 0

    def _run(self, batch: Batch, shard: str) -> States:
        keys = [pair.columns["key"] for pair in batch.pairs]
        with explained_memory(len(keys)), torch.inference_mode():
            found = self._backbone.activations(batch.inputs)
        check_finite(found, shard, keys)
        return States(found.states, found.side, f"shard {shard!r}, samples {keys[0]!r} to {keys[-1]!r}", len(keys))


def check_finite(found: Activations, shard: str, keys: list[str]) -> None:
    """Raise `SAEError` that names the sample whose states are not finite."""
    bad = (~torch.isfinite(found.states).all(1)).nonzero()[:, 0]
    if len(bad):
        key = keys[int(found.sample[bad[0]])]
        raise SAEError(
            f"shard {shard!r}, sample {key!r} gives states that are not finite: use --dtype float32, or leave the sample out; checkpoints are kept"
        )


def sizes_of(shards: Sequence[str]) -> list[int | None]:
    """Size of each shard, None where it is unknown; raises `ShardError` for one that is gone."""
    sizes: list[int | None] = []
    for found in stamps(shards):
        if isinstance(found, ShardError):
            raise found
        sizes.append(found.size)
    return sizes


def estimated_pairs(shards: Sequence[str], inputs: InputOptions) -> float | None:
    """How many pairs shards hold, by their sizes and those of the first pairs; None where a size is unknown.

    Of shards with one extension a pair takes what it takes in the first of them that has any. Parquet whose
    images shrink by its compression, as JPEGs hardly do, is taken to hold fewer.
    """
    sizes = sizes_of(shards)
    if None in sizes:
        return None
    kinds: dict[str, float] = {}
    for shard in shards:
        kind = os.path.splitext(shard)[1]
        kinds[kind] = kinds.get(kind) or _bytes_per_pair(shard, inputs)
    return sum(size / (kinds[os.path.splitext(shard)[1]] or 1) for shard, size in zip(shards, sizes, strict=True))


def _bytes_per_pair(shard: str, inputs: InputOptions) -> float:
    sizes = [_share(shard, raw) for raw in itertools.islice(read_samples(shard, options=inputs), 100)]
    return sum(sizes) / len(sizes) if sizes else 0.0


def _share(shard: str, raw: RawSample) -> int:
    """Bytes of a shard's size that a sample takes; the images of LLaVA JSON are elsewhere."""
    if raw.nbytes is not None:
        return raw.nbytes
    alone = shard.lower().endswith((".json", ".jsonl"))
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
