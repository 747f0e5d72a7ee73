"""The Hugging Face folder, opened by the `datasets` library itself."""

from __future__ import annotations

import io

import numpy as np
import pytest
import yaml
from PIL import Image

from mmfilter.core.files import read_json, write_json
from tests.conftest import caption, good, picture, write_tar
from tests.core.output.writers.conftest import HARD
from tests.core.output.writers.test_parquet import CAPTIONS
from tests.runs import make_run

datasets = pytest.importorskip("datasets")

KINDS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}


@pytest.fixture
def load(tmp_path):
    datasets.disable_progress_bars()
    yield lambda *words, **settings: datasets.load_dataset(
        *map(str, words), cache_dir=str(tmp_path / "cache"), **settings
    )
    datasets.enable_progress_bars()


def test_the_library_gives_every_image_and_caption(hard, written, load):
    best = written(hard, "hf", shard_size=3)
    assert sorted(path.name for path in (best / "data").iterdir()) == [
        f"train-0000{i}-of-00003.parquet" for i in range(3)
    ]
    loaded = load(best)
    assert list(loaded) == ["train"]
    pairs = loaded["train"]
    assert pairs["key"][:] == list(HARD)
    assert pairs["caption"][:] == CAPTIONS
    assert np.array_equal(pairs["similarity"][:], np.arange(8, dtype=np.float32) / np.float32(10))
    for pair, members in zip(pairs, HARD.values(), strict=True):
        ext, content = next((ext.lower(), content) for ext, content in members if ext.lower() in KINDS)
        assert pair["image"].format == KINDS[ext]
        assert np.array_equal(pair["image"], Image.open(io.BytesIO(content)))


def test_the_card_says_what_the_columns_are(hard, written, load):
    best = written(hard, "hf", top="5")
    front = yaml.safe_load((best / "README.md").read_text("utf-8").split("---\n")[1])
    described = datasets.Features._from_yaml_list(front["dataset_info"]["features"])  # noqa: SLF001 (has no other name)
    assert described["image"] == datasets.Image()
    assert (
        described == load(best, split="train").features == datasets.Features.from_arrow_schema(described.arrow_schema)
    )
    assert load("parquet", data_files=f"{best}/data/*.parquet", split="train").features == described, (
        "the tables say it too"
    )
    assert front["dataset_info"]["splits"][0]["num_examples"] == 5


def test_the_library_notices_a_table_that_is_lost(hard, written, load):
    best = written(hard, "hf", shard_size=3)
    (best / "data/train-00001-of-00003.parquet").unlink()
    with pytest.raises(datasets.exceptions.NonMatchingSplitsSizesError):
        load(best)


def test_the_card_says_where_the_pairs_come_from(hard, written):
    settings = {"model": "some/model", "caption": "auto"}
    write_json(
        hard / "manifest.json",
        read_json(hard / "manifest.json") | {"version": "9.9", "versions": {"torch": "2.0"}, "settings": settings},
    )
    card = (written(hard, "hf", top="3", where="key != '```'") / "README.md").read_text("utf-8")
    for words in [
        "3 pairs that mmfilter",
        '"model": "some/model"',
        '"torch": "2.0"',
        f'"run": "{hard}"',
        '"top": "3"',
        '"where": "key != \'```\'"',
    ]:
        assert words in card
    assert [line for line in card.splitlines() if line.startswith("```")] == ["```json", "```", "```json", "```"]


def test_nothing_kept_streams_nothing(hard, written, load):
    best = written(hard, "hf", min=9.0)
    assert list(load(best, split="train", streaming=True)) == []


def test_parquet_opens_too(hard, written, load):
    pairs = load(written(hard, "parquet", shard_size=3) / "data", split="train")
    assert pairs["caption"][:] == CAPTIONS and all(isinstance(image, Image.Image) for image in pairs["image"][:])


def images_of(members):
    return next(content for ext, content in members if ext.lower() in KINDS)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["hf", "parquet", "files"])
def test_images_are_the_bytes_of_the_source(hard, written, load, form, streaming):
    best = written(hard, "hf" if form == "hf" else "parquet", shard_size=3)
    words = {"hf": [best], "parquet": [best / "data"], "files": ["parquet"]}[form]
    files = {"data_files": f"{best}/data/*.parquet"} if form == "files" else {}
    pairs = load(*words, split="train", streaming=streaming, **files).cast_column("image", datasets.Image(decode=False))
    rows = list(pairs)
    assert [(row["key"], row["caption"], row["image"]["bytes"]) for row in rows] == [
        (key, text, images_of(members)) for (key, members), text in zip(HARD.items(), CAPTIONS, strict=True)
    ]
    assert [row["json"] is None for row in rows] == [
        "json" not in dict(members) or key == "k3" for key, members in HARD.items()
    ]
    assert {row["uid"] for row in rows} == {row["width"] for row in rows} == {None}, (
        "columns without any value stay columns"
    )
    assert (pairs.features["uid"], pairs.features["width"]) == (datasets.Value("string"), datasets.Value("int32"))


@pytest.mark.parametrize("streaming", [False, True])
def test_an_empty_caption_is_a_caption(tmp_path, written, load, streaming):
    members = [
        (f"{i}.{ext}", content)
        for i in range(12)
        for ext, content in [("png", picture(i, kind="PNG")), ("txt", b" \n" if i != 7 else b"seven")]
    ]
    run = make_run(tmp_path / "run", {str(write_tar(tmp_path / "a.tar", members)): [0.5] * 12})
    pairs = load(written(run, "hf"), split="train", streaming=streaming)
    assert [row["caption"] for row in pairs] == ["seven" if i == 7 else "" for i in range(12)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # datasets leaves tars open
def test_shards_of_one_kind_of_image_open_as_webdataset(tmp_path, written, load, streaming):
    shard = write_tar(tmp_path / "a.tar", [member for i in range(6) for member in good(f"{i}", i)])
    run = make_run(tmp_path / "run", {str(shard): [i / 10 for i in range(6)]})
    best = written(run, "shards", top="4", shard_size=2)
    rows = list(load("webdataset", data_files=f"{best}/*.tar", split="train", streaming=streaming))
    assert [(row["__key__"], row["txt"]) for row in rows] == [(f"{i}", caption(i)) for i in range(2, 6)]
    assert all(
        np.array_equal(row["jpg"], Image.open(io.BytesIO(picture(i)))) for i, row in zip(range(2, 6), rows, strict=True)
    )
