"""What a selection found: how many samples each step left, and why the others were dropped, in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mmfilter.core.codes.duplicate_settings import SAME
from mmfilter.core.files import read_json
from mmfilter.core.run.score_tables import Column, ScoreTables
from mmfilter.core.selection.choice import Decision, quotas
from mmfilter.core.selection.select_settings import SelectSettings
from mmfilter.core.selection.top import Top


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
    """Lowest score kept; None too where that is infinite"""
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
        chosen = self.kept + self.dropped.get(labels_of(settings)[Decision.NO_COPY], 0)
        fewer = f", of {self.asked:,} asked for" if self.asked is not None and chosen < self.asked else ""
        steps.append((_way(settings, self.n_parts) + fewer, chosen))
        if settings.repeat is not None:
            steps.append((f"at least once by --repeat {settings.repeat!r}", self.kept))
            steps.append(("with their repetitions", self.written))
        return steps


def counted(
    settings: SelectSettings,
    tables: ScoreTables,
    decision: np.ndarray,
    column: Column,
    parts: np.ndarray | None,
    copies: np.ndarray | None,
) -> Selection:
    counts = dict(zip(Decision, np.bincount(decision, minlength=len(Decision)).tolist(), strict=True))
    candidates = tables.rows - counts[Decision.NOT_IN_WHERE]
    scored = candidates - counts[Decision.NO_SCORE]
    at_least_min = scored - counts[Decision.BELOW_MIN]
    not_exact = at_least_min - counts[Decision.EXACT_DUPLICATE]
    dropped = {label: counts[code] for code, label in labels_of(settings).items() if code != Decision.NO_SCORE}
    if counts[Decision.NO_SCORE]:
        label = labels_of(settings)[Decision.NO_SCORE]
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
        cut=_cut(column.values[decision == Decision.KEPT]),
        dropped={label: n for label, n in dropped.items() if n},
        warnings=(*_unfinished(tables), *tables.notes),
    )


def _cut(kept: np.ndarray) -> float | None:
    lowest = float(kept.min()) if len(kept) else math.inf
    return lowest if math.isfinite(lowest) else None


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
    return f"kept by --top {settings.top}" + (
        " --diverse" if settings.diverse else f" --match {str(settings.match)!r}" if settings.match else ""
    )


def labels_of(settings: SelectSettings) -> dict[Decision, str]:
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
    n = len(read_json(tables.run.manifest)["inputs"]) - len(tables.shards)
    return (f"shards of the run that are not scored yet and take no part: {n:,}",) if n > 0 else ()
