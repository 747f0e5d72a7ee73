"""Shards: WebDataset tars, found by pattern and read sample by sample with their byte ranges (`tar_walk` reads the tar).

Reading goes forward only, in bounded memory, from a path, a URL or stdin. A sample that cannot be
used is yielded with a `problem`; a shard that cannot be read to its end raises `ShardError`, since
tar readers otherwise take a truncated file for a shorter one.
"""

from __future__ import annotations

import glob
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from mmfilter.core.data.tar_walk import BLOCK, Member, TarWalk
from mmfilter.errors import MissingExtra, ShardError

STDIN = "-"
"""The name of a tar that arrives on standard input."""

MAX_MEMBER_BYTES = 256 << 20
SAMPLE_LIMIT = 4
"""A whole sample may hold this many times the limit of one member."""

_CHUNK = 1 << 20
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_SAMPLE_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_META_NAME = re.compile(r"__[^/]*__(/|$)")


# --- where shards are ------------------------------------------------------------------------


def is_url(shard: str) -> bool:
    return bool(_URL.match(shard))


def expand(patterns: Iterable[str | os.PathLike[str]]) -> list[str]:
    """The shards that paths, globs, brace patterns and URLs name: in order, each once.

    Local paths come back absolute, the matches of one glob sorted. `-` is a tar on stdin and stands
    alone. Raises `ShardError` for what does not exist; plain URLs are looked at when they are read.
    """
    names = [os.fspath(pattern) for pattern in patterns]
    if STDIN in names and len(names) > 1:
        raise ShardError(STDIN, "(stdin) must be the only shard; give the others in another run")
    shards = list(dict.fromkeys(shard for name in names for shard in _expand_one(name)))
    for shard in shards:
        if any(letter < " " or "\ud800" <= letter <= "\udfff" for letter in shard):
            raise ShardError(shard, "has a line break or bytes that are no UTF-8 in its path; rename it")
    return shards


def _expand_one(name: str) -> Iterator[str]:
    if name == STDIN:
        yield name
    elif name.startswith("pipe:"):
        raise ShardError(name, "is a command and would run a shell; run it yourself and pipe its output in: COMMAND | mmfilter score -")
    elif not is_url(name) and os.path.exists(name):  # also names that only look like patterns
        yield _existing(name)
    else:
        for single in _expand_braces(name):
            yield from _expand_url(single) if is_url(single) else _expand_path(single)


def _expand_braces(name: str) -> Iterator[str]:
    import braceexpand

    try:
        yield from braceexpand.braceexpand(name, escape=False)
    except braceexpand.UnbalancedBracesError as error:
        raise ShardError(name, "has unbalanced braces; write a range as {00000..00099} and a choice as {a,b}") from error


def _expand_path(name: str) -> Iterator[str]:
    if os.path.exists(name) or not glob.has_magic(name):
        yield _existing(name)
        return
    found = sorted(match for match in glob.glob(name, recursive=True) if os.path.isfile(match))
    if not found:
        raise ShardError(name, "matches no file; check the folder and the pattern")
    yield from map(os.path.abspath, found)


def _existing(name: str) -> str:
    if os.path.isdir(name):
        raise ShardError(name, f"is a directory; name the shards in it: {os.path.join(name, '*.tar')!r}")
    if not os.path.exists(name):
        raise ShardError(name, "does not exist; check the path, or give a pattern such as 'data/*.tar'")
    return os.path.abspath(name)


def _expand_url(url: str) -> Iterator[str]:
    if url.lower().startswith("file://"):
        yield from _expand_path(unquote(urlsplit(url).path))
    elif glob.has_magic(url) and not url.lower().startswith(("http://", "https://")):
        filesystem, path = _filesystem(url)
        found = sorted(_remote(url, filesystem.glob, path))
        if not found:
            raise ShardError(url, "matches no file; check the bucket and the pattern")
        yield from (filesystem.unstrip_protocol(match) for match in found)
    else:
        yield url


def _filesystem(url: str) -> tuple[Any, str]:
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


def _remote(url: str, call: Any, *args: Any) -> Any:
    """`call(*args)`; whatever a remote file system raises becomes a `ShardError`."""
    try:
        return call(*args)
    except FileNotFoundError as error:
        raise ShardError(url, "does not exist; check the URL") from error
    except Exception as error:
        raise ShardError(url, f"cannot be read: {type(error).__name__}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@contextmanager
def open_shard(shard: str, *, stdin: BinaryIO | None = None, buffering: int = _CHUNK) -> Iterator[BinaryIO]:
    """Open a shard for reading bytes; `-` is `stdin`, or the process's own, and stays open.

    `buffering` is how much of a local file is read at one time.
    """
    if shard == STDIN:
        yield stdin if stdin is not None else sys.stdin.buffer
    elif is_url(shard):
        filesystem, path = _filesystem(shard)
        with _remote(shard, filesystem.open, path, "rb") as file:
            yield file
    else:
        with _open_local(shard, buffering) as file:
            yield file


def fetch(ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """The bytes of remote ranges (URL, start, end), many at a time where the file system can.

    Fewer bytes come back where a shard ends before. Raises `ShardError` for the first that cannot be read.
    """
    places = [_filesystem(url) for url, _, _ in ranges]
    found: list[Any] = [b""] * len(ranges)
    for filesystem in {id(filesystem): filesystem for filesystem, _ in places}.values():
        mine = [i for i, (other, _) in enumerate(places) if other is filesystem]
        paths, starts, ends = [places[i][1] for i in mine], [ranges[i][1] for i in mine], [ranges[i][2] for i in mine]
        for i, content in zip(mine, _remote(ranges[mine[0]][0], filesystem.cat_ranges, paths, starts, ends), strict=True):
            found[i] = content
    for (url, _, _), content in zip(ranges, found, strict=True):
        if isinstance(content, BaseException):  # `cat_ranges` returns them, so that the shard can be named
            _remote(url, _throw, content)
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


def stamp(shard: str) -> Stamp:
    """The stamp of a shard as it is now; raises `ShardError` when it is gone."""
    if shard == STDIN:
        return Stamp()
    if is_url(shard):
        filesystem, path = _filesystem(shard)
        info = _remote(shard, filesystem.info, path)
        tags = (info.get(name) for name in ("ETag", "etag", "LastModified", "last_modified", "mtime", "created"))
        return Stamp(info.get("size"), None, next((str(tag) for tag in tags if tag is not None), None))
    try:
        found = os.stat(shard)
    except OSError as error:
        raise ShardError(shard, f"cannot be found: {error.strerror}") from error
    return Stamp(found.st_size, found.st_mtime_ns, None)


# --- what is in them -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RawSample:
    """The members of one sample, as bytes, and where they are in the shard."""

    key: str
    """Path of the members up to the first dot of the file name, as webdataset has it."""
    row: int
    """Position of the sample in the shard, from 0."""
    offset: int
    """First byte of the first member's first header."""
    nbytes: int
    """Length from there to the end of the last member's padding."""
    members: dict[str, bytes]
    """Lower-case extension (`jpg`, `json`, `seg.png`) to content; without what was not read."""
    problem: str | None
    """Why the sample cannot be used, as `kind: details`, or None."""


def read_samples(shard: str, *, max_member_bytes: int = MAX_MEMBER_BYTES, stdin: BinaryIO | None = None) -> Iterator[RawSample]:
    """Yield the samples of a shard in order, then check that the shard ended as a tar must.

    A sample is a run of adjacent members with one key, as webdataset groups them. Directories,
    dot files, names without an extension and `__meta__` files are ignored. Raises `ShardError`
    where the shard is truncated, damaged, compressed or no tar; a sample that the damage may have
    cut short is not yielded.
    """
    with open_shard(shard, stdin=stdin) as file:
        walk = TarWalk(shard, file)
        first_rows: dict[str, int] = {}
        for row, group in enumerate(_groups(walk, max_member_bytes)):
            first = first_rows.setdefault(group.key, row)
            if first != row:
                group.problem = (
                    f"duplicate key: {group.key!r}, first at row {first}; keys must be unique and the members of a sample adjacent (tar --sort=name)"
                )
            yield RawSample(group.key, row, group.start, group.end - group.start, group.members, group.problem)


def sample_members(content: bytes, key: str) -> dict[str, bytes] | None:
    """The members of a sample whose byte range of a shard is `content`; None where that is not the sample called `key`."""
    walk = TarWalk(key, io.BytesIO(content + bytes(2 * BLOCK)))
    try:
        [group] = _groups(walk, max(len(content), 1))
    except (ShardError, ValueError):  # no tar, or not one sample
        return None
    return group.members if group.key == key and group.problem is None else None


@dataclass
class _Group:
    """A sample while its members arrive."""

    key: str
    start: int
    end: int
    members: dict[str, bytes] = field(default_factory=dict)
    extensions: set[str] = field(default_factory=set)
    problem: str | None = None
    nbytes_held: int = 0

    def add(self, member: Member, ext: str, walk: TarWalk, max_member_bytes: int) -> None:
        self.end = member.end
        self.problem = self.problem or self._problem_with(member, max_member_bytes)
        if self.problem is None:
            self.members[ext] = walk.read(member)
        if self.nbytes_held <= SAMPLE_LIMIT * max_member_bytes:
            self.nbytes_held += len(self.members.get(ext, b"")) + len(member.name) + BLOCK
            self.extensions.add(ext)

    def _problem_with(self, member: Member, max_member_bytes: int) -> str | None:
        if any(ord(letter) < 32 for letter in self.key):
            return f"bad key: {self.key!r} has control characters"
        if member.oddity:
            return f"not a plain file: {member.name!r} is a {member.oddity}"
        if member.size > max_member_bytes:
            return f"member too large: {member.name!r} has {member.size:,} bytes, the limit is {max_member_bytes:,}"
        if self.nbytes_held + member.size > SAMPLE_LIMIT * max_member_bytes:
            return f"sample too large: {SAMPLE_LIMIT * max_member_bytes:,} bytes are passed at {member.name!r}"
        return None


def _groups(walk: TarWalk, max_member_bytes: int) -> Iterator[_Group]:
    group: _Group | None = None
    while (member := walk.next()) is not None:
        split = _split_name(member)
        if split is None:
            continue
        key, ext = split
        if group is None or group.key != key or ext in group.extensions:
            if group is not None:
                yield group
            group = _Group(key, member.start, member.end)
        group.add(member, ext, walk, max_member_bytes)
    if group is not None:
        yield group


def with_suffix(name: str, suffix: str) -> str | None:
    """A member's name with a longer key; None for a member that belongs to no sample."""
    match = _SAMPLE_NAME.fullmatch(name)
    return None if match is None or _META_NAME.match(name) else f"{match[1]}{suffix}.{match[2]}"


def key_at(shard: str, file: BinaryIO, offset: int) -> str | None:
    """The key of the member that starts at a byte of an open shard; None where no member does."""
    file.seek(offset)
    try:
        member = TarWalk(shard, file).next()
    except ShardError:
        return None
    split = None if member is None else _split_name(member)
    return None if split is None else split[0]


def _split_name(member: Member) -> tuple[str, str] | None:
    """Key and lower-case extension of a member, or None for one that belongs to no sample."""
    match = _SAMPLE_NAME.fullmatch(member.name)
    if match is None or member.oddity == "directory" or _META_NAME.match(member.name):
        return None
    return match[1], match[2].lower()
