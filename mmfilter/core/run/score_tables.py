"""The score tables of a run as one relation in source order; the door to DuckDB, with `database`, `decisions`,
`expressions`, `metadata`, `more_columns`.

A row's *position* counts from 0 through all tables: in the order of the run's inputs, then by row.
Columns are read as numpy arrays, one value a position; strings stay in DuckDB until they are written.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import duckdb
import numpy as np

from mmfilter.core.files import read_json
from mmfilter.core.input.places import Stamp
from mmfilter.core.input.source import InputOptions
from mmfilter.core.run.database import identifier, literal, lock, open_database, reason_of
from mmfilter.core.run.directory import RunDirectory, ScoredShard
from mmfilter.core.run.expressions import DECIMAL, NUMERIC, Expression
from mmfilter.core.run.members import Members
from mmfilter.core.run.metadata_columns import MoreColumns
from mmfilter.core.run.tables import arrow_table, read_table_metadata
from mmfilter.errors import RunError, SelectionError

_ROWS_AT_ONCE = 1 << 22
"""Values that are taken out of DuckDB at one time, where they come in any order"""


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
        self._paths = [path.resolve() for path in run.score_tables()]
        about = [read_table_metadata(path) for path in self._paths]
        self.names = [path.stem for path in self._paths]
        """Of the shards in the run, as in the names of their tables"""
        self.options = InputOptions.of_run(read_json(run.manifest).get("settings", {}))
        """How the shards are read again"""
        self.shards = [
            ScoredShard(item["shard"], Stamp.from_metadata(item), item["rows"], self.options) for item in about
        ]
        self.starts = np.cumsum([0] + [shard.rows for shard in self.shards])
        """Position of the first row of each shard, and after the last the number of all rows"""
        self._more = MoreColumns(self.shards, self.starts, files)
        self._database = self.connect()
        self.types = self._described()
        """Column name -> DuckDB type"""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about columns from other files."""
        return tuple(self._more.notes)

    def _described(self) -> dict[str, str]:
        return {name: kind for name, kind, *_ in self._query("DESCRIBE scores").fetchall()}

    @property
    def rows(self) -> int:
        return int(self.starts[-1])

    def connect(self, *, locked: bool = False, among: np.ndarray | None = None) -> duckdb.DuckDBPyConnection:
        """A database with the view `scores`; a locked one can read nothing else, nor write.

        With a mask there is the view `candidates` too: the rows of the mask with their position as `__mmfilter_at`.
        """
        try:
            database = open_database(self._paths, "score_tables")
            self._more.widen(database, "score_tables", "scores")
        except duckdb.Error as error:
            raise self._damaged(error) from error
        if among is not None:
            database.register("given", arrow_table({"among": among, "place": np.arange(len(among))}))
            database.execute(
                "CREATE VIEW candidates AS SELECT scores.*, given.place AS __mmfilter_at FROM scores POSITIONAL JOIN "
                "given WHERE given.among"
            )
        if locked:
            lock(database, (*self._paths, *self._more.paths))
        return database

    def _query(self, sql: str, **arrays: np.ndarray) -> duckdb.DuckDBPyConnection:
        """Run SQL over `scores` and, if there are arrays, `given` (one value a position)."""
        try:
            return self.execute(sql, **arrays)
        except duckdb.Error as error:
            raise self._damaged(error) from error

    def execute(self, sql: str, **arrays: Any) -> duckdb.DuckDBPyConnection:
        """The same, its errors as DuckDB has them; an array may be anything that is a column of an Arrow table."""
        if arrays:
            self._database.register("given", arrow_table(arrays))
        return self._database.execute(sql)

    def _damaged(self, error: Exception) -> RunError:
        return RunError(
            f"the score tables of run {str(self.run.path)!r} cannot be read ({reason_of(error)}); score the shard again"
        )

    # --- questions, each one scan ---

    @property
    def scored(self) -> np.ndarray:
        """(rows,) True where the sample has scores."""
        found = self._query("SELECT coalesce(ok, false) AS ok FROM scores").fetchnumpy()["ok"]
        self._check_rows(len(found))
        return np.ma.getdata(found)

    def column(self, by: str, where: str | None = None) -> Column:
        """A numeric column, or an expression over the columns, and which rows pass `where`, a condition over them.

        In an expression `rank(x)` is the share of the other candidates with an x whose x is smaller; the
        candidates are the scored rows that pass. Raises `SelectionError` for another column, or an
        expression or condition that is not a plain one.
        """
        by = next((name for name in self.types if name.lower() == by.lower()), by)  # as in SQL
        plain = by in self.types or re.fullmatch(r"\w+", by) is not None
        condition = None if where is None else Expression("--where", where, condition=True)
        self._find(
            ({by} if plain else set()) | (set() if condition is None else condition.columns(self._database.cursor()))
        )
        if not plain or self.types.get(by, "").startswith(DECIMAL):
            passes = np.ma.getdata(self._fetch(condition, "1 AS v")["p"])
            return Column(*self.numbers("--by", by, passes & self.scored), passes)
        self._check_numeric(by)
        found = self._fetch(condition, f"CASE WHEN ok THEN {identifier(by)} END AS v")
        return Column(*_present(found["v"]), np.ma.getdata(found["p"]))

    def _find(self, names: set[str]) -> None:
        """Add those of the columns that only other files have."""
        if self._more.find(self._database, self.types, names):
            self._database = self.connect()
            self.types = self._described()

    def _fetch(self, condition: Expression | None, what: str) -> dict[str, np.ndarray]:
        """A column and, as `p`, which rows pass, in one scan."""
        database, test = self._database, "true"
        if condition is not None:
            database = self.connect(locked=True)
            condition.check(database, self._there)
            test = f"coalesce(CAST((\n{condition.text}\n) AS BOOLEAN), false)"
        try:
            found = database.execute(f"SELECT {what}, {test} AS p FROM scores").fetchnumpy()
        except duckdb.Error as error:
            raise (
                self._damaged(error) if condition is None else condition.error(f"fails: {reason_of(error)}")
            ) from error
        self._check_rows(len(found["p"]))
        return found

    def numbers(self, option: str, text: str, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """An expression's values for the rows of a mask, and where there is one that is not NaN."""
        values, present = np.zeros(self.rows), np.zeros(self.rows, bool)
        for at, found, there in self._evaluate(Expression(option, text), among, lambda value: value, number=True):
            if values.dtype != found.dtype:
                values = values.astype(found.dtype)  # before the first: all are of one type
            values[at] = found
            present[at] = there & ~np.isnan(found)
        return values, present

    def parts(self, option: str, text: str, among: np.ndarray) -> np.ndarray:
        """(rows,) for the rows of a mask the number, from 0, of their value of an expression, null being one too; −1
        elsewhere."""
        numbers = np.full(self.rows, -1, np.int32)
        for at, found, _ in self._evaluate(
            Expression(option, text), among, lambda value: f"dense_rank() OVER (ORDER BY {value}) - 1", number=False
        ):
            numbers[at] = found
        return numbers

    def _evaluate(
        self, expression: Expression, among: np.ndarray, made: Callable[[str], str], *, number: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Chunks of position, `made` value of an expression and whether there is one, for the rows of a mask in any
        order."""
        self._check_rows(len(self.scored))
        self._find(expression.columns(self._database.cursor()))
        database = self.connect(locked=True, among=among)
        expression.check(database, self._there)
        value = expression.numeric(database) if number else f"(\n{expression.text}\n)"
        try:
            database.execute(
                f"CREATE TEMP TABLE found AS SELECT i, {made('v')} AS v FROM (SELECT __mmfilter_at AS i, {value} AS v "
                "FROM candidates AS scores)"
            )
        except duckdb.Error as error:
            raise expression.error(f"fails: {reason_of(error)}") from error
        for first in range(0, database.execute("SELECT count(*) FROM found").fetchall()[0][0], _ROWS_AT_ONCE):
            sql = (
                f"SELECT i, coalesce(v, 0) AS v, v IS NOT NULL AS there FROM found WHERE rowid >= {first} AND rowid < "
                f"{first + _ROWS_AT_ONCE}"
            )
            chunk = database.execute(sql).fetchnumpy()
            yield np.ma.getdata(chunk["i"]), np.ma.getdata(chunk["v"]), np.ma.getdata(chunk["there"])

    @property
    def _there(self) -> str:
        """What columns there are, here and in other files."""
        return "; ".join([", ".join(self.types), *self._more.described()])

    def _check_numeric(self, name: str) -> None:
        numeric = [column for column, kind in self.types.items() if kind in NUMERIC]
        there = f"to rank by it has {', '.join(numeric)}"
        if name not in self.types:
            near = difflib.get_close_matches(name, numeric, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            if self._more.described():
                raise SelectionError(f"no column {name!r}; {hint}the score table has {self._there}")
            raise SelectionError(f"the score table has no column {name!r}; {hint}{there}")
        if name not in numeric:
            raise SelectionError(
                f"column {name!r} of the score table is not a number ({self.types[name].lower()}); {there}"
            )

    def _check_rows(self, rows: int) -> None:
        if rows != self.rows:
            raise RunError(
                f"the score tables of run {str(self.run.path)!r} hold {rows:,} rows but say {self.rows:,}; score the "
                "shards again"
            )

    def first_by_key(self, among: np.ndarray, n: int) -> np.ndarray:
        """Positions of the first `n` rows by key, then shard, then row, where `among` is true."""
        sql = f"""SELECT given.position FROM scores POSITIONAL JOIN given WHERE given.among
            ORDER BY key, shard, scores.row LIMIT {int(n)}"""
        return self._query(sql, among=among, position=np.arange(len(among))).fetchnumpy()["position"]

    def members(self, kept: np.ndarray, copies: np.ndarray | None = None) -> Members:
        """The byte ranges of the rows where `kept` is true, in source order.

        With `copies` (rows,), how often each of them is to be there, its second copies follow, again in
        source order, then the third, and so on: as far from one another as can be.
        """
        found = self._query(
            """SELECT scores.row AS r, coalesce("offset", -1 - scores.row) AS o,
                coalesce(nbytes, 0) AS n, hash(key) AS h
            FROM scores POSITIONAL JOIN given WHERE given.kept""",
            kept=kept,
        ).fetchnumpy()
        position = np.flatnonzero(kept)
        shard = np.searchsorted(self.starts, position, side="right") - 1
        if any(np.ma.is_masked(column) for column in found.values()) or not np.array_equal(
            found["r"], position - self.starts[shard]
        ):
            raise RunError(
                f"the score tables of run {str(self.run.path)!r} are not in row order; score the shards again"
            )
        columns = (shard.astype(np.int32), *(np.ma.getdata(found[name]) for name in "onh"))
        members = Members(self.shards, *columns)
        if copies is None:
            return members
        again = self._query(
            """SELECT place, n, hash(key || '-' || (n + 1)) AS h
            FROM (SELECT given.place, key, unnest(range(1, given.copies)) AS n
                FROM scores POSITIONAL JOIN given WHERE given.copies > 1)""",
            copies=np.where(kept, copies, 0),
            place=np.arange(self.rows),
        ).fetchnumpy()
        order = np.lexsort((again["place"], again["n"]))
        return members.with_copies(
            np.searchsorted(position, again["place"][order]), again["n"][order], again["h"][order]
        )

    def keys(self, positions: np.ndarray) -> Iterator[list[str]]:
        """Chunks of the keys at positions, in their order; one may come more than once."""
        rows = self.take(positions, ("key",))
        while chunk := list(islice(rows, 10_000)):
            yield [key for (key,) in chunk]

    def take(self, positions: np.ndarray, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """The values of columns at `positions`, row by row in that order; positions may come more than once.

        One query at a time: another question ends the iteration.
        """
        names = ", ".join(f"scores.{identifier(column)}" for column in columns)
        among = np.zeros(self.rows, bool)
        among[positions] = True
        if (positions[1:] > positions[:-1]).all():
            found = self._query(f"SELECT {names} FROM scores POSITIONAL JOIN given WHERE given.among", among=among)
        else:
            self._database.register("wanted", arrow_table({"place": positions, "rank": np.arange(len(positions))}))
            sql = f"""
                SELECT {names} FROM (
                    SELECT scores.*, given.place AS _place FROM scores POSITIONAL JOIN given WHERE given.among
                ) AS scores
                JOIN wanted ON wanted.place = _place ORDER BY wanted.rank"""
            found = self._query(sql, among=among, place=np.arange(self.rows))
        while chunk := found.fetchmany(10_000):
            yield from chunk

    def names_of(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """Columns `key`, `shard` and `row` at ascending `positions`."""
        return self.at(positions, ("key", "shard", "row"))

    def at(self, positions: np.ndarray, columns: Sequence[str]) -> dict[str, np.ndarray]:
        """Columns at ascending `positions`; null is NaN in a column of floats."""
        among = np.zeros(self.rows, bool)
        among[positions] = True
        names = ", ".join(f"scores.{identifier(column)}" for column in columns)
        found = self._query(
            f"SELECT {names} FROM scores POSITIONAL JOIN given WHERE given.among", among=among
        ).fetchnumpy()
        return {
            name: np.ma.filled(column, np.nan) if column.dtype.kind == "f" else np.ma.getdata(column)
            for name, column in found.items()
        }

    def with_key(self, key: str) -> np.ndarray:
        """Positions of the rows with this key."""
        found = self._query(f"SELECT key = {literal(key)} AS same FROM scores").fetchnumpy()["same"]
        return np.flatnonzero(np.ma.filled(found, fill_value=False))

    def key_like(self, key: str) -> str | None:
        """Of the first million keys the one most like this, if one is no more than two letters away."""
        sql = (
            f"SELECT key, levenshtein(key, {literal(key)}) AS away FROM (SELECT key FROM scores LIMIT 1000000) WHERE "
            "away <= 2 ORDER BY away, key LIMIT 1"
        )
        return next((key for key, _ in self._query(sql).fetchall()), None)

    def positions(self, paths: Sequence[str], shard: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Positions of rows of shards; `shard` indexes `paths`."""
        start = {shard.path: start for shard, start in zip(self.shards, self.starts.tolist(), strict=False)}
        positions: np.ndarray = np.array([start[path] for path in paths], np.int64)[shard] + row
        return positions

    def groups(self, *columns: str) -> np.ndarray:
        """(rows,) int64: for rows that share the values of these columns the position of the first of them.

        The first by key, then shard, then row; a row alone, without a score or with a null is its own.
        """
        names = ", ".join(map(identifier, columns))
        there = " AND ".join(f"{identifier(column)} IS NOT NULL" for column in columns)
        digest = self._query(f"SELECT CASE WHEN ok AND {there} THEN hash({names}) END AS h FROM scores").fetchnumpy()[
            "h"
        ]
        among = _repeated(np.ma.getdata(digest), ~np.ma.getmaskarray(digest))
        group = np.arange(self.rows)
        if among.any():
            sql = f"""
                SELECT given.position AS p,
                    first_value(given.position) OVER (PARTITION BY {names} ORDER BY key, shard, scores.row) AS first
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


def _repeated(values: np.ndarray, there: np.ndarray) -> np.ndarray:
    """True where a value, among those that are there, comes more than once."""
    at = np.flatnonzero(there)
    order = at[np.argsort(values[at], kind="stable")]
    same = values[order[1:]] == values[order[:-1]]
    found = np.zeros(len(values), bool)
    found[order[1:][same]] = found[order[:-1][same]] = True
    return found


def _present(column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values of a column, and where there is one that is not NaN."""
    values, present = np.ma.getdata(column), ~np.ma.getmaskarray(column)
    if values.dtype.kind == "f":
        present &= ~np.isnan(values)
    return values, present
