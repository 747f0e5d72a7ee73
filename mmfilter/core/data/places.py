"""Where bytes are: local paths, fsspec URLs and stdin; opening them, and noticing that they have changed."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from mmfilter.errors import MissingExtra, ShardError

STDIN = "-"
"""The name of a tar that arrives on standard input."""
PIPE = "pipe:"
"""What a command begins with whose output is a tar."""

_CHUNK = 1 << 20
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def is_url(shard: str) -> bool:
    return bool(_URL.match(shard))


def read_once(shard: str) -> bool:
    """Whether the shard is a stream, which is gone when it has been read."""
    return shard == STDIN or shard.startswith(PIPE)


def filesystem_of(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url`, and the path in it."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        if url.startswith(("s3://", "s3a://")):
            raise MissingExtra("reading s3:// shards", "s3") from error
        raise ShardError(url, f"needs an fsspec package that is not installed ({error})") from error
    except ValueError as error:
        raise ShardError(url, f"has a protocol that fsspec does not know ({error})") from error


def remote(url: str, call: Any, *args: Any) -> Any:
    """`call(*args)`; whatever a remote file system raises becomes a `ShardError`."""
    try:
        return call(*args)
    except FileNotFoundError as error:
        raise ShardError(url, "does not exist; check the URL") from error
    except Exception as error:
        raise ShardError(url, f"cannot be read: {type(error).__name__}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@contextmanager
def open_shard(shard: str, *, stdin: BinaryIO | None = None, buffering: int = _CHUNK) -> Iterator[BinaryIO]:
    """Open a shard for reading bytes; `-` is `stdin`, or the process's own, and stays open.

    `buffering` is how much of a local file is read at one time.
    """
    if shard == STDIN:
        yield stdin if stdin is not None else sys.stdin.buffer
    elif is_url(shard):
        filesystem, path = filesystem_of(shard)
        with remote(shard, filesystem.open, path, "rb") as file:
            yield file
    else:
        with _open_local(shard, buffering) as file:
            yield file


def fetch(ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """The bytes of remote ranges (URL, start, end), many at a time where the file system can.

    Fewer bytes come back where a shard ends before. Raises `ShardError` for the first that cannot be read.
    """
    places = [filesystem_of(url) for url, _, _ in ranges]
    found: list[Any] = [b""] * len(ranges)
    for filesystem in {id(filesystem): filesystem for filesystem, _ in places}.values():
        mine = [i for i, (other, _) in enumerate(places) if other is filesystem]
        paths, starts, ends = [places[i][1] for i in mine], [ranges[i][1] for i in mine], [ranges[i][2] for i in mine]
        for i, content in zip(mine, remote(ranges[mine[0]][0], filesystem.cat_ranges, paths, starts, ends), strict=True):
            found[i] = content
    for (url, _, _), content in zip(ranges, found, strict=True):
        if isinstance(content, BaseException):  # `cat_ranges` returns them, so that the shard can be named
            remote(url, _throw, content)
    return found


def _throw(error: BaseException) -> None:
    raise error


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
    """A whole plain file, called `name` in what is said of it; raises `BadFile` for one that is none or has more than `limit` bytes."""
    try:
        content = _read_url(path, limit + 1) if is_url(path) else _read_path(path, name, limit)
    except (FileNotFoundError, NotADirectoryError):
        raise BadFile(f"no such file: {name!r}") from None
    except (OSError, ValueError, ShardError) as error:  # ValueError: a name that no file can have
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


def _read_url(url: str, size: int) -> bytes:
    filesystem, path = filesystem_of(url)
    try:
        with filesystem.open(path, "rb") as file:
            return file.read(size)
    except OSError:
        raise
    except Exception as error:  # remote file systems raise what they like
        raise ShardError(url, f"cannot be read: {type(error).__name__}: {one_line(error)}") from error


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
        info = remote(shard, filesystem.info, path)
        tags = (info.get(name) for name in ("ETag", "etag", "LastModified", "last_modified", "mtime", "created"))
        return Stamp(info.get("size"), None, next((str(tag) for tag in tags if tag is not None), None))
    try:
        found = os.stat(shard)
    except OSError as error:
        raise ShardError(shard, f"cannot be found: {error.strerror}") from error
    return Stamp(found.st_size, found.st_mtime_ns, None)
