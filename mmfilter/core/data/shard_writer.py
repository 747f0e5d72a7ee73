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

from mmfilter.core.data.sample import RawSample
from mmfilter.core.data.shards import open_rows, open_shard
from mmfilter.core.data.sources.source import NO_OPTIONS, InputOptions, RowSource
from mmfilter.core.data.sources.webdataset_tar import with_suffix
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

_Copy = Callable[[int, int, int, int], int]
"""File descriptors of source and output, offset, at most so many bytes -> bytes copied, 0 if it could not."""


@dataclass
class _Source:
    fd: int
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

    def _rows_of(self, shard: str) -> RowSource:
        """A shard that is no tar."""
        if shard in self._rows:
            self._rows.move_to_end(shard)
        else:
            if len(self._rows) >= _MAX_OPEN_ROWS:
                self._rows.popitem(last=False)[1].close()
            self._rows[shard] = open_rows(shard, self._options)
        return self._rows[shard]

    def get(self, shard: str) -> int:
        """A descriptor of the shard, which is read at offsets and never moved."""
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            if len(self._open) >= _MAX_OPEN:
                self._open.popitem(last=False)[1].closing.close()
            closing = ExitStack()
            self._open[shard] = _Source(closing.enter_context(open_shard(shard)).fileno(), closing)
        return self._open[shard].fd

    def read(self, shard: str, offset: int, nbytes: int) -> bytes:
        """A byte range of a local tar; raises `ShardError` when the shard ends before it does.

        With a negative offset, −1 − row of a sample of a shard that is no tar, it is what a tar would hold of it.
        """
        if offset < 0:
            return self._made(shard, -1 - offset)
        fd, parts = self.get(shard), []
        end = offset + nbytes
        while offset < end:
            parts.append(os.pread(fd, end - offset, offset))
            if not parts[-1]:
                raise _shorter(shard, offset)
            offset += len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _made(self, shard: str, row: int) -> bytes:
        sample = self._rows_of(shard).sample(row)
        if sample.problem:
            raise ShardError(shard, f"has changed since it was scored, score it again: row {row:,}: {sample.problem}")
        return tar_members(sample)


def _shorter(shard: str, offset: int) -> ShardError:
    return ShardError(shard, "has become shorter since it was scored: score it again; it ends", offset=offset)


class ShardWriter:
    """Writes one tar to a file descriptor: `copy` ranges of whole members, or `write` them, then `finish`."""

    def __init__(self, fd: int, sources: Sources) -> None:
        self.nbytes = 0
        """Bytes written so far"""
        self._fd, self._sources = fd, sources
        self._ways: list[_Copy] = [_copy_file_range, _sendfile, _read_and_write]

    def write(self, content: bytes) -> None:
        """Append bytes."""
        write_all(self._fd, content)
        self.nbytes += len(content)

    def copy(self, shard: str, offset: int, nbytes: int) -> None:
        """Append a byte range of a local shard; raises `ShardError` when the shard ends before it does.

        A negative offset is −1 − row of a sample of a shard that is no tar: its members are appended.
        """
        if offset < 0:
            return self.write(self._sources.read(shard, offset, nbytes))
        source = self._sources.get(shard)
        end = offset + nbytes
        while offset < end:
            copied = self._copy_some(source, offset, min(end - offset, _AT_ONCE))
            if copied == 0:
                raise _shorter(shard, offset)
            offset += copied
            self.nbytes += copied

    def write_as(self, content: bytes, suffix: str) -> None:
        """Append the members of a sample under its key with a suffix; their content stays as it is."""
        self.write(_renamed(content, suffix))

    def _copy_some(self, source: int, offset: int, nbytes: int) -> int:
        """Copy in the first way that works here; the system refuses those that do not."""
        while True:
            try:
                copied = self._ways[0](source, self._fd, offset, nbytes)
            except BlockingIOError:
                select.select([], [self._fd], [])
                continue
            except OSError as error:
                if len(self._ways) == 1 or error.errno not in _NOT_POSSIBLE:
                    raise
                copied = 0
            if copied or len(self._ways) == 1:
                return copied
            del self._ways[0]

    def finish(self) -> None:
        """Write the end-of-archive marker."""
        self.write(END_OF_ARCHIVE)


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


def _copy_file_range(source: int, fd: int, offset: int, nbytes: int) -> int:
    if not hasattr(os, "copy_file_range"):
        return 0
    return os.copy_file_range(source, fd, nbytes, offset_src=offset)


def _sendfile(source: int, fd: int, offset: int, nbytes: int) -> int:
    return os.sendfile(fd, source, offset, nbytes)


def _read_and_write(source: int, fd: int, offset: int, nbytes: int) -> int:
    content = os.pread(source, min(nbytes, _CHUNK), offset)
    write_all(fd, content)
    return len(content)


def _renamed(content: bytes, suffix: str) -> bytes:
    """Members of a sample under other names; headers are written anew, with all that they say of the file."""
    found = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(content + END_OF_ARCHIVE), mode="r:", encoding="utf-8") as tar:
        for member in tar:
            name = with_suffix(member.name, suffix)
            if name is None or not member.isreg():
                continue
            start = member.offset_data
            member.name = name
            found.write(member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
            found.write(content[start : start + member.size].ljust(-(-member.size // BLOCK) * BLOCK, b"\0"))
    return found.getvalue()
