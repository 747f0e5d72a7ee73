"""The same pairs as tar, folder, parquet and LLaVA JSON leave through every writer as the same samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mmfilter.core.files import read_json, write_json
from mmfilter.core.selection.select_settings import SelectSettings
from mmfilter.errors import SelectionError, ShardError
from mmfilter.ops.select import select
from tests import inputs
from tests.ops.test_inputs import samples_of
from tests.runs import make_run

N = 30
PAIRS = inputs.pairs(N)
KEYS = [key for key, _, _ in PAIRS]
COLUMNS = [{"similarity": (7 * i % N) / N, "width": i % 4, "uid": f"{i:032x}"} for i in range(N)]
OTHERS = ["folder", "parquet", "json"]


def set_inputs(run: Path, **settings: Any) -> None:
    write_json(run / "manifest.json", read_json(run / "manifest.json") | {"settings": settings})


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A run over each kind of input, with the same score for the same pair."""
    base = tmp_path_factory.mktemp("written")
    shards = {
        "tar": inputs.as_tar(base / "data/00000.tar", PAIRS),
        "folder": f"{inputs.as_folder(base / 'folder', PAIRS)}/",
        "parquet": inputs.as_parquet(base / "rows/train.parquet", PAIRS),
        "json": inputs.as_llava(base / "llava/data.json", PAIRS),
    }
    runs = {kind: make_run(base / "runs" / kind, {str(shard): COLUMNS}) for kind, shard in shards.items()}
    set_inputs(runs["json"], images=str(base / "llava/images"))
    return runs


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> tuple[Path, Path]:
    """A run over a tar, a folder and a parquet file, and one over the same pairs in three tars."""
    base = tmp_path_factory.mktemp("mixed")
    parts = [PAIRS[:10], PAIRS[10:20], PAIRS[20:]]
    tars = [inputs.as_tar(base / f"tars/{i}.tar", part) for i, part in enumerate(parts)]
    kinds = [
        inputs.as_tar(base / "data/0.tar", parts[0]),
        f"{inputs.as_folder(base / 'folder', parts[1])}/",
        inputs.as_parquet(base / "2.parquet", parts[2]),
    ]
    scores = [COLUMNS[:10], COLUMNS[10:20], COLUMNS[20:]]
    return tuple(
        make_run(base / name, {str(path): part for path, part in zip(paths, scores, strict=True)})
        for name, paths in (("a", kinds), ("b", tars))
    )


def out(run: Path, tmp_path: Path, form: str, name: str, **settings: Any) -> Path:
    select(run, SelectSettings(**({"top": "40%", "shard_size": 5} | settings), format=form, output=tmp_path / name))
    return tmp_path / name


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((folder / "data").iterdir()) for row in pq.read_table(path).to_pylist()]


def decisions(folder: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in row.items() if name != "shard"}
        for row in pq.read_table(folder / "selection.parquet").to_pylist()
    ]


@pytest.mark.parametrize("form", ["parquet", "hf"])
@pytest.mark.parametrize("settings", [{}, {"shuffle": 3}, {"repeat": "width + 1"}], ids=str)
def test_tables_are_equal(runs, tmp_path, form, settings):
    found = {kind: out(run, tmp_path, form, kind, **settings) for kind, run in runs.items()}
    rows = {kind: rows_of(folder) for kind, folder in found.items()}
    texts = {key: text for key, _, text in PAIRS}
    images = {key: image for key, image, _ in PAIRS}
    assert len(rows["tar"]) >= 12
    assert all(
        row["caption"] == texts[row["key"]]
        and row["image"] == {"bytes": images[row["key"]], "path": f"{row['key']}.jpg"}
        for row in rows["tar"]
    )
    for kind in OTHERS:
        same = [{name: value for name, value in row.items() if name not in ("shard", "json")} for row in rows[kind]]
        assert same == [
            {name: value for name, value in row.items() if name not in ("shard", "json")} for row in rows["tar"]
        ]
        assert decisions(found[kind]) == decisions(found["tar"])
    assert {row["json"] for kind in ("tar", "folder") for row in rows[kind]} == {None}
    assert [json.loads(row["json"]) for row in rows["parquet"]] == [
        {"id": row["key"], "caption": row["caption"]} for row in rows["tar"]
    ]
    assert [json.loads(row["json"]) for row in rows["json"]] == [
        inputs.record(row["key"], row["caption"], f"{row['key']}.jpg") for row in rows["tar"]
    ]


@pytest.mark.parametrize("settings", [{}, {"repeat": "width + 1", "shuffle": 1}], ids=str)
def test_llava_folders_are_equal(runs, tmp_path, settings):
    found = {kind: out(run, tmp_path, "llava-json", kind, **settings) for kind, run in runs.items()}
    entries = {kind: json.loads((folder / "llava.json").read_text()) for kind, folder in found.items()}
    files = {
        kind: {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("images/*/*")}
        for kind, folder in found.items()
    }
    assert entries["tar"] == entries["folder"] == entries["parquet"] and len(entries["tar"]) >= 12
    assert files["tar"] == files["folder"] == files["parquet"] == files["json"]
    turns = {key: inputs.record(key, text, "")["conversations"] for key, _, text in PAIRS}
    assert entries["json"] == [entry | {"conversations": turns[entry["id"]]} for entry in entries["tar"]]


@pytest.mark.parametrize("kind", OTHERS)
def test_subsets_and_keys_are_equal(runs, tmp_path, kind):
    for form, name in (("datacomp", "subset.npy"), ("keys", "keys")):
        other = out(runs[kind], tmp_path, form, f"{kind}-{name}", repeat="width + 1")
        assert other.read_bytes() == out(runs["tar"], tmp_path, form, f"tar-{name}", repeat="width + 1").read_bytes()


@pytest.mark.parametrize("form", ["shards", "tar"])
@pytest.mark.parametrize("shuffle", [None, 4])
def test_copies_of_samples_that_are_in_no_tar(mixed, tmp_path, form, shuffle):
    """In one output with byte ranges of a tar: the same keys, in the same order, over the same bytes."""
    found = []
    for run, name in zip(mixed, "ab", strict=True):
        (tmp_path / name).mkdir()
        out(run, tmp_path, form, f"{name}/out" + (".tar" if form == "tar" else ""), repeat="width + 1", shuffle=shuffle)
        found.append(samples_of(tmp_path / name / ("out" if form == "shards" else "")))
    mine, tars = found
    assert list(mine) == list(tars)
    assert [{ext: members[ext] for ext in ("jpg", "txt")} for members in mine.values()] == list(tars.values())
    images = {key: image for key, image, _ in PAIRS}
    copies = [key for key in mine if key not in images]
    assert {key.rpartition("-")[2] for key in copies} == {"2", "3", "4"}
    assert all(mine[key]["jpg"] == images[key.rpartition("-")[0]] for key in copies)
    assert any(key.rpartition("-")[0] in KEYS[10:20] for key in copies) and any(
        key.rpartition("-")[0] in KEYS[20:] for key in copies
    )


def test_captions_of_a_column_are_written_as_they_were_scored(tmp_path):
    path = inputs.as_parquet(tmp_path / "0.parquet", PAIRS, blip=[f"blip {key}" for key in KEYS])
    run = make_run(tmp_path / "run", {str(path): COLUMNS})
    set_inputs(run, caption="blip")
    rows = rows_of(out(run, tmp_path, "parquet", "best"))
    assert [row["caption"] for row in rows] == [f"blip {row['key']}" for row in rows] and len(rows) == 12


@pytest.mark.parametrize("form", ["shards", "tar", "parquet", "llava-json", "hf"])
def test_an_image_that_is_gone_is_named(tmp_path, form):
    path = inputs.as_llava(tmp_path / "llava/data.json", PAIRS[:3])
    run = make_run(tmp_path / "run", {str(path): COLUMNS[:3]})
    set_inputs(run, images=str(tmp_path / "llava/images"))
    (tmp_path / f"llava/images/{KEYS[1]}.jpg").unlink()
    with pytest.raises(ShardError) as caught:
        out(run, tmp_path, form, "best", top="100%")
    assert (
        str(caught.value)
        == f"shard {str(path)!r} has changed since it was scored, score it again: row 1: no such file: '{KEYS[1]}.jpg'"
    )
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize("form", ["shards", "tar", "parquet", "llava-json", "hf"])
def test_a_file_that_has_changed_is_refused_before_anything_is_written(tmp_path, form):
    path = inputs.as_parquet(tmp_path / "0.parquet", PAIRS)
    run = make_run(tmp_path / "run", {str(path): COLUMNS})
    inputs.as_parquet(path, PAIRS[:20])
    with pytest.raises(
        SelectionError, match="has changed since it was scored, its byte ranges may be wrong; score it again"
    ):
        out(run, tmp_path, form, "best")
    assert not (tmp_path / "best").exists()


def test_another_sample_than_was_scored_is_named_by_its_row(tmp_path):
    path = inputs.as_parquet(tmp_path / "0.parquet", PAIRS[:3])
    run = make_run(tmp_path / "run", {str(path): COLUMNS[:3]})
    table = pq.read_table(run / "scores/0-0.parquet")
    pq.write_table(
        table.set_column(0, "key", [["x", "y", "z"]]).replace_schema_metadata(
            pq.read_metadata(run / "scores/0-0.parquet").metadata
        ),
        run / "scores/0-0.parquet",
    )
    with pytest.raises(ShardError) as caught:
        out(run, tmp_path, "parquet", "best", top="100%")
    assert (
        str(caught.value)
        == f"shard {str(path)!r} does not hold sample 'x' where it was scored: score it again; it is row 0"
    )
