"""A folder of images with their captions beside them: `a.jpg`, `a.txt` and perhaps `a.json`, nested or not.

Samples are in the order of their paths, and stretches of at most 10,000 of them are shards of their own,
called `FOLDER/`, `FOLDER/#00001`, `FOLDER/#00002`, …
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from mmfilter.core.input.places import BadFile, Stamp, read_file
from mmfilter.core.input.remote import as_it_suits, ask, filesystem_of, is_url, tag_of
from mmfilter.core.input.sample import IMAGE_EXTENSIONS, MAX_MEMBER_BYTES, SAMPLE_LIMIT, Keys, RawSample, fit
from mmfilter.core.input.source import RowSource
from mmfilter.errors import ShardError

STRETCH = 10_000
"""Samples of a folder that are one shard"""

_EXTENSIONS = (*IMAGE_EXTENSIONS, "txt", "json")

_FOLDER = re.compile(r"/(#\d{5,})?$")

_Sample = tuple[str, tuple[str, ...]]
"""Key, and the paths of its files in the folder"""


def is_folder(shard: str) -> bool:
    """Whether this is the name of a folder or of a stretch of one."""
    return bool(_FOLDER.search(shard))


def has_images(folder: str) -> bool:
    """Whether there is an image in a local folder, or below it."""
    return any(_extension(name) in IMAGE_EXTENSIONS for name in _local_files(folder))


def folder_shards(folder: str) -> Iterator[str]:
    """The shards of a folder, given without a slash at its end; raises `ShardError` where it holds no image."""
    _listing.cache_clear()
    _remote_files.cache_clear()
    samples = _listing(folder)
    if not any(_extension(name) in IMAGE_EXTENSIONS for _, names in samples for name in names):
        raise ShardError(folder, f"is a folder without images ({', '.join(IMAGE_EXTENSIONS)})")
    for number in range(-(-len(samples) // STRETCH)):
        yield f"{folder}/#{number:05d}" if number else f"{folder}/"


class ImageFolder(RowSource):
    """One stretch of a folder; files are read one by one, as they are asked for."""

    kind = "folder"

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._folder, _, self._number = path.rpartition("/")
        self._first = STRETCH * int(self._number.removeprefix("#") or 0)

    @property
    def stem(self) -> str:
        return os.path.basename(self._folder) + self._number.replace("#", "-") or "folder"

    def holds(self, path: str | os.PathLike[str]) -> bool:
        """Whether it lies anywhere in the folder."""
        real, folder = os.path.realpath(path), os.path.realpath(self._folder)
        return not self.remote and (real == folder or real.startswith(os.path.join(folder, "")))

    def stamp(self) -> Stamp:
        """The size of all its files, the time of the last change, and a digest of names, sizes and times."""
        digest, size, last = hashlib.sha256(), 0, 0
        for _, names in self._samples():
            for name in names:
                bytes_, changed = self._about(name)
                digest.update(f"{name}\0{bytes_}\0{changed}\n".encode("utf-8", "surrogateescape"))
                size += bytes_
                last = max(last, changed) if isinstance(changed, int) else 0
        return Stamp(size, last or None, digest.hexdigest()[:32])

    def _about(self, name: str) -> tuple[int, int | str]:
        """Size and time of the last change of a file."""
        if self.remote:
            info = _remote_files(self._folder)[name]
            return int(info.get("size") or 0), str(tag_of(info))
        try:
            found = os.stat(os.path.join(self._folder, name))
        except OSError as error:
            raise ShardError(self.path, f"has changed: {name!r}: {error.strerror}") from error
        return found.st_size, found.st_mtime_ns

    def samples(self, max_member_bytes: int = MAX_MEMBER_BYTES) -> Iterator[RawSample]:
        """The samples in the order of their paths."""
        samples = enumerate(self._samples())
        return as_it_suits(self._folder, lambda item: self._read(*item, max_member_bytes), samples)

    def sample(self, row: int) -> RawSample:
        """One sample, read anew."""
        samples = self._samples()
        if row >= len(samples):
            raise ShardError(
                self.path, f"has only {len(samples):,} samples; it has changed since it was scored, score it again"
            )
        return self._read(row, samples[row], MAX_MEMBER_BYTES)

    def close(self) -> None:
        """Nothing is held open."""

    def _samples(self) -> list[_Sample]:
        samples = _listing(self._folder)[self._first : self._first + STRETCH]
        if not samples:
            raise ShardError(self.path, "has no samples any more; score what is there into another --run")
        return samples

    def _read(self, row: int, sample: _Sample, limit: int) -> RawSample:
        key, names = sample
        members: dict[str, bytes] = {}
        try:
            for name in names:
                extension = _extension(name)
                if extension in members:
                    raise BadFile(f"two files for one: {name!r} and another {extension!r}")
                members[extension] = read_file(
                    f"{self._folder}/{name}", name, min(limit, SAMPLE_LIMIT * limit - sum(map(len, members.values())))
                )
        except BadFile as bad:
            return RawSample(key, row, None, None, members, str(bad))
        return RawSample(key, row, None, None, members, None)


@lru_cache(maxsize=2)
def _listing(folder: str) -> list[_Sample]:
    """All samples of a folder in the order of their paths; `folder_shards` makes it look again.

    The key is the path without extension, its dots and what else no key can hold as `_`.
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(_remote_files(folder) if is_url(folder) else _local_files(folder)):
        groups.setdefault(name[: name.rindex(".")], []).append(name)
    keys = Keys(os.path.basename(folder))
    return [
        (keys.unique("/".join(map(fit, stem.split("/"))), row), tuple(groups[stem]))
        for row, stem in enumerate(sorted(groups))
    ]


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _wanted(name: str) -> bool:
    return not name.startswith(".") and "." in name and _extension(name) in _EXTENSIONS


def _local_files(folder: str) -> Iterator[str]:
    """Paths in the folder of the files that belong to samples; hidden files and folders do not."""

    def unreadable(error: OSError) -> None:
        raise ShardError(folder, f"cannot be listed: {error.filename!r}: {error.strerror}") from error

    for place, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(place, folder)
        for name in filter(_wanted, names):
            yield name if inside == "." else os.path.join(inside, name)


@lru_cache(maxsize=2)
def _remote_files(folder: str) -> dict[str, dict[str, Any]]:
    """The same of a URL, with what its file system says of each."""
    filesystem, root = filesystem_of(folder)
    found = ask(folder, filesystem.find, root, detail=True)
    names = {path[len(root.rstrip("/")) + 1 :]: info for path, info in found.items()}
    return {
        name: info
        for name, info in names.items()
        if _wanted(name.rpartition("/")[2]) and not any(part.startswith(".") for part in name.split("/"))
    }
