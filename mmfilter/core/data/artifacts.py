"""The files of a run directory: parquet tables, manifests and atomic writes.

The one door to pyarrow. Every file is written to a temporary name beside its place and renamed, so
that a file that *exists* is a file that is *finished*.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmfilter.errors import RunError

METADATA_KEY = b"mmfilter"
"""Parquet key under which a table explains itself, as JSON."""

SCORES = (
    "saev",
    "cooccurrence",
    "l0",
    "l0_image",
    "l0_text",
    "l1",
    "l1_image",
    "l1_text",
    "similarity",
    "support",
    "raw",
    "random",
)
"""Score columns of the score table, in their order (definitions in `core/scoring/scores.py`)."""

SCORE_TABLE = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("row", pa.int32()),
        ("offset", pa.int64()),
        ("nbytes", pa.int64()),
        ("ok", pa.bool_()),
        ("reason", pa.string()),
        ("uid", pa.string()),
        ("image_hash", pa.string()),
        ("text_hash", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("caption_chars", pa.int32()),
        ("n_image_tokens", pa.int32()),
        ("n_text_tokens", pa.int32()),
        *((name, pa.float32()) for name in SCORES),
    ]
)
"""One row for every sample of the input, bad ones too; score columns are null where `ok` is false.

`offset` and `nbytes` are the byte range of all the sample's members in the tar, headers and padding
included, so that a selection copies bytes and never decodes.
"""

CODE_TABLE = pa.schema(
    [
        ("key", pa.string()),
        ("row", pa.int32()),
        *(
            (f"{side}_{part}", pa.list_(kind))
            for side in ("image", "text")
            for part, kind in (("ids", pa.uint32()), ("max", pa.float16()), ("mean", pa.float16()))
        ),
    ]
)
"""Sparse codes: per scored sample and side the strongest features, strongest first.

`max` and `mean` are taken over the side's tokens (mean over all tokens, silent ones count 0).
"""


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it into place if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file; raises `RunError` naming the file when it is damaged."""
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise RunError(f"{str(path)!r} is not valid JSON ({error}); delete it and run again") from error


class TableWriter:
    """Appends row groups to a parquet file that appears under its name only when finished."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path, self._schema = path, schema
        self._context = atomic(path)
        self._writer = pq.ParquetWriter(self._context.__enter__(), schema, compression="zstd")

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append rows (dicts by column name; missing columns become null) as one row group."""
        if rows:
            self._writer.write_table(pa.Table.from_pylist(rows, schema=self._schema))

    def finish(self, metadata: Mapping[str, Any]) -> None:
        """Store `metadata` in the file and move it into place."""
        self._writer.add_key_value_metadata({METADATA_KEY: json.dumps(dict(metadata)).encode()})
        self._writer.close()
        self._context.__exit__(None, None, None)

    def abandon(self) -> None:
        """Drop what was written."""
        self._writer.close()
        self._context.__exit__(RuntimeError, RuntimeError("abandoned"), None)


def read_table_metadata(path: Path) -> dict[str, Any]:
    """What a table says of itself (kind, version, shard, size, mtime_ns, rows, ok, …)."""
    try:
        stored = pq.read_metadata(path).metadata or {}  # not of the schema: that lacks what a writer adds
    except (pa.ArrowInvalid, OSError) as error:
        raise RunError(f"{str(path)!r} is not a readable parquet file: {error}") from error
    if METADATA_KEY not in stored:
        raise RunError(f"{str(path)!r} was not written by mmfilter: it has no {METADATA_KEY.decode()!r} metadata")
    return json.loads(stored[METADATA_KEY])


@dataclass(frozen=True)
class RunDirectory:
    """Where a run keeps its files."""

    path: Path

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def weights(self) -> Path:
        return self.path / "weights.safetensors"

    def scores(self, name: str) -> Path:
        """The score table of the shard called `name` in this run."""
        return self.path / "scores" / f"{name}.parquet"

    def codes(self, name: str) -> Path:
        """The code table of the shard called `name` in this run."""
        return self.path / "codes" / f"{name}.parquet"

    def score_tables(self) -> list[Path]:
        """All finished score tables, in the order of the inputs in the manifest, then by name.

        Raises `RunError` when there is no run or nothing in it is finished.
        """
        if not self.manifest.exists():
            raise RunError(f"{str(self.path)!r} is no run: it has no manifest.json; make one with: mmfilter score SHARDS --run {self.path}")
        order = {item["name"]: i for i, item in enumerate(read_json(self.manifest)["inputs"])}
        found = sorted((self.path / "scores").glob("*.parquet"), key=lambda p: (order.get(p.stem, len(order)), p.stem))
        if not found:
            raise RunError(f"run {str(self.path)!r} has no finished shard yet; continue it with: mmfilter score SHARDS --run {self.path}")
        return found


def read_column(tables: list[Path], column: str) -> np.ndarray:
    """One numeric column of all rows of the tables, float32, null as NaN."""
    parts = [pq.read_table(path, columns=[column]).column(0).to_numpy(zero_copy_only=False) for path in tables]
    return np.concatenate(parts).astype(np.float32) if parts else np.zeros(0, np.float32)
