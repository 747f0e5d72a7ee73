"""Walking a tar member by member, forward only, and noticing every way in which it can be broken.

`tarfile` reads a header; what is between and after the headers is checked here, because `tarfile` takes
a file that is cut at a header, or has a hole, for a shorter one.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from mmfilter.errors import ShardError

BLOCK = tarfile.BLOCKSIZE
MAX_EXTENSION_BYTES = 1 << 20
"""Limit of one pax or GNU extension header; they hold a name and a few numbers."""

_CHUNK = 1 << 20
_COMPRESSION = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\x00": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}


@dataclass(frozen=True, slots=True)
class Member:
    name: str
    size: int
    start: int
    """Where its first header is, extension headers included."""
    data: int
    """Where its content is."""
    end: int
    """Where the next header is."""
    oddity: str | None
    """What it is, where it is not a plain file."""


class TarWalk:
    """Walks the headers of a tar, forward only; `tarfile` reads a header, the checks are ours."""

    def __init__(self, shard: str, file: BinaryIO) -> None:
        self.shard = shard
        self.position = 0
        self._file = file
        self._seekable = getattr(file, "seekable", lambda: False)()
        self._current: Member | None = None

    def next(self) -> Member | None:
        """The next member, or None at a proper end of the archive."""
        self._leave_current()
        start = self.position
        name: str | None = None
        pax: dict[str, str] = {}
        while (header := self._header(in_member=self.position != start)) is not None:
            if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
                text = _text(self._extension(header).split(b"\0", 1)[0])
                name = text if header.type == tarfile.GNUTYPE_LONGNAME else name
            elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                pax.update(self._pax(header))
            elif header.type == tarfile.XGLTYPE:
                self._extension(header)
                start = self.position if not pax and name is None else start
            else:
                self._current = self._member(header, name, pax, start)
                return self._current
        self._check_end()
        return None

    def read(self, member: Member) -> bytes:
        """The content of the current member."""
        content = self._read(member.size)
        if len(content) < member.size:
            raise self._truncated_in(member)
        return content

    def _leave_current(self) -> None:
        member, self._current = self._current, None
        if member is not None and not self._skip(member.end - self.position):
            raise self._truncated_in(member)

    def _truncated_in(self, member: Member) -> ShardError:
        return ShardError(
            self.shard,
            f"is truncated, fetch it again: it ends inside member {member.name!r}, which begins",
            offset=member.start,
        )

    def _header(self, *, in_member: bool) -> tarfile.TarInfo | None:
        """The header at this position, or None for a block of zeros."""
        at = self.position
        block = self._read(BLOCK)
        if at == 0:
            self._check_magic(block)
        if not block and not in_member:
            raise ShardError(self.shard, "is truncated, fetch it again: no end-of-archive marker", offset=at)
        if len(block) < BLOCK:
            raise ShardError(self.shard, "is truncated, fetch it again: it ends inside the header", offset=at)
        if not any(block) and not in_member:
            return None
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
        except tarfile.HeaderError as error:
            if at == 0:
                raise ShardError(self.shard, "is not a tar: it does not begin with a tar header") from error
            raise ShardError(self.shard, "is damaged, fetch it again: no valid tar header", offset=at) from error
        if header.size < 0:
            raise ShardError(self.shard, "is damaged, fetch it again: a negative member size", offset=at)
        if header.type == tarfile.GNUTYPE_SPARSE:
            self._skip_sparse_map(block)
        return header

    def _check_magic(self, block: bytes) -> None:
        if not block:
            raise ShardError(
                self.shard, "is empty (0 bytes); a tar without samples still has 1,024 bytes, fetch it again"
            )
        for magic, (name, command) in _COMPRESSION.items():
            if block.startswith(magic):
                problem = f"is compressed with {name}; decompress it first with {command}"
                raise ShardError(self.shard, f"{problem}: samples are copied by their byte ranges")
        if len(block) < BLOCK:
            raise ShardError(self.shard, f"is not a tar: it has only {len(block)} bytes")

    def _skip_sparse_map(self, block: bytes) -> None:
        more = block[482]
        while more:
            block = self._read(BLOCK)
            if len(block) < BLOCK:
                raise ShardError(
                    self.shard, "is truncated, fetch it again: it ends inside the header", offset=self.position
                )
            more = block[504]

    def _extension(self, header: tarfile.TarInfo) -> bytes:
        """The content of an extension header."""
        at = self.position - BLOCK
        if header.size > MAX_EXTENSION_BYTES:
            raise ShardError(
                self.shard, f"is damaged, fetch it again: an extension header of {header.size:,} bytes", offset=at
            )
        content = self._read(_padded(header.size))
        if len(content) < _padded(header.size):
            raise ShardError(self.shard, "is truncated, fetch it again: it ends inside the header", offset=at)
        return content[: header.size]

    def _pax(self, header: tarfile.TarInfo) -> dict[str, str]:
        at = self.position - BLOCK
        try:
            return dict(_pax_records(self._extension(header)))
        except ValueError as error:
            raise ShardError(self.shard, "is damaged, fetch it again: no valid pax header", offset=at) from error

    def _member(self, header: tarfile.TarInfo, name: str | None, pax: Mapping[str, str], start: int) -> Member:
        size = header.size
        if "size" in pax:
            if not (pax["size"].isascii() and pax["size"].isdigit() and len(pax["size"]) < 20):
                raise ShardError(self.shard, "is damaged, fetch it again: no valid pax header", offset=start)
            size = int(pax["size"])
        if not header.isreg() and header.type in tarfile.SUPPORTED_TYPES:
            size = 0  # links, directories and devices have no content, whatever they claim
        name = pax.get("GNU.sparse.name") or pax.get("path") or name or header.name
        sparse = header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in pax)
        return Member(
            name,
            size,
            start,
            self.position,
            self.position + _padded(size),
            "sparse file" if sparse else _oddity(header),
        )

    def _check_end(self) -> None:
        """Read past the first zero block: only zeros may follow."""
        while chunk := self._read(_CHUNK):
            if data := chunk.lstrip(b"\0"):
                raise ShardError(
                    self.shard,
                    "is damaged: data after the end-of-archive marker (join tars with tar --concatenate, not with cat)",
                    offset=self.position - len(data),
                )

    def _read(self, size: int) -> bytes:
        """The next `size` bytes, fewer only at the end of the file."""
        parts: list[bytes] = []
        missing = size
        while missing and (part := self._try(self._file.read, missing)):
            parts.append(part)
            missing -= len(part)
            self.position += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _skip(self, size: int) -> bool:
        """Go `size` bytes forward; False where the file ends before."""
        if self._seekable and size > _CHUNK:
            self._try(self._file.seek, size - 1, os.SEEK_CUR)
            self.position += size - 1
            size = 1
        while size and (got := len(self._read(min(size, _CHUNK)))):
            size -= got
        return size == 0

    def _try(self, call: Any, *args: int) -> Any:
        try:
            return call(*args)
        except ShardError:
            raise
        except Exception as error:  # streams raise what they like
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ShardError(self.shard, f"cannot be read ({reason})", offset=self.position) from error


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _oddity(header: tarfile.TarInfo) -> str | None:
    if header.isdir():
        return "directory"
    if header.issym():
        return "symbolic link"
    if header.islnk():
        return "hard link (make the tar with --hard-dereference)"
    return None if header.isreg() else "special file"


def _pax_records(content: bytes) -> Iterator[tuple[str, str]]:
    """The `length keyword=value` records of a pax header; raises `ValueError` for others."""
    at = 0
    while at < len(content) and content[at]:
        space = content.index(b" ", at, at + 20)
        end = at + int(content[at:space])
        keyword, equals, value = content[space + 1 : end - 1].partition(b"=")
        if not equals or end <= space or end > len(content) or content[end - 1] != ord("\n"):
            raise ValueError("no pax record")
        yield _text(keyword), _text(value)
        at = end
