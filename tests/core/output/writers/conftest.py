"""Samples that are hard to write: odd keys, several kinds of images, extra members, captions of all scripts."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mmfilter.core.files import read_json, write_json
from mmfilter.core.input.shards import open_source
from mmfilter.core.selection.select_settings import SelectSettings
from mmfilter.ops.select import select
from tests.conftest import picture
from tests.runs import add_table, make_run

TURNS = [
    {"from": "human", "value": "What is this?\n<image>"},
    {"from": "gpt", "value": "Ein Baum."},
    {"from": "human", "value": "Sure?"},
]

HARD = {
    "../../up/k0": [
        ("jpg", picture(0)),
        ("txt", "日本のリンゴ 🍎".encode()),
        ("json", b'{"caption": "other", "n": 0}'),
    ],
    "a.b/k1": [("png", picture(1, kind="PNG")), ("txt", b"\xef\xbb\xbf  spaces  \n")],
    "/abs/Ключ": [
        ("webp", picture(2, kind="WEBP")),
        ("json", json.dumps({"text": "ж" * 300}, ensure_ascii=False).encode()),
    ],
    "k3": [("seg.png", b"mask"), ("jpg", picture(3)), ("txt", b"three"), ("cls", b"7"), ("json", b"\xff\xfe no json")],
    "k4": [("jpeg", picture(4)), ("json", json.dumps({"id": 17, "conversations": TURNS}).encode())],
    "K3": [("jpg", picture(5)), ("png", picture(6, kind="PNG")), ("txt", b"two images")],
    "x" * 200: [("jpg", picture(7)), ("txt", b"long key"), ("json", b'{"conversations": "none", "id": [1]}')],
    "with space%&": [("JPG", picture(8)), ("txt", b"capitals"), ("json", b'{"caption": "\\ud83d"}')],
}


@pytest.fixture
def hard(tmp_path: Path) -> Path:
    """A run over two shards with these samples; the first scores 0.0, each next one 0.1 more."""
    (tmp_path / "data").mkdir()
    keys = list(HARD)
    scores = {}
    for i in range(2):
        with tarfile.open(tmp_path / f"data/{i}.tar", "w", format=tarfile.GNU_FORMAT) as tar:
            for name, content in [
                (f"{key}.{ext}", content) for key in keys[4 * i : 4 * i + 4] for ext, content in HARD[key]
            ]:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        scores[f"{tmp_path}/data/{i}.tar"] = [(4 * i + j) / 10 for j in range(4)]
    return make_run(tmp_path / "run", scores)


@pytest.fixture
def truncated(hard: Path, tmp_path: Path) -> Path:
    """The same run, but the second shard has lost its end without its score table knowing."""
    shard = tmp_path / "data/1.tar"
    last = list(open_source(str(shard)).samples())[-1].offset
    os.truncate(shard, last + 512)
    table = hard / "scores/1-1.parquet"
    now = shard.stat()
    add_table(hard, "1-1", str(shard), pq.read_table(table).to_pylist(), size=now.st_size, mtime_ns=now.st_mtime_ns)
    return hard


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """written(run, "parquet", top="3"): select into a new folder."""

    def write(run: Path, form: str, *, name: str = "best", **settings) -> Path:
        select(run, SelectSettings(**({"top": "100%"} | settings), format=form, output=tmp_path / name))
        return tmp_path / name

    return write


@pytest.fixture
def caption_from(hard: Path) -> Callable[[str], None]:
    """Make the run one that took captions from elsewhere."""

    def change(where: str) -> None:
        write_json(hard / "manifest.json", read_json(hard / "manifest.json") | {"settings": {"caption": where}})

    return change
