"""What every kind of input is to the rest: samples in order, a stamp, and single samples by row where it is no stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mmfilter.core.input.places import Stamp
from mmfilter.core.input.sample import RawSample
from mmfilter.errors import ShardError


@dataclass(frozen=True)
class InputOptions:
    """What has to be said about inputs that do not explain themselves."""

    caption: str = "auto"
    """Where the caption is (see `DecodeSettings`): of a parquet file, a column"""
    images: str | None = None
    """Folder or URL that the `image` of LLaVA JSON is relative to; None is the folder of the JSON"""
    allow_pipe: bool = False
    """Run `pipe:` inputs in a shell"""

    @classmethod
    def of_run(cls, settings: Mapping[str, Any]) -> InputOptions:
        """The options that a run was scored with, from the settings in its manifest; commands are not run again."""
        return cls(settings.get("caption") or "auto", settings.get("images"))

    def check_pipe(self, shard: str) -> None:
        """Raise `ShardError` unless commands are allowed."""
        if not self.allow_pipe:
            said = (
                "is a command and would run a shell; run it yourself and pipe its output in: COMMAND | mmfilter score -"
            )
            raise ShardError(shard, f"{said}, or allow it with --allow-pipe")


NO_OPTIONS = InputOptions()


class Source(Protocol):
    """One shard."""

    def stamp(self) -> Stamp:
        """What it is like now; raises `ShardError` when it is gone."""

    def samples(self, max_member_bytes: int) -> Iterator[RawSample]:
        """Its samples in order, in bounded memory; raises `ShardError` where it cannot be read to its end."""


class RowSource(Source, Protocol):
    """A shard that is no tar: its samples are made when they are asked for, and have no byte range."""

    def sample(self, row: int) -> RawSample:
        """One sample, the same as in `samples`; cheap for rows in ascending order. Raises `ShardError` when it is gone."""

    def close(self) -> None:
        """Let go of what `sample` holds open."""
