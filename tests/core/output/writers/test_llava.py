"""LLaVA's JSON, read as its data loader reads it: `os.path.join(image_folder, item["image"])`."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmfilter.core.output.repack import new_folder
from mmfilter.core.selection.select_settings import SelectSettings
from mmfilter.errors import SelectionError
from mmfilter.ops.select import select
from tests.conftest import picture, write_tar
from tests.core.output.writers.conftest import HARD, TURNS
from tests.runs import make_run


def items_of(folder):
    return json.loads((folder / "llava.json").read_text("utf-8"))


def test_every_item_has_its_image_and_its_words(hard, written):
    best = written(hard, "llava-json", shard_size=5)
    items = items_of(best)
    assert [list(item) for item in items] == [["id", "image", "conversations"]] * 8
    assert [item["id"] for item in items] == [17 if key == "k4" else key for key in HARD]
    for item, members in zip(items, HARD.values(), strict=True):
        images = [item["image"]] if isinstance(item["image"], str) else item["image"]
        contents = [content for ext, content in members if ext.lower() in ("jpg", "jpeg", "png", "webp")]
        assert [Path(os.path.join(best / "images", image)).read_bytes() for image in images] == contents
    captions = {item["id"]: item["conversations"] for item in items}
    assert captions["../../up/k0"] == [
        {"from": "human", "value": "<image>\nDescribe the image."},
        {"from": "gpt", "value": "日本のリンゴ 🍎"},
    ]
    assert captions["K3"] == [
        {"from": "human", "value": "<image>\n<image>\nDescribe the image."},
        {"from": "gpt", "value": "two images"},
    ]
    assert captions[17] == TURNS, "a conversation stays as it is"
    assert captions["x" * 200][1]["value"] == "long key", "what is no list of turns is no conversation"


def test_names_are_harmless_and_new(hard, written):
    best = written(hard, "llava-json")
    names = [item["image"] for item in items_of(best)]
    assert isinstance(names[5], list)
    names[5:6] = names[5]
    assert names[3:7] == ["00000000/k3.jpg", "00000000/k4.jpeg", "00000000/K3-2.jpg", "00000000/K3.png"]
    assert all(re.fullmatch(r"00000000/[A-Za-z0-9_-]{1,100}\.(jpg|jpeg|png|webp)", name) for name in names)
    assert len({name.lower() for name in names}) == 9
    everything = {
        os.path.relpath(os.path.join(folder, name), best) for folder, _, files in os.walk(best) for name in files
    }
    assert everything == {f"images/{name}" for name in names} | {"llava.json", "selection.parquet", "manifest.json"}
    assert sorted(path.name for path in best.parent.iterdir()) == ["best", "data", "run"], (
        "nothing is outside the folder"
    )


def test_images_are_in_folders_of_a_bounded_size(hard, written):
    best = written(hard, "llava-json", shard_size=3, shuffle=1)
    assert [len(list(folder.iterdir())) for folder in sorted((best / "images").iterdir())] in (
        [3, 3, 3],
        [3, 4, 2],
        [4, 3, 2],
    )
    where = {row["key"]: row["output_shard"] for row in pq.read_table(best / "selection.parquet").to_pylist()}
    for item in items_of(best):
        image = item["image"] if isinstance(item["image"], str) else item["image"][0]
        assert f"images/{image}".startswith(where["k4" if item["id"] == 17 else item["id"]] + "/")


def test_words_that_utf8_cannot_hold(tmp_path, written):
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "half \ud83d a pair"}]
    shard = write_tar(
        tmp_path / "a.tar",
        [("a.jpg", picture(0)), ("a.txt", b"x"), ("a.json", json.dumps({"conversations": turns}).encode())],
    )
    run = make_run(tmp_path / "run", {str(shard): [1.0]})
    assert items_of(written(run, "llava-json"))[0]["conversations"] == turns


def test_images_decode(hard, written):
    best = written(hard, "llava-json", where="row < 3")
    for item, key in zip(items_of(best)[:3], list(HARD)[:3], strict=True):
        assert np.array_equal(Image.open(best / "images" / item["image"]), Image.open(io.BytesIO(HARD[key][0][1])))


def as_llava_reads(folder):
    """The items as LLaVA's LazySupervisedDataset takes them: images opened, and the words around the places where they go."""
    for item in items_of(folder):
        images = [item["image"]] if isinstance(item["image"], str) else item["image"]
        opened = [Image.open(os.path.join(folder / "images", image)).convert("RGB") for image in images]
        assert [turn["from"] for turn in item["conversations"]] == (["human", "gpt"] * len(item["conversations"]))[
            : len(item["conversations"])
        ]
        yield opened, "\n".join(turn["value"] for turn in item["conversations"]).split("<image>")


def test_llava_has_a_place_for_every_image(hard, written):
    pairs = list(as_llava_reads(written(hard, "llava-json", shard_size=3)))
    assert [len(words) - 1 for _, words in pairs] == [len(images) for images, _ in pairs] == [1, 1, 1, 1, 1, 2, 1, 1]
    for (images, words), members in zip(pairs, HARD.values(), strict=True):
        source = [content for ext, content in members if ext.lower() in ("jpg", "jpeg", "png", "webp")]
        assert all(
            np.array_equal(image, Image.open(io.BytesIO(content)).convert("RGB"))
            for image, content in zip(images, source, strict=True)
        )
        assert "".join(words).strip()


def test_words_with_too_few_or_too_many_places_are_told(tmp_path):
    none = {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]}
    odd = {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": 7}]}
    members = [
        *[("a.jpg", picture(0)), ("a.txt", b"an <image> tag")],
        *[("b.jpg", picture(1)), ("b.json", json.dumps(none).encode()), ("b.txt", b"x")],
        *[("c.jpg", picture(2)), ("c.txt", b"fine")],
        *[("d.jpg", picture(3)), ("d.json", json.dumps(odd).encode()), ("d.txt", b"x")],
    ]
    run = make_run(tmp_path / "run", {str(write_tar(tmp_path / "a.tar", members)): [0.1] * 4})
    selection = select(run, SelectSettings(top="100%", format="llava-json", output=tmp_path / "best"))
    assert selection.warnings == (
        "2 samples do not have <image> once for each image in their words (first: key 'a'): LLaVA trains on these without the image, or stops",
    )
    words = [[turn["value"] for turn in item["conversations"]] for item in items_of(tmp_path / "best")]
    assert words == [
        ["<image>\nDescribe the image.", "an <image> tag"],
        ["What?", "This."],
        ["<image>\nDescribe the image.", "fine"],
        ["<image>", 7],
    ]


def test_nothing_kept_is_an_empty_list(hard, written):
    best = written(hard, "llava-json", min=9.0)
    assert items_of(best) == [] and list((best / "images").iterdir()) == []


def test_a_folder_in_the_way_is_refused(hard, tmp_path):
    (tmp_path / "best/images").mkdir(parents=True)
    with pytest.raises(SelectionError, match=r"best' is not empty; name a new folder, or delete it first$"):
        select(hard, SelectSettings(top="1", format="llava-json", output=tmp_path / "best"))


def test_an_interrupted_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "best") as folder:
        (folder / "half").write_text("made")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
