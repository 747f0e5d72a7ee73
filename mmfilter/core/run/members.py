"""Where the samples of a selection are: shard, offset and length of each, in the order in which they are written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mmfilter.core.input.source import Source
from mmfilter.core.run.directory import ScoredShard


@dataclass(frozen=True)
class Members:
    """Where samples are, in output order: one value a sample."""

    shards: Sequence[ScoredShard]
    shard: np.ndarray
    """Index into `shards`"""
    offset: np.ndarray
    """In the tar; −1 − row for a sample of a shard that is not a tar"""
    nbytes: np.ndarray
    key_hash: np.ndarray
    copy: np.ndarray | None = None
    """0 for a sample under its own key, n for the n-th further copy, whose key ends in `-` and n + 1; None: no
    copies"""

    def __len__(self) -> int:
        return len(self.shard)

    def take(self, order: np.ndarray) -> Members:
        columns = {name: getattr(self, name)[order] for name in ("shard", "offset", "nbytes", "key_hash")}
        return replace(self, **columns, copy=None if self.copy is None else self.copy[order])

    def with_copies(self, number: np.ndarray, copy: np.ndarray, key_hash: np.ndarray) -> Members:
        """These samples, then further copies of some: which sample, which copy of it, and the hash of the key it
        gets."""
        again = self.take(number)
        return replace(
            self,
            shard=np.concatenate([self.shard, again.shard]),
            offset=np.concatenate([self.offset, again.offset]),
            nbytes=np.concatenate([self.nbytes, again.nbytes]),
            key_hash=np.concatenate([self.key_hash, key_hash]),
            copy=np.concatenate([np.zeros(len(self), np.int64), copy]),
        )

    def n_adjacent_repeats(self) -> int:
        """Samples with the key of the sample before them: readers would take the two for one."""
        return int((self.key_hash[1:] == self.key_hash[:-1]).sum())

    def previous_with_key(self) -> np.ndarray:
        """Position of the last earlier sample with the same key, -1 if there is none."""
        order = np.argsort(self.key_hash, kind="stable")
        same = self.key_hash[order[1:]] == self.key_hash[order[:-1]]
        previous = np.full(len(self), -1)
        previous[order[1:][same]] = order[:-1][same]
        return previous

    def places(self, start: int, stop: int) -> list[tuple[Source, int, int]]:
        """Shard, offset and length of each of the samples `start` to `stop`."""
        columns = (column[start:stop].tolist() for column in (self.shard, self.offset, self.nbytes))
        return [(self.shards[i].source, offset, nbytes) for i, offset, nbytes in zip(*columns, strict=True)]

    def ranges(self, start: int, stop: int) -> Iterator[tuple[Source, int, int, int]]:
        """Shard, offset, length and copy of the bytes of samples `start` to `stop`, adjacent ones of a tar joined."""
        copy = np.zeros(stop - start, np.int64) if self.copy is None else self.copy[start:stop]
        shard, offset, nbytes = (column[start:stop] for column in (self.shard, self.offset, self.nbytes))
        end = offset + nbytes
        apart = (
            (shard[1:] != shard[:-1]) | (offset[1:] != end[:-1]) | (offset[1:] < 0) | (copy[1:] > 0) | (copy[:-1] > 0)
        )
        first = np.flatnonzero(np.r_[len(shard) > 0, apart])
        last = np.r_[first[1:], len(shard)] - 1
        for i, start, stop, n in zip(
            shard[first].tolist(), offset[first].tolist(), end[last].tolist(), copy[first].tolist(), strict=True
        ):
            yield self.shards[i].source, start, stop - start, n
