"""Columns that the score tables lack and other files have: parquet beside a tar or as input, and files that the user
names.

img2dataset writes `00000.parquet` beside `00000.tar`, with a row for what it could not fetch as well, in
no particular order: rows are joined by `key`, and only those whose `status` is `success`. A parquet file
that is itself the input is joined by row. Files that the user names are joined by `uid` where they and the
run have one, else by `key`. Only the columns that are asked for are read.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from mmfilter.core.input.remote import exists, in_parallel, is_url, look, matches, without_query
from mmfilter.core.input.source import Source
from mmfilter.core.run.database import identifier, literal, no_glob, reason_of
from mmfilter.core.run.remote_tables import reach, said_by_file
from mmfilter.core.run.tables import arrow_table
from mmfilter.errors import SelectionError, ShardError

_INTEGERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT", "HUGEINT"}
_READERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".ndjson": "json", ".json": "json"}
_FILE = "__mmfilter_file"
FOUND = "__mmfilter_found"
"""Column of what `write_columns` writes that is null where a row was not found"""
_NAME, _FIRST = "__mmfilter_name", "__mmfilter_first"


@dataclass(frozen=True)
class Files:
    """Files of one kind with one set of columns, as something to select from."""

    what: str
    """What they are called in messages"""
    relation: str
    """SQL that gives their rows"""
    types: dict[str, str]
    """Column -> DuckDB type"""
    by: str
    """The column that they are joined by"""
    start_of: dict[str, int] | None = None
    """File -> position of the first row of its shard; None where a row may belong to any shard"""
    mine: str | None = None
    """The column of the score table that `by` is held against, where it is called otherwise"""

    @property
    def by_number(self) -> bool:
        """Whether they name samples by numbers: zeros before them say nothing then."""
        return self.types[self.by] in _INTEGERS

    def find(self, names: Iterable[str]) -> list[str]:
        """Which of these columns they have, whatever their case, in the spelling of the files."""
        spelt = {name.lower(): name for name in self.types}
        return [spelt[name.lower()] for name in names if name.lower() in spelt]


# --- which files there are -------------------------------------------------------------------


def beside(database: duckdb.DuckDBPyConnection, sources: Sequence[Source], starts: Sequence[int]) -> Files | None:
    """The parquet files beside the tars of a run, None where there are none with a column `key`."""
    start_of = _there(
        {
            source.path.removesuffix(".tar") + ".parquet": start
            for source, start in zip(sources, starts, strict=False)
            if source.kind == "tar" and source.path.endswith(".tar")
        }
    )
    if not start_of:
        return None
    relation = _parquet_files(database, start_of)
    what = "the parquet files beside the shards"
    types = _types(database, relation, what)
    del types[_FILE]
    if "key" not in types:
        return None
    fetched = " WHERE coalesce(status, 'success') = 'success'" if types.get("status") == "VARCHAR" else ""
    return Files(what, f"(FROM {relation}{fetched})", types, "key", start_of)


def own(database: duckdb.DuckDBPyConnection, sources: Sequence[Source], starts: Sequence[int]) -> Files | None:
    """The parquet files that are shards of a run themselves, None where there are none."""
    start_of = _there(
        {source.path: start for source, start in zip(sources, starts, strict=False) if source.kind == "parquet"}
    )
    if not start_of:
        return None
    what = "the parquet files of the input"
    relation = _parquet_files(database, start_of, ", file_row_number = true")
    types = _types(database, relation, what)
    del types[_FILE]
    return Files(what, relation, types, "file_row_number", start_of, "row")


def _parquet_files(database: duckdb.DuckDBPyConnection, paths: Iterable[str], more: str = "") -> str:
    """SQL that reads all of them, with the file of each row."""
    reach(database, paths)
    listed = ", ".join(literal(no_glob(path)) for path in paths)
    return f"read_parquet([{listed}], union_by_name = true, filename = '{_FILE}', hive_partitioning = false{more})"


def _there(start_of: dict[str, int]) -> dict[str, int]:
    """Those of the files that exist."""
    urls = [path for path in start_of if is_url(path)]
    there = dict(zip(urls, in_parallel(exists, urls), strict=True))
    return {path: start for path, start in start_of.items() if (there[path] if path in there else os.path.exists(path))}


def named(database: duckdb.DuckDBPyConnection, patterns: Sequence[str], *, uids: bool) -> Files:
    """The files that the user names, all joined by one column; `uids` says whether the run has any.

    Raises `SelectionError` for files that are missing, of another kind, or without a column to join by.
    """
    paths = [path for pattern in patterns for path in _matches(pattern)]
    tables = [_read(database, path) for path in paths]
    types = {name: kind for _, columns in tables for name, kind in columns.items()}
    by = "uid" if uids and all("uid" in columns for _, columns in tables) else "key"
    for path, (_, columns) in zip(paths, tables, strict=True):
        if by not in columns:
            none = ", and the samples of this run have no uid" if "uid" in columns and not uids else ""
            raise SelectionError(
                f"--metadata {path!r} has no column 'key' or 'uid' to find samples by{none}; it has "
                f"{', '.join(columns)}"
            )
    if len({columns[by] in _INTEGERS for _, columns in tables}) > 1:
        types[by] = "VARCHAR"
    relation = " UNION ALL BY NAME ".join(f"(FROM {relation})" for relation, _ in tables)
    what = "--metadata " + (repr(paths[0]) if len(paths) == 1 else f"({len(paths):,} files)")
    return Files(what, f"({relation})", types, by)


def _matches(pattern: str) -> list[str]:
    if is_url(pattern):
        try:
            found = matches(pattern)
            if found == [pattern]:
                look(pattern)
        except ShardError as error:
            raise SelectionError(f"--metadata {pattern!r} {error.problem}") from error
    else:
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise SelectionError(f"--metadata {pattern!r} matches no file; check the path")
    return found


def _read(database: duckdb.DuckDBPyConnection, path: str) -> tuple[str, dict[str, str]]:
    """SQL that reads a file, and its columns; what looks like a date or a UUID in a column to join by stays text."""
    reader = _READERS.get(os.path.splitext(without_query(path))[1].lower())
    if reader is None:
        raise SelectionError(f"--metadata {path!r} is none of {', '.join(_READERS)}")
    reach(database, [path])
    place = literal(no_glob(path if is_url(path) else os.path.abspath(path)))
    more = {"parquet": ", hive_partitioning = false", "csv": ", header = true", "json": ""}[reader]
    types = _types(database, f"read_{reader}({place}{more})", f"--metadata {path!r}")
    types |= {name: "VARCHAR" for name in ("key", "uid") if name in types and types[name] not in _INTEGERS}
    if reader == "csv":
        kept: dict[str, str] = {name: types[name] for name in ("key", "uid") if name in types}
        more += f", types = {_struct(kept)}" if kept else ""
    elif reader == "json":
        more += f", columns = {_struct(types)}"
    return f"read_{reader}({place}{more})", types


def _struct(types: dict[str, str]) -> str:
    return "{" + ", ".join(f"{literal(name)}: {literal(kind)}" for name, kind in types.items()) + "}"


def _types(database: duckdb.DuckDBPyConnection, relation: str, what: str) -> dict[str, str]:
    try:
        return {name: kind for name, kind, *_ in database.execute(f"DESCRIBE FROM {relation}").fetchall()}
    except duckdb.Error as error:
        raise SelectionError(f"{what}{_why(error)}") from error


def _why(error: duckdb.Error) -> str:
    said = said_by_file(error)
    return f" cannot be read: {reason_of(error)}" if said is None else f": {said}"


# --- joining ---------------------------------------------------------------------------------


def write_columns(
    database: duckdb.DuckDBPyConnection, files: Files, columns: Sequence[str], path: Path, starts: np.ndarray
) -> int:
    """Write `columns` of the files to a parquet file with one row for every row of the view `scores`.

    `starts` is the position of every shard's first row, and the number of all rows behind them. Returns
    how many rows of `scores` have no row in the files; they get nulls. Raises `SelectionError` when the
    files have two rows for one sample, or none for any.
    """
    arrays: dict[str, Any] = {"position": np.arange(starts[-1]), "first": np.repeat(starts[:-1], np.diff(starts))}
    database.register("given", arrow_table(arrays))
    joined = (
        f"SELECT {_listed(columns, 'theirs.')}, theirs.{FOUND} FROM {_mine(files)} LEFT JOIN {_theirs(files, columns)} "
        f"ON theirs.{_NAME} = mine.name"
    )
    if files.start_of is not None:
        names = list(files.start_of)
        reach(database, names)
        database.register("places", arrow_table({"file": names, "first": [files.start_of[name] for name in names]}))
        joined += f" AND theirs.{_FIRST} = mine.first"
    try:
        [(rows,)] = database.execute(
            f"COPY ({joined} ORDER BY mine.position) TO {literal(str(path))} (FORMAT parquet)"
        ).fetchall()
        [(without,)] = database.execute(f"SELECT count(*) FROM {reading(path)} WHERE {FOUND} IS NULL").fetchall()
    except duckdb.Error as error:
        raise SelectionError(f"{files.what}{_why(error)}") from error
    if rows > starts[-1]:
        raise SelectionError(
            f"{files.what}: more than one row for one {files.by} ({rows - int(starts[-1]):,} too many); leave one of "
            "each"
        )
    if without == rows:
        raise SelectionError(f"{files.what}: no row for any sample of the run, none has the same {files.by!r}")
    return int(without)


def reading(path: Path) -> str:
    """SQL that reads what `write_columns` wrote."""
    return f"read_parquet({literal(no_glob(str(path)))})"


def _mine(files: Files) -> str:
    """The samples of the run: what they are found by, where they are, and where their shard begins."""
    column = f"scores.{files.mine or files.by}"
    name = f"TRY_CAST({column} AS HUGEINT)" if files.by_number else column
    return (
        f"(SELECT {name} AS name, given.first AS first, given.position AS position FROM scores POSITIONAL JOIN given) "
        "AS mine"
    )


def _theirs(files: Files, columns: Sequence[str]) -> str:
    """The rows of the files: what they are found by, their columns, and where their shard begins."""
    name = f"CAST(rows.{files.by} AS {'HUGEINT' if files.by_number else 'VARCHAR'})"
    found = f"{name} AS {_NAME}, true AS {FOUND}, {_listed(columns, 'rows.')}"
    if files.start_of is None:
        return f"(SELECT {found} FROM {files.relation} AS rows) AS theirs"
    return (
        f"(SELECT {found}, places.first AS {_FIRST} FROM {files.relation} AS rows JOIN places ON places.file = "
        f"rows.{_FILE}) AS theirs"
    )


def _listed(columns: Sequence[str], table: str) -> str:
    return ", ".join(table + identifier(name) for name in columns)
