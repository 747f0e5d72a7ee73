"""Samples of many shards, copied into new shards or into one tar.

A folder of new shards is what img2dataset, open_clip and resharder expect: `00000000.tar` …,
`00000000_stats.json` with `successes`, and `sizes.json` with the samples of each shard.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import numpy as np

from mmfilter.core.files import write_json
from mmfilter.core.input.ranges import OpenShards, is_remote, read_ranges, stream_remote
from mmfilter.core.input.source import Source
from mmfilter.core.output.tar_writer import ShardWriter
from mmfilter.core.run.members import Members

_AT_ONCE = 100_000
"""Samples whose ranges become Python objects at one time"""

_COPIES_AT_ONCE = 100
"""Samples that are held when they get other names"""


def write_tar(fd: int, members: Members) -> int:
    """Write all samples as one tar to a file descriptor; the bytes written."""
    with OpenShards() as sources:
        return _write_range(fd, sources, members, 0, len(members))


@dataclass(frozen=True)
class NewShards:
    """What `write_shards` wrote."""

    number: np.ndarray
    """Of each sample, the shard it is in"""
    nbytes: int
    n_shards: int
    n_early: int
    """Shards that ended early because the next sample's key was in them already"""


def write_shards(folder: Path, members: Members, shard_size: int) -> NewShards:
    """Write the samples as shards into an empty folder.

    A shard ends after `shard_size` samples, or before a key that it has already: keys are unique in a
    shard, as readers expect, also where the input's shards share keys.
    """
    starts, n_early = shard_starts(members.previous_with_key(), shard_size)
    sizes: dict[str, int] = {}
    nbytes = 0
    with OpenShards() as sources:
        for number, (start, stop) in enumerate(zip(starts, [*starts, len(members)][1:], strict=True)):
            name = f"{number:08d}.tar"
            with open(folder / name, "xb", buffering=0) as file:
                nbytes += _write_range(file.fileno(), sources, members, start, stop)
            sizes[name] = stop - start
            stats = {"count": stop - start, "successes": stop - start}
            write_json(folder / f"{number:08d}_stats.json", stats)
    write_json(folder / "sizes.json", sizes)
    shard = np.repeat(np.arange(len(starts), dtype=np.int32), list(sizes.values()))
    return NewShards(shard, nbytes, len(starts), n_early)


def _write_range(fd: int, sources: OpenShards, members: Members, start: int, stop: int) -> int:
    writer = ShardWriter(fd, sources)
    for first in range(start, stop, _AT_ONCE):
        parts = members.ranges(first, min(first + _AT_ONCE, stop))
        for (remote, renamed), group in groupby(parts, key=lambda part: (is_remote(part[:3]), part[3] > 0)):
            if renamed:
                _write_copies(writer, sources, group)
            elif remote:
                for content in stream_remote(part[:3] for part in group):
                    writer.write(content)
            else:
                for part in group:
                    writer.copy(*part[:3])
    writer.finish()
    return writer.nbytes


def _write_copies(writer: ShardWriter, sources: OpenShards, parts: Iterator[tuple[Source, int, int, int]]) -> None:
    """Samples under keys of their own, a few at a time."""
    while batch := list(islice(parts, _COPIES_AT_ONCE)):
        contents = read_ranges(sources, [part[:3] for part in batch])
        for content, (_, _, _, copy) in zip(contents, batch, strict=True):
            writer.write_as(content, f"-{copy + 1}")


def shard_starts(previous_with_key: np.ndarray, shard_size: int) -> tuple[list[int], int]:
    """Position of the first sample of each shard, and how many shards ended early."""
    n = len(previous_with_key)
    starts = [0] if n else []
    n_early = 0
    for i in [*np.flatnonzero(previous_with_key >= 0).tolist(), n]:
        starts += range(starts[-1] + shard_size, i, shard_size) if starts else ()
        if i < n and previous_with_key[i] >= starts[-1] and i - starts[-1] < shard_size:
            starts.append(i)
            n_early += 1
    return starts, n_early


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; rename it into place if the block succeeds, else delete it."""
    path = path.resolve()
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:  # from before it is made: a signal may come at any time
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(path)  # also over an empty folder
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
