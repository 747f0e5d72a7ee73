"""Shards, read by open_clip's own training data loader.

Its torchvision cannot be installed beside the torch and transformers of the tests, so it lies in a folder of its own, which
`make` fills, and runs in a process of its own.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmfilter.core.selection.select_settings import SelectSettings
from mmfilter.ops.select import select
from tests.conftest import caption, picture, write_tar
from tests.runs import make_run

PEERS = Path(__file__).parents[4] / "build/peers/open-clip"
READER = Path(__file__).parent / "open_clip_reader.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (PEERS / "open_clip_train").is_dir(), reason=f"there is no open_clip in {PEERS}: make test puts it there"
    ),
]

N = 24
CAPTIONS = [
    f"{caption(i)} {word}".strip()
    for i, word in zip(range(N), ["", "日本のリンゴ 🍎", "Ключ", "ein Fluß"] * 6, strict=True)
]
KINDS = [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("jpeg", "JPEG")]
IMAGES = [picture(i, kind=KINDS[i % 4][1]) for i in range(N)]


def members(i: int) -> list[tuple[str, bytes]]:
    key = f"{i:09d}"
    record = json.dumps({"caption": CAPTIONS[i], "uid": f"{i:032x}"}).encode()
    return [(f"{key}.{KINDS[i % 4][0]}", IMAGES[i]), (f"{key}.json", record), (f"{key}.txt", CAPTIONS[i].encode())]


def pixels(image: bytes) -> str:
    """Digest of (3, height, width) of an image, decoded here."""
    return hashlib.sha256(
        np.asarray(Image.open(io.BytesIO(image)).convert("RGB")).transpose(2, 0, 1).tobytes()
    ).hexdigest()


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the loader gives of each selection, all read by one process."""
    folder = tmp_path_factory.mktemp("open_clip")
    shards = [
        write_tar(folder / f"{n}.tar", [member for i in range(12 * n, 12 * n + 12) for member in members(i)])
        for n in range(2)
    ]
    run = make_run(
        folder / "run", {str(shard): [i / N for i in range(12 * n, 12 * n + 12)] for n, shard in enumerate(shards)}
    )
    bare = write_tar(folder / "bare.tar", [member for i in range(4) for member in members(i)[:2]])
    make_run(folder / "bare-run", {str(bare): [0.0, 0.1, 0.2, 0.3]})

    def pattern(name: str, run: Path = run, **settings) -> str:
        selection = select(run, SelectSettings(**({"top": "100%"} | settings), output=folder / name))
        return f"{folder / name}/{{{0:08d}..{selection.shards_written - 1:08d}}}.tar"

    jobs = {
        "train": {"train": pattern("best", top="20", shard_size=5), "workers": 2},
        "shuffled": {"train": pattern("shuffled", top="20", shard_size=5, shuffle=7), "workers": 4},
        "val": {"val": pattern("val", top="15", shard_size=4), "workers": 1},
        "repeated": {"train": pattern("repeated", top="8", repeat="row % 4", shard_size=6), "workers": 1},
        "bare": {"val": pattern("bare", folder / "bare-run"), "workers": 1},
    }
    asked = json.dumps({"jobs": jobs, "captions": CAPTIONS})
    done = subprocess.run(
        [sys.executable, READER],
        input=asked,
        env=os.environ | {"PYTHONPATH": str(PEERS)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def pairs(read: dict, name: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(digest, tuple(tokens)) for digest, tokens in read[name]["pairs"]]


def expected(read: dict, numbers: list[int]) -> list[tuple[str, tuple[int, ...]]]:
    return [(pixels(IMAGES[i]), tuple(read["captions"][CAPTIONS[i]])) for i in numbers]


def test_all_captions_and_images_differ(read):
    assert len(set(expected(read, list(range(N))))) == N == len({pixels(image) for image in IMAGES})


@pytest.mark.parametrize("name", ["train", "shuffled"])
def test_training_sees_every_pair_once_an_epoch(read, name):
    """In several workers, without being told how many there are: `sizes.json` says so."""
    assert Counter(pairs(read, name)) == Counter(expected(read, list(range(4, 24))))
    assert read[name]["num_samples"] == 20


def test_evaluation_sees_the_pairs_in_order(read):
    assert pairs(read, "val") == expected(read, list(range(9, 24)))


def test_training_sees_a_repeated_pair_as_often_as_it_is_there(read):
    assert Counter(pairs(read, "repeated")) == Counter(expected(read, [i for i in range(16, 24) for _ in range(i % 4)]))
    assert read["repeated"]["num_samples"] == 12


def test_pairs_without_a_txt_are_left_out_as_the_documents_say(read):
    assert pairs(read, "bare") == []
