"""Writing tars by copying byte ranges of other tars: members stay as they were, byte for byte.

Samples that come from something else than a tar are written as members of their own.
"""

from __future__ import annotations

import errno
import io
import os
import select
import tarfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import BinaryIO

from mmfilter.core.data.sample import RawSample
from mmfilter.core.data.shards import open_rows, open_shard
from mmfilter.core.data.sources.source import NO_OPTIONS, InputOptions, RowSource
from mmfilter.core.data.tar_walk import BLOCK
from mmfilter.errors import ShardError

END_OF_ARCHIVE = bytes(2 * BLOCK)

_MAX_OPEN = 64
_MAX_OPEN_ROWS = 4
"""Fewer: each of them holds decoded rows, or an index"""
_CHUNK = 1 << 20
_AT_ONCE = 1 << 30
_NOT_POSSIBLE = {
    errno.EBADF,  # also: output opened for appending
    errno.EINVAL,  # also: output is a pipe
    errno.ENOSYS,
    errno.ENOTSOCK,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.EXDEV,
}

_Copy = Callable[["_Source", int, int, int], int]
"""Source, output file descriptor, offset, at most so many bytes -> bytes copied, 0 if it could not."""


@dataclass
class _Source:
    shard: str
    file: BinaryIO
    fd: int | None
    """None for a remote file"""
    closing: ExitStack


class Sources:
    """The shards that are copied from, the least recently used closed when too many are open."""

    def __init__(self, options: InputOptions = NO_OPTIONS) -> None:
        self._open: OrderedDict[str, _Source] = OrderedDict()
        self._rows: OrderedDict[str, RowSource] = OrderedDict()
        self._options = options

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._open:
            self._open.popitem()[1].closing.close()
        while self._rows:
            self._rows.popitem()[1].close()

    def rows(self, shard: str) -> RowSource:
        """A shard that is no tar."""
        if shard in self._rows:
            self._rows.move_to_end(shard)
        else:
            if len(self._rows) >= _MAX_OPEN_ROWS:
                self._rows.popitem(last=False)[1].close()
            self._rows[shard] = open_rows(shard, self._options)
        return self._rows[shard]

    def get(self, shard: str) -> _Source:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            if len(self._open) >= _MAX_OPEN:
                self._open.popitem(last=False)[1].closing.close()
            closing = ExitStack()
            file = closing.enter_context(open_shard(shard))
            self._open[shard] = _Source(shard, file, _descriptor(file), closing)
        return self._open[shard]


def _descriptor(file: BinaryIO) -> int | None:
    try:
        return file.fileno()
    except (AttributeError, OSError):
        return None


class ShardWriter:
    """Writes one tar to a file descriptor: `copy` ranges of whole members, then `finish`."""

    def __init__(self, fd: int, sources: Sources) -> None:
        self.nbytes = 0
        """Bytes written so far"""
        self._fd, self._sources = fd, sources
        self._ways: list[_Copy] = [_copy_file_range, _sendfile, _read_and_write]

    def copy(self, shard: str, offset: int, nbytes: int) -> None:
        """Append a byte range of a shard; raises `ShardError` when the shard ends before it does.

        A negative offset is −1 − row of a sample of a shard that is no tar: its members are appended.
        """
        if offset < 0:
            return self._append(shard, -1 - offset)
        source = self._sources.get(shard)
        ways = self._ways if source.fd is not None else [_read_and_write]
        end = offset + nbytes
        while offset < end:
            copied = self._copy_some(ways, source, offset, min(end - offset, _AT_ONCE))
            if copied == 0:
                raise ShardError(shard, "has become shorter since it was scored: score it again; it ends", offset=offset)
            offset += copied
            self.nbytes += copied

    def _append(self, shard: str, row: int) -> None:
        sample = self._sources.rows(shard).sample(row)
        if sample.problem:
            raise ShardError(shard, f"has changed since it was scored, score it again: row {row:,}: {sample.problem}")
        content = tar_members(sample)
        write_all(self._fd, content)
        self.nbytes += len(content)

    def _copy_some(self, ways: list[_Copy], source: _Source, offset: int, nbytes: int) -> int:
        """Copy in the first way that works here; the system refuses those that do not."""
        while True:
            try:
                copied = ways[0](source, self._fd, offset, nbytes)
            except BlockingIOError:
                select.select([], [self._fd], [])
                continue
            except OSError as error:
                if len(ways) == 1 or error.errno not in _NOT_POSSIBLE:
                    raise
                copied = 0
            if copied or len(ways) == 1:
                return copied
            del ways[0]

    def finish(self) -> None:
        """Write the end-of-archive marker."""
        write_all(self._fd, END_OF_ARCHIVE)
        self.nbytes += len(END_OF_ARCHIVE)


def tar_members(sample: RawSample) -> bytes:
    """The members of a sample as part of a tar: `KEY.jpg`, `KEY.json`, …; the same bytes whenever it is done."""
    part = io.BytesIO()
    for extension, content in sample.members.items():
        header = tarfile.TarInfo(f"{sample.key}.{extension}")
        header.size, header.mode = len(content), 0o444
        part.write(header.tobuf(tarfile.PAX_FORMAT))
        part.write(content + bytes(-len(content) % BLOCK))
    return part.getvalue()


def write_all(fd: int, content: bytes) -> None:
    """Write all of `content`, also to a pipe that takes less at a time or does not block."""
    view = memoryview(content)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            select.select([], [fd], [])


def _copy_file_range(source: _Source, fd: int, offset: int, nbytes: int) -> int:
    if not hasattr(os, "copy_file_range"):
        return 0
    return os.copy_file_range(source.fd, fd, nbytes, offset_src=offset)


def _sendfile(source: _Source, fd: int, offset: int, nbytes: int) -> int:
    return os.sendfile(fd, source.fd, offset, nbytes)


def _read_and_write(source: _Source, fd: int, offset: int, nbytes: int) -> int:
    size = min(nbytes, _CHUNK)
    content = _read_remote(source, offset, size) if source.fd is None else os.pread(source.fd, size, offset)
    write_all(fd, content)
    return len(content)


def _read_remote(source: _Source, offset: int, size: int) -> bytes:
    try:
        source.file.seek(offset)
        return source.file.read(size)
    except Exception as error:  # remote files raise what their library likes
        reason = " ".join(str(error).split())
        raise ShardError(source.shard, f"cannot be read ({type(error).__name__}: {reason})", offset=offset) from error
