"""Byte ranges of shards. Local ones are read as they are; remote ones in few requests, near ones together.

A sample of a shard that is no tar has no range, but a negative offset (`Sources.read`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from mmfilter.core.data.remote import fetch, is_url
from mmfilter.core.data.shard_writer import Sources
from mmfilter.errors import ShardError

Range = tuple[str, int, int]
"""Shard, offset and length"""

MAX_GAP = 64 << 10
"""Bytes between two ranges of a remote shard that are read along. With a hundred requests under way a
request costs about as long as these bytes take."""

MAX_REQUEST = 16 << 20
AT_ONCE = 64 << 20
"""Bytes that are asked for at one time"""
_RANGES_AT_ONCE = 512


def is_remote(part: Range) -> bool:
    """Whether it is a range of a tar at a URL."""
    return is_url(part[0]) and part[1] >= 0


def read_ranges(sources: Sources, ranges: Sequence[Range]) -> Iterator[bytes]:
    """The bytes of each range, all remote ones asked for together; raises `ShardError` when a shard ends before one does."""
    remote = _fetch_together([part for part in ranges if is_remote(part)])
    for part in ranges:
        yield next(remote) if is_remote(part) else sources.read(*part)


def stream_remote(ranges: Iterable[Range]) -> Iterator[bytes]:
    """The bytes of remote ranges one after the other, in pieces, of which a bounded number is held."""
    batch: list[Range] = []
    held = 0
    for shard, offset, nbytes in ranges:
        for start in range(offset, offset + nbytes, MAX_REQUEST):
            piece = min(MAX_REQUEST, offset + nbytes - start)
            if batch and (held + piece > AT_ONCE or len(batch) == _RANGES_AT_ONCE):
                yield from _fetch_together(batch)
                batch, held = [], 0
            batch.append((shard, start, piece))
            held += piece
    yield from _fetch_together(batch)


def _fetch_together(ranges: Sequence[Range]) -> Iterator[bytes]:
    if not ranges:
        return
    requests, places = coalesce(ranges)
    contents = fetch([(shard, offset, offset + nbytes) for shard, offset, nbytes in requests])
    for request, content in zip(requests, contents, strict=True):
        _check_length(request, content)
    for (request, start), (_, _, nbytes) in zip(places, ranges, strict=True):
        yield contents[request][start : start + nbytes]


def coalesce(ranges: Sequence[Range]) -> tuple[list[Range], list[tuple[int, int]]]:
    """The requests that cover all ranges, and of each range the request and where in it the range begins."""
    requests: list[Range] = []
    places: list[tuple[int, int]] = [(0, 0)] * len(ranges)
    by_shard = groupby(sorted(range(len(ranges)), key=lambda i: ranges[i][:2]), key=lambda i: ranges[i][0])
    for shard, members in by_shard:
        first = True
        for i in members:
            _, offset, nbytes = ranges[i]
            start, end = (0, 0) if first else (requests[-1][1], requests[-1][1] + requests[-1][2])
            if first or offset > end + MAX_GAP or max(end, offset + nbytes) - start > MAX_REQUEST:
                requests.append((shard, offset, nbytes))
            else:
                requests[-1] = (shard, start, max(end, offset + nbytes) - start)
            first = False
            places[i] = len(requests) - 1, offset - requests[-1][1]
    return requests, places


def _check_length(request: Range, content: bytes) -> None:
    shard, offset, nbytes = request
    if len(content) < nbytes:
        raise ShardError(shard, "has become shorter since it was scored: score it again; it ends", offset=offset + len(content))
    if len(content) > nbytes:
        raise ShardError(shard, "comes from a server that gives the whole file for a byte range; download it, and score the local file")
