"""Select the best samples of a run and copy them out, byte for byte, in the format that a trainer reads.

Choosing reads one score column; copying moves byte ranges. Neither decodes a sample.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, get_args

import numpy as np

from mmfilter import __version__
from mmfilter.core.codes.duplicates import SAME, DuplicateSettings
from mmfilter.core.codes.index import On
from mmfilter.core.codes.matching import Covering
from mmfilter.core.codes.rule import Deduplicator
from mmfilter.core.data import artifacts
from mmfilter.core.data.artifacts import RunDirectory
from mmfilter.core.data.choice import Decision, Top, choose, positions, quotas
from mmfilter.core.data.destination import Format, check_output, explained, stream, to_folder
from mmfilter.core.data.progress import Progress, Silence
from mmfilter.core.data.repack import Members, new_folder, write_tar
from mmfilter.core.data.score_tables import Column, ScoreTables
from mmfilter.core.data.shard_writer import write_all
from mmfilter.core.data.source_check import check_sources
from mmfilter.core.data.writers import FOLDER_WRITERS
from mmfilter.core.data.writers.datacomp import write_subset
from mmfilter.core.data.writers.kept import Kept
from mmfilter.errors import SelectionError

MAX_COPIES = 1000
"""More of one sample is a column mistaken for one of repetitions"""


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
        if self.min is not None and self.min != self.min:
            raise SelectionError("--min is nan; give a number")
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
        ways = [option for option, given in (("--per", self.per is not None), ("--diverse", self.diverse), ("--match", self.match is not None)) if given]
        if len(ways) > 1:
            raise SelectionError(f"{' and '.join(ways)} are different ways to choose; give one of them")
        if ways and self.top is None:
            raise SelectionError(f"{ways[0]} needs to know how many: add --top 20% or --top 5000")

    def _check_format(self) -> None:
        if self.format not in get_args(Format):
            raise SelectionError(f"--format {self.format!r} is unknown; choose from {', '.join(get_args(Format))}")
        if self.to_folder and self.output is None and not self.dry_run:
            raise SelectionError(f"{self.format} cannot go to stdout: give a new folder with -o DIR, or --format tar or keys")
        if self.format == "datacomp" and self.shuffle is not None:
            raise SelectionError("--format datacomp is sorted by uid, so --shuffle has nothing to do: leave it out")

    @property
    def to_folder(self) -> bool:
        """Whether a folder is written, with a table of all decisions, rather than one file."""
        return to_folder(self.format, self.output)


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
    """Different samples"""
    written: int
    """Samples with their repetitions"""
    asked: int | None
    """Samples that `top` asks for; fewer are kept where too few have a score or reach `min`"""
    n_parts: int | None
    """Values of `per` among the candidates"""
    cut: float | None
    """Lowest score kept"""
    dropped: dict[str, int]
    """Reason -> samples"""
    shards_written: int = 0
    """Tars, parquet files or folders of images written"""
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
        chosen = self.kept + self.dropped.get(_labels(settings)[Decision.NO_COPY], 0)
        fewer = f", of {self.asked:,} asked for" if self.asked is not None and chosen < self.asked else ""
        steps.append((_way(settings, self.n_parts) + fewer, chosen))
        if settings.repeat is not None:
            steps.append((f"at least once by --repeat {settings.repeat!r}", self.kept))
            steps.append(("with their repetitions", self.written))
        return steps


def select(
    run: Path, settings: SelectSettings, *, stdout: BinaryIO | None = None, progress: Progress | None = None, recipe: Mapping[str, Any] | None = None
) -> Selection:
    """Select from a run directory and write what is kept.

    `recipe`, where the selection follows one, is told in the manifest of a folder. `stdout` is a binary
    file with a descriptor, by default the process's own. A reader that closes it early is a normal end
    (`reader_closed`). Raises `SelectionError` before anything is written when the selection cannot be
    made: an unknown column, an expression that is none, more asked for than there is, an output in the
    way, a source shard that is missing or has changed since it was scored.
    """
    tables = ScoreTables(RunDirectory(run), settings.metadata)
    progress = progress or Silence()
    if settings.output is not None:
        check_output(Path(settings.output), settings.to_folder, tables)
    column = tables.column(settings.by, settings.where)
    _check_count(settings, column)
    drop = None if settings.dedup is None else _Drop(tables, settings, column.values, progress)
    parts = None if settings.per is None else tables.parts("--per", settings.per, column.passes)
    decision = choose(
        column.values, column.present, column.passes, top=None if settings.top is None else Top.parse(settings.top), minimum=settings.min,
        first_by_key=tables.first_by_key, duplicates=drop, parts=parts, chooser=_chooser(settings, tables, column, progress),
    )  # fmt: skip
    copies = None if settings.repeat is None else _copies(settings.repeat, tables, decision)
    selection = _counted(settings, tables, decision, column, parts, copies)
    order = _order(selection.written, settings.shuffle)
    if settings.dry_run and settings.output is None:
        return selection  # the funnel needs no shard to be there
    if settings.format == "keys":
        return selection if settings.dry_run else _write_keys(selection, tables, positions(decision, copies)[order], stdout)
    members = None
    if settings.format != "datacomp":
        members = tables.members(decision == Decision.KEPT, copies).take(order)
        check_sources(tables, decision == Decision.KEPT)
    if settings.dry_run:
        return selection
    kept = Kept(tables, positions(decision, copies)[order], settings.shard_size, _about(selection, tables, recipe), members)
    if settings.to_folder:
        return _write_folder(selection, kept, column, decision, order, drop, copies)
    return _write_tar(selection, members, stdout) if settings.format == "tar" else _write_subset(selection, kept, stdout)


def _check_count(settings: SelectSettings, column: Column) -> None:
    """A number of samples that are not there is refused; a share, or a number for each part, takes what there is."""
    count = None if settings.top is None or settings.per is not None else Top.parse(settings.top).count
    there = int((column.present & column.passes).sum())
    if count is not None and count > there:
        which = f"have a score {settings.by!r}" + ("" if settings.where is None else f" and pass --where {settings.where!r}")
        raise SelectionError(f"--top {count} is more than there is: {there:,} samples {which}; give a smaller number, or --top 100%")


def _chooser(settings: SelectSettings, tables: ScoreTables, column: Column, progress: Progress) -> Covering | None:
    if not settings.diverse and settings.match is None:
        return None
    target = None if settings.match is None else ScoreTables(RunDirectory(settings.match))
    return Covering(tables, column.values, target, progress)


def _copies(repeat: str, tables: ScoreTables, decision: np.ndarray) -> np.ndarray:
    """(rows,) how often each kept row is to be written, 0 for the others; those with 0 are kept no longer."""
    values, present = tables.numbers("--repeat", repeat, decision == Decision.KEPT)
    wanted = np.floor(np.where(present, values, 0).astype(np.float64) + 0.5)
    if wanted.max(initial=0) > MAX_COPIES:
        raise SelectionError(f"--repeat {repeat!r} asks for {wanted.max():g} copies of a sample; up to {MAX_COPIES:,} are possible")
    copies = np.maximum(wanted, 0).astype(np.int64)
    decision[(decision == Decision.KEPT) & (copies == 0)] = Decision.NO_COPY
    return copies


class _Drop:
    """The duplicates among the rows of a mask; remembers of which kept sample they are duplicates."""

    def __init__(self, tables: ScoreTables, settings: SelectSettings, values: np.ndarray, progress: Progress) -> None:
        self._rule = Deduplicator(tables, DuplicateSettings(settings.dedup, settings.dedup_on), progress, keep=not settings.dry_run)
        self._values = values
        self.named: tuple[np.ndarray, np.ndarray] | None = None

    def __call__(self, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = self._rule(self._values, among)
        self.named = found.of, found.similarity
        return found.exact, found.near


# --- counting --------------------------------------------------------------------------------


def _counted(
    settings: SelectSettings, tables: ScoreTables, decision: np.ndarray, column: Column, parts: np.ndarray | None, copies: np.ndarray | None
) -> Selection:
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
        written=counts[Decision.KEPT] if copies is None else int(copies.sum()),
        asked=_asked(settings, candidates, parts),
        n_parts=None if parts is None else int(parts.max(initial=-1)) + 1,
        cut=float(column.values[decision == Decision.KEPT].min()) if counts[Decision.KEPT] else None,
        dropped={label: n for label, n in dropped.items() if n},
        warnings=(*_unfinished(tables), *tables.notes),
    )


def _asked(settings: SelectSettings, candidates: int, parts: np.ndarray | None) -> int | None:
    top = None if settings.top is None else Top.parse(settings.top)
    if top is None or (parts is not None and top.count is not None):
        return None
    return top.of(candidates) if parts is None else int(quotas(top, parts[parts >= 0]).sum())


def _way(settings: SelectSettings, n_parts: int | None) -> str:
    """How the last step chooses, in words."""
    if settings.top is None:
        return "kept"
    if settings.per is not None:
        return f"kept by --top {settings.top} in each of {n_parts:,} groups of --per {settings.per!r}"
    return f"kept by --top {settings.top}" + (" --diverse" if settings.diverse else f" --match {str(settings.match)!r}" if settings.match else "")


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
        Decision.NOT_CHOSEN: "not chosen by --diverse" if settings.diverse else "not chosen by --match",
        Decision.NO_COPY: f"written 0 times by --repeat {settings.repeat!r}",
    }


def _unfinished(tables: ScoreTables) -> tuple[str, ...]:
    n = len(artifacts.read_json(tables.run.manifest)["inputs"]) - len(tables.shards)
    return (f"shards of the run that are not scored yet and take no part: {n:,}",) if n > 0 else ()


def _order(n: int, seed: int | None) -> np.ndarray:
    """Output order of the kept samples; the generator's raw numbers never change between versions."""
    if seed is None:
        return np.arange(n)
    return np.argsort(np.random.PCG64(seed).random_raw(n), kind="stable")


# --- writing ---------------------------------------------------------------------------------


def _write_folder(
    selection: Selection, kept: Kept, column: Column, decision: np.ndarray, order: np.ndarray, drop: _Drop | None, copies: np.ndarray | None
) -> Selection:
    settings = selection.settings
    with explained(settings.output), new_folder(Path(settings.output)) as folder:
        written = FOLDER_WRITERS[settings.format](folder, kept)
        output = None
        if written.number is not None:
            output = np.full(len(decision), -1, np.int32)
            first = order < selection.kept  # of a sample's copies the one under its own key
            output[kept.positions[first]] = written.number[first]
        labels = [_labels(settings).get(code) for code in Decision]
        kept.tables.write_decisions(
            folder / "selection.parquet", column, decision, labels=labels, metadata=kept.about,
            output=output, output_name=written.name, copies=copies, duplicates=None if drop is None else drop.named,
        )  # fmt: skip
        artifacts.write_json(folder / "manifest.json", kept.about)
    return replace(selection, shards_written=written.n_shards, nbytes_written=written.nbytes, warnings=selection.warnings + written.warnings)


def _about(selection: Selection, tables: ScoreTables, recipe: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "kind": "selection",
        "version": __version__,
        "run": str(tables.run.path.resolve()),
        "settings": asdict(selection.settings)
        | {"output": str(selection.settings.output), "match": None if selection.settings.match is None else str(selection.settings.match.resolve())},
        "funnel": [{"step": step, "samples": n} for step, n in selection.funnel],
        "dropped": selection.dropped,
        "cut": selection.cut,
    } | ({} if recipe is None else {"recipe": dict(recipe)})


def _write_tar(selection: Selection, members: Members, stdout: BinaryIO | None) -> Selection:
    warnings = selection.warnings
    if repeats := members.n_adjacent_repeats():
        warnings += (
            f"input shards share keys: in {repeats:,} places two neighbours have one key, and readers merge them or stop; "
            "select into shards instead, which keeps them apart",
        )
    with stream(selection.settings.output, stdout) as fd:
        nbytes = write_tar(fd, members)
        return replace(selection, shards_written=1, nbytes_written=nbytes, warnings=warnings)
    return replace(selection, reader_closed=True, warnings=warnings)


def _write_keys(selection: Selection, tables: ScoreTables, positions: np.ndarray, stdout: BinaryIO | None) -> Selection:
    nbytes = 0
    with stream(selection.settings.output, stdout) as fd:
        for keys in tables.keys(positions):
            lines = "".join(f"{key}\n" for key in keys).encode()
            write_all(fd, lines)
            nbytes += len(lines)
        return replace(selection, nbytes_written=nbytes)
    return replace(selection, reader_closed=True)


def _write_subset(selection: Selection, kept: Kept, stdout: BinaryIO | None) -> Selection:
    with stream(selection.settings.output, stdout) as fd:
        written = write_subset(fd, kept)
        return replace(selection, nbytes_written=written.nbytes, warnings=selection.warnings + written.warnings)
    return replace(selection, reader_closed=True)
