"""The tables of the shard at hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mmfilter import __version__
from mmfilter.core.files import system_reason
from mmfilter.core.input.places import Stamp
from mmfilter.core.input.sample import problem_kind
from mmfilter.core.run.directory import RunDirectory, Shard
from mmfilter.core.run.tables import CODE_TABLE, TableWriter, score_table
from mmfilter.errors import RunError


@dataclass
class ShardTables:
    """The score table and the code table of one shard, under temporary names until it is finished."""

    run: RunDirectory
    shard: Shard
    scores: tuple[str, ...]
    """Names of the score columns"""
    rows: int = 0
    ok: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Kind of problem -> samples"""

    def __post_init__(self) -> None:
        self._scores = TableWriter(self.run.scores(self.shard.name), score_table(self.scores))
        self._codes = TableWriter(self.run.codes(self.shard.name), CODE_TABLE)

    def write(self, rows: list[dict[str, Any]], codes: list[dict[str, Any]]) -> None:
        """Append rows of both tables, in the order of the shard; raises `RunError` when the disk is full."""
        with self._writing_errors():
            self._scores.write(rows)
            self._codes.write(codes)
        self.rows += len(rows)
        self.ok += len(codes)
        self.reasons.update(problem_kind(row["reason"]) for row in rows if not row["ok"])

    def finish(self, before: Stamp) -> None:
        """Move both tables into place; the score table last, since its existence means finished."""
        about = {
            "version": __version__,
            "shard": self.shard.path,
            "name": self.shard.name,
            "size": before.size,
            "mtime_ns": before.mtime_ns,
            "etag": before.etag,
            "rows": self.rows,
            "ok": self.ok,
            "reasons": dict(self.reasons),
        }
        with self._writing_errors():
            self._codes.finish({"kind": "codes"} | about)
            self._scores.finish({"kind": "scores"} | about)

    @contextmanager
    def _writing_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"run {str(self.run.path)!r} cannot be written: {system_reason(error)}; make room and run the same "
                "command again: what is finished is kept"
            ) from error

    def abandon(self) -> None:
        """Drop both tables."""
        self._scores.abandon()
        self._codes.abandon()
