"""Pieces of SQL, quoted for DuckDB, and what it says when something is wrong."""

from __future__ import annotations

import re


def identifier(column: str) -> str:
    """The name of a column."""
    return '"' + column.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A text."""
    return "'" + text.replace("'", "''") + "'"


def no_glob(path: str) -> str:
    """`path` so that DuckDB, which takes every path for a pattern, finds just that."""
    return re.sub(r"([*?\[])", r"[\1]", path)


def reason_of(error: Exception) -> str:
    """DuckDB's message as one line, without its drawing of the query."""
    return " ".join(str(error).split("\n\nLINE ")[0].split())
