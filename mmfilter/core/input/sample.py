"""A sample as bytes, before anything is decoded, and the key that names it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CAPTION_FIELDS = ("caption", "text")

MAX_MEMBER_BYTES = 256 << 20
SAMPLE_LIMIT = 4
"""A whole sample may hold this many times the limit of one member."""

_MAX_KEY = 200
_UNFIT = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff./\\]")
"""What cannot be in a key of ours: it becomes a file name in a tar, up to the first dot."""
_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp"}


@dataclass(frozen=True, slots=True)
class RawSample:
    """The members of one sample, as bytes, and where they are in the shard."""

    key: str
    """Path of the members up to the first dot of the file name, as webdataset has it."""
    row: int
    """Position of the sample in the shard, from 0."""
    offset: int | None
    """First byte of the first member's first header; None where the shard is not a tar."""
    nbytes: int | None
    """Length from there to the end of the last member's padding; None where the shard is not a tar."""
    members: dict[str, bytes]
    """Lower-case extension (`jpg`, `json`, `seg.png`) to content; without what was not read."""
    problem: str | None
    """Why the sample cannot be used, as `kind: details`, or None."""


def problem_kind(problem: str) -> str:
    """Of `kind: details`, the kind: what problems are counted by."""
    return problem.split(":")[0]


class Keys:
    """Gives every sample of a shard that is not a tar a key of its own, from the name that the data has for it."""

    def __init__(self, fallback: str) -> None:
        self._fallback = fit(fallback)
        self._taken: set[str] = set()

    def take(self, name: Any, row: int) -> str:
        """`name` with what cannot be in a key replaced by `_`, with `-ROW` behind it where it comes again.

        The first sample with a name has it plain. Without a name it is `FALLBACK-ROW`.
        """
        named = isinstance(name, (str, int)) and not isinstance(name, bool) and str(name)
        return self.unique(fit(str(name)) if named else f"{self._fallback}-{row:09d}", row)

    def unique(self, key: str, row: int) -> str:
        """`key`, with `-ROW` behind it where it comes again."""
        while key in self._taken:
            key = f"{key}-{row}"
        self._taken.add(key)
        return key


def fit(name: str) -> str:
    """`name` without what cannot be in a key, and not too long."""
    return _UNFIT.sub("_", name)[:_MAX_KEY]


def image_extension(payload: bytes, name: str | None = None) -> str:
    """The extension of an image: that of its file name if it is a known one, else what its first bytes say, else
    `jpg`."""
    stated = (name or "").rpartition(".")[2].lower()
    if stated in IMAGE_EXTENSIONS:
        return stated
    return next((extension for magic, extension in _MAGIC.items() if payload.startswith(magic)), "jpg")
