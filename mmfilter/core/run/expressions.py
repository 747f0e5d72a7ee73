"""SQL expressions that users write over the score table: what may be in one, and what to say of one that cannot be.

An expression is evaluated in a database that is locked: it
sees the score tables, with what has been fetched from other files, and nothing else, and can write nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import duckdb

from mmfilter.core.run.database import reason_of
from mmfilter.errors import SelectionError

NUMERIC = (
    "FLOAT",
    "DOUBLE",
    "TINYINT",
    "SMALLINT",
    "INTEGER",
    "BIGINT",
    "UTINYINT",
    "USMALLINT",
    "UINTEGER",
    "UBIGINT",
)
DECIMAL = ("DECIMAL", "HUGEINT", "UHUGEINT")
"""How types begin whose values become DOUBLE"""

_RANK = """CREATE OR REPLACE MACRO rank(x) AS CASE WHEN x IS NOT NULL AND NOT isnan(CAST(x AS DOUBLE)) THEN
    percent_rank() OVER (PARTITION BY x IS NULL OR isnan(CAST(x AS DOUBLE)) ORDER BY x) END"""
"""(rows with a smaller x) / (rows with an x − 1): 0 for the smallest, 1 for one that all others are below."""
_NO_RANK = "CREATE OR REPLACE MACRO rank(x) AS CAST(x AS DOUBLE)"
"""Of the same type, while an expression is checked: a window function of the user's own must stand out."""


@dataclass(frozen=True)
class Expression:
    """An expression over the columns of one row, as given with an option of the command line."""

    option: str
    """`--where`, `--by`, …: what messages begin with"""
    text: str
    condition: bool = False
    """It says which rows pass; others give a value and may use `rank(x)`"""

    def check(self, database: duckdb.DuckDBPyConnection, columns: str) -> None:
        """Raise `SelectionError` unless it is one expression over the columns, without sub-queries.

        `columns` says in words which there are.
        """
        self.check_form(database)
        if not self.condition:
            database.execute(_NO_RANK)
        try:
            database.execute(
                f"SELECT 1 FROM scores WHERE (\n{self.text}\n) {'' if self.condition else 'IS NULL'} LIMIT 0"
            )
        except duckdb.Error as error:
            raise self._impossible(error, columns) from error
        if not self.condition:
            database.execute(_RANK)

    def check_form(self, database: duckdb.DuckDBPyConnection) -> None:
        """Raise `SelectionError` for what can be seen in the text, whatever the columns."""
        if not self.text.strip():
            raise self.error(f"is no{self._what.removeprefix('a')}")
        skeleton, _ = self._parsed(database, "true")
        statement, found = self._parsed(database, self.text)
        if statement != skeleton:
            raise self.error(f"is more than {self._what}")
        if '"class": "SUBQUERY"' in json.dumps(found):
            raise self.error(
                f"has a sub-query; only {'a condition' if self.condition else 'a formula'} over the columns of one row "
                "is possible"
            )
        if next(_nodes(found, "STAR"), None) is not None:
            raise self.error("has a * for several columns; name each")
        self._check_constant(database, found)

    def columns(self, database: duckdb.DuckDBPyConnection) -> set[str]:
        """The names in it that may be columns."""
        names = (node["column_names"] for node in _nodes(self._parsed(database, self.text)[1], "COLUMN_REF"))
        return {parts[1] if len(parts) > 1 and parts[0].lower() == "scores" else parts[0] for parts in names}

    @property
    def _what(self) -> str:
        if self.condition:
            return "a condition; write what could follow WHERE, such as 'width >= 256 AND ok'"
        return "a formula; write one over the columns, such as '0.7 * similarity + 0.3 * rank(saev)'"

    def _parsed(self, database: duckdb.DuckDBPyConnection, text: str) -> tuple[Any, Any]:
        """The syntax tree of a query with this condition: all but the condition, and the condition."""
        [serialized] = database.execute(
            "SELECT json_serialize_sql(?)", [f"SELECT 1 FROM scores WHERE (\n{text}\n)"]
        ).fetchall()[0]
        tree = json.loads(serialized)
        if tree["error"]:
            raise self.error(f"is not possible: {' '.join(tree['error_message'].split())}")
        return tree, tree["statements"][0]["node"].pop("where_clause", None)

    def _check_constant(self, database: duckdb.DuckDBPyConnection, tree: Any) -> None:
        """Refuse functions that give something else each time."""
        volatile = {
            name
            for (name,) in database.execute(
                "SELECT function_name FROM duckdb_functions() WHERE stability = 'VOLATILE'"
            ).fetchall()
        }
        for name in (node["function_name"].lower() for node in _nodes(tree, "FUNCTION")):
            if name in volatile:
                raise self.error(
                    f"uses {name}(), which is another number each time; the column 'random' is a seeded one"
                )

    def _impossible(self, error: duckdb.Error, columns: str) -> SelectionError:
        said = reason_of(error)
        if unknown := re.search(r'Referenced column "(.*?)" not found|does not have a column named "(.*?)"', said):
            return self.error(
                f"names a column {unknown[1] or unknown[2]!r} that the score table does not have; it has {columns}"
            )
        return self.error(
            f"is not possible: {said if self.condition else said.replace('WHERE clause', 'a formula over one row')}"
        )

    def error(self, problem: str) -> SelectionError:
        return SelectionError(f"{self.option} {self.text!r} {problem}")

    def numeric(self, database: duckdb.DuckDBPyConnection) -> str:
        """SQL of its value as a number; raises `SelectionError` when it is none."""
        try:
            [(_, kind, *_)] = database.execute(f"DESCRIBE SELECT (\n{self.text}\n) AS v FROM scores").fetchall()
        except duckdb.Error as error:
            raise self.error(f"is not possible: {reason_of(error)}") from error
        if kind in NUMERIC:
            return f"(\n{self.text}\n)"
        if kind.startswith(("BOOLEAN", *DECIMAL)) and not kind.endswith("]"):
            return f"CAST((\n{self.text}\n) AS DOUBLE)"
        raise self.error(
            f"is not a number but {kind.lower()}; write a formula that gives one, such as '0.7 * similarity + 0.3 * "
            "rank(saev)'"
        )


def _nodes(tree: Any, kind: str) -> Iterator[dict[str, Any]]:
    """The nodes of a class in a syntax tree."""
    if isinstance(tree, dict):
        if tree.get("class") == kind:
            yield tree
        tree = list(tree.values())
    for item in tree if isinstance(tree, list) else ():
        yield from _nodes(item, kind)
