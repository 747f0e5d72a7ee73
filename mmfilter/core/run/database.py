"""Opening DuckDB over the score tables of a run, and locking it before an expression of the user is run."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import duckdb

from mmfilter.core.memory import available

LEAST_MEMORY = 256 << 20
"""Bytes that DuckDB is given in any case"""


def open_database(paths: Sequence[Path], view: str) -> duckdb.DuckDBPyConnection:
    """A database in which `view` is the score tables, one after the other."""
    spill = os.path.join(tempfile.gettempdir(), f"mmfilter-{os.getpid()}")
    database = duckdb.connect(config={"temp_directory": spill, "autoinstall_known_extensions": "false"})
    database.execute("SET enable_progress_bar = false")
    database.execute(f"SET memory_limit = '{max(available() // 3, LEAST_MEMORY)} B'")  # the arrays need some too
    database.read_parquet([no_glob(str(path)) for path in paths], hive_partitioning=False).create_view(view)
    return database


def in_memory() -> duckdb.DuckDBPyConnection:
    """An empty database, to see what DuckDB makes of a text."""
    return duckdb.connect(config={"autoinstall_known_extensions": "false"})


def lock(database: duckdb.DuckDBPyConnection, paths: Iterable[Path]) -> None:
    """Let it read nothing but the folders of these files, and write nothing, from now on."""
    folders = {os.path.dirname(str(path)) + "/" for path in paths}
    folders |= {no_glob(folder) for folder in folders}
    database.execute("SET python_enable_replacements = false")
    database.execute("SET allowed_directories = ?", [sorted(folders)])
    database.execute("SET enable_external_access = false")
    database.execute("SET lock_configuration = true")


# --- pieces of SQL ---------------------------------------------------------------------------


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
