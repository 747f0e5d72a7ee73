"""WebDataset tars: samples are runs of members with one key, each with its byte range in the tar."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from mmfilter.core.input.places import STDIN, Stamp, open_file, stamp_file
from mmfilter.core.input.sample import MAX_MEMBER_BYTES, SAMPLE_LIMIT, RawSample
from mmfilter.core.input.source import Source
from mmfilter.core.input.tar_walk import BLOCK, Member, TarWalk
from mmfilter.errors import ShardError

_SAMPLE_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_META_NAME = re.compile(r"__[^/]*__(/|$)")


class WebdatasetTar(Source):
    """A tar at a path or at a URL."""

    kind = "tar"

    def stamp(self) -> Stamp:
        return stamp_file(self.path)

    def samples(self, max_member_bytes: int = MAX_MEMBER_BYTES) -> Iterator[RawSample]:
        with open_file(self.path) as file:
            yield from tar_samples(self.path, file, max_member_bytes)


class StdinTar(Source):
    """A tar on standard input, the process's own or a given one, which stays open."""

    kind = "stdin"

    def __init__(self, stdin: BinaryIO | None = None) -> None:
        super().__init__(STDIN)
        self._stdin = stdin

    @property
    def stem(self) -> str:
        return "stdin"

    def stamp(self) -> Stamp:
        return Stamp()

    def samples(self, max_member_bytes: int = MAX_MEMBER_BYTES) -> Iterator[RawSample]:
        yield from tar_samples(self.path, self._stdin or sys.stdin.buffer, max_member_bytes)


def tar_samples(shard: str, file: BinaryIO, max_member_bytes: int) -> Iterator[RawSample]:
    """Yield the samples of a tar in order, then check that it ended as a tar must.

    A sample is a run of adjacent members with one key, as webdataset groups them. Directories,
    dot files, names without an extension and `__meta__` files are ignored. Raises `ShardError`
    where the tar is truncated, damaged, compressed or no tar; a sample that the damage may have
    cut short is not yielded.
    """
    walk = TarWalk(shard, file)
    first_rows: dict[str, int] = {}
    for row, group in enumerate(_groups(walk, max_member_bytes)):
        first = first_rows.setdefault(group.key, row)
        if first != row:
            group.problem = (
                f"duplicate key: {group.key!r}, first at row {first}; keys must be unique and the members of a sample "
                "adjacent (tar --sort=name)"
            )
        yield RawSample(group.key, row, group.start, group.end - group.start, group.members, group.problem)


def sample_in(content: bytes) -> tuple[str, dict[str, bytes]] | None:
    """Key and members of the one sample that a byte range of a shard holds; None where it holds something else."""
    walk = TarWalk("", io.BytesIO(content + bytes(2 * BLOCK)))
    try:
        [group] = _groups(walk, max(len(content), 1))
    except (ShardError, ValueError):  # not a tar, or not one sample
        return None
    return (group.key, group.members) if group.problem is None else None


def sample_members(content: bytes, key: str) -> dict[str, bytes] | None:
    """The members of a sample whose byte range of a shard is `content`; None where that is not the sample called
    `key`."""
    sample = sample_in(content)
    return sample[1] if sample is not None and sample[0] == key else None


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
