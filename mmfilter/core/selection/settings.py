"""What a selection is asked for."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from mmfilter.core.codes.duplicates import DuplicateSettings
from mmfilter.core.codes.index import On
from mmfilter.core.output.destination import Format, to_folder
from mmfilter.core.selection.choice import Top
from mmfilter.errors import SelectionError


@dataclass(frozen=True)
class SelectSettings:
    """What to keep, and how to write it."""

    top: str | None = None
    """Keep the best: a percentage of the candidates (`20%`) or a count (`5000`)"""
    min: float | None = None
    """Keep what scores at least this; with `top`, what meets both"""
    by: str = "similarity"
    """Column of the score table to rank by, or an SQL expression over its columns, in which rank(x) is x's percentile"""
    where: str | None = None
    """SQL condition over the score table; the rows that pass are the candidates"""
    metadata: tuple[str, ...] = ()
    """Parquet, CSV or JSON files with more columns for `by` and `where`, as paths or patterns"""
    dedup: float | None = None
    """Of candidates whose codes are at least this close only the best is kept; None keeps duplicates"""
    dedup_on: On = "both"
    """Which sides have to be that close (see `DuplicateSettings`)"""
    per: str | None = None
    """Column or expression: `top` holds within each of its values"""
    diverse: bool = False
    """Keep `top` samples that together cover all features, in place of the best"""
    match: Path | None = None
    """Keep `top` samples whose features are spread as in this run, in place of the best"""
    repeat: str | None = None
    """Column or expression: a kept sample is written as often as it says, rounded; not at all where that is 0 or there is no value"""
    dry_run: bool = False
    """Decide and count only, write nothing; with `output` also check that it could be written"""
    shuffle: int | None = None
    """Seed of a random output order; None keeps the order of the source"""
    format: Format = "shards"
    """`tar`: one tar; `keys`: one key a line; `datacomp`: a file `*.npy` or a new folder; the others: a new folder"""
    output: str | Path | None = None
    """The folder or file to write; None is stdout"""
    shard_size: int = 10_000
    """Samples an output shard"""

    def __post_init__(self) -> None:
        if self.top is None and self.min is None:
            more = "; to keep all that pass --where add --top 100%" if self.where else ""
            raise SelectionError(f"nothing says what to keep: give --top 20%, --top 5000 or --min 0.3{more}")
        if self.top is not None:
            Top.parse(self.top)
        if self.min is not None and not math.isfinite(self.min):
            raise SelectionError(f"--min is {self.min}; give a number")
        self._check_format()
        if self.output is not None and re.match(r"[a-z][a-z0-9+.-]+:/", str(self.output)):
            raise SelectionError(f"output {str(self.output)!r} is a URL; select into a local folder and upload that")
        if self.shard_size < 1:
            raise SelectionError(f"--shard-size is {self.shard_size}; at least 1 is needed")
        if self.shuffle is not None and self.shuffle < 0:
            raise SelectionError(f"--shuffle is {self.shuffle}; a seed from 0 is needed")
        if self.dedup is not None:
            DuplicateSettings(self.dedup, self.dedup_on)
        self._check_ways()

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

    def _check_format(self) -> None:
        if self.format not in get_args(Format):
            raise SelectionError(f"--format {self.format!r} is unknown; choose from {', '.join(get_args(Format))}")
        if self.to_folder and self.output is None and not self.dry_run:
            raise SelectionError(
                f"{self.format} cannot go to stdout: give a new folder with -o DIR, or --format tar or keys"
            )
        if self.format == "datacomp" and self.shuffle is not None:
            raise SelectionError("--format datacomp is sorted by uid, so --shuffle has nothing to do: leave it out")

    @property
    def to_folder(self) -> bool:
        """Whether a folder is written, with a table of all decisions, rather than one file."""
        return to_folder(self.format, self.output)
