"""Find exact and near duplicates in a run: which sample of each is kept, and which are dropped for it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmfilter import __version__
from mmfilter.core.codes.duplicates import SAME, DuplicateSettings, Pairs
from mmfilter.core.codes.rule import Deduplicator, Duplicates
from mmfilter.core.data import artifacts
from mmfilter.core.data.artifacts import RunDirectory
from mmfilter.core.data.choice import Decision
from mmfilter.core.data.progress import Progress
from mmfilter.core.data.score_tables import Column, ScoreTables
from mmfilter.errors import RunError, SelectionError


@dataclass(frozen=True)
class DedupSettings:
    """What counts as a duplicate, and which of two is kept."""

    duplicates: DuplicateSettings = field(default_factory=DuplicateSettings)
    by: str = "similarity"
    """Score column; of two duplicates the one with the larger value is kept"""
    borderline: int = 0
    """How many of the pairs closest to the threshold, on either side of it, to list"""

    def __post_init__(self) -> None:
        if self.borderline < 0:
            raise SelectionError(f"--borderline is {self.borderline}; give a number of pairs from 0")


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
    other_key: str
    other_shard: str
    other_row: int


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
            (f"without exact duplicates ({SAME[self.settings.duplicates.on]})", self.scored - self.exact),
            (f"without near-duplicates at {self.settings.duplicates.threshold}", self.kept),
        ]


def dedup(run: Path, settings: DedupSettings, progress: Progress) -> DedupSummary:
    """Decide on every sample of a run and write `dedup.parquet` there, with the pairs it rests on.

    Pairs that were searched before are used again when they go down to the threshold. Raises
    `RunError` for a run without scores or codes, `SelectionError` for a column that is none.
    """
    scores = ScoreTables(RunDirectory(run))
    column = scores.column(settings.by)
    if not scores.run.writable:
        raise RunError(f"run {str(run)!r} cannot be written, and its decisions belong there; copy it, or use mmfilter select --dedup")
    rule = Deduplicator(scores, settings.duplicates, progress)
    found = rule(column.values, column.present)
    close = rule.pairs.at_least(settings.duplicates.threshold)
    summary = DedupSummary(
        run, settings, scores.rows, int(column.present.sum()), int(found.exact.sum()), int(found.near.sum()),
        len(close), len(close.crowded), rule.pairs.index, _borderline(scores, rule.pairs, settings),
    )  # fmt: skip
    _write(scores, found, column, summary)
    return summary


def _write(scores: ScoreTables, found: Duplicates, column: Column, summary: DedupSummary) -> None:
    duplicates = summary.settings.duplicates
    decision = np.where(found.exact, Decision.EXACT_DUPLICATE, np.where(found.near, Decision.NEAR_DUPLICATE, Decision.KEPT)).astype(np.int8)
    decision[~column.present] = Decision.NO_SCORE
    labels = ["" if code else None for code in Decision]
    labels[Decision.NO_SCORE] = "no score: "
    labels[Decision.EXACT_DUPLICATE] = f"exact duplicate ({SAME[duplicates.on]})"
    labels[Decision.NEAR_DUPLICATE] = f"near-duplicate at {duplicates.threshold}"
    about = {"kind": "dedup", "version": __version__, "settings": asdict(summary.settings)}
    about |= {"rows": summary.rows, "scored": summary.scored, "exact": summary.exact, "near": summary.near, "kept": summary.kept}
    try:
        with artifacts.atomic(scores.run.dedup) as temporary:
            scores.write_decisions(temporary, column, decision, labels=labels, metadata=about, duplicates=(found.of, found.similarity))
    except OSError as error:
        raise RunError(f"{str(scores.run.dedup)!r} cannot be written: {artifacts.reason(error)}") from error


def _borderline(scores: ScoreTables, pairs: Pairs, settings: DedupSettings) -> tuple[BorderlinePair, ...]:
    at = pairs.borderline(settings.duplicates.threshold, settings.borderline)
    positions = np.unique(np.concatenate([pairs.first[at], pairs.second[at]]))
    names = scores.names_of(positions)
    found = []
    for i in at.tolist():
        one, other = ({name: values[np.searchsorted(positions, p)] for name, values in names.items()} for p in (pairs.first[i], pairs.second[i]))
        close = (float(getattr(pairs, name)[i]) for name in ("similarity", "image", "text"))
        found.append(BorderlinePair(*close, one["key"], one["shard"], int(one["row"]), other["key"], other["shard"], int(other["row"])))
    return tuple(found)
