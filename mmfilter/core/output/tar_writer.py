"""Writing tars by copying byte ranges of other tars: members stay as they were, byte for byte.

Samples that come from something else than a tar are written as members of their own.
"""

from __future__ import annotations

import errno
import io
import os
import select
import tarfile
from collections.abc import Callable, Sequence

from mmfilter.core.input.ranges import OpenShards, shorter
from mmfilter.core.input.source import Source
from mmfilter.core.input.sources.webdataset_tar import with_suffix
from mmfilter.core.input.tar_walk import BLOCK

END_OF_ARCHIVE = bytes(2 * BLOCK)

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

Copy = Callable[[int, int, int, int], int]
"""File descriptors of source and output, offset, at most so many bytes -> bytes copied, 0 if it could not."""


class ShardWriter:
    """Writes one tar to a file descriptor: `copy` ranges of whole members, or `write` them, then `finish`."""

    def __init__(self, fd: int, sources: OpenShards, ways: Sequence[Copy] | None = None) -> None:
        self.nbytes = 0
        """Bytes written so far"""
        self._fd, self._sources = fd, sources
        self._ways = [copy_file_range, sendfile, read_and_write] if ways is None else list(ways)

    def write(self, content: bytes) -> None:
        """Append bytes."""
        write_all(self._fd, content)
        self.nbytes += len(content)

    def copy(self, shard: Source, offset: int, nbytes: int) -> None:
        """Append a byte range of a local shard; raises `ShardError` when the shard ends before it does.

        A negative offset is −1 − row of a sample of a shard that is not a tar: its members are appended.
        """
        if offset < 0:
            return self.write(self._sources.read(shard, offset, nbytes))
        source = self._sources.get(shard)
        end = offset + nbytes
        while offset < end:
            copied = self._copy_some(source, offset, min(end - offset, _AT_ONCE))
            if copied == 0:
                raise shorter(shard, offset)
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


def write_all(fd: int, content: bytes | memoryview) -> None:
    """Write all of `content`, also to a pipe that takes less at a time or does not block."""
    view = memoryview(content)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            select.select([], [fd], [])


def copy_file_range(source: int, fd: int, offset: int, nbytes: int) -> int:
    if not hasattr(os, "copy_file_range"):
        return 0
    return os.copy_file_range(source, fd, nbytes, offset_src=offset)


def sendfile(source: int, fd: int, offset: int, nbytes: int) -> int:
    return os.sendfile(fd, source, offset, nbytes)


def read_and_write(source: int, fd: int, offset: int, nbytes: int) -> int:
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
