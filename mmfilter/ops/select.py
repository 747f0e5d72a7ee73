"""Select the best samples of a run and copy them out, byte for byte: shards, one tar, or keys.

Choosing reads one score column; copying moves byte ranges. Neither decodes a sample.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np

from mmfilter import __version__
from mmfilter.core.codes.duplicates import SAME, DuplicateSettings
from mmfilter.core.codes.index import On
from mmfilter.core.codes.rule import Deduplicator
from mmfilter.core.data import artifacts
from mmfilter.core.data.artifacts import RunDirectory
from mmfilter.core.data.choice import Decision, Top, choose
from mmfilter.core.data.progress import Progress, Silence
from mmfilter.core.data.repack import Members, new_folder, write_shards, write_tar
from mmfilter.core.data.run import in_source
from mmfilter.core.data.score_tables import ScoreTables
from mmfilter.core.data.shard_writer import write_all
from mmfilter.core.data.shards import STDIN, read_once, stamp
from mmfilter.errors import SelectionError, ShardError

Format = Literal["shards", "tar", "keys"]


@dataclass(frozen=True)
class SelectSettings:
    """What to keep, and how to write it."""

    top: str | None = None
    """Keep the best: a percentage of the candidates (`20%`) or a count (`5000`)"""
    min: float | None = None
    """Keep what scores at least this; with `top`, what meets both"""
    by: str = "similarity"
    """Column of the score table to rank by"""
    where: str | None = None
    """SQL condition over the score table; the rows that pass are the candidates"""
    metadata: tuple[str, ...] = ()
    """Parquet, CSV or JSON files with more columns for `by` and `where`, as paths or patterns"""
    dedup: float | None = None
    """Of candidates whose codes are at least this close only the best is kept; None keeps duplicates"""
    dedup_on: On = "both"
    """Which sides have to be that close (see `DuplicateSettings`)"""
    shuffle: int | None = None
    """Seed of a random output order; None keeps the order of the source"""
    format: Format = "shards"
    """`shards`: a new folder; `tar`: one tar; `keys`: one key a line"""
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
        if self.min is not None and self.min != self.min:
            raise SelectionError("--min is nan; give a number")
        if self.format not in get_args(Format):
            raise SelectionError(f"--format {self.format!r} is unknown; choose from {', '.join(get_args(Format))}")
        if self.format == "shards" and self.output is None:
            raise SelectionError("shards cannot go to stdout: give a new folder with -o DIR, or --format tar or keys")
        if self.output is not None and re.match(r"[a-z][a-z0-9+.-]+:/", str(self.output)):
            raise SelectionError(f"output {str(self.output)!r} is a URL; select into a local folder and upload that")
        if self.shard_size < 1:
            raise SelectionError(f"--shard-size is {self.shard_size}; at least 1 is needed")
        if self.shuffle is not None and self.shuffle < 0:
            raise SelectionError(f"--shuffle is {self.shuffle}; a seed from 0 is needed")
        if self.dedup is not None:
            DuplicateSettings(self.dedup, self.dedup_on)


@dataclass(frozen=True)
class Selection:
    """What was selected and written."""

    settings: SelectSettings
    rows: int
    """Samples in the run, bad ones too"""
    candidates: int
    """… of these that pass `where`"""
    scored: int
    """… of these that have a score"""
    at_least_min: int
    """… of these that score at least `min`"""
    not_exact: int
    """… of these without exact duplicates"""
    not_near: int
    """… of these without near-duplicates"""
    kept: int
    asked: int | None
    """Samples that `top` asks for; fewer are kept where too few have a score or reach `min`"""
    cut: float | None
    """Lowest score kept"""
    dropped: dict[str, int]
    """Reason -> samples"""
    shards_written: int = 0
    """Tars written"""
    nbytes_written: int = 0
    reader_closed: bool = False
    """The reader of the stream stopped early, as `head` does"""
    warnings: tuple[str, ...] = ()

    @property
    def fraction_kept(self) -> float:
        """Of the candidates."""
        return self.kept / self.candidates if self.candidates else 0.0

    @property
    def funnel(self) -> list[tuple[str, int]]:
        """What is left after each step, first step first."""
        settings = self.settings
        steps = [("in the run", self.rows)]
        if settings.where is not None:
            steps.append((f"pass --where {settings.where!r}", self.candidates))
        steps.append((f"have a score {settings.by!r}", self.scored))
        if settings.min is not None:
            steps.append((f"at least --min {settings.min}", self.at_least_min))
        if settings.dedup is not None:
            steps.append((f"without exact duplicates ({SAME[settings.dedup_on]})", self.not_exact))
            steps.append((f"without near-duplicates (--dedup {settings.dedup})", self.not_near))
        fewer = f", of {self.asked:,} asked for" if self.asked is not None and self.kept < self.asked else ""
        steps.append((("kept" if settings.top is None else f"kept by --top {settings.top}") + fewer, self.kept))
        return steps


def select(run: Path, settings: SelectSettings, *, stdout: BinaryIO | None = None, progress: Progress | None = None) -> Selection:
    """Select from a run directory and write what is kept.

    `stdout` is a binary file with a descriptor, by default the process's own. A reader that closes
    it early is a normal end (`reader_closed`). Raises `SelectionError` before anything is written
    when the selection cannot be made: an unknown column, a condition that is none, an output in the
    way, a source shard that is missing or has changed since it was scored.
    """
    tables = ScoreTables(RunDirectory(run), settings.metadata)
    if settings.output is not None:
        with _explained(settings.output):
            _check_output(Path(settings.output), settings.format, tables)
    column = tables.column(settings.by, settings.where)
    top = None if settings.top is None else Top.parse(settings.top)
    drop = None if settings.dedup is None else _Drop(tables, settings, column.values, progress or Silence())
    decision = choose(column.values, column.present, column.passes, top=top, minimum=settings.min, first_by_key=tables.first_by_key, duplicates=drop)
    selection = _counted(settings, tables, decision, column.values)
    if settings.format == "keys":
        return _write_keys(selection, tables, decision, stdout)
    members = tables.members(decision == Decision.KEPT)
    _check_sources(members, tables)
    order = _order(len(members), settings.shuffle)
    if settings.format == "tar":
        return _write_tar(selection, members.take(order), stdout)
    return _write_folder(selection, tables, decision, members.take(order), order, drop)


class _Drop:
    """The duplicates among the rows of a mask; remembers of which kept sample they are duplicates."""

    def __init__(self, tables: ScoreTables, settings: SelectSettings, values: np.ndarray, progress: Progress) -> None:
        self._rule = Deduplicator(tables, DuplicateSettings(settings.dedup, settings.dedup_on), progress)
        self._values = values
        self.named: tuple[np.ndarray, np.ndarray] | None = None

    def __call__(self, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = self._rule(self._values, among)
        self.named = found.of, found.similarity
        return found.exact, found.near


# --- counting --------------------------------------------------------------------------------


def _counted(settings: SelectSettings, tables: ScoreTables, decision: np.ndarray, values: np.ndarray) -> Selection:
    counts = dict(zip(Decision, np.bincount(decision, minlength=len(Decision)).tolist(), strict=True))
    candidates = tables.rows - counts[Decision.NOT_IN_WHERE]
    scored = candidates - counts[Decision.NO_SCORE]
    at_least_min = scored - counts[Decision.BELOW_MIN]
    not_exact = at_least_min - counts[Decision.EXACT_DUPLICATE]
    dropped = {label: counts[code] for code, label in _labels(settings).items() if code != Decision.NO_SCORE}
    if counts[Decision.NO_SCORE]:
        label = _labels(settings)[Decision.NO_SCORE]
        dropped |= {label + kind: n for kind, n in tables.reasons(decision == Decision.NO_SCORE).items()}
    return Selection(
        settings,
        rows=tables.rows,
        candidates=candidates,
        scored=scored,
        at_least_min=at_least_min,
        not_exact=not_exact,
        not_near=not_exact - counts[Decision.NEAR_DUPLICATE],
        kept=counts[Decision.KEPT],
        asked=None if settings.top is None else Top.parse(settings.top).of(candidates),
        cut=float(values[decision == Decision.KEPT].min()) if counts[Decision.KEPT] else None,
        dropped={label: n for label, n in dropped.items() if n},
        warnings=(*_unfinished(tables), *tables.notes),
    )


def _labels(settings: SelectSettings) -> dict[Decision, str]:
    """Why a row is dropped; the reason of the score table follows after a colon."""
    return {
        Decision.NOT_IN_WHERE: "not in --where",
        Decision.NO_SCORE: "no score: ",
        Decision.BELOW_MIN: f"below --min {settings.min}" if settings.min is not None else "below --min",
        Decision.BELOW_CUT: "below the cut",
        Decision.TIED: "at the cut, after others by key",
        Decision.EXACT_DUPLICATE: f"exact duplicate ({SAME[settings.dedup_on]})",
        Decision.NEAR_DUPLICATE: f"near-duplicate at --dedup {settings.dedup}",
    }


def _unfinished(tables: ScoreTables) -> tuple[str, ...]:
    n = len(artifacts.read_json(tables.run.manifest)["inputs"]) - len(tables.shards)
    return (f"shards of the run that are not scored yet and take no part: {n:,}",) if n > 0 else ()


def _order(n: int, seed: int | None) -> np.ndarray:
    """Output order of the kept samples; the generator's raw numbers never change between versions."""
    if seed is None:
        return np.arange(n)
    return np.argsort(np.random.PCG64(seed).random_raw(n), kind="stable")


# --- checks before anything is written -------------------------------------------------------


def _check_output(output: Path, format: Format, tables: ScoreTables) -> None:
    real, run = output.resolve(), tables.run.path.resolve()
    if real == run or run in real.parents:
        raise SelectionError(f"output {str(output)!r} is in the run directory {str(tables.run.path)!r}; write beside it")
    if format == "shards":
        if any(in_source(real, shard.path) for shard in tables.shards):
            raise SelectionError(f"output {str(output)!r} holds shards of the input; name a new folder")
        if real.exists() and (not real.is_dir() or any(real.iterdir())):
            what = "is not empty" if real.is_dir() else "is a file"
            raise SelectionError(f"output {str(output)!r} {what}; name a new folder, or delete it first")
    elif real.exists():
        raise SelectionError(f"output {str(output)!r} exists already; name a new file, or delete it first")


def _check_sources(members: Members, tables: ScoreTables) -> None:
    """Raise `SelectionError` unless every shard that is copied from is as it was when it was scored."""
    for i in np.unique(members.source).tolist():
        shard = tables.shards[i]
        if read_once(shard.path):
            what = "stdin" if shard.path == STDIN else f"the command {shard.path!r}"
            raise SelectionError(f"run {str(tables.run.path)!r} was scored from {what}, so there is no shard to copy from; use --format keys")
        try:
            same = stamp(shard.path) == shard.stamp
        except ShardError as error:
            raise SelectionError(f"{error}; put it back, or score the input again") from error
        if not same:
            raise SelectionError(f"shard {shard.path!r} has changed since it was scored, its byte ranges may be wrong; score it again")


# --- writing ---------------------------------------------------------------------------------


def _write_folder(selection: Selection, tables: ScoreTables, decision: np.ndarray, members: Members, order: np.ndarray, drop: _Drop | None) -> Selection:
    settings = selection.settings
    with _explained(settings.output), new_folder(Path(settings.output)) as folder:
        shards = write_shards(folder, members, settings.shard_size)
        output = np.full(len(decision), -1, np.int32)
        output[np.flatnonzero(decision == Decision.KEPT)[order]] = shards.number
        about = _about(selection, tables)
        labels = [_labels(settings).get(code) for code in Decision]
        named = None if drop is None else drop.named
        tables.write_decisions(folder / "selection.parquet", settings.by, decision, labels=labels, metadata=about, output=output, duplicates=named)
        artifacts.write_json(folder / "manifest.json", about)
    warnings = selection.warnings
    if shards.n_early:
        warnings += (f"input shards share keys: {shards.n_early:,} output shards end early, so that keys are unique in each",)
    return replace(selection, shards_written=shards.n_shards, nbytes_written=shards.nbytes, warnings=warnings)


def _about(selection: Selection, tables: ScoreTables) -> dict[str, Any]:
    return {
        "kind": "selection",
        "version": __version__,
        "run": str(tables.run.path.resolve()),
        "settings": asdict(selection.settings) | {"output": str(selection.settings.output)},
        "funnel": [{"step": step, "samples": n} for step, n in selection.funnel],
        "dropped": selection.dropped,
        "cut": selection.cut,
    }


def _write_tar(selection: Selection, members: Members, stdout: BinaryIO | None) -> Selection:
    warnings = selection.warnings
    if repeats := members.n_adjacent_repeats():
        warnings += (
            f"input shards share keys: in {repeats:,} places two neighbours have one key, and readers merge them or stop; "
            "select into shards instead, which keeps them apart",
        )
    with _stream(selection.settings.output, stdout) as fd:
        nbytes = write_tar(fd, members)
        return replace(selection, shards_written=1, nbytes_written=nbytes, warnings=warnings)
    return replace(selection, reader_closed=True, warnings=warnings)


def _write_keys(selection: Selection, tables: ScoreTables, decision: np.ndarray, stdout: BinaryIO | None) -> Selection:
    rank = np.full(len(decision), -1, np.int64)
    order = _order(selection.kept, selection.settings.shuffle)
    rank[np.flatnonzero(decision == Decision.KEPT)[order]] = np.arange(selection.kept)
    nbytes = 0
    with _stream(selection.settings.output, stdout) as fd:
        for keys in tables.keys(rank, in_order=selection.settings.shuffle is None):
            lines = "".join(f"{key}\n" for key in keys).encode()
            write_all(fd, lines)
            nbytes += len(lines)
        return replace(selection, nbytes_written=nbytes)
    return replace(selection, reader_closed=True)


@contextmanager
def _stream(output: str | Path | None, stdout: BinaryIO | None) -> Iterator[int]:
    """The file descriptor to write to. A reader of stdout that goes away ends the block, quietly."""
    if output is not None:
        with _explained(output), artifacts.atomic(Path(output)) as temporary, open(temporary, "wb") as file:
            yield file.fileno()
        return
    file = sys.stdout.buffer if stdout is None else stdout
    with _explained("stdout"), suppress(BrokenPipeError):
        file.flush()
        yield file.fileno()


@contextmanager
def _explained(output: Path | str) -> Iterator[None]:
    """What the system says against writing, as a `SelectionError`."""
    try:
        yield
    except OSError as error:
        raise SelectionError(f"output {str(output)!r} cannot be written: {error.strerror or error}") from error
