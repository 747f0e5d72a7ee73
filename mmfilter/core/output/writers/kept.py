"""The kept samples of a selection, as every writer gets them: in output order, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmfilter.core.input.decode import DecodeSettings, caption_of, images_of
from mmfilter.core.input.ranges import OpenShards, Range, read_ranges
from mmfilter.core.input.sources.webdataset_tar import sample_members
from mmfilter.core.run.members import Members
from mmfilter.core.run.score_tables import ScoreTables
from mmfilter.errors import ShardError

BATCH_ROWS = 1000
BATCH_BYTES = 32 << 20
"""Limits of a batch of samples; one sample alone may have more bytes"""
_UNKNOWN_BYTES = 1 << 20
"""Taken for the size of a sample that has no byte range"""


@dataclass(frozen=True, slots=True)
class KeptSample:
    """One kept sample: its members as they are in the shard, and what the score table says of it."""

    key: str
    members: dict[str, bytes]
    """Extension -> content, in the order of the shard"""
    images: dict[str, bytes]
    """… of these the images; at least one"""
    caption: str
    """As it was scored"""
    columns: dict[str, Any]
    """Column of the score table -> value"""


@dataclass(frozen=True)
class Kept:
    """What a writer writes."""

    tables: ScoreTables
    positions: np.ndarray
    """Of the kept samples in the score tables, in output order"""
    shard_size: int
    """Samples an output shard, file or folder of images"""
    about: Mapping[str, Any]
    """The manifest of the selection"""
    members: Members | None = None
    """Where the samples are, in output order; None for a format that only names them"""

    @property
    def places(self) -> Members:
        """Where the samples are, for a format that copies them."""
        if self.members is None:
            raise AssertionError("a format that only names its samples asks for their bytes")
        return self.members

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def number(self) -> np.ndarray:
        """Of each sample, the output shard that it is in when each takes `shard_size`."""
        return (np.arange(len(self)) // self.shard_size).astype(np.int32)

    @property
    def n_shards(self) -> int:
        return -(-len(self) // self.shard_size)

    def batches(self, columns: Sequence[str] = ()) -> Iterator[tuple[int, list[KeptSample]]]:
        """Output shard and samples, a bounded number at a time, all of one output shard."""
        settings = DecodeSettings(self.tables.options.caption)
        columns = list(dict.fromkeys(["key", *columns]))
        rows = self.tables.take(self.positions, columns)
        members = self.places
        with OpenShards() as sources:
            for start, stop in self._bounds(np.where(members.offset < 0, _UNKNOWN_BYTES, members.nbytes)):
                places = members.places(start, stop)
                contents = read_ranges(sources, places)
                named = (dict(zip(columns, row, strict=True)) for row in islice(rows, stop - start))
                yield (
                    start // self.shard_size,
                    [
                        _sample(row, place, content, settings)
                        for row, place, content in zip(named, places, contents, strict=True)
                    ],
                )

    def _bounds(self, nbytes: np.ndarray) -> Iterator[tuple[int, int]]:
        end = np.cumsum(nbytes)
        start = 0
        while start < len(self):
            before = end[start] - nbytes[start]
            fit = int(np.searchsorted(end, before + BATCH_BYTES, side="right"))
            stop = min(
                max(fit, start + 1), start + BATCH_ROWS, (start // self.shard_size + 1) * self.shard_size, len(self)
            )
            yield start, stop
            start = stop


def _sample(row: dict[str, Any], place: Range, content: bytes, settings: DecodeSettings) -> KeptSample:
    members = sample_members(content, row["key"])
    if members is None:
        raise _changed(place, f"does not hold sample {row['key']!r} where it was scored", "should begin")
    images, caption = images_of(members), caption_of(members, settings)
    if not images or caption is None:
        raise _changed(
            place, f"holds sample {row['key']!r} without the image or the caption it was scored with", "begins"
        )
    return KeptSample(row["key"], members, images, caption, row)


def _changed(place: Range, problem: str, begins: str) -> ShardError:
    shard, offset, _ = place
    if offset < 0:
        return ShardError(shard.path, f"{problem}: score it again; it is row {-1 - offset:,}")
    return ShardError(shard.path, f"{problem}: score it again; it {begins}", offset=offset)


@dataclass(frozen=True)
class Written:
    """What a writer wrote."""

    nbytes: int
    number: np.ndarray | None = None
    """Of each sample the number of the output shard it is in, where there are any"""
    name: str = ""
    """… whose name this is, with a place for the number as in `%08d.tar`"""
    n_shards: int = 0
    warnings: tuple[str, ...] = ()


class FolderWriter(Protocol):
    """Writes the kept samples into an empty folder, which gets its name only afterwards."""

    def __call__(self, folder: Path, kept: Kept) -> Written: ...
