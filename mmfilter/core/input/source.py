"""What every kind of input is to the rest: one shard, opened once at the door (`shards.open_sources`)."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mmfilter.core.input.places import Stamp
from mmfilter.core.input.remote import is_url, without_query
from mmfilter.core.input.sample import MAX_MEMBER_BYTES, RawSample
from mmfilter.core.typed import setting
from mmfilter.errors import ShardError

Kind = Literal["tar", "parquet", "llava-json", "folder", "pipe", "stdin"]


@dataclass(frozen=True)
class InputOptions:
    """What has to be said about inputs that do not explain themselves."""

    GROUP: ClassVar[str] = "Input"

    caption: str = "auto"
    """Where captions are: txt, conversations, a JSON field or parquet column, or auto"""
    images: str | None = setting(None, metavar="DIR")
    """Folder or URL of the images of LLaVA JSON (default: the JSON's own)"""
    allow_pipe: bool = False
    """Run pipe:COMMAND inputs in a shell and read the tars that they print"""

    @property
    def inputs(self) -> InputOptions:
        """These options alone, with a folder that means the same everywhere."""
        images = self.images if self.images is None or is_url(self.images) else os.path.abspath(self.images)
        return InputOptions(self.caption, images, self.allow_pipe)

    @classmethod
    def of_run(cls, settings: Mapping[str, Any]) -> InputOptions:
        """The options that a run was scored with, from the settings in its manifest; commands are not run again."""
        return cls(settings.get("caption") or "auto", settings.get("images"))

    def check_pipe(self, shard: str) -> None:
        """Raise `ShardError` unless commands are allowed."""
        if not self.allow_pipe:
            raise ShardError(
                shard,
                "is a command and would run a shell; run it yourself and pipe its output in: "
                "COMMAND | mmfilter score -, or allow it with --allow-pipe",
            )


NO_OPTIONS = InputOptions()


class Source(ABC):
    """One shard. Two sources of one path are equal: they are the same shard."""

    kind: ClassVar[Kind]

    def __init__(self, path: str) -> None:
        self.path = path
        """Absolute path, URL, `pipe:COMMAND` or `-`: what manifests, tables and messages call it"""
        self.remote = is_url(path)
        """Whether it is at a URL"""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Source) and other.path == self.path

    def __hash__(self) -> int:
        return hash(self.path)

    def __repr__(self) -> str:
        return f"<{self.kind} {self.path!r}>"

    @property
    def once(self) -> bool:
        """Whether it is a stream, which is gone when it has been read."""
        return self.kind in ("pipe", "stdin")

    @property
    def is_tar(self) -> bool:
        """Whether its samples are byte ranges of a tar."""
        return self.kind in ("tar", "pipe", "stdin")

    @property
    def stem(self) -> str:
        """What its tables in a run are called, unless another shard is called so too."""
        return re.sub(r"\.(tar|parquet|jsonl?)$", "", without_query(self.path).rstrip("/").rpartition("/")[2])

    @property
    def folder(self) -> str | None:
        """The local folder that it is in; None for what is somewhere else."""
        return os.path.dirname(self.path) if os.path.isabs(self.path) else None

    def holds(self, path: str | os.PathLike[str]) -> bool:
        """Whether something written to `path` would be written among the source's files."""
        return self.folder is not None and os.path.realpath(path) == os.path.realpath(self.folder)

    @abstractmethod
    def stamp(self) -> Stamp:
        """What it is like now; empty for a stream. Raises `ShardError` when it is gone."""

    @abstractmethod
    def samples(self, max_member_bytes: int = MAX_MEMBER_BYTES) -> Iterator[RawSample]:
        """Its samples in order, in bounded memory; raises `ShardError` where it cannot be read to its end."""


class RowSource(Source):
    """A shard that is not a tar: its samples are made when they are asked for, and have no byte range."""

    @abstractmethod
    def sample(self, row: int) -> RawSample:
        """One sample, the same as in `samples`; cheap for rows in ascending order. Raises `ShardError` when it is
        gone."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what `sample` holds open."""
