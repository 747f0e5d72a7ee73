"""What a selection is asked for."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mmfilter.core.codes.duplicate_settings import DuplicateSettings, On
from mmfilter.core.output.formats import Format, to_folder
from mmfilter.core.selection.top import Top
from mmfilter.core.typed import check_fields, setting
from mmfilter.errors import SelectionError


@dataclass(frozen=True)
class ChoiceSettings:
    """What to keep."""

    GROUP: ClassVar[str] = "Choice"

    top: str | None = None
    """Keep the best: a share (20%) or a number (5000)"""
    min: float | None = None
    """Keep scores of at least this; with --top, what meets both"""
    by: str = "similarity"
    """Score column to rank by, or a formula: '0.7 * similarity + 0.3 * rank(saev)'"""
    where: str | None = None
    """SQL condition on the score table that candidates have to meet"""
    metadata: tuple[str, ...] = setting((), metavar="FILES")
    """Parquet, CSV or JSONL files with more columns for --where, --by, --per and --repeat; repeatable"""
    dedup: float | None = setting(None, metavar="COSINE")
    """Of candidates whose codes are at least this close keep only the best"""
    dedup_on: On = "both"
    """Which sides have to be that close"""
    per: str | None = setting(None, metavar="EXPR")
    """Apply --top within each value of this column or formula"""
    diverse: bool = False
    """Keep --top pairs that together cover all features, in place of the best"""
    match: Path | None = setting(None, metavar="TARGET_RUN")
    """Keep --top pairs that together resemble the data of this run, in place of the best"""
    repeat: str | None = setting(None, metavar="EXPR")
    """Write a kept pair as often as this column or formula says, rounded; not at all at 0 or without a value"""


@dataclass(frozen=True)
class SelectSettings(ChoiceSettings):
    """What to keep, and how to write it."""

    GROUP: ClassVar[str] = "Output"

    dry_run: bool = False
    """Print the funnel and write nothing; with -o also check that the output could be written"""
    shuffle: int | None = setting(None, metavar="SEED", least=0)
    """Shuffle the output with this seed (default: the order of the source)"""
    format: Format | None = None
    """What to write (default: shards into a folder, tar into a stream)"""
    output: str | Path | None = setting(None, flag="-o,--output")
    """Folder to write (a file for tar, keys and *.npy), or - for a stream on stdout"""
    shard_size: int = setting(10_000, least=1)
    """Samples in an output shard, parquet file or folder of images"""

    def __post_init__(self) -> None:
        if str(self.output) == "-":
            object.__setattr__(self, "output", None)
        if self.format is None:
            object.__setattr__(self, "format", "tar" if self.output is None else "shards")
        if self.top is None and self.min is None:
            more = "; to keep all that pass --where add --top 100%" if self.where else ""
            raise SelectionError(f"nothing says what to keep: give --top 20%, --top 5000 or --min 0.3{more}")
        if self.top is not None:
            Top.parse(self.top)
        if self.min is not None and not math.isfinite(self.min):
            raise SelectionError(f"--min is {self.min}; give a number")
        check_fields(self, SelectionError)
        if self.format == "datacomp" and self.shuffle is not None:
            raise SelectionError("--format datacomp is sorted by uid, so --shuffle has nothing to do: leave it out")
        if self.output is not None and re.match(r"[a-z][a-z0-9+.-]+:/", str(self.output)):
            raise SelectionError(f"output {str(self.output)!r} is a URL; select into a local folder and upload that")
        if self.dedup is not None:
            DuplicateSettings(self.dedup, self.dedup_on)
        self._check_ways()

    @property
    def form(self) -> Format:
        """The format that is written."""
        return self.format or "tar"

    def _check_ways(self) -> None:
        ways = [
            option
            for option, given in (
                ("--per", self.per is not None),
                ("--diverse", self.diverse),
                ("--match", self.match is not None),
            )
            if given
        ]
        if len(ways) > 1:
            raise SelectionError(f"{' and '.join(ways)} are different ways to choose; give one of them")
        if ways and self.top is None:
            raise SelectionError(f"{ways[0]} needs to know how many: add --top 20% or --top 5000")

    @property
    def misdirected(self) -> str | None:
        """Why the format cannot go where the output goes; None where it can."""
        if self.to_folder and self.output is None and not self.dry_run:
            return f"{self.form} cannot go to stdout: give a new folder with -o DIR, or --format tar or keys"
        return None

    @property
    def to_folder(self) -> bool:
        """Whether a folder is written, with a table of all decisions, rather than one file."""
        return to_folder(self.form, self.output)
