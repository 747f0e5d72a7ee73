"""The parquet tables of a run: their schemas, writing them, and reading whole columns.

The one door to pyarrow, but for parquet that is input (`input/sources/parquet_rows.py`) and the pairs that a
selection writes (`output/writers/parquet.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmfilter.core.files import atomic
from mmfilter.errors import RunError

METADATA_KEY = b"mmfilter"
"""Parquet key under which a table explains itself, as JSON."""

_SAMPLE_COLUMNS = (
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
)


def score_table(scores: Iterable[str]) -> pa.Schema:
    """The score table: one row for every sample of the input, bad ones too; the columns of `scores` are null where `ok`
    is false.

    `offset` and `nbytes` are the byte range of all the sample's members in the tar, headers and padding
    included, so that a selection copies bytes and never decodes; null where the shard is not a tar.
    """
    return pa.schema([*_SAMPLE_COLUMNS, *((name, pa.float32()) for name in scores)])


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

DUPLICATE_TABLE = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("row", pa.int32()),
        ("other_key", pa.string()),
        ("other_shard", pa.string()),
        ("other_row", pa.int32()),
        ("image", pa.float32()),
        ("text", pa.float32()),
        ("similarity", pa.float32()),
    ]
)
"""Pairs of samples whose codes are close: the cosine of either side, and the one that is held against
the threshold. A row without another says that the pairs of this sample are complete only above
`similarity`: it has more neighbours than are kept.
"""


class TableWriter:
    """Appends row groups to a parquet file that appears under its name only when finished."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path, self._schema = path, schema
        self._temporary = ExitStack()
        self._writer = pq.ParquetWriter(self._temporary.enter_context(atomic(path)), schema, compression="zstd")

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append rows (dicts by column name; missing columns become null) as one row group."""
        if rows:
            self._writer.write_table(pa.Table.from_pylist(rows, schema=self._schema))

    def write_columns(self, columns: Mapping[str, Any]) -> None:
        """Append one row group from whole columns (arrays, or lists with None)."""
        self._writer.write_table(
            pa.table(
                {field.name: pa.array(columns[field.name], field.type) for field in self._schema}, schema=self._schema
            )
        )

    def finish(self, metadata: Mapping[str, Any]) -> None:
        """Store `metadata` in the file and move it into place."""
        self._writer.add_key_value_metadata({METADATA_KEY: json.dumps(dict(metadata)).encode()})
        self._writer.close()
        self._temporary.close()

    def abandon(self) -> None:
        """Drop what was written; nothing happens to what is finished."""
        with suppress(OSError):  # a disk may be full
            self._writer.close()
        self._temporary.__exit__(RuntimeError, RuntimeError("abandoned"), None)


def read_table_metadata(path: Path) -> dict[str, Any]:
    """What a table says of itself (kind, version, shard, size, mtime_ns, rows, ok, …)."""
    try:
        stored = pq.read_metadata(path).metadata or {}  # not of the schema: that lacks what a writer adds
    except (pa.ArrowInvalid, OSError) as error:
        raise RunError(f"{str(path)!r} is not a readable parquet file: {error}") from error
    if METADATA_KEY not in stored:
        raise RunError(f"{str(path)!r} was not written by mmfilter: it has no {METADATA_KEY.decode()!r} metadata")
    metadata: dict[str, Any] = json.loads(stored[METADATA_KEY])
    return metadata


def read_column(tables: list[Path], column: str) -> np.ndarray:
    """One numeric column of all rows of the tables, float32, null as NaN."""
    parts = [pq.read_table(path, columns=[column]).column(0).to_numpy(zero_copy_only=False) for path in tables]
    return np.concatenate(parts).astype(np.float32) if parts else np.zeros(0, np.float32)


def whole(paths: Sequence[Path]) -> pa.Table:
    """Tables of one schema, one after the other."""
    return pa.concat_tables([pq.read_table(path) for path in paths])


def taken(table: pa.Table, positions: np.ndarray) -> pa.Table:
    """Rows of a table, in the order of `positions`."""
    return table.take(pa.array(positions))


def arrow_table(columns: Mapping[str, Any]) -> pa.Table:
    """Columns of one length as a table that DuckDB can read."""
    return pa.table(dict(columns))


def dictionary_column(values: np.ndarray, index: np.ndarray) -> pa.Array:
    """`values[index]` as a column that holds each value once; null where the index is negative."""
    return pa.DictionaryArray.from_arrays(pa.array(index.astype(np.int32), mask=index < 0), pa.array(values))


def read_columns(path: Path, columns: Sequence[str]) -> dict[str, Any]:
    """Whole columns of a table: numbers as arrays, masked where null; strings as (values, index of each row, −1 where
    null)."""
    found: dict[str, Any] = {}
    for name, chunks in zip(columns, pq.read_table(path, columns=list(columns)).columns, strict=True):
        column = pa.concat_arrays(chunks.chunks) if chunks.num_chunks else pa.array([], chunks.type)
        if pa.types.is_string(column.type):
            coded = column.dictionary_encode()
            found[name] = coded.dictionary.to_pylist(), coded.indices.fill_null(-1).to_numpy()
        else:
            found[name] = np.ma.array(
                column.fill_null(0).to_numpy(), mask=column.is_null().to_numpy(zero_copy_only=False)
            )
    return found


def read_codes(
    path: Path, columns: Sequence[str], wanted: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]]]]:
    """Batches of a code table: rows in the shard, and list columns as (lengths, flattened values).

    With `wanted`, rows in the shard in ascending order, only those are yielded, and row groups without
    any of them are not read. Raises `RunError` when the table is damaged.
    """
    try:
        with pq.ParquetFile(path) as file:
            place = file.schema_arrow.get_field_index("row")
            for number in range(file.num_row_groups):
                bounds = file.metadata.row_group(number).column(place).statistics
                if wanted is not None and bounds is not None and bounds.has_min_max:
                    first, last = np.searchsorted(wanted, (bounds.min, bounds.max + 1))
                    if first == last:
                        continue
                yield from _code_batches(file, number, columns, wanted)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise RunError(
            f"code table {str(path)!r} cannot be read ({error}); delete it and score the shard again"
        ) from error


def _code_batches(
    file: pq.ParquetFile, number: int, columns: Sequence[str], wanted: np.ndarray | None
) -> Iterator[tuple[np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]]]]:
    for batch in file.iter_batches(4096, row_groups=[number], columns=["row", *columns], use_threads=False):
        rows = batch.column("row").to_numpy()
        if wanted is not None:
            batch = batch.filter(pa.array(np.isin(rows, wanted)))
            rows = batch.column("row").to_numpy()
        lists = ((name, batch.column(name)) for name in columns)
        yield (
            rows,
            {
                name: (pc.list_value_length(column).to_numpy(), column.flatten().to_numpy(zero_copy_only=False))
                for name, column in lists
            },
        )
