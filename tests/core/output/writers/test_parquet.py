"""Parquet: every column against the members as tarfile reads them."""

from __future__ import annotations

import itertools
import json
import re

import duckdb
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmfilter.core.selection.select_settings import SelectSettings
from mmfilter.errors import ShardError
from mmfilter.ops.select import select
from tests.core.output.writers.conftest import HARD
from tests.runs import add_table

CAPTIONS = [
    "日本のリンゴ 🍎",
    "spaces",
    "ж" * 300,
    "three",
    "What is this?\nEin Baum.\nSure?",
    "two images",
    "long key",
    "capitals",
]


def rows_of(folder):
    return [row for path in sorted((folder / "data").iterdir()) for row in pq.read_table(path).to_pylist()]


def test_nothing_of_a_sample_is_lost_or_changed(hard, written, tmp_path):
    best = written(hard, "parquet", shard_size=3)
    rows = rows_of(best)
    assert [row["key"] for row in rows] == list(HARD)
    assert [row["caption"] for row in rows] == CAPTIONS
    for row, (key, members) in zip(rows, HARD.items(), strict=True):
        given = {ext.lower(): content for ext, content in members}
        found = {row["image"]["path"].rsplit(".", 1)[1]: row["image"]["bytes"]} | {
            item["name"]: item["bytes"] for item in row["others"]
        }
        if row["json"] is not None:
            found["json"] = row["json"].encode()
        if "txt" in given:
            found["txt"] = given["txt"]  # the caption, checked above
        assert found == given, key
    assert [row["image"]["path"] for row in rows][:4] == ["k0.jpg", "k1.png", "Ключ.webp", "k3.jpg"]
    assert [[item["name"] for item in row["others"]] for row in rows] == [
        [],
        [],
        [],
        ["seg.png", "cls", "json"],
        [],
        ["png"],
        [],
        [],
    ]
    assert [row["similarity"] for row in rows] == [float(np.float32(i / 10)) for i in range(8)]
    assert [(row["shard"], row["row"]) for row in rows] == [
        (f"{tmp_path}/data/{i}.tar", j) for i in range(2) for j in range(4)
    ]
    assert not {"ok", "reason", "offset", "nbytes"} & set(rows[0])


def test_pandas_reads_the_folder(hard, written):
    table = pandas.read_parquet(written(hard, "parquet", shard_size=3) / "data")
    assert table["key"].tolist() == list(HARD) and table["caption"].tolist() == CAPTIONS
    assert [image["bytes"] for image in table["image"]] == [
        next(content for ext, content in members if ext.lower() in ("jpg", "jpeg", "png", "webp"))
        for members in HARD.values()
    ]
    assert table["similarity"].tolist() == [float(np.float32(i / 10)) for i in range(8)] and table["uid"].isna().all()


def test_files_hold_as_many_rows_as_asked_and_the_table_says_where_each_is(hard, written):
    best = written(hard, "parquet", shard_size=3, min=0.1)
    assert sorted(path.name for path in best.iterdir()) == ["data", "manifest.json", "selection.parquet"]
    assert {path.name: pq.read_metadata(path).num_rows for path in (best / "data").iterdir()} == {
        "00000000.parquet": 3, "00000001.parquet": 3, "00000002.parquet": 1,
    }  # fmt: skip
    where = {row["key"]: row["output_shard"] for row in pq.read_table(best / "selection.parquet").to_pylist()}
    found = duckdb.sql(f"SELECT key, filename FROM read_parquet('{best}/data/*.parquet', filename = true)").fetchall()
    assert where == {"../../up/k0": None} | {key: name.removeprefix(f"{best}/") for key, name in found}
    about = json.loads((best / "manifest.json").read_text())
    assert (about["kind"], about["settings"]["format"]) == ("selection", "parquet")
    assert json.loads(pq.read_schema(best / "data/00000000.parquet").metadata[b"mmfilter"]) == about


def test_the_order_is_that_of_the_other_formats(hard, written, tmp_path):
    select(hard, SelectSettings(top="100%", shuffle=5, format="keys", output=tmp_path / "keys"))
    keys = (tmp_path / "keys").read_text().splitlines()
    assert keys != list(HARD)
    rows = rows_of(written(hard, "parquet", shuffle=5, shard_size=2))
    assert [row["key"] for row in rows] == keys
    assert [row["image"]["bytes"] for row in rows] == [
        next(content for ext, content in HARD[key] if ext.lower() in ("jpg", "jpeg", "png", "webp")) for key in keys
    ]


def test_images_are_stored_and_the_rest_compressed(hard, written):
    group = pq.read_metadata(written(hard, "parquet") / "data/00000000.parquet").row_group(0)
    kinds = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert kinds["image.bytes"].compression == "UNCOMPRESSED" and not kinds["image.bytes"].is_stats_set
    assert kinds["caption"].compression == kinds["similarity"].compression == "ZSTD"


def test_a_row_group_is_a_bounded_number_of_bytes(hard, written, monkeypatch):
    from mmfilter.core.output.writers import kept

    monkeypatch.setattr(kept, "BATCH_BYTES", 12_000)
    table = pq.ParquetFile(written(hard, "parquet") / "data/00000000.parquet")
    sizes = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
    held = iter(
        pq.read_table(hard / "scores/0-0.parquet")["nbytes"].to_pylist()
        + pq.read_table(hard / "scores/1-1.parquet")["nbytes"].to_pylist()
    )
    assert sum(sizes) == 8 and len(sizes) > 2
    groups = [[next(held) for _ in range(size)] for size in sizes]
    assert all(len(group) == 1 or sum(group) <= 12_000 for group in groups)
    assert all(sum(group) + following[0] > 12_000 for group, following in itertools.pairwise(groups)), (
        "none is smaller than it has to be"
    )


def test_captions_come_from_where_they_were_scored(hard, written, caption_from):
    caption_from("caption")
    [row] = rows_of(written(hard, "parquet", top="1", where="row = 0 AND similarity < 0.1"))
    assert row["caption"] == "other"
    assert row["others"] == [{"name": "txt", "bytes": "日本のリンゴ 🍎".encode()}], (
        "a txt that is not the caption is kept"
    )


def test_nothing_kept_is_one_table_without_rows(hard, written):
    table = pq.read_table(written(hard, "parquet", min=9.0) / "data/00000000.parquet")
    assert table.num_rows == 0 and table.column_names[:5] == ["key", "image", "caption", "json", "others"]


@pytest.mark.parametrize("form", ["parquet", "hf", "llava-json"])
def test_nothing_is_left_of_a_write_that_fails(truncated, tmp_path, form):
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(
        ShardError, match=r"1\.tar' has become shorter since it was scored: score it again; it ends at byte [0-9,]+$"
    ):
        select(truncated, SelectSettings(top="100%", format=form, output=tmp_path / "best"))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_sample_that_is_not_the_one_that_was_scored(hard, tmp_path):
    table = hard / "scores/0-0.parquet"
    rows = pq.read_table(table)
    offsets = [0, 0, *rows["offset"].to_pylist()[2:]]  # of the second sample it is that of the first
    moved = rows.set_column(rows.schema.get_field_index("offset"), "offset", pa.array(offsets, pa.int64()))
    now = (tmp_path / "data/0.tar").stat()
    add_table(hard, "0-0", str(tmp_path / "data/0.tar"), moved.to_pylist(), size=now.st_size, mtime_ns=now.st_mtime_ns)
    message = f"shard '{tmp_path}/data/0.tar' does not hold sample 'a.b/k1' where it was scored: score it again; it should begin at byte 0"
    with pytest.raises(ShardError, match=f"^{re.escape(message)}$"):
        select(hard, SelectSettings(top="100%", format="parquet", output=tmp_path / "best"))


def test_a_sample_without_the_caption_it_was_scored_with(hard, tmp_path, caption_from):
    caption_from("headline")
    message = f"shard '{tmp_path}/data/0.tar' holds sample '../../up/k0' without the image or the caption it was scored with: score it again; it begins at byte 0"
    with pytest.raises(ShardError, match=f"^{re.escape(message)}$"):
        select(hard, SelectSettings(top="100%", format="parquet", output=tmp_path / "best"))


def test_a_repeated_sample_is_a_row_each_time(hard, written):
    """In the order of the other formats: after the first copies the second ones, and so on."""
    best = written(hard, "parquet", repeat="CASE key WHEN 'k3' THEN 3 WHEN 'k4' THEN 2 ELSE 1 END", shard_size=4)
    assert [row["key"] for row in rows_of(best)] == [*HARD, "k3", "k4", "k3"]
    where = {
        row["key"]: (row["output_shard"], row["copies"])
        for row in pq.read_table(best / "selection.parquet").to_pylist()
    }
    assert (where["k3"], where["k4"]) == (("data/00000000.parquet", 3), ("data/00000001.parquet", 2))
