"""Following recipes with the embedded model: what is written, what is skipped, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmfilter.core.input.shards import open_source
from mmfilter.errors import MissingExtra, MMFilterError, RecipeError, RunError, SelectionError
from mmfilter.recipes.reading import read_recipe
from mmfilter.recipes.schema import Check, Dedup, Inputs, Output, Recipe, Run, Select
from mmfilter.recipes.steps import Step, follow
from tests.conftest import Quiet, caption, good, picture, write_tar

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))


def go(recipe: Recipe, **options) -> list[Step]:
    return follow(recipe, Quiet(), lambda step: None, **options)


def states(steps: list[Step]) -> list[tuple[str, str]]:
    return [(step.name, step.state) for step in steps]


@pytest.fixture
def recipe(make_shard, tmp_path) -> Recipe:
    """Two shards of 12 pairs, the last four pictures and captions of the first again in the second."""
    make_shard("0.tar", n=12, seed=0)
    make_shard("1.tar", n=12, seed=8)
    return Recipe(
        Inputs(shards=(f"{tmp_path}/source/*.tar",)), run=Run(Path(f"{tmp_path}/run")), dedup=Dedup(0.999), select=Select("25%", shuffle=1),
        outputs=(Output(f"{tmp_path}/best"), Output(f"{tmp_path}/best.txt", "keys")),
    )  # fmt: skip


def kept_keys(folder: Path) -> list[str]:
    return [sample.key for shard in sorted(folder.glob("*.tar")) for sample in open_source(str(shard)).samples()]


def table(run: Path) -> list[dict]:
    return [row for path in sorted((run / "scores").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_recipes_run_and_the_second_time_skip_everything(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe(path, [f"inputs.shards={ROOT}/examples/shards/*.tar", "run.limit=40"])
    first = go(recipe)
    assert first[0].facts == {"samples": 40, "scored": 40} and {step.state for step in first} == {"done"}
    assert [step.name for step in first] == ["score"] + ["dedup"] * (recipe.dedup is not None) + ["select"] * len(
        recipe.outputs
    )
    again = go(recipe)
    assert states(again) == [(step.name, "skipped") for step in first]
    expected = {"20%": 8, "25%": 10, "30%": 12, "100%": 40}[recipe.select.top]  # the example pairs are all different
    assert first[-1].facts["written"] == expected


def test_the_selection_is_that_of_a_plain_sort(recipe, tmp_path):
    go(replace(recipe, dedup=None, select=Select("25%", shuffle=None)))
    rows = sorted(table(tmp_path / "run"), key=lambda row: (-row["similarity"], row["key"], row["shard"]))[:6]
    expected = [row["key"] for row in sorted(rows, key=lambda row: (row["shard"], row["row"]))]
    assert kept_keys(tmp_path / "best") == expected == (tmp_path / "best.txt").read_text().split()


def test_duplicates_of_the_section_dedup_are_left_out(recipe, tmp_path):
    steps = go(replace(recipe, select=Select("100%")))
    digests = {(row["image_hash"], row["text_hash"]) for row in table(tmp_path / "run")}
    assert len(digests) == 20 and steps[1].facts == {"kept": 20, "exact_duplicates": 4, "near_duplicates": 0}
    assert len(kept_keys(tmp_path / "best")) == 20


def test_the_recipe_of_a_manifest_makes_the_same_set_again(recipe, tmp_path):
    go(recipe)
    for manifest in (tmp_path / "best/manifest.json", tmp_path / "best.txt.manifest.json"):
        about = json.loads(manifest.read_text())["recipe"]
        assert (
            {"mmfilter", "python", "torch", "transformers", "numpy"} <= about["versions"].keys()
            and about["hashes"]["sae_hash"]
            and about["card"]["layer"] == 1
        )
        name = f"again-{manifest.parent.name}"
        again = read_recipe(
            manifest,
            [
                f"run.directory={tmp_path}/{name}",
                f"outputs.0.path={tmp_path}/{name}-best",
                f"outputs.1.path={tmp_path}/{name}.txt",
            ],
        )
        assert {step.state for step in go(again)} == {"done"}
        assert kept_keys(tmp_path / f"{name}-best") == kept_keys(tmp_path / "best")
        assert (tmp_path / f"{name}.txt").read_text() == (tmp_path / "best.txt").read_text()
        assert json.loads((tmp_path / f"{name}-best/manifest.json").read_text())["recipe"]["scores"] == about["scores"]


def test_a_new_output_is_written_from_the_old_scores(recipe, tmp_path):
    go(recipe)
    more = replace(recipe, outputs=(*recipe.outputs, Output(f"{tmp_path}/table", "parquet")))
    assert states(go(more)) == [
        ("score", "skipped"),
        ("dedup", "skipped"),
        ("select", "skipped"),
        ("select", "skipped"),
        ("select", "done"),
    ]
    assert pq.read_table(tmp_path / "table/data")["key"].to_pylist() == kept_keys(tmp_path / "best")


def test_what_changes_no_score_is_no_other_recipe(recipe):
    go(recipe)
    faster = replace(recipe, run=replace(recipe.run, batch_size=3, workers=1))
    assert {step.state for step in go(faster)} == {"skipped"}


def test_another_dedup_is_made_again_also_when_another_command_made_it(recipe, tmp_path):
    from mmfilter.ops.dedup import dedup
    from mmfilter.ops.dedup_settings import DedupSettings

    recipe = replace(recipe, select=None, outputs=())
    assert states(go(recipe)) == [("score", "done"), ("dedup", "done")]
    assert states(go(recipe))[1] == ("dedup", "skipped")
    dedup(tmp_path / "run", DedupSettings(0.5), Quiet())
    assert states(go(recipe))[1] == ("dedup", "done")
    assert states(go(replace(recipe, dedup=Dedup(0.9))))[1] == ("dedup", "done")


def test_check_is_told_and_kept(make_shard, tmp_path):
    shard = make_shard(n=60)
    recipe = Recipe(Inputs(shards=(str(shard),)), run=Run(Path(f"{tmp_path}/run")), check=Check(20))
    first = go(recipe)
    assert states(first) == [("check", "done"), ("score", "done")]
    stored = json.loads((tmp_path / "run/check.json").read_text())
    assert (
        stored == first[0].facts
        and stored["pairs"] == 20
        and 0 <= stored["auc"]["similarity"] <= 1
        and stored["verdict"] == first[0].text
    )
    again = go(recipe)
    assert states(again) == [("check", "skipped"), ("score", "skipped")] and again[0].facts == stored
    assert states(go(replace(recipe, check=Check(21))))[0] == ("check", "done")


def test_a_dry_run_writes_nothing(recipe, tmp_path):
    before = sorted(os.listdir(tmp_path))
    steps = go(replace(recipe, check=Check()), dry_run=True)
    assert states(steps) == [(name, "planned") for name in ("check", "score", "dedup", "select", "select")]
    assert steps[3].text == f"write {tmp_path}/best (shards)" and sorted(os.listdir(tmp_path)) == before
    go(recipe)
    assert {step.state for step in go(recipe, dry_run=True)} == {"skipped"}


def test_a_dry_run_of_a_scored_run_has_the_funnel_of_what_would_be_written(recipe, tmp_path):
    go(recipe)
    other = replace(recipe, select=Select("50%", min=-1.0), outputs=(Output(f"{tmp_path}/half"),))
    before = sorted(tmp_path.rglob("*"))
    planned = go(other, dry_run=True)[-1]
    assert sorted(tmp_path.rglob("*")) == before
    done = go(other)[-1]
    assert (planned.state, done.state) == ("planned", "done") and planned.funnel == done.funnel
    assert (
        planned.text == f"write 12 samples, 50.0% of the candidates -> {tmp_path}/half (shards)"
        and done.facts["written"] == 12
    )


@pytest.mark.parametrize(
    ("select", "words"),
    [
        (Select("25%", where="width >"), "--where 'width >' is not possible: syntax error"),
        (
            Select("25%", by="random() + 1"),
            r"--by 'random\(\) \+ 1' uses random\(\), which is another number each time",
        ),
        (Select("25%", per="(SELECT 1)"), r"--per '\(SELECT 1\)' has a sub-query"),
        (Select("25%", match="nowhere"), "nowhere' is not a run: it has no manifest.json"),
        (Select("25%", metadata=("no*.csv",)), r"--metadata '.*/no\*\.csv' matches no file; check the path"),
    ],
)
def test_a_selection_that_cannot_be_made_is_told_before_the_pass(recipe, tmp_path, select, words):
    with pytest.raises(MMFilterError, match=words):
        go(replace(recipe, select=select))
    assert not (tmp_path / "run").exists()


def test_a_run_at_a_url_is_refused(recipe):
    with pytest.raises(RunError, match=r"run 's3:/bucket/run' is a URL; use a local folder and upload that"):
        go(replace(recipe, run=Run(run="s3://bucket/run")))


def test_a_changed_shard_is_scored_again_and_its_old_output_is_not_taken_for_new(recipe, tmp_path):
    go(recipe)
    members = [member for i in range(13) for member in good(f"{i:09d}", 40 + i)]
    write_tar(tmp_path / "source/1.tar", members)
    told: list[Step] = []
    with pytest.raises(
        RecipeError,
        match=r"output '.*/best' was made from other scores than run '.*/run' holds now; name a new path, or delete it",
    ):
        follow(recipe, Quiet(), told.append)
    assert states(told) == [("score", "done"), ("dedup", "done")] and told[0].facts["samples"] == 25
    assert len(table(tmp_path / "run")) == 25


def test_other_scoring_settings_are_refused_by_the_run(recipe):
    go(recipe)
    with pytest.raises(RunError, match=r"made with other settings \(seed was 0, is now 5\)"):
        go(replace(recipe, run=replace(recipe.run, seed=5), outputs=(), select=None))


def test_a_local_model_that_changed_is_looked_at_again(recipe, tmp_path):
    shutil.copytree(ROOT / "models/tiny/sae", tmp_path / "sae")
    recipe = replace(recipe, model=replace(recipe.model, sae=f"{tmp_path}/sae"), select=None, outputs=(), dedup=None)
    go(recipe)
    assert states(go(recipe)) == [("score", "skipped")]
    os.utime(tmp_path / "sae/cfg.json", (1, 1))
    assert states(go(recipe)) == [("score", "done")]  # its hash is the same, so nothing is scored again
    assert states(go(recipe)) == [("score", "skipped")]


def test_outputs_that_cannot_be_written_are_refused_before_anything_is_scored(recipe, tmp_path):
    (tmp_path / "file").touch()
    places = {
        "run/best": f"is in the run directory '{tmp_path}/run'; write beside it",
        "file/best": "cannot be written: Not a directory",
    }
    for place, words in places.items():
        with pytest.raises(SelectionError) as caught:
            go(replace(recipe, outputs=(Output(f"{tmp_path}/{place}"),)), dry_run=True)
        assert str(caught.value) == f"output '{tmp_path}/{place}' {words}"
    assert not (tmp_path / "run").exists()


def test_outputs_in_the_way_are_refused_before_anything_is_scored(recipe, tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best.txt").write_text("mine")
    with pytest.raises(
        RecipeError,
        match=r"output '.*/best\.txt' is there already and no recipe made it; name a new path, or delete it first",
    ):
        go(recipe)
    assert not (tmp_path / "run").exists() and (tmp_path / "best.txt").read_text() == "mine"
    (tmp_path / "best.txt").unlink()
    go(recipe)
    with pytest.raises(
        RecipeError,
        match=r"best' was made with another recipe \(select\.top was '25%', is now '50%'; select\.shuffle was 1, is now None\)",
    ):
        go(replace(recipe, select=Select("50%")))
    with pytest.raises(RecipeError, match=r"best' was made with another recipe \(its format or shard_size differs\)"):
        go(replace(recipe, outputs=(replace(recipe.outputs[0], shard_size=5),)))


def test_a_run_with_other_shards_is_refused(recipe, tmp_path):
    go(replace(recipe, outputs=(), select=None, dedup=None))
    with pytest.raises(
        RecipeError,
        match=r"also holds 1 shard that inputs\.shards does not name \(first: '.*/1\.tar'\), and a selection would take of that too",
    ):
        go(replace(recipe, inputs=Inputs(shards=(f"{tmp_path}/source/0.tar",))))


def test_a_missing_faiss_is_told_before_the_pass(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(
        MissingExtra, match=r"the index over codes needs an optional package: pip install 'mmfilter\[cpu\]'"
    ):
        go(recipe)
    assert not (tmp_path / "run").exists()
    assert states(go(replace(recipe, dedup=None)))[0] == ("score", "done")


def test_a_selection_that_fails_leaves_no_manifest_behind(recipe, tmp_path):
    with pytest.raises(MMFilterError, match="no column 'beauty'"):
        go(replace(recipe, select=Select("5%", by="beauty"), outputs=(recipe.outputs[1],)))
    assert not list(tmp_path.glob("best*"))


def test_too_many_bad_samples_end_it_every_time(make_shard, tmp_path):
    shard = make_shard(n=4, extra=[("z.jpg", picture(1)), ("zz.jpg", b"no image"), ("zz.txt", b"x")])
    recipe = Recipe(Inputs(shards=(str(shard),)), run=Run(Path(f"{tmp_path}/run")))
    for _ in range(2):
        with pytest.raises(
            RecipeError,
            match=r"33\.3% of the samples have no score, more than run\.max_bad 10% allows; the column 'reason'",
        ):
            go(recipe)
    assert go(replace(recipe, run=replace(recipe.run, max_bad=0.4)))[0].text.startswith(
        "finished before: 4 of 6 samples have scores"
    )


def test_broken_and_empty_shards(make_shard, tmp_path):
    shard = make_shard(n=4)
    content = shard.read_bytes()
    (tmp_path / "broken.tar").write_bytes(content[:9000])
    recipe = Recipe(Inputs(shards=(str(shard), f"{tmp_path}/broken.tar")), run=Run(Path(f"{tmp_path}/run")))
    with pytest.raises(
        RecipeError,
        match=r"1 of 2 shards could not be read to their end, first: .*broken\.tar.* The others are finished; repair and run again",
    ):
        go(recipe)
    (tmp_path / "broken.tar").write_bytes(content)
    assert go(recipe)[0].facts == {"samples": 8, "scored": 8}
    empty = write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(RecipeError, match="the shards hold no samples: nothing to score"):
        go(Recipe(Inputs(shards=(str(empty),)), run=Run(Path(f"{tmp_path}/empty"))))


def test_conversations_become_llava_json(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    members = []
    for i in range(20):
        turns = [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": f"A red apple, number {i}."},
        ]
        members += [
            (f"{i:03d}.jpg", picture(i)),
            (f"{i:03d}.json", json.dumps({"id": f"id-{i}", "conversations": turns}).encode()),
        ]
    write_tar(tmp_path / "chats.tar", members)
    go(
        read_recipe(
            ROOT / "examples/recipes/instruction-data.yaml",
            ["inputs.shards=chats.tar", "inputs.caption=conversations", "select.min=-1"],
        )
    )
    entries = json.loads((tmp_path / "selected/instruction-data/llava.json").read_text())
    assert len(entries) == 5 and all(
        entry["conversations"][1]["value"] == f"A red apple, number {entry['id'][3:]}." for entry in entries
    )


def test_the_subset_of_datacomp_and_its_keys_name_the_same_samples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    go(
        read_recipe(
            ROOT / "examples/recipes/datacomp.yaml", [f"inputs.shards={ROOT}/examples/shards/*.tar", "run.limit=30"]
        )
    )
    uids = {row["key"]: row["uid"] for row in table(tmp_path / "runs/datacomp")}
    ids = [f"{high:016x}{low:016x}" for high, low in np.load("selected/datacomp.npy").tolist()]
    assert ids == sorted(uids[key] for key in Path("selected/datacomp.txt").read_text().split()) and len(ids) == 9


def test_selecting_from_finished_scores_needs_no_torch(recipe, tmp_path):
    go(replace(recipe, check=None, outputs=(), select=None))
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe.values()))
    script = "import sys; from mmfilter.cli.app import main; code = main(['run', sys.argv[1]]); print('torch' in sys.modules, code)"
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "recipe.yaml"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False 0" and len(kept_keys(tmp_path / "best")) == 6


def test_llava_json_with_its_folder_and_columns_of_another_file(tmp_path, monkeypatch):
    """Inputs that are no tars, and `select.metadata`, go through a recipe as through the commands."""
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    records = []
    for i in range(6):
        Path("pictures", f"{i}.jpg").write_bytes(picture(i))
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": caption(i)}]
        records.append({"id": f"s{i}", "image": f"{i}.jpg", "conversations": turns})
    Path("data.json").write_text(json.dumps(records))
    Path("more.csv").write_text("key,taste\n" + "".join(f"s{i},{i}\n" for i in range(6)))
    Path("recipe.yaml").write_text(
        "inputs: {shards: [data.json], images: pictures}\nselect: {top: 50%, by: taste, metadata: [more.csv]}\noutputs: [{path: out, format: keys}]\n"
    )
    assert states(go(read_recipe(Path("recipe.yaml")))) == [("score", "done"), ("select", "done")]
    assert Path("out").read_text().split() == ["s3", "s4", "s5"]
    assert states(go(read_recipe(Path("recipe.yaml")))) == [("score", "skipped"), ("select", "skipped")]
    Path("more.csv").write_text("key,taste\n" + "".join(f"s{i},{10 - i}\n" for i in range(6)))
    with pytest.raises(
        RecipeError,
        match=r"output '.*/out' was made from other scores than run '.*', or select\.metadata holds now; name a new path, or delete it",
    ):
        go(read_recipe(Path("recipe.yaml")))
