"""Shards and streams, read by webdataset itself: as a command, in workers, and in order."""

from __future__ import annotations

import json
import os
import shlex
import sys
import tarfile
from pathlib import Path

import pytest
import webdataset

from mmfilter.core.selection.select_settings import SelectSettings
from mmfilter.ops.select import select
from tests.conftest import picture, write_tar
from tests.runs import make_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
    ),  # webdataset leaves files open
]

KINDS = [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")]
CAPTIONS = ["an apple", "日本のリンゴ 🍎", "x", "two\nlines and \u2028 more", "«Ключ»"]


def members(i: int) -> dict[str, bytes]:
    """Every third without a JSON, every fourth with more members, and all kinds of images among each other."""
    ext, kind = KINDS[i % 3]
    found = {ext: picture(i, kind=kind), "txt": f"{CAPTIONS[i % 5]} {i}".encode()}
    if i % 3 != 1:
        found["json"] = json.dumps({"caption": f"{CAPTIONS[i % 5]} {i}", "uid": f"{i:032x}", "nothing": None}).encode()
    if i % 4 == 2:
        found |= {"seg.png": picture(100 + i, kind="PNG", mode="L"), "cls": b"7", "empty": b""}
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    scores = {}
    for n in range(2):
        rows = range(20 * n, 20 * n + 20)
        shard = write_tar(
            folder / f"{n}.tar", [(f"{i:06d}.{ext}", content) for i in rows for ext, content in members(i).items()]
        )
        scores[str(shard)] = [{"similarity": i / 40} for i in rows]
    return make_run(folder / "run", scores)


def as_written(sample: dict) -> tuple[str, dict[str, bytes]]:
    return sample["__key__"], {name: value for name, value in sample.items() if not name.startswith("__")}


def expected(numbers: range) -> list[tuple[str, dict[str, bytes]]]:
    return [(f"{i:06d}", members(i)) for i in numbers]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> str:
    """`mmfilter` as a shell runs it here."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    return f"{shlex.quote(sys.executable)} -W ignore -m mmfilter"


def test_the_stream_of_a_command(run, command):
    found = webdataset.WebDataset(f"pipe:{command} select {run} --top 50% -o - 2>/dev/null", shardshuffle=False)
    assert [as_written(sample) for sample in found] == expected(range(20, 40))


def test_a_reader_of_a_command_that_has_enough(run, command):
    found = iter(
        webdataset.WebDataset(
            f"pipe:{command} select {run} --top 100% --repeat 200 -o - 2>/dev/null", shardshuffle=False
        )
    )
    assert as_written(next(found)) == expected(range(1))[0]
    found.close()


def test_a_command_that_fails_is_no_empty_dataset(run, command):
    with pytest.raises((OSError, tarfile.ReadError), match=r"exit 1|empty file"):  # whichever it sees first
        list(
            webdataset.WebDataset(
                f"pipe:{command} select {run} --top 100% --by nothing -o - 2>/dev/null", shardshuffle=False
            )
        )


def test_a_command_that_fails_midway_is_no_short_dataset(truncated, command):
    """A shard that is shorter than its score table says; what came before it is in the stream."""
    found = iter(
        webdataset.WebDataset(f"pipe:{command} select {truncated} --top 100% -o - 2>/dev/null", shardshuffle=False)
    )
    seen = []
    with pytest.raises((OSError, tarfile.ReadError), match=r"exit 1|unexpected end of data"):
        seen += [next(found)["__key__"]]
        while True:
            seen.append(next(found)["__key__"])
    assert seen


@pytest.fixture
def shards(run: Path, tmp_path: Path) -> str:
    select(run, SelectSettings(top="75%", output=tmp_path / "best", shard_size=4))
    return f"{tmp_path}/best/{{00000000..00000007}}.tar"


def test_nothing_is_lost_and_all_is_in_order(shards):
    assert [as_written(sample) for sample in webdataset.WebDataset(shards, shardshuffle=False)] == expected(
        range(10, 40)
    )


def test_workers_share_the_shards(shards):
    dataset = webdataset.WebDataset(shards, shardshuffle=False)
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=2)
    assert sorted((as_written(sample) for sample in loader), key=lambda sample: sample[0]) == expected(range(10, 40))


def test_nodes_share_the_shards(shards, monkeypatch):
    found = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        dataset = webdataset.WebDataset(shards, shardshuffle=False, nodesplitter=webdataset.split_by_node)
        found.append([as_written(sample) for sample in dataset])
    assert [len(samples) for samples in found] == [16, 14]
    assert sorted(found[0] + found[1], key=lambda sample: sample[0]) == expected(range(10, 40))


def test_images_and_captions_decode(shards):
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=False)
        .decode("pilrgb")
        .rename(image="jpg;png;webp", text="txt")
        .to_tuple("image", "text")
    )
    for i, (image, text) in zip(range(10, 40), dataset, strict=True):
        assert image.size == (96, 80) and text == f"{CAPTIONS[i % 5]} {i}"
