"""Parquet files with encoded images in a column, as `datasets` and img2dataset write them: a sample a row.

The image column is a struct with `bytes` (and `path`), or plain bytes; all other columns that JSON can
hold become the sample's `json`, and the caption its `txt` as well.
"""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmfilter.core.input.places import Stamp, open_file, stamp_file
from mmfilter.core.input.sample import (
    CAPTION_FIELDS,
    IMAGE_EXTENSIONS,
    MAX_MEMBER_BYTES,
    Keys,
    RawSample,
    image_extension,
)
from mmfilter.core.input.source import InputOptions, RowSource
from mmfilter.errors import ShardError

CAPTION_COLUMNS = (*CAPTION_FIELDS, "txt", "conversations")
"""Columns that `auto` looks for, the first that has a text in a row is its caption."""
IMAGE_COLUMNS = ("image", "img", *IMAGE_EXTENSIONS)
KEY_COLUMNS = ("__key__", "key", "id", "uid")

_BATCH = 16
"""Rows that are in memory at one time"""


class ParquetRows(RowSource):
    """A parquet file with an image column; an open one remembers where it stands."""

    kind = "parquet"

    def __init__(self, path: str, options: InputOptions) -> None:
        super().__init__(path)
        self._caption = options.caption
        self._open = ExitStack()
        self._file: pq.ParquetFile | None = None
        self._keys: list[str] = []
        self._starts: list[int] = []
        self._batches: Iterator[tuple[int, list[dict[str, Any]]]] = iter(())
        self._at: tuple[int, list[dict[str, Any]]] = (0, [])

    def stamp(self) -> Stamp:
        return stamp_file(self.path)

    def samples(self, max_member_bytes: int = MAX_MEMBER_BYTES) -> Iterator[RawSample]:
        """The rows in order."""
        try:
            for start, rows in self._from(self._opened(), 0):
                for row, values in enumerate(rows, start):
                    yield self._sample(row, values, max_member_bytes)
        finally:
            self.close()

    def sample(self, row: int) -> RawSample:
        """One row; the row group that it is in is read up to it, unless the last call was just before it."""
        file = self._opened()
        if row >= len(self._keys):
            raise ShardError(
                self.path, f"has only {len(self._keys):,} rows; it has changed since it was scored, score it again"
            )
        start, rows = self._at
        group = bisect_right(self._starts, row) - 1
        if not rows or row < start or start + len(rows) < self._starts[group]:
            self._batches, rows = self._from(file, group), []
        while not rows or row >= start + len(rows):
            start, rows = self._at = next(self._batches)
        return self._sample(row, rows[row - start], MAX_MEMBER_BYTES)

    def close(self) -> None:
        """Close the file."""
        self._open.close()
        self._file, self._batches, self._at = None, iter(()), (0, [])

    def _opened(self) -> pq.ParquetFile:
        """Open the file, find its columns, and name its rows."""
        if self._file is not None:
            return self._file
        file = self._open.enter_context(open_file(self.path))
        with self._reading_errors():
            self._file = pq.ParquetFile(file)
            schema = self._file.schema_arrow
            self._image = self._image_column(schema)
            self._captions = self._caption_columns(schema)
            self._others = [field.name for field in schema if field.name != self._image and not _has_bytes(field.type)]
            groups = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
            self._starts = [sum(groups[:i]) for i in range(len(groups))]
            self._keys = self._named(self._file, schema)
        return self._file

    def _named(self, file: pq.ParquetFile, schema: pa.Schema) -> list[str]:
        column = next(
            (name for name in KEY_COLUMNS if name in schema.names and _is_name(schema.field(name).type)), None
        )
        names = (
            [None] * file.metadata.num_rows
            if column is None
            else file.read([column], use_threads=False).column(0).to_pylist()
        )
        keys = Keys(os.path.basename(self.path).rpartition(".")[0])
        return [keys.take(name, row) for row, name in enumerate(names)]

    def _image_column(self, schema: pa.Schema) -> str:
        columns = {field.name: field.type for field in schema if _holds_image(field.type)}
        named = [name for name in IMAGE_COLUMNS if name in columns] or list(columns)
        if len(named) == 1 or (named and named[0] in IMAGE_COLUMNS):
            return named[0]
        if named:
            raise ShardError(
                self.path, f"has several columns of bytes ({', '.join(named)}); call the one with the images 'image'"
            )
        raise ShardError(
            self.path, f"has no column with the bytes of images{self._beside_tar()}; it has {_listed(schema)}"
        )

    def _beside_tar(self) -> str:
        tar = self.path[: -len("parquet")] + "tar"
        if not self.remote and os.path.exists(tar):
            return f" (it describes {os.path.basename(tar)!r} beside it: name that)"
        return ""

    def _caption_columns(self, schema: pa.Schema) -> list[str]:
        wanted = CAPTION_COLUMNS if self._caption == "auto" else (self._caption,)
        found = [name for name in wanted if name in schema.names]
        if not found:
            said = (
                f"none of {', '.join(wanted)}; name one with --caption"
                if self._caption == "auto"
                else f"no {self._caption!r}"
            )
            raise ShardError(self.path, f"has no column with captions ({said}): it has {_listed(schema)}")
        return found

    def _from(self, file: pq.ParquetFile, group: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Batches of rows from the beginning of a row group on, each with the number of its first row."""
        groups = list(range(group, file.num_row_groups))
        start = self._starts[group] if groups else 0
        with self._reading_errors():
            for batch in file.iter_batches(
                _BATCH, row_groups=groups, columns=[self._image, *self._others], use_threads=False
            ):
                yield start, batch.to_pylist()
                start += batch.num_rows

    @contextmanager
    def _reading_errors(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            raise ShardError(
                self.path, f"is not a readable parquet file ({' '.join(str(error).split())[:200]})"
            ) from error

    def _sample(self, row: int, values: dict[str, Any], limit: int) -> RawSample:
        image = values[self._image]
        payload, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
        members: dict[str, bytes] = {
            "json": json.dumps(_plain({name: values[name] for name in self._others}), ensure_ascii=False).encode(
                "utf-8", "surrogatepass"
            )
        }
        caption = next((values[name] for name in self._captions if isinstance(values[name], str)), None)
        if caption is not None:
            members["txt"] = caption.encode("utf-8", "surrogatepass")
        problem = None
        if payload is None:
            problem = f"no image: column {self._image!r} is null" + (f" but for the path {path!r}" if path else "")
        elif len(payload) > limit:
            problem = f"member too large: the image has {len(payload):,} bytes, the limit is {limit:,}"
        else:
            members = {image_extension(payload, path or f".{self._image}"): payload} | members
        return RawSample(self._keys[row], row, None, None, members, problem)


def _listed(schema: pa.Schema) -> str:
    return ", ".join(schema.names) or "no columns"


def _is_bytes(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))


def _holds_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" and _is_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return _is_bytes(kind)


def _is_name(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string))


def _has_bytes(kind: pa.DataType) -> bool:
    return _is_bytes(kind) or any(_has_bytes(kind.field(i).type) for i in range(kind.num_fields))


def _plain(value: Any) -> Any:
    """A value of arrow as JSON has it: no NaN, and other things (times, decimals) as text."""
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)
