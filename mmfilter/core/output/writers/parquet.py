"""Pairs as parquet: the image file's bytes, the caption, the JSON and the scores, a row for each kept sample.

The image column is the `datasets` library's Image, struct<bytes, path>, and the file's metadata says so. A batch
of kept samples is a row group, so that memory stays bounded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmfilter.core.output.writers.kept import Kept, KeptSample, Written
from mmfilter.core.run.score_tables import ScoreTables
from mmfilter.core.run.tables import METADATA_KEY

_KINDS = {
    "VARCHAR": "string",
    "BOOLEAN": "bool",
    "FLOAT": "float32",
    "DOUBLE": "float64",
    "TINYINT": "int8",
    "SMALLINT": "int16",
    "INTEGER": "int32",
    "BIGINT": "int64",
    "UTINYINT": "uint8",
    "USMALLINT": "uint16",
    "UINTEGER": "uint32",
    "UBIGINT": "uint64",
}
_OWN = ("key", "image", "caption", "json", "others")
_VOID = ("ok", "reason", "offset", "nbytes", *_OWN)
"""Columns of the score table that say nothing of a sample that is kept and copied"""


def write_parquet(folder: Path, kept: Kept) -> Written:
    """Write `data/00000000.parquet` …, of `shard_size` rows each; at least one, so that the columns are there to
    see."""
    return write_tables(folder, kept, "data/%08d.parquet")


def write_tables(folder: Path, kept: Kept, name: str) -> Written:
    """Write the tables under `name`, with a place for the number."""
    columns = score_columns(kept.tables)
    schema = _schema(features(kept.tables), kept)
    (folder / name).parent.mkdir()
    batches = kept.batches(list(columns))
    number, samples = next(batches, (0, []))
    for shard in range(max(1, kept.n_shards)):
        with _writer(folder / (name % shard), schema) as writer:
            while samples and number == shard:
                writer.write_table(_table(samples, columns, schema))
                number, samples = next(batches, (shard, []))
    nbytes = sum(path.stat().st_size for path in (folder / name).parent.iterdir())
    return Written(nbytes, kept.number, name, kept.n_shards)


def score_columns(tables: ScoreTables) -> dict[str, str]:
    """Columns that are taken over from the score table, and their types."""
    return {name: _KINDS[kind] for name, kind in tables.types.items() if kind in _KINDS and name not in _VOID}


def features(tables: ScoreTables) -> dict[str, Any]:
    """The columns as the `datasets` library describes them; of the list in the way that its old versions read too."""
    string = {"_type": "Value", "dtype": "string"}
    found: dict[str, Any] = {name: string for name in _OWN}
    found |= {"image": {"_type": "Image"}, "others": [{"name": string, "bytes": {"_type": "Value", "dtype": "binary"}}]}
    return found | {name: {"_type": "Value", "dtype": kind} for name, kind in score_columns(tables).items()}


def _schema(described: dict[str, Any], kept: Kept) -> pa.Schema:
    special = {
        "image": pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        "others": pa.list_(pa.struct([("name", pa.string()), ("bytes", pa.binary())])),
    }
    fields = [(name, special.get(name) or pa.type_for_alias(kind["dtype"])) for name, kind in described.items()]
    metadata = {
        b"huggingface": json.dumps({"info": {"features": described}}),
        METADATA_KEY: json.dumps(dict(kept.about)),
    }
    return pa.schema(fields, metadata=metadata)


@contextmanager
def _writer(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """Images are stored as they are: they are compressed already."""
    bulky = ("image.bytes", "others.list.element.bytes")
    paths = [column.path for column in pq.ParquetFile(_empty(schema)).schema]
    rest = [column for column in paths if column not in bulky]
    compression = {column: "none" if column in bulky else "zstd" for column in paths}
    with pq.ParquetWriter(
        path, schema, compression=compression, use_dictionary=["shard"], write_statistics=rest
    ) as writer:
        yield writer


def _empty(schema: pa.Schema) -> pa.BufferReader:
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    return pa.BufferReader(sink.getvalue())


def _table(samples: Sequence[KeptSample], columns: dict[str, str], schema: pa.Schema) -> pa.Table:
    own = [_own_columns(sample) for sample in samples]
    values = {name: [row[name] for row in own] for name in _OWN} | {
        name: [sample.columns[name] for sample in samples] for name in columns
    }
    return pa.table({field.name: pa.array(values[field.name], field.type) for field in schema}, schema=schema)


def _own_columns(sample: KeptSample) -> dict[str, Any]:
    """The members as columns; what has no column of its own is in `others`, so that nothing is lost."""
    ext, image = next(iter(sample.images.items()))
    record = _text(sample.members.get("json"))
    held = {ext} | ({"json"} if record is not None else set())
    if (_text(sample.members.get("txt")) or "").lstrip("\ufeff").strip() == sample.caption:
        held.add("txt")
    return {
        "key": sample.key,
        "image": {"bytes": image, "path": f"{sample.key.rpartition('/')[2]}.{ext}"},
        "caption": sample.caption,
        "json": record,
        "others": [{"name": name, "bytes": content} for name, content in sample.members.items() if name not in held],
    }


def _text(content: bytes | None) -> str | None:
    try:
        return None if content is None else content.decode()
    except UnicodeDecodeError:
        return None
