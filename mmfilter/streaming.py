"""`stream`: a selection as a webdataset pipeline, read by byte range in every worker, without a shell.

(The module is not called `stream`: a submodule of that name would take the place of the function in the package.)
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import assert_spawning
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from webdataset.utils import pytorch_worker_info

from mmfilter.core.input.ranges import OpenShards, read_ranges
from mmfilter.core.input.source import Source
from mmfilter.core.input.sources.webdataset_tar import sample_in
from mmfilter.core.run.members import Members
from mmfilter.core.selection.select_settings import ChoiceSettings, SelectSettings
from mmfilter.core.typed import combined
from mmfilter.errors import ShardError
from mmfilter.menu import Text, Warned, keywords
from mmfilter.ops.select import chosen

AT_ONCE = 64
"""Samples that are read together"""
CHUNK = 256
"""Consecutive samples that stay together when the order is shuffled, and are shuffled among themselves"""
MOST_WORKERS = 1024


@dataclass(frozen=True)
class StreamSettings(ChoiceSettings):
    """What to keep, and in what order."""

    shuffle: int | None = None
    """Seed of an order that changes from epoch to epoch (default: the order of the source)"""


@keywords(StreamSettings)
def stream(run: Text, settings: StreamSettings) -> SelectionStream:
    """The selected samples of a run as a webdataset pipeline: `.decode("pil").to_tuple("jpg;png", "txt").batched(16)`.

    The keywords are what `select` takes to choose (`top`, `min`, `by`, `where`, `dedup`, `per`, `diverse`, `match`,
    `repeat`), and `shuffle`, the seed of an order that changes from epoch to epoch. Nodes (RANK and WORLD_SIZE, or
    torch.distributed) and the workers of a DataLoader share the samples: together they see every sample once an
    epoch. Raises `SelectionError` and `RunError` as `select` does, before anything is read.

    >>> import mmfilter
    >>> [sorted(sample)[-1] for sample in mmfilter.stream("runs/icons", top="20%")][:2]
    ['txt', 'txt']
    >>> batches = mmfilter.stream("runs/icons", top="20%").decode("pil").to_tuple("jpg", "txt").batched(3)
    >>> [len(captions) for images, captions in batches]
    [3, 3, 2]
    """
    decided = chosen(Path(run), combined(SelectSettings, settings, shuffle=None, format="tar"), Warned())
    return SelectionStream(SelectedSamples(Part.of(decided.members()), settings.shuffle))


class SelectionStream(wds.DataPipeline, wds.FluidInterface):  # type: ignore[misc]
    """A webdataset pipeline that begins with the samples of a selection."""

    def set_epoch(self, epoch: int) -> None:
        """Begin the next epoch with this number: it decides the shuffled order. Without it epochs count from 0."""
        self.pipeline[0].set_epoch(epoch)

    @property
    def n_samples(self) -> int:
        """Samples of an epoch, over all nodes and workers."""
        return len(self.pipeline[0].part)


@dataclass(frozen=True)
class Part:
    """Where the samples are; what a worker is sent."""

    sources: Sequence[Source]
    shard: np.ndarray
    """(samples,) index into `sources`"""
    offset: np.ndarray
    nbytes: np.ndarray
    copy: np.ndarray
    """(samples,) 0 for a sample under its own key, n for its n-th further copy"""

    @classmethod
    def of(cls, members: Members) -> Part:
        """The samples of a selection."""
        used, shard = np.unique(members.shard, return_inverse=True)
        copy = np.zeros(len(members), np.int64) if members.copy is None else members.copy
        sources = [members.shards[number].source for number in used.tolist()]
        return cls(sources, shard.reshape(-1), members.offset, members.nbytes, copy)

    def __len__(self) -> int:
        return len(self.shard)


class SelectedSamples(wds.PipelineStage):  # type: ignore[misc]
    """The first stage of the pipeline: samples as webdataset has them, `__key__`, `__url__` and members as bytes."""

    def __init__(self, part: Part, shuffle: int | None) -> None:
        self.part, self._shuffle = part, shuffle
        self._epochs = Epochs()

    def set_epoch(self, epoch: int) -> None:
        """What the next epoch counts as."""
        self._epochs.set(epoch)

    def run(self, *_: Any) -> Iterator[dict[str, Any]]:
        """One epoch of this node's and worker's share."""
        rank, world_size, worker, n_workers = pytorch_worker_info()
        epoch = self._epochs.next(worker)
        order = self._order(epoch)
        slot, slots = rank * n_workers + worker, world_size * n_workers
        mine = order[slot * len(order) // slots : (slot + 1) * len(order) // slots]
        with OpenShards() as shards:
            for first in range(0, len(mine), AT_ONCE):
                yield from self._read(shards, mine[first : first + AT_ONCE])

    def _order(self, epoch: int) -> np.ndarray:
        order = np.arange(len(self.part))
        if self._shuffle is None:
            return order
        randomness = random.Random(f"{self._shuffle} {epoch}")
        chunks = [order[first : first + CHUNK].tolist() for first in range(0, len(order), CHUNK)]
        randomness.shuffle(chunks)
        for chunk in chunks:
            randomness.shuffle(chunk)
        return np.array([number for chunk in chunks for number in chunk], np.int64)

    def _read(self, shards: OpenShards, numbers: np.ndarray) -> Iterator[dict[str, Any]]:
        part = self.part
        places = [
            (part.sources[shard], offset, nbytes)
            for shard, offset, nbytes in zip(
                part.shard[numbers].tolist(), part.offset[numbers].tolist(), part.nbytes[numbers].tolist(), strict=True
            )
        ]
        contents = read_ranges(shards, places)
        for content, (source, offset, _), copy in zip(contents, places, part.copy[numbers].tolist(), strict=True):
            sample = sample_in(content)
            if sample is None:
                raise ShardError(
                    source.path, "has changed since it was scored: score it again; it has no sample", offset=offset
                )
            key, members = sample
            yield {"__key__": f"{key}-{copy + 1}" if copy else key, "__url__": source.path} | members


class Epochs:
    """Counts the epochs that each worker has begun, also where the workers are new processes every epoch."""

    def __init__(self) -> None:
        self._begun = RawArray("q", MOST_WORKERS)  # without a lock: a worker writes its own place only

    def set(self, epoch: int) -> None:
        """Let the next epoch of all workers be this one."""
        self._begun[:] = [epoch] * MOST_WORKERS

    def next(self, worker: int) -> int:
        """The number of the epoch that a worker begins."""
        epoch = int(self._begun[worker])
        self._begun[worker] = epoch + 1
        return epoch

    def __getstate__(self) -> dict[str, Any]:
        try:
            assert_spawning(self)
        except RuntimeError:  # copied or stored, not sent to a worker: the copy counts for itself
            return {"epoch": max(self._begun)}
        return {"begun": self._begun}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "begun" in state:
            self._begun = state["begun"]
        else:
            self.__init__()  # type: ignore[misc]
            self.set(state["epoch"])
