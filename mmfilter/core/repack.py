"""Samples of many shards, copied into new shards or into one tar.

A folder of new shards is what img2dataset, open_clip and resharder expect: `00000000.tar` …,
`00000000_stats.json` with `successes`, and `sizes.json` with the samples of each shard.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmfilter.core import artifacts
from mmfilter.core.shard_writer import ShardWriter, Sources


@dataclass(frozen=True)
class Members:
    """Where samples are, in output order: one value a sample."""

    sources: Sequence[str]
    """Paths or URLs of the shards"""
    source: np.ndarray
    """Index into `sources`"""
    offset: np.ndarray
    nbytes: np.ndarray
    key_hash: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def take(self, order: np.ndarray) -> Members:
        return Members(self.sources, self.source[order], self.offset[order], self.nbytes[order], self.key_hash[order])

    def repeats_key(self) -> np.ndarray:
        """Positions of samples with the key of the sample before them, which readers would merge."""
        return np.flatnonzero(self.key_hash[1:] == self.key_hash[:-1]) + 1

    def ranges(self, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """Shard, offset and length of the bytes of samples `start` to `stop`, adjacent ones joined."""
        source, offset, nbytes = (column[start:stop] for column in (self.source, self.offset, self.nbytes))
        end = offset + nbytes
        first = np.flatnonzero(np.r_[len(source) > 0, (source[1:] != source[:-1]) | (offset[1:] != end[:-1])])
        last = np.r_[first[1:], len(source)] - 1
        for i, start, stop in zip(source[first].tolist(), offset[first].tolist(), end[last].tolist(), strict=True):
            yield self.sources[i], start, stop - start


def write_tar(fd: int, members: Members) -> int:
    """Write all samples as one tar to a file descriptor; the bytes written."""
    with Sources() as sources:
        return _write_range(fd, sources, members, 0, len(members))


def write_shards(folder: Path, members: Members, shard_size: int) -> tuple[np.ndarray, int]:
    """Write the samples as shards into an empty folder: each sample's shard number, and the bytes written.

    A shard ends after `shard_size` samples, or where the next one has the same key as the last.
    """
    starts = _shard_starts(len(members), members.repeats_key(), shard_size)
    sizes: dict[str, int] = {}
    nbytes = 0
    with Sources() as sources:
        for number, (start, stop) in enumerate(zip(starts, [*starts, len(members)][1:], strict=True)):
            name = shard_name(number)
            with open(folder / name, "xb", buffering=0) as file:
                nbytes += _write_range(file.fileno(), sources, members, start, stop)
            sizes[name] = stop - start
            stats = {"count": stop - start, "successes": stop - start}
            artifacts.write_json(folder / f"{number:08d}_stats.json", stats)
    artifacts.write_json(folder / "sizes.json", sizes)
    return np.repeat(np.arange(len(starts), dtype=np.int32), list(sizes.values())), nbytes


def shard_name(number: int) -> str:
    return f"{number:08d}.tar"


def _write_range(fd: int, sources: Sources, members: Members, start: int, stop: int) -> int:
    writer = ShardWriter(fd, sources)
    for shard, offset, nbytes in members.ranges(start, stop):
        writer.copy(shard, offset, nbytes)
    writer.finish()
    return writer.nbytes


def _shard_starts(n: int, breaks: np.ndarray, shard_size: int) -> list[int]:
    starts = []
    start = 0
    for end in [*breaks.tolist(), n]:
        starts += range(start, end, shard_size)
        start = end
    return starts


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; rename it into place if the block succeeds, else delete it."""
    path = path.resolve()
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(path)  # also over an empty folder
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
