"""What samples look like: captions and pictures, read again from their shards to be shown to a person."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mmfilter.core.input.decode import DecodeSettings, caption_of, images_of
from mmfilter.core.input.ranges import OpenShards, Range, read_ranges
from mmfilter.core.input.sources.webdataset_tar import sample_members
from mmfilter.core.run.score_tables import ScoreTables
from mmfilter.errors import ShardError

_AT_ONCE = 100
"""Samples whose bytes are in memory together"""


@dataclass(frozen=True)
class Look:
    """A sample as a person sees it."""

    caption: str | None = None
    """As it was scored"""
    image: bytes | None = None
    """The image file as it is in the shard"""
    problem: str | None = None
    """Why there is neither"""


def looks(tables: ScoreTables, positions: Sequence[int] | np.ndarray) -> list[Look]:
    """What the samples at `positions` look like, in any order and number; one that cannot be read has a `problem`."""
    wanted, place = np.unique(np.asarray(positions, np.int64), return_inverse=True)
    if not len(wanted):
        return []
    among = np.zeros(tables.rows, bool)
    among[wanted] = True
    members, settings = tables.members(among), DecodeSettings(tables.options.caption)
    keys = tables.at(wanted, ("key",))["key"].tolist()
    ranges = members.places(0, len(members))
    found: list[Look] = []
    with OpenShards() as sources:
        for first in range(0, len(wanted), _AT_ONCE):
            some = slice(first, first + _AT_ONCE)
            contents = _contents(sources, ranges[some])
            found += [
                _look(content, part[0].path, key, settings)
                for content, part, key in zip(contents, ranges[some], keys[some], strict=True)
            ]
    return [found[i] for i in place.tolist()]


def problems(found: Sequence[Look]) -> list[str]:
    """The different problems."""
    return list(dict.fromkeys(look.problem for look in found if look.problem is not None))


def one_line(text: str, at_most: int) -> str:
    """Text from anywhere, safe on a terminal: in one line, without control characters, cut with an ellipsis."""
    shown = " ".join(
        "".join(
            " " if char.isspace() else char for char in text if char.isspace() or unicodedata.category(char)[0] != "C"
        ).split()
    )
    return shown if len(shown) <= at_most else shown[: at_most - 1].rstrip() + "…"


def _contents(sources: OpenShards, ranges: Sequence[Range]) -> list[bytes | Look]:
    """What each range holds, or why it cannot be read; one that cannot does not keep the others from it."""
    once = {shard for shard, _, _ in ranges if shard.once}
    read = _read(sources, [part for part in ranges if part[0] not in once])
    return [
        Look(problem=f"{part[0].path!r} could be read only once") if part[0] in once else next(read) for part in ranges
    ]


def _read(sources: OpenShards, ranges: Sequence[Range]) -> Iterator[bytes | Look]:
    """All together; one by one where that fails, to know which it is."""
    try:
        found: list[bytes | Look] = list(read_ranges(sources, ranges))
    except ShardError as error:
        found = (
            [Look(problem=str(error))]
            if len(ranges) == 1
            else [content for part in ranges for content in _read(sources, [part])]
        )
    yield from found


def _look(content: bytes | Look, shard: str, key: str, settings: DecodeSettings) -> Look:
    if isinstance(content, Look):
        return content
    members = sample_members(content, key)
    if members is None:
        return Look(problem=f"shard {shard!r} does not hold sample {key!r} where it was scored")
    return Look(caption_of(members, settings), next(iter(images_of(members).values()), None))
