"""Find exact and near duplicates in a run: which sample of each is kept, and which are dropped for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmfilter import __version__
from mmfilter.core.codes.duplicate_settings import SAME
from mmfilter.core.codes.duplicates import Pairs
from mmfilter.core.codes.rule import Deduplicator, Duplicates
from mmfilter.core.files import atomic, system_reason
from mmfilter.core.pages.gallery import Shown, Tile, write_page
from mmfilter.core.progress import Progress
from mmfilter.core.run.decisions import Decisions, write_decisions
from mmfilter.core.run.directory import RunDirectory
from mmfilter.core.run.previews import Preview, previews, problems
from mmfilter.core.run.score_tables import Column, ScoreTables
from mmfilter.core.selection.choice import Decision
from mmfilter.errors import RunError
from mmfilter.ops.dedup_settings import DedupSettings


@dataclass(frozen=True)
class BorderlinePair:
    """Two samples whose similarity is near the threshold."""

    similarity: float
    image: float
    """Cosine of the image sides"""
    text: float
    key: str
    shard: str
    row: int
    caption: str | None
    """Read again from the shard; None where that cannot be read"""
    other_key: str
    other_shard: str
    other_row: int
    other_caption: str | None


@dataclass(frozen=True)
class DedupSummary:
    """What came of it; the decision on every row is in `dedup.parquet` of the run."""

    run: Path
    settings: DedupSettings
    rows: int
    """Samples in the run, bad ones too"""
    scored: int
    """… that have the score to rank by"""
    exact: int
    """… of these dropped as exact duplicates"""
    near: int
    """… of these dropped as near-duplicates"""
    pairs: int
    """Pairs of different samples at or above the threshold"""
    crowded: int
    """Samples with more neighbours than are listed; they were compared with the kept ones directly"""
    index: dict[str, Any]
    """How the pairs were searched"""
    borderline: tuple[BorderlinePair, ...] = ()

    @property
    def kept(self) -> int:
        return self.scored - self.exact - self.near

    @property
    def funnel(self) -> list[tuple[str, int]]:
        """What is left after each step, first step first."""
        return [
            ("in the run", self.rows),
            (f"have a score {self.settings.by!r}", self.scored),
            (f"without exact duplicates ({SAME[self.settings.on]})", self.scored - self.exact),
            (f"without near-duplicates at {self.settings.threshold}", self.kept),
        ]


def dedup(run: Path, settings: DedupSettings, progress: Progress) -> DedupSummary:
    """Decide on every sample of a run and write `dedup.parquet` there, with the pairs it rests on.

    Pairs that were searched before are used again when they go down to the threshold. Raises
    `RunError` for a run without scores or codes, `SelectionError` for a column that is not there or not numeric.
    """
    scores = ScoreTables(RunDirectory(run))
    column = scores.column(settings.by)
    if not scores.run.writable:
        raise RunError(
            f"run {str(run)!r} cannot be written, and its decisions belong there; copy it, or use mmfilter select "
            "--dedup"
        )
    rule = Deduplicator(scores, settings, progress)
    duplicates = rule(column.values, column.present)
    close = rule.pairs.at_least(settings.threshold)
    summary = DedupSummary(
        run,
        settings,
        scores.rows,
        int(column.present.sum()),
        int(duplicates.exact.sum()),
        int(duplicates.near.sum()),
        len(close),
        len(close.crowded),
        rule.pairs.index,
        _borderline(scores, rule.pairs, settings, progress),
    )
    _write(scores, duplicates, column, summary)
    return summary


def _write(scores: ScoreTables, duplicates: Duplicates, column: Column, summary: DedupSummary) -> None:
    settings = summary.settings
    decision = np.where(
        duplicates.exact, Decision.EXACT_DUPLICATE, np.where(duplicates.near, Decision.NEAR_DUPLICATE, Decision.KEPT)
    ).astype(np.int8)
    decision[~column.present] = Decision.NO_SCORE
    labels = ["" if code else None for code in Decision]
    labels[Decision.NO_SCORE] = "no score: "
    labels[Decision.EXACT_DUPLICATE] = f"exact duplicate ({SAME[settings.on]})"
    labels[Decision.NEAR_DUPLICATE] = f"near-duplicate at {settings.threshold}"
    shown = ("borderline", "page")  # decide nothing
    about = {
        "kind": "dedup",
        "version": __version__,
        "settings": {name: value for name, value in settings.stored().items() if name not in shown},
        "rows": summary.rows,
        "scored": summary.scored,
        "exact": summary.exact,
        "near": summary.near,
        "kept": summary.kept,
    }
    try:
        with atomic(scores.run.dedup) as temporary:
            decisions = Decisions(column, decision, labels, duplicates=(duplicates.of, duplicates.similarity))
            write_decisions(scores, temporary, decisions, about)
    except OSError as error:
        raise RunError(f"{str(scores.run.dedup)!r} cannot be written: {system_reason(error)}") from error


def _borderline(
    scores: ScoreTables, pairs: Pairs, settings: DedupSettings, progress: Progress
) -> tuple[BorderlinePair, ...]:
    at = pairs.borderline(settings.threshold, settings.borderline)
    positions = np.unique(np.concatenate([pairs.first[at], pairs.second[at]]))
    names, samples = scores.names_of(positions), previews(scores, positions)
    for problem in problems(samples)[:3]:
        progress.note(f"no caption: {problem}")
    borderline, shown = [], []
    for i in at.tolist():
        one, other = (int(np.searchsorted(positions, p)) for p in (pairs.first[i], pairs.second[i]))
        borderline.append(
            BorderlinePair(
                similarity=float(pairs.similarity[i]),
                image=float(pairs.image[i]),
                text=float(pairs.text[i]),
                key=names["key"][one],
                shard=names["shard"][one],
                row=int(names["row"][one]),
                caption=samples[one].caption,
                other_key=names["key"][other],
                other_shard=names["shard"][other],
                other_row=int(names["row"][other]),
                other_caption=samples[other].caption,
            )
        )
        shown.append((samples[one], samples[other]))
    if settings.page is not None:
        _write_page(settings.page, scores.run.path, settings, borderline, shown)
    return tuple(borderline)


def _write_page(
    path: Path, run: Path, settings: DedupSettings, pairs: list[BorderlinePair], shown: list[tuple[Preview, Preview]]
) -> None:
    tiles = []
    for pair, (one, other) in sorted(zip(pairs, shown, strict=True), key=lambda item: -item[0].similarity):
        verdict = "duplicates" if pair.similarity >= settings.threshold else "not close enough"
        sides = (
            Shown(one, (pair.key, Path(pair.shard).name)),
            Shown(other, (pair.other_key, Path(pair.other_shard).name)),
        )
        tiles.append(Tile(f"{pair.similarity:.4f} {verdict} (image {pair.image:.4f}, text {pair.text:.4f})", sides))
    about = (
        f"the {len(pairs):,} pairs of run {run} nearest to --threshold {settings.threshold} with --on {settings.on}, "
        "the closest first"
    )
    write_page(path, "Borderline pairs", about, tiles)
