"""Writing tars by copying byte ranges of other tars: members stay as they were, byte for byte."""

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

from mmfilter.core.data.shards import open_shard, with_suffix
from mmfilter.core.data.tar_walk import BLOCK
from mmfilter.errors import ShardError

END_OF_ARCHIVE = bytes(2 * BLOCK)

_MAX_OPEN = 64
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

    def __init__(self) -> None:
        self._open: OrderedDict[str, _Source] = OrderedDict()

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._open:
            self._open.popitem()[1].closing.close()

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
        """Append a byte range of a shard; raises `ShardError` when the shard ends before it does."""
        source = self._sources.get(shard)
        ways = self._ways if source.fd is not None else [_read_and_write]
        end = offset + nbytes
        while offset < end:
            copied = self._copy_some(ways, source, offset, min(end - offset, _AT_ONCE))
            if copied == 0:
                raise ShardError(shard, "has become shorter since it was scored: score it again; it ends", offset=offset)
            offset += copied
            self.nbytes += copied

    def copy_as(self, shard: str, offset: int, nbytes: int, suffix: str) -> None:
        """Append the members of a sample under its key with a suffix; their content stays as it is."""
        content = bytearray()
        while len(content) < nbytes:
            found = _read(self._sources.get(shard), offset + len(content), nbytes - len(content))
            if not found:
                raise ShardError(shard, "has become shorter since it was scored: score it again; it ends", offset=offset + len(content))
            content += found
        renamed = _renamed(bytes(content), suffix)
        write_all(self._fd, renamed)
        self.nbytes += len(renamed)

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
    content = _read(source, offset, size)
    write_all(fd, content)
    return len(content)


def _read(source: _Source, offset: int, size: int) -> bytes:
    """Up to so many bytes, none at the end."""
    return _read_remote(source, offset, size) if source.fd is None else os.pread(source.fd, size, offset)


def _read_remote(source: _Source, offset: int, size: int) -> bytes:
    try:
        source.file.seek(offset)
        return source.file.read(size)
    except Exception as error:  # remote files raise what their library likes
        reason = " ".join(str(error).split())
        raise ShardError(source.shard, f"cannot be read ({type(error).__name__}: {reason})", offset=offset) from error


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
