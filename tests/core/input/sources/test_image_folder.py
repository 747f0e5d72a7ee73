"""Folders of images: grouping by path, order, stretches, stamps and files that cannot be read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mmfilter.core.input.decode import DecodeSettings, decode
from mmfilter.core.input.shards import expand, open_source
from mmfilter.core.input.source import InputOptions
from mmfilter.core.input.sources import image_folder
from mmfilter.core.run.directory import RunDirectory, name_shards
from mmfilter.errors import ShardError
from tests.conftest import caption, picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, stem in enumerate(["b", "a", "sub/deep/c", "sub/a", "Mr. X"]):
        path = tmp_path / "my set" / stem
        path.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{path}.jpg").write_bytes(picture(i))
        Path(f"{path}.txt").write_text(caption(i))
    return tmp_path / "my set"


def read(folder: Path) -> list:
    return [raw for shard in expand([folder]) for raw in open_source(shard).samples()]


def test_samples_are_in_the_order_of_their_paths(folder):
    (folder / "a.json").write_text('{"uid": "u"}')
    (folder / ".hidden.jpg").write_bytes(b"x")
    (folder / ".cache").mkdir()
    (folder / ".cache/x.jpg").write_bytes(b"x")
    (folder / "README").write_text("no sample")
    (folder / "clip.mp4").write_bytes(b"no sample")
    assert expand([folder]) == [f"{folder}/"]
    samples = read(folder)
    assert [(raw.key, sorted(raw.members)) for raw in samples] == [
        ("Mr_ X", ["jpg", "txt"]), ("a", ["jpg", "json", "txt"]), ("b", ["jpg", "txt"]), ("sub/a", ["jpg", "txt"]), ("sub/deep/c", ["jpg", "txt"]),
    ]  # fmt: skip
    assert samples[1].members == {"jpg": picture(1), "txt": caption(1).encode(), "json": b'{"uid": "u"}'}
    assert [(raw.row, raw.offset, raw.nbytes, raw.problem) for raw in samples] == [
        (i, None, None, None) for i in range(5)
    ]


def test_what_is_missing_is_a_row_with_a_reason(folder):
    (folder / "b.txt").unlink()
    (folder / "a.jpg").unlink()
    (folder / "Mr. X.png").write_bytes(picture(0, kind="PNG"))
    (folder / "sub/a.JPG").write_bytes(b"again")
    (folder / "sub/deep/c.txt").unlink()
    os.mkfifo(folder / "sub/deep/c.txt")
    shard = f"{folder}/"
    assert [decode(raw, shard, DecodeSettings()).reason for raw in read(folder)] == [
        "2 images (jpg, png): one per sample is expected",
        "no image: no jpg, jpeg, png, webp among the members (txt)",
        "no caption: no txt, no caption in the json (members: jpg)",
        "two files for one: 'sub/a.jpg' and another 'jpg'",
        "not a plain file: 'sub/deep/c.txt'",
    ]


def test_large_files_are_not_read(folder):
    [raw, *_] = open_source(expand([folder])[0]).samples(200)
    assert raw.problem == f"member too large: 'Mr. X.jpg' has {len(picture(4)):,} bytes, the limit is 200"


def test_stretches_are_shards(folder, monkeypatch, tmp_path):
    whole = read(folder)
    monkeypatch.setattr(image_folder, "STRETCH", 2)
    shards = expand([folder])
    assert shards == [f"{folder}/", f"{folder}/#00001", f"{folder}/#00002"]
    parts = [list(open_source(shard).samples()) for shard in shards]
    assert [len(part) for part in parts] == [2, 2, 1] and [raw.row for part in parts for raw in part] == [0, 1, 0, 1, 0]
    assert [(raw.key, raw.members) for part in parts for raw in part] == [(raw.key, raw.members) for raw in whole]
    assert [shard.name for shard in name_shards(list(map(open_source, shards)), RunDirectory(tmp_path / "run"))] == [
        "my set",
        "my set-00001",
        "my set-00002",
    ]
    rows = open_source(shards[1], InputOptions())
    assert [rows.sample(row) for row in (1, 0)] == parts[1][::-1]
    with pytest.raises(ShardError, match="has only 2 samples; it has changed since it was scored, score it again"):
        rows.sample(2)
    for path in ("sub/a", "sub/deep/c", "b"):
        os.unlink(folder / f"{path}.jpg")
        os.unlink(folder / f"{path}.txt")
    assert expand([folder]) == shards[:1]
    with pytest.raises(ShardError, match="has no samples any more; score what is there into another --run"):
        open_source(shards[2]).stamp()


def test_the_stamp_sees_every_change(folder):
    shard = expand([folder])[0]
    seen = {open_source(shard).stamp()}
    assert open_source(shard).stamp() in seen and open_source(shard).stamp().size == sum(
        path.stat().st_size for path in folder.rglob("*.*")
    )
    os.utime(folder / "a.txt", ns=(1, 1))
    seen.add(open_source(shard).stamp())
    (folder / "b.txt").write_text("longer than it was, by far")
    seen.add(open_source(shard).stamp())
    (folder / "new.jpg").write_bytes(picture(9))
    expand([folder])
    seen.add(open_source(shard).stamp())
    os.rename(folder / "new.jpg", folder / "newer.jpg")
    expand([folder])
    seen.add(open_source(shard).stamp())
    assert len(seen) == 5
    (folder / "a.txt").unlink()
    with pytest.raises(ShardError, match=r"has changed: 'a\.txt': No such file or directory"):
        open_source(shard).stamp()


def test_a_tar_may_have_a_name_with_a_hash(tmp_path):
    assert [
        image_folder.is_folder(name)
        for name in ("/x/", "/x/#00001", "memory://x/", "/x/#1.tar", "/x/#1", "/x/a.tar", "-")
    ] == [True] * 3 + [False] * 4


def test_a_folder_without_images_names_the_shards_in_it(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ShardError) as caught:
        expand([tmp_path])
    assert str(caught.value) == f"shard {str(tmp_path)!r} is a directory; name the shards in it: '{tmp_path}/*.tar'"


def test_a_url_that_ends_in_a_slash_is_a_folder(folder):
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in folder.rglob("*.*"):
        memory.pipe(f"/set/{path.relative_to(folder)}", path.read_bytes())
    [shard] = expand(["memory://set/"])
    assert shard == "memory://set/"
    assert [(raw.key, raw.members) for raw in open_source(shard).samples()] == [
        (raw.key, raw.members) for raw in read(folder)
    ]
    before = open_source(shard).stamp()
    assert before == open_source(shard).stamp() and before.size == sum(
        path.stat().st_size for path in folder.rglob("*.*")
    )
    memory.pipe("/none/a.txt", b"x")
    with pytest.raises(ShardError) as caught:
        expand(["memory://none/"])
    assert str(caught.value) == "shard 'memory://none' is a folder without images (jpg, jpeg, png, webp)"
