"""Byte ranges of shards. Local ones are read as they are; remote ones in few requests, near ones together.

A sample of a shard that is not a tar has no range, but a negative offset (`OpenShards.read`).
"""

from __future__ import annotations

import io
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from types import TracebackType

from mmfilter.core.input.places import open_file
from mmfilter.core.input.remote import fetch
from mmfilter.core.input.sample import RawSample
from mmfilter.core.input.source import RowSource, Source
from mmfilter.core.input.tar_walk import BLOCK
from mmfilter.errors import ShardError

Range = tuple[Source, int, int]
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
    return part[0].remote and part[1] >= 0


def read_ranges(sources: OpenShards, ranges: Sequence[Range]) -> Iterator[bytes]:
    """The bytes of each range, all remote ones asked for together; raises `ShardError` when a shard ends before one
    does."""
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
    contents = fetch([(shard.path, offset, offset + nbytes) for shard, offset, nbytes in requests])
    for request, content in zip(requests, contents, strict=True):
        _check_length(request, content)
    for (number, start), (_, _, nbytes) in zip(places, ranges, strict=True):
        yield contents[number][start : start + nbytes]


def coalesce(ranges: Sequence[Range]) -> tuple[list[Range], list[tuple[int, int]]]:
    """The requests that cover all ranges, and of each range the request and where in it the range begins."""
    requests: list[Range] = []
    places: list[tuple[int, int]] = [(0, 0)] * len(ranges)
    by_shard = groupby(
        sorted(range(len(ranges)), key=lambda i: (ranges[i][0].path, ranges[i][1])), key=lambda i: ranges[i][0]
    )
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
        raise ShardError(
            shard.path, "has become shorter since it was scored: score it again; it ends", offset=offset + len(content)
        )
    if len(content) > nbytes:
        raise ShardError(
            shard.path,
            "comes from a server that gives the whole file for a byte range; download it, and score the local file",
        )


# --- local shards, and samples that are made -------------------------------------------------


_MAX_OPEN = 64


_MAX_OPEN_ROWS = 4
"""Fewer: each of them holds decoded rows, or an index"""


@dataclass
class _OpenTar:
    fd: int
    closing: ExitStack


class OpenShards:
    """The shards that are copied from, the least recently used closed when too many are open."""

    def __init__(self) -> None:
        self._open: OrderedDict[Source, _OpenTar] = OrderedDict()
        self._rows: OrderedDict[Source, RowSource] = OrderedDict()

    def __enter__(self) -> OpenShards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._open:
            self._open.popitem()[1].closing.close()
        while self._rows:
            self._rows.popitem()[1].close()

    def _rows_of(self, shard: Source) -> RowSource:
        """A shard that is not a tar."""
        if not isinstance(shard, RowSource):
            raise ShardError(shard.path, "is a tar now, and was not when it was scored: score it again")
        if shard in self._rows:
            self._rows.move_to_end(shard)
        else:
            if len(self._rows) >= _MAX_OPEN_ROWS:
                self._rows.popitem(last=False)[1].close()
            self._rows[shard] = shard
        return self._rows[shard]

    def get(self, shard: Source) -> int:
        """A descriptor of the shard, which is read at offsets and never moved."""
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            if len(self._open) >= _MAX_OPEN:
                self._open.popitem(last=False)[1].closing.close()
            closing = ExitStack()
            self._open[shard] = _OpenTar(closing.enter_context(open_file(shard.path)).fileno(), closing)
        return self._open[shard].fd

    def read(self, shard: Source, offset: int, nbytes: int) -> bytes:
        """A byte range of a local tar; raises `ShardError` when the shard ends before it does.

        With a negative offset, −1 − row of a sample of a shard that is not a tar, it is what a tar would hold of it.
        """
        if offset < 0:
            return self._made(shard, -1 - offset)
        fd, parts = self.get(shard), []
        end = offset + nbytes
        while offset < end:
            parts.append(os.pread(fd, end - offset, offset))
            if not parts[-1]:
                raise shorter(shard, offset)
            offset += len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _made(self, shard: Source, row: int) -> bytes:
        sample = self._rows_of(shard).sample(row)
        if sample.problem:
            raise ShardError(
                shard.path, f"has changed since it was scored, score it again: row {row:,}: {sample.problem}"
            )
        return tar_members(sample)


def shorter(shard: Source, offset: int) -> ShardError:
    return ShardError(shard.path, "has become shorter since it was scored: score it again; it ends", offset=offset)


def tar_members(sample: RawSample) -> bytes:
    """The members of a sample as part of a tar: `KEY.jpg`, `KEY.json`, …; the same bytes whenever it is done."""
    part = io.BytesIO()
    for extension, content in sample.members.items():
        header = tarfile.TarInfo(f"{sample.key}.{extension}")
        header.size, header.mode = len(content), 0o444
        part.write(header.tobuf(tarfile.PAX_FORMAT))
        part.write(content + bytes(-len(content) % BLOCK))
    return part.getvalue()
