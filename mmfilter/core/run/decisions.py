"""The table of a decision on every sample: kept or why not, and where to (`selection.parquet`, `dedup.parquet`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from mmfilter.core.run.database import literal, reason_of
from mmfilter.core.run.score_tables import Column, ScoreTables
from mmfilter.core.run.tables import METADATA_KEY, dictionary_column
from mmfilter.errors import SelectionError


@dataclass(frozen=True)
class Decisions:
    """What became of every row of the score tables; arrays are (rows,)."""

    score: Column
    """What was ranked by"""
    decision: np.ndarray
    """Index into `labels`"""
    labels: Sequence[str | None]
    """Reasons: None is kept; one that ends in `: ` goes on with the reason of the score table"""
    output: np.ndarray | None = None
    """Number of the output shard, negative if none"""
    output_name: str = "%08d.tar"
    """The name of an output shard, with a place for its number"""
    copies: np.ndarray | None = None
    """How often the row was written"""
    duplicates: tuple[np.ndarray, np.ndarray] | None = None
    """Position of the kept sample that the row is a duplicate of, negative if none, and their similarity"""


def write_decisions(tables: ScoreTables, path: Path, decisions: Decisions, metadata: Mapping[str, Any]) -> None:
    """Write a table with a row for every row of the score tables; raises `SelectionError` where it cannot."""
    score, labels = decisions.score, decisions.labels
    cases = " ".join(f"WHEN {code} THEN {_label(label)}" for code, label in enumerate(labels) if label is not None)
    about = f"{{{METADATA_KEY.decode()}: {literal(json.dumps(dict(metadata)))}}}"
    given: dict[str, Any] = {"decision": decisions.decision, "score": np.ma.array(score.values, mask=~score.present)}
    more = ""
    if decisions.output is not None:
        given["output"] = decisions.output
        name = f"printf({literal(decisions.output_name)}, given.output)"
        more += f", CASE WHEN given.output >= 0 THEN {name} END AS output_shard"
    if decisions.copies is not None:
        given["copies"] = decisions.copies
        more += ", given.copies AS copies"
    if decisions.duplicates is not None:
        given |= _representatives(tables, *decisions.duplicates)
        more += "".join(f", given.{name} AS {name}" for name in ("duplicate_of", "duplicate_shard", "duplicate_row"))
        more += ", CASE WHEN given.duplicate_of IS NOT NULL THEN given.closeness END AS similarity"
    sql = f"""
        COPY (
            SELECT key, shard, scores.row AS row, given.score AS score,
                given.decision = {labels.index(None)} AS kept,
                CASE given.decision {cases} END AS reason {more}
            FROM scores POSITIONAL JOIN given
        ) TO {literal(str(path))} (
            FORMAT parquet, COMPRESSION zstd, DICTIONARY_SIZE_LIMIT 1000, KV_METADATA {about}
        )"""  # without the limit it tries a dictionary for the keys, which are all different
    try:
        tables.execute(sql, **given).fetchall()
    except duckdb.Error as error:
        raise SelectionError(f"{str(path)!r} cannot be written: {reason_of(error)}") from error


def _representatives(tables: ScoreTables, of: np.ndarray, similarity: np.ndarray) -> dict[str, Any]:
    """Columns that name the kept sample of each row; each name is held once, however many rows have it."""
    positions = np.unique(of[of >= 0])
    names = tables.names_of(positions)
    index = np.where(of >= 0, np.searchsorted(positions, of), -1)
    found = {
        f"duplicate_{'of' if name == 'key' else name}": dictionary_column(values, index)
        for name, values in names.items()
    }
    return found | {"closeness": similarity}


def _label(label: str) -> str:
    return f"{literal(label)} || coalesce(reason, 'no value')" if label.endswith(": ") else literal(label)
