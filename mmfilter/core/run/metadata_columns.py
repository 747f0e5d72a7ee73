"""Which columns of other files (`metadata`) a run's expressions name, fetched when they are first asked for."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import duckdb
import numpy as np

from mmfilter.core.run import metadata
from mmfilter.core.run.directory import ScoredShard
from mmfilter.errors import SelectionError


class MoreColumns:
    """The columns of other files that have been fetched for a run: parquet files with a row for each of its rows."""

    def __init__(self, shards: Sequence[ScoredShard], starts: np.ndarray, patterns: Sequence[str]) -> None:
        self.paths: list[Path] = []
        """What has been fetched, in a folder that is deleted with this object"""
        self.notes: list[str] = []
        """What the user should know about it"""
        self._shards, self._starts, self._patterns = shards, starts, patterns
        self._files: list[metadata.Files] | None = None
        self._folder: Path | None = None

    def find(self, database: duckdb.DuckDBPyConnection, known: Mapping[str, str], names: set[str]) -> bool:
        """Fetch those of the columns that are not `known` and other files have; whether there are any.

        Raises `SelectionError` for files that cannot be read or do not fit the run; none is looked at unless
        a name is unknown.
        """
        before, here = len(self.paths), {column.lower() for column in known}
        missing = sorted(name for name in names if name.lower() not in here)
        for files in self._looked_for(database) if missing else ():
            if columns := files.find(missing):
                self._add(database, files, columns)
                missing = [name for name in missing if name.lower() not in {column.lower() for column in columns}]
        return len(self.paths) > before

    def described(self) -> list[str]:
        """The columns of each kind of files that has been looked at."""
        return [f"{files.what}: {', '.join(files.types)}" for files in self._files or ()]

    def widen(self, database: duckdb.DuckDBPyConnection, view: str, wider: str) -> None:
        """Make the view `wider`, of a view of the score tables and the fetched columns."""
        more = "".join(
            f" POSITIONAL JOIN (SELECT * EXCLUDE ({metadata.FOUND}) FROM {metadata.reading(path)})"
            for path in self.paths
        )
        database.execute(f"CREATE VIEW {wider} AS SELECT * FROM {view}{more}")

    def _looked_for(self, database: duckdb.DuckDBPyConnection) -> list[metadata.Files]:
        if self._files is None:
            found = [metadata.named(database, self._patterns, uids=_has_uids(database))] if self._patterns else []
            for look in (metadata.beside, metadata.own):
                files = look(database, [shard.source for shard in self._shards], self._starts.tolist())
                found += [files] if files else []
            self._files = found
        return self._files

    def _add(self, database: duckdb.DuckDBPyConnection, files: metadata.Files, columns: list[str]) -> None:
        if files.mine is not None and files.start_of is not None:
            self._check_unchanged(set(files.start_of))
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="mmfilter-")).resolve()
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        path = self._folder / f"{len(self.paths)}.parquet"
        without = metadata.write_columns(database, files, columns, path, self._starts)
        self.paths.append(path)
        if without:
            self.notes.append(
                f"{files.what}: no row for {without:,} of {int(self._starts[-1]):,} samples, {', '.join(columns)} is "
                "null there"
            )

    def _check_unchanged(self, paths: set[str]) -> None:
        """Raise `SelectionError` for a shard whose rows may not be those of its score table any more."""
        for shard in self._shards:
            if shard.path in paths and shard.source.stamp() != shard.stamp:
                raise SelectionError(
                    f"shard {shard.path!r} has changed since it was scored, its rows may be others; score it again"
                )


def _has_uids(database: duckdb.DuckDBPyConnection) -> bool:
    return bool(database.execute("SELECT count(uid) FROM scores").fetchall()[0][0])
