"""Tables at URLs for DuckDB: it asks for the bytes of the columns that it wants, and gets just those."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import duckdb
from fsspec import AbstractFileSystem

from mmfilter.core.input.remote import RemoteFile, ask, filesystem_of, is_url


def reach(database: duckdb.DuckDBPyConnection, paths: Iterable[str]) -> None:
    """Let a database read those of the paths that are URLs."""
    for protocol in {path.partition("://")[0] for path in paths if is_url(path)}:
        if protocol not in database.list_filesystems():
            database.register_filesystem(_Tables(protocol))


class _Tables(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A file system of whole URLs, in the words that DuckDB has for one.

    Those of fsspec read far more than they are asked for, ask for the size of a file whenever it is opened,
    and for plain HTTP lack what DuckDB wants to know.
    """

    cachable = False

    def __init__(self, protocol: str) -> None:
        super().__init__()
        self.protocol = protocol
        self._sizes: dict[str, int | None] = {}

    def glob(self, path: str, **_settings: Any) -> list[str]:
        """The one file: its name is never a pattern here (`sql.no_glob`)."""
        return [re.sub(r"\[([*?\[])\]", r"\1", path)]

    def unstrip_protocol(self, name: str) -> str:
        return name

    def open(self, path: str, _mode: str = "rb", **_settings: Any) -> RemoteFile:
        return RemoteFile(path, self._size(path))

    def info(self, path: str, **_settings: Any) -> dict[str, Any]:
        size = self._size(path)
        if size is None:
            with RemoteFile(path) as file:
                size = file.size
        return {"name": path, "size": size, "type": "file"}

    def modified(self, _path: str) -> datetime:
        """Always the same: what has been read of a file is not kept from one command to another."""
        return datetime(1970, 1, 1, tzinfo=UTC)

    def _size(self, path: str) -> int | None:
        if path not in self._sizes:
            filesystem, place = filesystem_of(path)
            self._sizes[path] = ask(path, filesystem.info, place).get("size")
        return self._sizes[path]


def said_by_file(error: duckdb.Error) -> str | None:
    """What `RemoteFile` said when it is behind an error of DuckDB, which holds it as the end of a traceback's text."""
    found = re.search(r"^(?:\w+\.)*ShardError: shard (.+)$", str(error), re.MULTILINE)
    return found[1] if found else None
