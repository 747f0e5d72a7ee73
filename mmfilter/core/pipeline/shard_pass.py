"""One shard, from its source to its tables in the run: the unit of work, here and in any other process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmfilter.core.input.decode import Pair
from mmfilter.core.input.places import Stamp
from mmfilter.core.input.sample import RawSample
from mmfilter.core.input.source import Source
from mmfilter.core.pipeline.feed import Batch, Prefetched
from mmfilter.core.pipeline.model_pass import ModelPass
from mmfilter.core.pipeline.scorer import Scored, Scorer
from mmfilter.core.progress import Progress
from mmfilter.core.run.shard_tables import ShardTables
from mmfilter.core.scores.random import random_score
from mmfilter.errors import ShardError

AHEAD = 3
"""Batches and windows that are ready before the model asks for them"""


@dataclass(frozen=True)
class ShardResult:
    """What came of a shard."""

    rows: int = 0
    """Samples in its tables"""
    ok: int = 0
    """… that have scores"""
    reasons: Counter[str] = field(default_factory=Counter)
    """Kind of problem -> samples without a score"""
    error: ShardError | None = None
    """Why it could not be read to its end; nothing is kept of it then"""


@dataclass(frozen=True)
class _Start:
    source: Source
    stamp: Stamp
    """From before it was read"""


@dataclass(frozen=True)
class _End:
    error: ShardError | None = None


_Event = _Start | Batch | list[Pair] | _End


class ShardReading:
    """A shard on its way: its batches, and after those of a window all pairs of the window."""

    def __init__(self, start: _Start, events: Iterator[_Event]) -> None:
        self.source, self.stamp = start.source, start.stamp
        self._events = events

    def __iter__(self) -> Iterator[Batch | list[Pair]]:
        for event in self._events:
            if isinstance(event, _End):
                if event.error is not None:
                    raise event.error
                return
            if not isinstance(event, _Start):
                yield event


def read_ahead(
    sources: Iterable[Source], samples: Callable[[Source], Iterable[RawSample]], model_pass: ModelPass
) -> Iterator[ShardReading]:
    """Shard after shard, read ahead in a thread, also over the end of one into the next; each is to be read to its end.

    The thread asks for the next of the `sources` when it has come to the end of the one before.
    """
    with closing(Prefetched(_events(sources, samples, model_pass), AHEAD)) as events:
        for event in events:
            if isinstance(event, _Start):
                yield ShardReading(event, events)


def _events(
    sources: Iterable[Source], samples: Callable[[Source], Iterable[RawSample]], model_pass: ModelPass
) -> Iterator[_Event]:
    for source in sources:
        started = False
        try:
            stamp = source.stamp()
            yield _Start(source, stamp)
            started = True
            for window in model_pass.windows(samples(source), source.path):
                yield from window.batches
                yield window.pairs
            yield _End()
        except ShardError as error:
            if not started:
                yield _Start(source, Stamp())
            yield _End(error)


def shard_pass(
    reading: ShardReading, model_pass: ModelPass, scorer: Scorer, tables: ShardTables, *, seed: int, progress: Progress
) -> ShardResult:
    """Score one shard into its tables; `seed` is that of the score `random`.

    A shard that cannot be read to its end leaves no table, and its result the reason. Raises `ModelError` when the
    device's memory does not suffice, `RunError` when the tables cannot be written; neither leaves one.
    """
    scored: dict[int, tuple[dict[str, Any], dict[str, np.ndarray] | None]] = {}
    try:
        for part in reading:
            if isinstance(part, Batch):
                scored |= _by_row(part.pairs, model_pass.through(part, lambda _, states: scorer.score(states)))
            else:
                tables.write(*_table_rows(part, scored, seed))
                scored.clear()
                progress.advance(len(part), sum(pair.columns["nbytes"] or 0 for pair in part))
        tables.finish(reading.stamp)
        return ShardResult(tables.rows, tables.ok, tables.reasons)
    except ShardError as error:
        return ShardResult(error=error)
    finally:
        tables.abandon()


def _by_row(pairs: list[Pair], scored: Scored) -> dict[int, tuple[dict[str, Any], dict[str, np.ndarray] | None]]:
    """Columns of the score table that the model fills, and codes, of each row; no codes where states are not finite."""
    finite = np.isfinite(np.stack(list(scored.scores.values()))).all(0)
    rows: dict[int, tuple[dict[str, Any], dict[str, np.ndarray] | None]] = {}
    for i, pair in enumerate(pairs):
        columns: dict[str, Any] = {
            "n_image_tokens": int(scored.n_image_tokens[i]),
            "n_text_tokens": int(scored.n_text_tokens[i]),
        }
        if finite[i]:
            columns |= {name: float(values[i]) for name, values in scored.scores.items()}
        rows[pair.row] = columns, scored.codes[i] if finite[i] else None
    return rows


def _table_rows(
    pairs: list[Pair], scored: dict[int, tuple[dict[str, Any], dict[str, np.ndarray] | None]], seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the score table and of the code table for a window."""
    score_rows, code_rows = [], []
    for pair in pairs:
        key, reason = pair.columns["key"], pair.reason
        columns, codes = scored.get(pair.row, ({}, None))
        if reason is None and codes is None:
            reason = "the model's states are not finite"
        ok = reason is None
        control = {"random": random_score(seed, key, pair.row)} if ok else {}
        score_rows.append(pair.columns | columns | control | {"ok": ok, "reason": reason})
        if codes is not None:
            code_rows.append({"key": key, "row": pair.row} | codes)
    return score_rows, code_rows
