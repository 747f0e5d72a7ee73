"""Where bytes are: local paths, fsspec URLs and stdin; opening them, and noticing that they have changed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from mmfilter.core.input.remote import BLOCK, ask, filesystem_of, is_url, open_remote, read_start, tag_of
from mmfilter.core.input.remote_errors import one_line, status_of
from mmfilter.errors import ShardError

STDIN = "-"
"""The name of a tar that arrives on standard input."""
PIPE = "pipe:"
"""What a command begins with whose output is a tar."""

_CHUNK = 1 << 20


@contextmanager
def open_file(path: str, *, buffering: int | None = None) -> Iterator[BinaryIO]:
    """Open a file at a path or URL for reading bytes; raises `ShardError` where there is none.

    `buffering` is how much of a file is read at one time, None for what suits reading all of it.
    """
    if is_url(path):
        with open_remote(path, buffering or BLOCK) as file:
            yield file
    else:
        with _open_local(path, buffering or _CHUNK) as file:
            yield file


def read_head(path: str, nbytes: int) -> bytes:
    """The first bytes of a file at a path or URL; none where it cannot be read, which reading it will tell."""
    try:
        if is_url(path):
            return read_start(path, nbytes)
        with open(path, "rb", buffering=0) as file:
            return file.read(nbytes)
    except (OSError, ShardError):
        return b""


def _open_local(path: str, buffering: int) -> BinaryIO:
    try:
        return open(path, "rb", buffering=buffering)
    except FileNotFoundError as error:
        raise ShardError(path, "does not exist; check the path") from error
    except OSError as error:
        raise ShardError(path, f"cannot be opened: {error.strerror}") from error


class BadFile(Exception):
    """Why one file of a sample cannot be used, as `kind: details`: the reason of its row."""


def read_file(path: str, name: str, limit: int) -> bytes:
    """A whole plain file, called `name` in what is said of it; raises `BadFile` for one that is none or has more than
    `limit` bytes."""
    try:
        content = read_start(path, limit + 1) if is_url(path) else _read_path(path, name, limit)
    except (FileNotFoundError, NotADirectoryError):
        raise BadFile(f"no such file: {name!r}") from None
    except ShardError as error:
        if status_of(error) not in (403, 404):  # the server's fault, not the file's: no reason to leave the sample out
            raise
        raise BadFile(f"no such file: {name!r}") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise BadFile(f"unreadable file: {name!r}: {getattr(error, 'strerror', None) or one_line(error)}") from None
    if len(content) > limit:
        raise BadFile(f"member too large: {name!r} has more than {limit:,} bytes")
    return content


def _read_path(path: str, name: str, limit: int) -> bytes:
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise BadFile(f"not a plain file: {name!r}")
    if found.st_size > limit:
        raise BadFile(f"member too large: {name!r} has {found.st_size:,} bytes, the limit is {limit:,}")
    with open(path, "rb") as file:
        return file.read(found.st_size + 1)


@dataclass(frozen=True)
class Stamp:
    """What tells whether a shard has changed since it was scored; all None for stdin."""

    size: int | None = None
    mtime_ns: int | None = None
    """Time of the last change of a local file, in nanoseconds."""
    etag: str | None = None
    """What a remote store gives instead: its ETag, or its time of the last change."""

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Stamp:
        """The stamp stored in a score table's metadata under `size`, `mtime_ns` and `etag`."""
        return cls(metadata.get("size"), metadata.get("mtime_ns"), metadata.get("etag"))


def stamp_file(shard: str) -> Stamp:
    """The stamp of a file as it is now; raises `ShardError` when it is gone."""
    if is_url(shard):
        filesystem, path = filesystem_of(shard)
        info = ask(shard, filesystem.info, path)
        return Stamp(info.get("size"), None, tag_of(info))
    try:
        found = os.stat(shard)
    except OSError as error:
        raise ShardError(shard, f"cannot be found: {error.strerror}") from error
    return Stamp(found.st_size, found.st_mtime_ns, None)
