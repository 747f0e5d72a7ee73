"""The score tables of a run as one relation in source order; the door to DuckDB, with `metadata` and `conditions`.

A row's *position* counts from 0 through all tables: in the order of the run's inputs, then by row.
Columns are read as numpy arrays, one value a position; strings stay in DuckDB until they are written.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from mmfilter.core.data import artifacts, metadata
from mmfilter.core.data.artifacts import RunDirectory
from mmfilter.core.data.conditions import check_expression, columns_of
from mmfilter.core.data.repack import Members
from mmfilter.core.data.shards import InputOptions, Stamp, stamp
from mmfilter.core.data.sql import identifier, literal, no_glob, reason_of
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
    """All finished score tables of a run. Raises `RunError` when there are none, or one is damaged.

    `files` are patterns of parquet, CSV or JSON files with more columns for the samples; those and the
    parquet files beside the shards are only looked at when a column is asked for that the tables lack.
    """

    def __init__(self, run: RunDirectory, files: Sequence[str] = ()) -> None:
        self.run = run
        self.notes: list[str] = []
        """What the user should know about columns from other files"""
        self._files = files
        self._elsewhere: list[metadata.Files] | None = None
        self._more: list[Path] = []
        self._folder: Path | None = None
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
            paths = [no_glob(str(path)) for path in self._paths]
            database.read_parquet(paths, hive_partitioning=False).create_view("score_tables" if self._more else "scores")
            self._widen(database)
        except duckdb.Error as error:
            raise self._damaged(error) from error
        if locked:
            folders = {os.path.dirname(str(path)) + "/" for path in self._paths}
            folders |= {os.path.dirname(str(path)) + "/" for path in self._more}
            folders |= {no_glob(folder) for folder in folders}
            database.execute("SET python_enable_replacements = false")
            database.execute("SET allowed_directories = ?", [sorted(folders)])
            database.execute("SET enable_external_access = false")
            database.execute("SET lock_configuration = true")
        return database

    def _widen(self, database: duckdb.DuckDBPyConnection) -> None:
        """Make the view `scores`, of the score tables and the columns of other files."""
        if self._more:
            more = "".join(f" POSITIONAL JOIN (SELECT * EXCLUDE ({metadata.FOUND}) FROM {metadata.reading(path)})" for path in self._more)
            database.execute(f"CREATE VIEW scores AS SELECT * FROM score_tables{more}")

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
        return RunError(f"the score tables of run {str(self.run.path)!r} cannot be read ({reason_of(error)}); score the shard again")

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
        missing = self._fetch({name} | (set() if where is None else columns_of(self._database.cursor(), where)))
        self._check_numeric(name)
        database = self._database if where is None else self._connect(locked=True)
        if where is not None:
            try:
                check_expression(database, where)
            except SelectionError as error:
                if missing and self._elsewhere and "Binder Error" in str(error):
                    raise SelectionError(f"--where {where!r} names {missing[0]!r}: {self._there()}") from error
                raise
        condition = "true" if where is None else f"coalesce(CAST((\n{where}\n) AS BOOLEAN), false)"
        try:
            found = database.execute(f"SELECT CASE WHEN ok THEN {identifier(name)} END AS v, {condition} AS p FROM scores").fetchnumpy()
        except duckdb.Error as error:
            if where is None:
                raise self._damaged(error) from error
            raise SelectionError(f"--where {where!r} fails: {reason_of(error)}") from error
        self._check_rows(len(found["v"]))
        values, present = np.ma.getdata(found["v"]), ~np.ma.getmaskarray(found["v"])
        if values.dtype.kind == "f":
            present &= ~np.isnan(values)
        return Column(values, present, np.ma.getdata(found["p"]))

    def _fetch(self, names: set[str]) -> list[str]:
        """Add those of the columns that only other files have; the names that nothing has are returned."""
        known = {column.lower() for column in self.types}
        missing = sorted(name for name in names if name.lower() not in known)
        if not missing:
            return []
        for files in self._other_files():
            if columns := files.find(missing):
                self._add(files, columns)
                missing = [name for name in missing if name.lower() not in {column.lower() for column in columns}]
        return missing

    def _other_files(self) -> list[metadata.Files]:
        if self._elsewhere is None:
            uids = bool(self._files) and self._query("SELECT count(uid) FROM scores").fetchall()[0][0] > 0
            found = [metadata.named(self._database, self._files, uids=uids)] if self._files else []
            for look in (metadata.beside, metadata.own):
                files = look(self._database, [shard.path for shard in self.shards], self.starts.tolist())
                found += [files] if files else []
            self._elsewhere = found
        return self._elsewhere

    def _add(self, files: metadata.Files, columns: list[str]) -> None:
        if files.mine is not None:
            self._check_unchanged(set(files.start_of))
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="mmfilter-")).resolve()
            weakref.finalize(self, shutil.rmtree, self._folder, True)
        path = self._folder / f"{len(self._more)}.parquet"
        without = metadata.write_columns(self._database, files, columns, path, self.starts)
        self._more.append(path)
        self._database = self._connect()
        self.types = {name: kind for name, kind, *_ in self._query("DESCRIBE scores").fetchall()}
        if without:
            self.notes.append(f"{files.what}: no row for {without:,} of {self.rows:,} samples, {', '.join(columns)} is null there")

    def _check_unchanged(self, paths: set[str]) -> None:
        """Raise `SelectionError` for a shard whose rows may not be those of its score table any more."""
        for shard in self.shards:
            if shard.path in paths and stamp(shard.path) != shard.stamp:
                raise SelectionError(f"shard {shard.path!r} has changed since it was scored, its rows may be others; score it again")

    def _there(self) -> str:
        """What columns there are, here and in other files."""
        more = "; ".join(f"{files.what}: {', '.join(files.types)}" for files in self._elsewhere or ())
        return f"the score table has {', '.join(self.types)}" + (f"; {more}" if more else "")

    def _check_numeric(self, name: str) -> None:
        numeric = [column for column, kind in self.types.items() if kind in NUMERIC]
        there = f"to rank by it has {', '.join(numeric)}"
        if name not in self.types:
            near = difflib.get_close_matches(name, numeric, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            if self._elsewhere:
                raise SelectionError(f"no column {name!r}; {hint}{self._there()}")
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
        names = ", ".join(f"scores.{identifier(column)}" for column in columns)
        found = self._query(f"SELECT {names} FROM scores POSITIONAL JOIN given WHERE given.among", among=among).fetchnumpy()
        return {name: np.ma.filled(column, np.nan) if column.dtype.kind == "f" else np.ma.getdata(column) for name, column in found.items()}

    def with_key(self, key: str) -> np.ndarray:
        """Positions of the rows with this key."""
        found = self._query(f"SELECT key = {literal(key)} AS same FROM scores").fetchnumpy()["same"]
        return np.flatnonzero(np.ma.filled(found, False))

    def positions(self, paths: Sequence[str], shard: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Positions of rows of shards; `shard` indexes `paths`."""
        start = {shard.path: start for shard, start in zip(self.shards, self.starts.tolist(), strict=False)}
        return np.array([start[path] for path in paths], np.int64)[shard] + row

    def groups(self, *columns: str) -> np.ndarray:
        """(rows,) int64: for rows that share the values of these columns the position of the first of them.

        The first by key, then shard, then row; a row alone, without a score or with a null is its own.
        """
        names = ", ".join(map(identifier, columns))
        there = " AND ".join(f"{identifier(column)} IS NOT NULL" for column in columns)
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
        about = f"{{{artifacts.METADATA_KEY.decode()}: {literal(json.dumps(dict(metadata)))}}}"
        given, more = {"decision": decision}, ""
        if output is not None:
            given["output"] = output
            more += ", CASE WHEN given.output >= 0 THEN printf('%08d.tar', given.output) END AS output_shard"
        if duplicates is not None:
            given |= self._representatives(*duplicates)
            more += ", duplicate_of, duplicate_shard, duplicate_row, CASE WHEN duplicate_of IS NOT NULL THEN closeness END AS similarity"
        sql = f"""
            COPY (
                SELECT key, shard, scores.row AS row, CASE WHEN ok THEN {identifier(by)} END AS score,
                    given.decision = {labels.index(None)} AS kept,
                    CASE given.decision {cases} END AS reason {more}
                FROM scores POSITIONAL JOIN given
            ) TO {literal(str(path))} (
                FORMAT parquet, COMPRESSION zstd, DICTIONARY_SIZE_LIMIT 1000, KV_METADATA {about}
            )"""  # without the limit it tries a dictionary for the keys, which are all different
        try:
            self._execute(sql, **given).fetchall()
        except duckdb.Error as error:
            raise SelectionError(f"{str(path)!r} cannot be written: {reason_of(error)}") from error

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
    return f"{literal(label)} || coalesce(reason, 'no value')" if label.endswith(": ") else literal(label)
