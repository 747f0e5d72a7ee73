"""LLaVA JSON: records as a stream against `json.load`, names of images that may not be opened, damaged files."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from mmfilter.core.input.decode import DecodeSettings, decode
from mmfilter.core.input.shards import expand, open_source
from mmfilter.core.input.source import InputOptions
from mmfilter.core.input.sources import llava_json
from mmfilter.errors import ShardError
from tests.conftest import picture
from tests.inputs import record

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A red apple."}]


@pytest.fixture
def images(tmp_path: Path) -> str:
    (tmp_path / "images/sub").mkdir(parents=True)
    (tmp_path / "images/a.jpg").write_bytes(picture(1))
    (tmp_path / "images/sub/b.PNG").write_bytes(picture(2, kind="PNG"))
    (tmp_path / "secret.jpg").write_bytes(picture(3))
    return str(tmp_path / "images")


def write(tmp_path: Path, content: object, name: str = "data.json") -> str:
    path = tmp_path / name
    path.write_bytes(
        content
        if isinstance(content, bytes)
        else json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")
    )
    return str(path)


def reasons(shard: str, images: str) -> list[str | None]:
    samples = list(open_source(shard, InputOptions(images=images)).samples())
    return [decode(raw, shard, DecodeSettings()).reason for raw in samples]


def error_of(shard: str) -> str:
    with pytest.raises(ShardError) as caught:
        list(open_source(shard).samples())
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"shard {shard!r} ", "", 1)


def test_caption_key_and_image(tmp_path, images):
    records = [
        {"id": "one", "image": "a.jpg", "conversations": TURNS},
        {"id": 2, "image": ["sub/b.PNG"], "conversations": TURNS},
    ]
    shard = write(tmp_path, records)
    samples = list(open_source(shard, InputOptions(images=images)).samples())
    assert [(raw.key, raw.row, sorted(raw.members), raw.offset, raw.nbytes) for raw in samples] == [
        ("one", 0, ["jpg", "json"], None, None),
        ("2", 1, ["json", "png"], None, None),
    ]
    assert [json.loads(raw.members["json"]) for raw in samples] == records
    assert samples[1].members["png"] == picture(2, kind="PNG")
    assert decode(samples[0], shard, DecodeSettings()).caption == "What is it?\nA red apple."


def test_images_are_beside_the_json_by_default(tmp_path, images):
    shard = write(Path(images), [record("x", "words", "a.jpg")])
    [raw] = open_source(shard).samples()
    assert (raw.problem, raw.members["jpg"]) == (None, picture(1))


def test_names_that_lead_out_of_the_folder_are_never_opened(tmp_path, images, monkeypatch):
    os.symlink(tmp_path, tmp_path / "images/link")
    names = [
        "../secret.jpg",
        str(tmp_path / "secret.jpg"),
        "sub/../../secret.jpg",
        "link/../secret.jpg",
        "..\\secret.jpg",
        "C:\\x.jpg",
        "file:///etc/passwd",
    ]
    opened: list[str] = []
    plain = llava_json.read_file

    def watched(path: str, name: str, limit: int) -> bytes:
        opened.append(name)
        return plain(path, name, limit)

    monkeypatch.setattr(llava_json, "read_file", watched)
    shard = write(tmp_path, [record(str(i), "words", name) for i, name in enumerate(names)])
    out, not_relative = "leads out of the folder of images", "is not relative to the folder of images"
    said = [out, not_relative, out, out, out, not_relative, not_relative]
    assert reasons(shard, images) == [f"bad image name: {name!r} {why}" for name, why in zip(names, said, strict=True)]
    assert opened == []


def null_reason() -> str:
    """What this Python says of a path with a null byte."""
    try:
        os.stat("a\0.jpg")
    except ValueError as error:
        return str(error)
    raise AssertionError("a path with a null byte was looked for")


NULL = null_reason()


def test_a_bad_record_is_a_row_with_a_reason(tmp_path, images):
    (tmp_path / "images/gif.jpg").write_bytes(b"GIF89a....")
    (tmp_path / "images/empty.jpg").write_bytes(b"")
    os.mkfifo(tmp_path / "images/fifo.jpg")
    records = [
        record("0", "words", "missing.jpg"),
        record("1", "words", "sub"),
        record("2", "words", "fifo.jpg"),
        {"id": "3", "conversations": TURNS},
        record("4", "words", ["a.jpg", "a.jpg"]),
        record("5", "words", 7),
        "no record",
        {"id": "7", "image": "a.jpg"},
        record("8", "words", "gif.jpg"),
        record("9", "words", "empty.jpg"),
        record("10", "words", "a\0.jpg"),
        record("11", "words", "\ud800.jpg"),
        record("12", "words", "x" * 300 + ".jpg"),
        record("13", "words", "a.jpg/b.jpg"),
        record("14", "fine", "a.jpg"),
    ]
    path = write(tmp_path, json.dumps(records).encode())
    found = reasons(path, images)
    long = "x" * 300 + ".jpg"
    assert found == [
        "no such file: 'missing.jpg'",
        "not a plain file: 'sub'",
        "not a plain file: 'fifo.jpg'",
        "no image: the record has no 'image'",
        "2 images: one per sample is expected",
        "bad image name: a int, no text",
        "not a record: a str, no object",
        "no caption: no txt, no caption in the json (members: jpg, json)",
        "image cannot be decoded: it is no JPEG, PNG or WebP",
        "image is empty: the jpg has 0 bytes",
        f"unreadable file: 'a\\x00.jpg': {NULL}",
        "unreadable file: '\\ud800.jpg': 'utf-8' codec can't encode character '\\ud800' in position "
        + f"{len(images) + 1}: surrogates not allowed",
        f"unreadable file: {long!r}: File name too long",
        "no such file: 'a.jpg/b.jpg'",
        None,
    ]


def test_large_images_are_not_read(tmp_path, images):
    shard = write(tmp_path, [record("0", "words", "a.jpg")])
    [raw] = open_source(shard, InputOptions(images=images)).samples(100)
    assert raw.problem == f"member too large: 'a.jpg' has {len(picture(1)):,} bytes, the limit is 100"


def test_keys_are_unique_and_can_be_file_names(tmp_path, images):
    ids = ["a", "a", "x/y.jpg", "../../etc", "", None, True, 12, "a-1", "a\nb", "k" * 300]
    shard = write(tmp_path, json.dumps([record("", "w", "a.jpg") | {"id": i} for i in ids]).encode())
    keys = [raw.key for raw in open_source(shard, InputOptions(images=images)).samples()]
    assert keys == [
        "a",
        "a-1",
        "x_y_jpg",
        "______etc",
        "data-000000004",
        "data-000000005",
        "data-000000006",
        "12",
        "a-1-8",
        "a_b",
        "k" * 200,
    ]
    rows = open_source(shard, InputOptions(images=images))
    assert [rows.sample(row).key for row in range(len(ids))] == keys
    rows.close()


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_records_are_those_of_json(tmp_path, images, monkeypatch, chunk, indent):
    monkeypatch.setattr(llava_json, "_CHUNK", chunk)
    rng = random.Random(chunk)
    texts = ["grün", "日本 ☃", 'say "]" and \\', "", "{[,]}", "𝄞 clef", "line\nline"]
    records = [
        record(str(i), rng.choice(texts) * rng.randrange(1, 5), "a.jpg")
        | {"n": rng.choice([1, -2.5, None, [1, [2]], {"a": {}}])}
        for i in range(40)
    ]
    content = json.dumps(records, indent=indent, ensure_ascii=False)
    for start in ("", "\ufeff \n"):
        shard = write(tmp_path, (start + content + "\n").encode())
        samples = list(open_source(shard, InputOptions(images=images)).samples())
        assert [json.loads(raw.members["json"]) for raw in samples] == records
        rows = open_source(shard, InputOptions(images=images))
        order = list(range(40))
        rng.shuffle(order)
        assert [rows.sample(row) for row in order] == [samples[row] for row in order]
        rows.close()


def test_lines_that_are_no_json_are_rows_with_a_reason(tmp_path, images):
    lines = [
        b"\xef\xbb\xbf" + json.dumps(record("a", "w", "a.jpg")).encode(),
        b"",
        b"{oh",
        b"\xff\xfe",
        b"  " + json.dumps(record("b", "w", "a.jpg")).encode(),
    ]
    shard = write(tmp_path, b"\n".join(lines), "data.jsonl")
    samples = list(open_source(shard, InputOptions(images=images)).samples())
    assert [(raw.key, (raw.problem or "").split(":")[0]) for raw in samples] == [
        ("a", ""), ("data-000000001", "unreadable json"), ("data-000000002", "unreadable json"), ("b", ""),
    ]  # fmt: skip
    rows = open_source(shard, InputOptions(images=images))
    assert rows.sample(3) == samples[3]
    rows.close()


WANTED = 'a list of records such as {"id": …, "image": "a.jpg", "conversations": […]}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", f"is empty, where {WANTED} is expected"),
        (b'{"images": []}', f"holds an object, where {WANTED} is expected; if it has a record a line, call it .jsonl"),
        (b"hello", f"is not JSON, where {WANTED} is expected"),
        (b"\xff\xfe[", "is not UTF-8 (invalid start byte), after the record that begins at byte 0"),
        (b'[{"id": 1}, {"id"', "is damaged or truncated: no valid JSON from the record or separator at byte 12"),
        (b'[{"id": 1}, ', "is truncated, fetch it again: the list does not end; it stops at byte 12"),
        (b'[{"id": 1}', "is truncated, fetch it again: the list does not end; it stops at byte 10"),
        (b'[{"id": 1} {"id": 2}]', "is damaged or truncated: no valid JSON from the record or separator at byte 11"),
        (b'[{"id": 1}] []', "is damaged or truncated: no valid JSON from the record or separator at byte 12"),
        (b"[" * 100_000, "is damaged or truncated: no valid JSON from the record or separator at byte 1"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_list_says_so(tmp_path, content, message):
    assert error_of(write(tmp_path, content)) == message


def test_an_empty_list_has_no_samples(tmp_path):
    assert list(open_source(write(tmp_path, [])).samples()) == []


def test_endless_records_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(llava_json, "MAX_RECORD", 1000)
    assert (
        error_of(write(tmp_path, b"a" * 2000, "x.jsonl"))
        == "has a line of more than 1,000 bytes, which is not a record; it begins at byte 0"
    )
    monkeypatch.setattr(llava_json, "_CHUNK", 500)
    assert (
        error_of(write(tmp_path, b'["' + b"a" * 5000))
        == "is damaged or truncated: no valid JSON from the record or separator at byte 1"
    )


def test_a_url_works_for_both(tmp_path, images):
    shard = write(tmp_path, [record("a", "w", "a.jpg"), record("b", "w", "nope.jpg")])
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/llava/data.json", Path(shard).read_bytes())
    memory.pipe("/llava/images/a.jpg", picture(1))
    found = list(open_source("memory://llava/data.json", InputOptions(images="memory://llava/images/")).samples())
    assert [(raw.key, raw.problem) for raw in found] == [("a", None), ("b", "no such file: 'nope.jpg'")]
    assert found[0].members["jpg"] == picture(1)


def test_a_json_that_has_changed_says_so(tmp_path, images):
    shard = write(tmp_path, [record("a", "w", "a.jpg")])
    rows = open_source(shard, InputOptions(images=images))
    with pytest.raises(ShardError, match="has only 1 records; it has changed since it was scored, score it again"):
        rows.sample(1)
    rows.close()
    assert expand([shard]) == [shard]
