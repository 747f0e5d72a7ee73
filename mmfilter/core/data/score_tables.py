"""The score tables of a run as one relation in source order; the one door to DuckDB.

A row's *position* counts from 0 through all tables: in the order of the run's inputs, then by row.
Columns are read as numpy arrays, one value a position; strings stay in DuckDB until they are written.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from mmfilter.core.data import artifacts
from mmfilter.core.data.artifacts import RunDirectory
from mmfilter.core.data.repack import Members
from mmfilter.core.data.shards import InputOptions, Stamp
from mmfilter.errors import RunError, SelectionError

NUMERIC = ("FLOAT", "DOUBLE", "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT")


@dataclass(frozen=True)
class ScoredShard:
    """An input shard of the run, as it was when it was scored."""

    path: str
    stamp: Stamp
    rows: int


@dataclass(frozen=True)
class Column:
    """One numeric column and what may be done with its rows, by position."""

    values: np.ndarray
    """In the type of the column; arbitrary where `present` is false"""
    present: np.ndarray
    """True where the sample was scored and has a value that is not NaN"""
    passes: np.ndarray
    """True where the condition holds"""


class ScoreTables:
    """All finished score tables of a run. Raises `RunError` when there are none, or one is damaged."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self._paths = [path.resolve() for path in run.score_tables()]
        about = [artifacts.read_table_metadata(path) for path in self._paths]
        self.names = [path.stem for path in self._paths]
        """Of the shards in the run, as in the names of their tables"""
        self.shards = [ScoredShard(item["shard"], Stamp.from_metadata(item), item["rows"]) for item in about]
        self.starts = np.cumsum([0] + [shard.rows for shard in self.shards])
        """Position of the first row of each shard, and after the last the number of all rows"""
        self.options = InputOptions.of_run(artifacts.read_json(run.manifest).get("settings", {}))
        """How the shards are read again"""
        self._database = self._connect()
        self.types = {name: kind for name, kind, *_ in self._query("DESCRIBE scores").fetchall()}
        """Column name -> DuckDB type"""

    @property
    def rows(self) -> int:
        return int(self.starts[-1])

    def _connect(self, *, locked: bool = False) -> duckdb.DuckDBPyConnection:
        """A database with the view `scores`; a locked one can read nothing else, nor write."""
        spill = os.path.join(tempfile.gettempdir(), f"mmfilter-{os.getpid()}")
        database = duckdb.connect(config={"temp_directory": spill, "autoinstall_known_extensions": "false"})
        database.execute("SET enable_progress_bar = false")
        try:
            paths = [_no_glob(str(path)) for path in self._paths]
            database.read_parquet(paths, hive_partitioning=False).create_view("scores")
        except duckdb.Error as error:
            raise self._damaged(error) from error
        if locked:
            folders = {os.path.dirname(str(path)) + "/" for path in self._paths}
            folders |= {_no_glob(folder) for folder in folders}
            database.execute("SET python_enable_replacements = false")
            database.execute("SET allowed_directories = ?", [sorted(folders)])
            database.execute("SET enable_external_access = false")
            database.execute("SET lock_configuration = true")
        return database

    def _query(self, sql: str, **arrays: np.ndarray) -> duckdb.DuckDBPyConnection:
        """Run SQL over `scores` and, if there are arrays, `given` (one value a position)."""
        try:
            return self._execute(sql, **arrays)
        except duckdb.Error as error:
            raise self._damaged(error) from error

    def _execute(self, sql: str, **arrays: Any) -> duckdb.DuckDBPyConnection:
        if arrays:
            self._database.register("given", artifacts.table(arrays))
        return self._database.execute(sql)

    def _damaged(self, error: Exception) -> RunError:
        return RunError(f"the score tables of run {str(self.run.path)!r} cannot be read ({_reason(error)}); score the shard again")

    # --- questions, each one scan ---

    @property
    def scored(self) -> np.ndarray:
        """(rows,) True where the sample has scores."""
        found = self._query("SELECT coalesce(ok, false) AS ok FROM scores").fetchnumpy()["ok"]
        self._check_rows(len(found))
        return np.ma.getdata(found)

    def column(self, name: str, where: str | None = None) -> Column:
        """A numeric column, and which rows pass `where`, an SQL expression over the score table.

        Raises `SelectionError` for another column or a condition that is no plain expression.
        """
        self._check_numeric(name)
        database = self._database if where is None else self._connect(locked=True)
        if where is not None:
            _check_expression(database, where)
        condition = "true" if where is None else f"coalesce(CAST((\n{where}\n) AS BOOLEAN), false)"
        try:
            found = database.execute(f"SELECT CASE WHEN ok THEN {_name(name)} END AS v, {condition} AS p FROM scores").fetchnumpy()
        except duckdb.Error as error:
            if where is None:
                raise self._damaged(error) from error
            raise SelectionError(f"--where {where!r} fails: {_reason(error)}") from error
        self._check_rows(len(found["v"]))
        values, present = np.ma.getdata(found["v"]), ~np.ma.getmaskarray(found["v"])
        if values.dtype.kind == "f":
            present &= ~np.isnan(values)
        return Column(values, present, np.ma.getdata(found["p"]))

    def _check_numeric(self, name: str) -> None:
        numeric = [column for column, kind in self.types.items() if kind in NUMERIC]
        there = f"to rank by it has {', '.join(numeric)}"
        if name not in self.types:
            near = difflib.get_close_matches(name, numeric, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise SelectionError(f"the score table has no column {name!r}; {hint}{there}")
        if name not in numeric:
            raise SelectionError(f"column {name!r} of the score table is no number ({self.types[name].lower()}); {there}")

    def _check_rows(self, rows: int) -> None:
        if rows != self.rows:
            raise RunError(f"the score tables of run {str(self.run.path)!r} hold {rows:,} rows but say {self.rows:,}; score the shards again")

    def first_by_key(self, among: np.ndarray, n: int) -> np.ndarray:
        """Positions of the first `n` rows by key, then shard, then row, where `among` is true."""
        sql = f"""
            SELECT given.position FROM scores POSITIONAL JOIN given WHERE given.among
            ORDER BY key, shard, scores.row LIMIT {int(n)}"""
        return self._query(sql, among=among, position=np.arange(len(among))).fetchnumpy()["position"]

    def members(self, kept: np.ndarray) -> Members:
        """The byte ranges of the rows where `kept` is true, in source order."""
        found = self._query(
            """SELECT scores.row AS r, coalesce("offset", -1 - scores.row) AS o, coalesce(nbytes, 0) AS n, hash(key) AS h
            FROM scores POSITIONAL JOIN given WHERE given.kept""",
            kept=kept,
        ).fetchnumpy()
        position = np.flatnonzero(kept)
        shard = np.searchsorted(self.starts, position, side="right") - 1
        if any(np.ma.is_masked(column) for column in found.values()) or not np.array_equal(found["r"], position - self.starts[shard]):
            raise RunError(f"the score tables of run {str(self.run.path)!r} are not in row order; score the shards again")
        paths = [shard.path for shard in self.shards]
        return Members(paths, shard.astype(np.int32), *(np.ma.getdata(found[name]) for name in "onh"), self.options)

    def keys(self, rank: np.ndarray, *, in_order: bool) -> Iterator[list[str]]:
        """Chunks of the keys of the rows whose rank is not negative, by rank unless already `in_order`."""
        order = "" if in_order else "ORDER BY given.rank"
        rows = self._query(f"SELECT key FROM scores POSITIONAL JOIN given WHERE given.rank >= 0 {order}", rank=rank)
        while chunk := rows.fetchmany(10_000):
            yield [key for (key,) in chunk]

    def names_of(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """Columns `key`, `shard` and `row` at ascending `positions`."""
        return self.at(positions, ("key", "shard", "row"))

    def at(self, positions: np.ndarray, columns: Sequence[str]) -> dict[str, np.ndarray]:
        """Columns at ascending `positions`; null is NaN in a column of floats."""
        among = np.zeros(self.rows, bool)
        among[positions] = True
        names = ", ".join(f"scores.{_name(column)}" for column in columns)
        found = self._query(f"SELECT {names} FROM scores POSITIONAL JOIN given WHERE given.among", among=among).fetchnumpy()
        return {name: np.ma.filled(column, np.nan) if column.dtype.kind == "f" else np.ma.getdata(column) for name, column in found.items()}

    def with_key(self, key: str) -> np.ndarray:
        """Positions of the rows with this key."""
        found = self._query(f"SELECT key = {_literal(key)} AS same FROM scores").fetchnumpy()["same"]
        return np.flatnonzero(np.ma.filled(found, False))

    def positions(self, paths: Sequence[str], shard: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Positions of rows of shards; `shard` indexes `paths`."""
        start = {shard.path: start for shard, start in zip(self.shards, self.starts.tolist(), strict=False)}
        return np.array([start[path] for path in paths], np.int64)[shard] + row

    def groups(self, *columns: str) -> np.ndarray:
        """(rows,) int64: for rows that share the values of these columns the position of the first of them.

        The first by key, then shard, then row; a row alone, without a score or with a null is its own.
        """
        names = ", ".join(map(_name, columns))
        there = " AND ".join(f"{_name(column)} IS NOT NULL" for column in columns)
        digest = self._query(f"SELECT CASE WHEN ok AND {there} THEN hash({names}) END AS h FROM scores").fetchnumpy()["h"]
        among = _repeated(np.ma.getdata(digest), ~np.ma.getmaskarray(digest))
        group = np.arange(self.rows)
        if among.any():
            sql = f"""
                SELECT given.position AS p, first_value(given.position) OVER (PARTITION BY {names} ORDER BY key, shard, scores.row) AS first
                FROM scores POSITIONAL JOIN given WHERE given.among"""
            found = self._query(sql, among=among, position=np.arange(self.rows)).fetchnumpy()
            group[found["p"]] = found["first"]
        return group

    def reasons(self, among: np.ndarray) -> dict[str, int]:
        """Why rows have no score, by kind (what comes before a colon), most frequent first."""
        sql = """
            SELECT coalesce(split_part(reason, ':', 1), 'no value') AS kind, count(*) AS n
            FROM scores POSITIONAL JOIN given WHERE given.among GROUP BY ALL ORDER BY n DESC, kind"""
        return dict(self._query(sql, among=among).fetchall())

    def write_decisions(
        self,
        path: Path,
        by: str,
        decision: np.ndarray,
        *,
        labels: Sequence[str | None],
        metadata: Mapping[str, Any],
        output: np.ndarray | None = None,
        duplicates: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        """Write a table with a row for every row of the score tables: kept or why not, and where to.

        `decision` indexes `labels`, the reasons (None is kept, a label that ends in `: ` goes on with
        the reason of the score table). `output` is the number of the output shard, negative if none.
        `duplicates` are the position of the kept sample that a row is a duplicate of, negative if none,
        and their similarity.
        """
        cases = " ".join(f"WHEN {code} THEN {_label(label)}" for code, label in enumerate(labels) if label is not None)
        about = f"{{{artifacts.METADATA_KEY.decode()}: {_literal(json.dumps(dict(metadata)))}}}"
        given, more = {"decision": decision}, ""
        if output is not None:
            given["output"] = output
            more += ", CASE WHEN given.output >= 0 THEN printf('%08d.tar', given.output) END AS output_shard"
        if duplicates is not None:
            given |= self._representatives(*duplicates)
            more += ", duplicate_of, duplicate_shard, duplicate_row, CASE WHEN duplicate_of IS NOT NULL THEN closeness END AS similarity"
        sql = f"""
            COPY (
                SELECT key, shard, scores.row AS row, CASE WHEN ok THEN {_name(by)} END AS score,
                    given.decision = {labels.index(None)} AS kept,
                    CASE given.decision {cases} END AS reason {more}
                FROM scores POSITIONAL JOIN given
            ) TO {_literal(str(path))} (
                FORMAT parquet, COMPRESSION zstd, DICTIONARY_SIZE_LIMIT 1000, KV_METADATA {about}
            )"""  # without the limit it tries a dictionary for the keys, which are all different
        try:
            self._execute(sql, **given).fetchall()
        except duckdb.Error as error:
            raise SelectionError(f"{str(path)!r} cannot be written: {_reason(error)}") from error

    def _representatives(self, of: np.ndarray, similarity: np.ndarray) -> dict[str, Any]:
        """Columns that name the kept sample of each row; each name is held once, however many rows have it."""
        positions = np.unique(of[of >= 0])
        names = self.names_of(positions)
        index = np.where(of >= 0, np.searchsorted(positions, of), -1)
        found = {f"duplicate_{'of' if name == 'key' else name}": artifacts.encoded(values, index) for name, values in names.items()}
        return found | {"closeness": similarity}


def _repeated(values: np.ndarray, there: np.ndarray) -> np.ndarray:
    """True where a value, among those that are there, comes more than once."""
    at = np.flatnonzero(there)
    order = at[np.argsort(values[at], kind="stable")]
    same = values[order[1:]] == values[order[:-1]]
    found = np.zeros(len(values), bool)
    found[order[1:][same]] = found[order[:-1][same]] = True
    return found


def _label(label: str) -> str:
    return f"{_literal(label)} || coalesce(reason, 'no value')" if label.endswith(": ") else _literal(label)


def _name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _no_glob(path: str) -> str:
    """`path` so that DuckDB, which takes every path for a pattern, finds just that."""
    return re.sub(r"([*?\[])", r"[\1]", path)


def _reason(error: Exception) -> str:
    """DuckDB's message as one line, without its drawing of the query."""
    return " ".join(str(error).split("\n\nLINE ")[0].split())


# --- conditions ------------------------------------------------------------------------------


def _check_expression(database: duckdb.DuckDBPyConnection, where: str) -> None:
    """Raise `SelectionError` unless `where` is one expression over the columns, without sub-queries."""
    skeleton, _ = _parsed(database, "true")
    statement, condition = _parsed(database, where)
    if statement != skeleton:
        raise SelectionError(f"--where {where!r} is more than a condition; write what could follow WHERE, such as 'width >= 256 AND ok'")
    if '"class": "SUBQUERY"' in json.dumps(condition):
        raise SelectionError(f"--where {where!r} has a sub-query; only a condition over the columns of one row is possible")
    try:
        database.execute(f"SELECT 1 FROM scores WHERE (\n{where}\n) LIMIT 0")
    except duckdb.Error as error:
        raise SelectionError(f"--where {where!r} is not possible: {_reason(error)}") from error


def _parsed(database: duckdb.DuckDBPyConnection, where: str) -> tuple[Any, Any]:
    """The syntax tree of a query with this condition: all but the condition, and the condition."""
    [serialized] = database.execute("SELECT json_serialize_sql(?)", [f"SELECT 1 FROM scores WHERE (\n{where}\n)"]).fetchone()
    tree = json.loads(serialized)
    if tree["error"]:
        raise SelectionError(f"--where {where!r} is not possible: {' '.join(tree['error_message'].split())}")
    return tree, tree["statements"][0]["node"].pop("where_clause", None)
