"""Parquet with images: which columns are taken, what becomes of the others, and files that will not do."""

from __future__ import annotations

import datetime
import json
import random
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmfilter.core.input.decode import DecodeSettings, decode
from mmfilter.core.input.sample import RawSample
from mmfilter.core.input.shards import expand, open_source
from mmfilter.core.input.source import InputOptions
from mmfilter.errors import ShardError
from tests import inputs
from tests.conftest import picture


def write(path: Path, columns: dict, **options) -> str:
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


def read(shard: str, caption: str = "auto", **options) -> list[RawSample]:
    return list(open_source(shard, InputOptions(caption)).samples(**options))


def error_of(shard: str, caption: str = "auto") -> str:
    with pytest.raises(ShardError) as caught:
        read(shard, caption)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"shard {shard!r} ", "", 1)


def test_images_are_structs_or_bytes_and_other_columns_become_json(tmp_path):
    more = {
        "score": [0.5, float("nan")],
        "when": [datetime.date(2024, 1, 2)] * 2,
        "tags": [["a"], None],
        "price": [Decimal("1.50")] * 2,
        "mask": [b"x", b"y"],
    }
    shard = str(inputs.as_parquet(tmp_path / "a.parquet", inputs.pairs(2), uid=["u0", "u1"], **more))
    first, second = read(shard)
    assert list(first.members) == ["jpg", "json", "txt"] and first.members["jpg"] == picture(0)
    assert (first.key, first.row, first.offset, first.nbytes, first.problem) == ("000000000", 0, None, None, None)
    text = first.members["txt"].decode()
    expected = {
        "id": "000000000",
        "caption": text,
        "uid": "u0",
        "score": 0.5,
        "when": "2024-01-02",
        "tags": ["a"],
        "price": "1.50",
    }
    assert json.loads(first.members["json"]) == expected
    assert json.loads(second.members["json"])["score"] is None
    assert decode(second, shard, DecodeSettings()).columns["uid"] == "u1"
    plain = write(tmp_path / "b.parquet", {"jpg": [picture(0)], "text": ["words"]})
    [raw] = read(plain)
    assert (raw.key, raw.members) == ("b-000000000", {"jpg": picture(0), "json": b'{"text": "words"}', "txt": b"words"})


def test_conversations_are_read_as_in_a_shard(tmp_path):
    turns = [[{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]]
    shard = write(
        tmp_path / "a.parquet", {"image": [{"bytes": picture(0, kind="PNG"), "path": None}], "conversations": turns}
    )
    [raw] = read(shard)
    assert list(raw.members) == ["png", "json"]
    assert decode(raw, shard, DecodeSettings()).caption == "What?\nA dog."


@pytest.mark.parametrize(("caption", "wanted"), [("auto", "one"), ("text", "two"), ("blip", "three")])
def test_the_caption_column(tmp_path, caption, wanted):
    shard = write(
        tmp_path / "a.parquet", {"image": [picture(0)], "text": ["two"], "blip": ["three"], "caption": ["one"]}
    )
    [raw] = read(shard, caption)
    assert raw.members["txt"] == wanted.encode()
    assert decode(raw, shard, DecodeSettings(caption)).caption == wanted


def test_rows_that_cannot_be_used_say_why(tmp_path):
    images = [
        {"bytes": None, "path": "a.jpg"},
        None,
        {"bytes": b"", "path": None},
        {"bytes": b"GIF89a", "path": "a.gif"},
        {"bytes": picture(0), "path": None},
    ]
    images += [{"bytes": picture(1), "path": None}]
    table = {
        "image": pa.array(images, inputs.IMAGE_STRUCT),
        "caption": ["a dog", "a dog", "a dog", "a dog", None, "a dog"],
    }
    shard = write(tmp_path / "a.parquet", table)
    assert [decode(raw, shard, DecodeSettings()).reason for raw in read(shard)] == [
        "no image: column 'image' is null but for the path 'a.jpg'",
        "no image: column 'image' is null",
        "image is empty: the jpg has 0 bytes",
        "image cannot be decoded: it is no JPEG, PNG or WebP",
        "no caption: no txt, no caption in the json (members: jpg, json)",
        None,
    ]
    [*_, large] = read(shard, max_member_bytes=100)
    assert large.problem == f"member too large: the image has {len(picture(1)):,} bytes, the limit is 100"


@pytest.mark.parametrize("row_group_size", [1, 5, 16, 100])
def test_single_rows_are_those_of_the_stream(tmp_path, row_group_size):
    shard = str(inputs.as_parquet(tmp_path / "a.parquet", inputs.pairs(50), row_group_size=row_group_size))
    samples = read(shard)
    order = [random.Random(row_group_size).randrange(50) for _ in range(80)] + list(range(0, 50, 3))
    rows = open_source(shard, InputOptions())
    assert [rows.sample(row) for row in order] == [samples[row] for row in order]
    with pytest.raises(ShardError, match="has only 50 rows; it has changed since it was scored, score it again"):
        rows.sample(50)
    rows.close()


@pytest.mark.parametrize("name", ["__key__", "key", "id", "uid"])
def test_keys_come_from_a_column_that_names_rows(tmp_path, name):
    columns = {"image": [picture(0)] * 4, "caption": ["w"] * 4}
    assert [raw.key for raw in read(write(tmp_path / "a.parquet", columns | {name: ["x", "y.z", None, "x"]}))] == [
        "x",
        "y_z",
        "a-000000002",
        "x-3",
    ]
    assert [raw.key for raw in read(write(tmp_path / "b.parquet", columns | {name: [7, 8, 9, 7]}))] == [
        "7",
        "8",
        "9",
        "7-3",
    ]


@pytest.mark.parametrize(
    ("columns", "caption", "message"),
    [
        ({"url": ["x"], "caption": ["w"]}, "auto", "has no column with the bytes of images; it has url, caption"),
        (
            {"image": [b"x"], "title": ["w"]}, "auto",
            "has no column with captions (none of caption, text, txt, conversations; name one with --caption): it has image, title",
        ),
        ({"image": [b"x"], "caption": ["w"]}, "title", "has no column with captions (no 'title'): it has image, caption"),
        ({"a": [b"x"], "b": [b"x"], "caption": ["w"]}, "auto", "has several columns of bytes (a, b); call the one with the images 'image'"),
    ],
)  # fmt: skip
def test_a_file_that_will_not_do_says_what_it_has(tmp_path, columns, caption, message):
    assert error_of(write(tmp_path / "a.parquet", columns), caption) == message


def test_a_sidecar_points_to_its_tar(tmp_path):
    shard = write(tmp_path / "00000.parquet", {"key": ["x"], "caption": ["w"]})
    (tmp_path / "00000.tar").write_bytes(b"")
    assert (
        error_of(shard)
        == "has no column with the bytes of images (it describes '00000.tar' beside it: name that); it has key, caption"
    )


def test_a_file_that_is_no_parquet_says_so(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no parquet at all")
    assert error_of(str(tmp_path / "a.parquet")).startswith("is not a readable parquet file (")
    good = inputs.as_parquet(tmp_path / "b.parquet", inputs.pairs(9))
    good.write_bytes(good.read_bytes()[:-100])
    assert error_of(str(good)).startswith("is not a readable parquet file (")
    assert error_of(str(tmp_path / "gone.parquet")) == "does not exist; check the path"


def test_a_damaged_page_ends_the_shard(tmp_path):
    path = inputs.as_parquet(tmp_path / "b.parquet", inputs.pairs(9))
    content = bytearray(path.read_bytes())
    content[4:40] = bytes(36)
    path.write_bytes(content)
    assert error_of(str(path)).startswith("is not a readable parquet file (")


def test_a_url_works(tmp_path):
    import fsspec

    path = inputs.as_parquet(tmp_path / "a.parquet", inputs.pairs(3))
    fsspec.filesystem("memory").pipe("/rows/a.parquet", path.read_bytes())
    assert expand(["memory://rows/*.parquet"]) == ["memory:///rows/a.parquet"]
    assert read("memory:///rows/a.parquet") == read(str(path))
