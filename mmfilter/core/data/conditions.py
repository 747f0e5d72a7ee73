"""Conditions over the score table: what is one, and which columns it names."""

from __future__ import annotations

import json
from typing import Any

import duckdb

from mmfilter.core.data.sql import reason_of
from mmfilter.errors import SelectionError


def check_expression(database: duckdb.DuckDBPyConnection, where: str) -> None:
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
        raise SelectionError(f"--where {where!r} is not possible: {reason_of(error)}") from error


def _parsed(database: duckdb.DuckDBPyConnection, where: str) -> tuple[Any, Any]:
    """The syntax tree of a query with this condition: all but the condition, and the condition."""
    [serialized] = database.execute("SELECT json_serialize_sql(?)", [f"SELECT 1 FROM scores WHERE (\n{where}\n)"]).fetchone()
    tree = json.loads(serialized)
    if tree["error"]:
        raise SelectionError(f"--where {where!r} is not possible: {' '.join(tree['error_message'].split())}")
    return tree, tree["statements"][0]["node"].pop("where_clause", None)


def columns_of(database: duckdb.DuckDBPyConnection, where: str) -> set[str]:
    """The names in a condition that may be columns."""
    found: set[str] = set()

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if node.get("class") == "COLUMN_REF":
                names = node["column_names"]
                found.add(names[1] if len(names) > 1 and names[0].lower() == "scores" else names[0])
            node = list(node.values())
        if isinstance(node, list):
            for part in node:
                walk(part)

    walk(_parsed(database, where)[1])
    return found
