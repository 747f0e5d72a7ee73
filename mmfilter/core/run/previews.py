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
class Preview:
    """A sample as a person sees it."""

    caption: str | None = None
    """As it was scored"""
    image: bytes | None = None
    """The image file as it is in the shard"""
    problem: str | None = None
    """Why there is neither"""


def previews(tables: ScoreTables, positions: Sequence[int] | np.ndarray) -> list[Preview]:
    """What the samples at `positions` look like, in any order and number; one that cannot be read has a `problem`."""
    wanted, place = np.unique(np.asarray(positions, np.int64), return_inverse=True)
    if not len(wanted):
        return []
    among = np.zeros(tables.rows, bool)
    among[wanted] = True
    members, settings = tables.members(among), DecodeSettings(tables.options.caption)
    keys = tables.at(wanted, ("key",))["key"].tolist()
    ranges = members.places(0, len(members))
    found: list[Preview] = []
    with OpenShards() as sources:
        for first in range(0, len(wanted), _AT_ONCE):
            some = slice(first, first + _AT_ONCE)
            contents = _contents(sources, ranges[some])
            found += [
                _preview(content, part[0].path, key, settings)
                for content, part, key in zip(contents, ranges[some], keys[some], strict=True)
            ]
    return [found[i] for i in place.tolist()]


def problems(found: Sequence[Preview]) -> list[str]:
    """The different problems."""
    return list(dict.fromkeys(preview.problem for preview in found if preview.problem is not None))


def one_line(text: str, at_most: int) -> str:
    """Text from anywhere, safe on a terminal: in one line, without control characters, cut with an ellipsis."""
    shown = " ".join(
        "".join(
            " " if char.isspace() else char for char in text if char.isspace() or unicodedata.category(char)[0] != "C"
        ).split()
    )
    return shown if len(shown) <= at_most else shown[: at_most - 1].rstrip() + "…"


def _contents(sources: OpenShards, ranges: Sequence[Range]) -> list[bytes | Preview]:
    """What each range holds, or why it cannot be read; one that cannot does not keep the others from it."""
    once = {shard for shard, _, _ in ranges if shard.once}
    read = _read(sources, [part for part in ranges if part[0] not in once])
    return [
        Preview(problem=f"{part[0].path!r} could be read only once") if part[0] in once else next(read)
        for part in ranges
    ]


def _read(sources: OpenShards, ranges: Sequence[Range]) -> Iterator[bytes | Preview]:
    """All together; one by one where that fails, to know which it is."""
    try:
        found: list[bytes | Preview] = list(read_ranges(sources, ranges))
    except ShardError as error:
        found = (
            [Preview(problem=str(error))]
            if len(ranges) == 1
            else [content for part in ranges for content in _read(sources, [part])]
        )
    yield from found


def _preview(content: bytes | Preview, shard: str, key: str, settings: DecodeSettings) -> Preview:
    if isinstance(content, Preview):
        return content
    members = sample_members(content, key)
    if members is None:
        return Preview(problem=f"shard {shard!r} does not hold sample {key!r} where it was scored")
    return Preview(caption_of(members, settings), next(iter(images_of(members).values()), None))
