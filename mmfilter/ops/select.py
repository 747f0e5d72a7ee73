"""Select the best samples of a run and copy them out, byte for byte, in the format that a trainer reads.

Choosing reads one score column; copying moves byte ranges. Neither decodes a sample.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mmfilter import __version__
from mmfilter.core.codes.duplicate_settings import DuplicateSettings
from mmfilter.core.codes.rule import Deduplicator
from mmfilter.core.files import write_json
from mmfilter.core.input.remote import is_url
from mmfilter.core.output.destination import check_output, output_errors, stream
from mmfilter.core.output.repack import new_folder, write_tar
from mmfilter.core.output.source_check import check_sources
from mmfilter.core.output.tar_writer import write_all
from mmfilter.core.output.writers import FOLDER_WRITERS
from mmfilter.core.output.writers.datacomp import write_subset
from mmfilter.core.output.writers.kept import Kept
from mmfilter.core.progress import Progress, Silence
from mmfilter.core.run.database import in_memory
from mmfilter.core.run.decisions import Decisions, write_decisions
from mmfilter.core.run.directory import RunDirectory
from mmfilter.core.run.expressions import Expression
from mmfilter.core.run.members import Members
from mmfilter.core.run.score_tables import Column, ScoreTables
from mmfilter.core.selection.choice import Decision, choose, positions
from mmfilter.core.selection.funnel import Selection, counted, labels_of
from mmfilter.core.selection.matching import Covering
from mmfilter.core.selection.select_settings import SelectSettings
from mmfilter.core.selection.top import Top
from mmfilter.errors import SelectionError

MAX_COPIES = 1000
"""More of one sample is a column mistaken for one of repetitions"""


@dataclass(frozen=True)
class Chosen:
    """A decision on every row of a run, before anything is written."""

    tables: ScoreTables
    column: Column
    """What was ranked by"""
    decision: np.ndarray
    """(rows,) int8, a `Decision` each"""
    copies: np.ndarray | None
    """(rows,) how often each row is to be written; None: once"""
    selection: Selection
    order: np.ndarray
    """Output order of what is written"""
    duplicates: tuple[np.ndarray, np.ndarray] | None
    """(rows,) of which kept sample each row is a duplicate, and how similar; None where nobody asked"""

    @property
    def positions(self) -> np.ndarray:
        """Positions of what is written, in output order."""
        return positions(self.decision, self.copies)[self.order]

    def members(self) -> Members:
        """Where what is written is; raises `SelectionError` where a shard is not what was scored."""
        kept = self.decision == Decision.KEPT
        members = self.tables.members(kept, self.copies).take(self.order)
        check_sources(self.tables, kept)
        return members


def chosen(run: Path, settings: SelectSettings, progress: Progress) -> Chosen:
    """Decide on every row of a run; raises `SelectionError` and `RunError` for what cannot be."""
    tables = ScoreTables(RunDirectory(run), settings.metadata)
    if settings.output is not None:
        sources = [shard.source for shard in tables.shards]
        check_output(Path(settings.output), tables.run.path, sources, folder=settings.to_folder)
    column = tables.column(settings.by, settings.where)
    _check_count(settings, column)
    drop = None
    if settings.dedup is not None:
        duplicates = DuplicateSettings(settings.dedup, settings.dedup_on)
        rule = Deduplicator(tables, duplicates, progress, keep=not settings.dry_run)
        drop = _Drop(rule, column.values)
    parts = None if settings.per is None else tables.parts("--per", settings.per, column.passes)
    decision = choose(
        column,
        top=None if settings.top is None else Top.parse(settings.top),
        minimum=settings.min,
        first_by_key=tables.first_by_key,
        duplicates=drop,
        parts=parts,
        chooser=_chooser(settings, tables, column, progress),
    )
    copies = None if settings.repeat is None else _copies(settings.repeat, tables, decision)
    selection = counted(settings, tables, decision, column, parts, copies)
    order = _order(selection.written, settings.shuffle)
    return Chosen(tables, column, decision, copies, selection, order, None if drop is None else drop.named)


def select(
    run: Path,
    settings: SelectSettings,
    *,
    stdout: BinaryIO | None = None,
    progress: Progress | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> Selection:
    """Select from a run directory and write what is kept.

    `recipe`, where the selection follows one, is told in the manifest of a folder. `stdout` is a binary
    file with a descriptor, by default the process's own. A reader that closes it early is a normal end
    (`reader_closed`). Raises `SelectionError` before anything is written when the selection cannot be
    made: an unknown column, an expression that is not one, more asked for than there is, an output in the
    way, a source shard that is missing or has changed since it was scored.
    """
    if settings.misdirected:
        raise SelectionError(settings.misdirected)
    choice = chosen(run, settings, progress or Silence())
    if settings.dry_run and settings.output is None:
        return choice.selection  # the funnel needs no shard to be there
    if settings.format == "keys":
        return choice.selection if settings.dry_run else _write_keys(choice, stdout)
    members = None if settings.format == "datacomp" else choice.members()
    if settings.dry_run:
        return choice.selection
    about = _about(choice.selection, choice.tables, recipe)
    kept = Kept(choice.tables, choice.positions, settings.shard_size, about, members)
    if settings.to_folder:
        return _write_folder(choice, kept)
    if members is not None:
        return _write_tar(choice.selection, members, stdout)
    return _write_subset(choice.selection, kept, stdout)


def check_request(settings: SelectSettings) -> None:
    """Raise `SelectionError` or `RunError` for what can be seen before there are scores to select by.

    That is the form of the expressions, files that are not there, and a run to match that is not one; which
    columns there are is seen later.
    """
    if settings.match is not None:
        RunDirectory(settings.match).score_tables()
    for pattern in settings.metadata:
        if not is_url(pattern) and not os.path.exists(pattern) and not glob.glob(pattern, recursive=True):
            raise SelectionError(f"--metadata {pattern!r} matches no file; check the path")
    given = (("--by", settings.by), ("--per", settings.per), ("--repeat", settings.repeat))
    expressions = [
        Expression(option, text) for option, text in given if text is not None and not re.fullmatch(r"\w+", text)
    ]
    if settings.where is not None:
        expressions.append(Expression("--where", settings.where, condition=True))
    with in_memory() as database:
        for expression in expressions:
            expression.check_form(database)


def _check_count(settings: SelectSettings, column: Column) -> None:
    """A number of samples that are not there is refused; a share, or a number for each part, takes what there is."""
    count = None if settings.top is None or settings.per is not None else Top.parse(settings.top).count
    scored = int((column.present & column.passes).sum())
    if count is not None and count > scored:
        condition = f"--where {settings.where!r}"
        if not scored:
            raise SelectionError(
                f"no sample has a score {settings.by!r}"
                + ("" if settings.where is None else f" and passes {condition}")
            )
        which = f"have a score {settings.by!r}" + ("" if settings.where is None else f" and pass {condition}")
        raise SelectionError(
            f"--top {count} is more than there is: {scored:,} samples {which}; give a smaller number, or --top 100%"
        )


def _chooser(settings: SelectSettings, tables: ScoreTables, column: Column, progress: Progress) -> Covering | None:
    if not settings.diverse and settings.match is None:
        return None
    target = None if settings.match is None else ScoreTables(RunDirectory(settings.match))
    return Covering(tables, column.values, target, progress)


def _copies(repeat: str, tables: ScoreTables, decision: np.ndarray) -> np.ndarray:
    """(rows,) how often each kept row is to be written, 0 for the others; those with 0 are kept no longer."""
    values, present = tables.numbers("--repeat", repeat, decision == Decision.KEPT)
    rounded = np.floor(np.where(present, values, 0).astype(np.float64) + 0.5)
    if rounded.max(initial=0) > MAX_COPIES:
        raise SelectionError(
            f"--repeat {repeat!r} asks for {rounded.max():g} copies of a sample; up to {MAX_COPIES:,} are possible"
        )
    copies = np.maximum(rounded, 0).astype(np.int64)
    decision[(decision == Decision.KEPT) & (copies == 0)] = Decision.NO_COPY
    return copies


class _Drop:
    """The duplicates among the rows of a mask; remembers of which kept sample they are duplicates."""

    def __init__(self, rule: Deduplicator, values: np.ndarray) -> None:
        """`values` (rows,) rank the samples."""
        self._rule, self._values = rule, values
        self.named: tuple[np.ndarray, np.ndarray] | None = None

    def __call__(self, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        duplicates = self._rule(self._values, among)
        self.named = duplicates.of, duplicates.similarity
        return duplicates.exact, duplicates.near


def _order(n: int, seed: int | None) -> np.ndarray:
    """Output order of the kept samples; the generator's raw numbers never change between versions."""
    if seed is None:
        return np.arange(n)
    return np.argsort(np.random.PCG64(seed).random_raw(n), kind="stable")


# --- writing ---------------------------------------------------------------------------------


def _write_folder(choice: Chosen, kept: Kept) -> Selection:
    selection, settings, decision = choice.selection, choice.selection.settings, choice.decision
    place = Path(str(settings.output))
    with output_errors(place), new_folder(place) as folder:
        written = FOLDER_WRITERS[settings.form](folder, kept)
        output = None
        if written.number is not None:
            output = np.full(len(decision), -1, np.int32)
            first = choice.order < selection.kept  # of a sample's copies the one under its own key
            output[kept.positions[first]] = written.number[first]
        labels = [labels_of(settings).get(code) for code in Decision]
        decisions = Decisions(
            choice.column, decision, labels, output, written.name, choice.copies, duplicates=choice.duplicates
        )
        write_decisions(kept.tables, folder / "selection.parquet", decisions, kept.about)
        write_json(folder / "manifest.json", kept.about)
    return replace(
        selection,
        shards_written=written.n_shards,
        nbytes_written=written.nbytes,
        warnings=selection.warnings + written.warnings,
    )


def _about(selection: Selection, tables: ScoreTables, recipe: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "kind": "selection",
        "version": __version__,
        "run": str(tables.run.path.resolve()),
        "settings": asdict(selection.settings)
        | {
            "output": str(selection.settings.output),
            "match": None if selection.settings.match is None else str(selection.settings.match.resolve()),
        },
        "funnel": [{"step": step, "samples": n} for step, n in selection.funnel],
        "dropped": selection.dropped,
        "cut": selection.cut,
    } | ({} if recipe is None else {"recipe": dict(recipe)})


def _write_tar(selection: Selection, members: Members, stdout: BinaryIO | None) -> Selection:
    warnings = selection.warnings
    if repeats := members.n_adjacent_repeats():
        warnings += (
            f"input shards share keys: in {repeats:,} places two neighbours have one key, and readers merge them or "
            "stop; "
            "select into shards instead, which keeps them apart",
        )
    with stream(selection.settings.output, stdout) as fd:
        nbytes = write_tar(fd, members)
        return replace(selection, shards_written=1, nbytes_written=nbytes, warnings=warnings)
    return replace(selection, reader_closed=True, warnings=warnings)


def _write_keys(choice: Chosen, stdout: BinaryIO | None) -> Selection:
    nbytes = 0
    with stream(choice.selection.settings.output, stdout) as fd:
        for keys in choice.tables.keys(choice.positions):
            lines = "".join(f"{key}\n" for key in keys).encode()
            write_all(fd, lines)
            nbytes += len(lines)
        return replace(choice.selection, nbytes_written=nbytes)
    return replace(choice.selection, reader_closed=True)


def _write_subset(selection: Selection, kept: Kept, stdout: BinaryIO | None) -> Selection:
    with stream(selection.settings.output, stdout) as fd:
        written = write_subset(fd, kept)
        return replace(selection, nbytes_written=written.nbytes, warnings=selection.warnings + written.warnings)
    return replace(selection, reader_closed=True)
