"""The first recipe for shards: what is seen in their head, and that what is written can be followed."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from mmfilter.core.cards.card_choice import ModelSettings
from mmfilter.core.cards.cards import card_names, load_card
from mmfilter.core.input.source import InputOptions
from mmfilter.errors import RecipeError, ShardError
from mmfilter.recipes.drafting import Look, draft, look, write_draft
from mmfilter.recipes.reading import read_recipe
from mmfilter.recipes.schema import Inputs, Output, Run, Select
from mmfilter.recipes.steps import follow
from tests import inputs
from tests.conftest import Quiet, good, picture, write_tar


def sample(i: int, record: dict | bytes | None, text: str | None = None) -> list[tuple[str, bytes]]:
    payload = record if isinstance(record, bytes) or record is None else json.dumps(record).encode()
    members = [(f"{i:05d}.jpg", picture(i, size=(16, 16)))]
    members += [] if payload is None else [(f"{i:05d}.json", payload)]
    return members + ([] if text is None else [(f"{i:05d}.txt", text.encode())])


TURNS = {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]}
HEADS = {
    "txt": ([sample(i, None, "a dog") for i in range(3)], "txt", False),
    "txt before json": ([sample(i, {"caption": "a cat", "uid": f"{i:032x}"}, "a dog") for i in range(3)], "txt", True),
    "caption": ([sample(i, {"caption": "a cat"}) for i in range(3)], "caption", False),
    "text": ([sample(i, {"text": "a cat", "uid": "short"}) for i in range(3)], "text", False),
    "conversations": ([sample(i, TURNS) for i in range(3)], "conversations", False),
    "two places": ([sample(0, None, "a dog"), sample(1, TURNS)], "auto", False),
    "one without a caption": ([sample(0, None, "a dog"), sample(1, None)], "txt", False),
    "a uid is missing": ([sample(0, {"uid": "0" * 32}, "a dog"), sample(1, {}, "a dog")], "txt", False),
    "broken json": ([sample(0, b"{", "a dog")], "txt", False),
    "no captions": ([sample(0, b"[]")], "auto", False),
}


@pytest.mark.parametrize("case", HEADS)
def test_captions_and_uids_are_found(tmp_path, case):
    samples, caption, has_uid = HEADS[case]
    shard = write_tar(tmp_path / "a.tar", [member for members in samples for member in members])
    output = "llava-json" if caption == "conversations" else "shards"
    assert look([str(shard)]) == Look((str(shard),), 1, len(samples), caption, has_uid, output)


def test_the_number_of_samples_is_estimated_from_sizes(tmp_path):
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", [member for j in range(150) for member in sample(j, None, "a dog")])
    found = look([f"{tmp_path}/*.tar"])
    assert (
        found.n_samples == pytest.approx(450, rel=0.05)
        and found.told == f"3 shards with about {found.n_samples:,} samples"
    )


@pytest.mark.parametrize(("case", "form"), [("txt before json", "shards"), ("conversations", "llava-json")])
def test_what_is_written_is_a_recipe_that_says_what_was_seen(tmp_path, monkeypatch, case, form):
    monkeypatch.chdir(tmp_path)
    samples, caption, has_uid = HEADS[case]
    write_tar(tmp_path / 'a "b": c.tar', [member for members in samples for member in members])
    text = draft(look(['a "b"*.tar']))
    write_draft(tmp_path / "recipe.yaml", text)
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert (recipe.inputs, recipe.model, recipe.run) == (
        Inputs(shards=('a "b"*.tar',), caption=caption),
        ModelSettings("tiny"),
        Run(run="mmfilter-run"),
    )
    assert (
        recipe.select == Select("20%")
        and recipe.outputs == (Output("best", form),)
        and recipe.check is recipe.dedup is None
    )
    assert ("format: datacomp" in text) == has_uid
    for name in card_names():
        assert (f"  #   {name}\n" in text) == (name != "tiny" and not load_card(name).cannot_score)


OTHERS = {
    "folder": (lambda here, found: inputs.as_folder(here / "pairs", found), {}, Inputs(shards=("pairs",)), "shards"),
    "parquet": (lambda here, found: inputs.as_parquet(here / "p/0.parquet", found).parent / "*.parquet", {}, Inputs(shards=("p/*.parquet",)), "shards"),
    "a column": (lambda here, found: _captioned(here / "p.parquet", found), {"caption": "my words"}, Inputs(shards=("p.parquet",), caption="my words"), "shards"),
    "LLaVA JSON": (lambda here, found: inputs.as_llava(here / "d.json", found), {"images": "images"}, Inputs(shards=("d.json",), images="images"), "llava-json"),
    "a command": (
        lambda here, found: f"pipe:cat {inputs.as_tar(here / 'a.tar', found).name}", {"allow_pipe": True},
        Inputs(shards=("pipe:cat a.tar",), caption="txt", allow_pipe=True), "keys",
    ),
}  # fmt: skip


def _captioned(path: Path, found: list[inputs.Pair]) -> Path:
    inputs.as_parquet(path, found)
    table = pq.read_table(path)
    pq.write_table(table.rename_columns([{"caption": "my words"}.get(name, name) for name in table.column_names]), path)
    return path


@pytest.mark.parametrize("case", OTHERS)
def test_other_inputs_get_a_recipe_that_runs_as_it_is(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    make, options, expected, output = OTHERS[case]
    made = make(tmp_path, inputs.pairs(6))
    pattern = made if isinstance(made, str) else str(made.relative_to(tmp_path))
    found = look([pattern], InputOptions(**options))
    assert (found.n_samples, found.output) == (6, output)
    write_draft(tmp_path / "recipe.yaml", draft(found))
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert recipe.inputs == expected and recipe.outputs[0].format == output
    steps = follow(recipe, Quiet(), lambda step: None)
    assert [(step.name, step.state) for step in steps] == [("score", "done"), ("select", "done")]
    assert (steps[0].facts, steps[1].facts["written"]) == ({"samples": 6, "scored": 6}, 1)


def test_how_many_samples_there_are_is_not_guessed_where_sizes_do_not_say(tmp_path):
    for i in range(2):
        inputs.as_parquet(tmp_path / f"{i}.parquet", inputs.pairs(3))
    assert look([f"{tmp_path}/*.parquet"]).told == "2 shards"


def test_everything_in_comments_is_a_recipe_too(tmp_path):
    """Each commented key, put in, is one that a recipe has."""
    shard = write_tar(tmp_path / "a.tar", [member for i in range(2) for member in good(f"{i}", i)])
    lines = draft(look([str(shard)])).splitlines()
    keyed = [
        line.replace("# ", "", 1) if line.lstrip().startswith(("# ", "#   ")) and ":" in line.split("#")[1] else line
        for line in lines[4:]
    ]
    text = "\n".join(line for line in keyed if not line.lstrip().startswith(("tiny is", "For real", "The samples")))
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert yaml.safe_load(text).keys() == {"inputs", "model", "run", "check", "dedup", "select", "outputs"}
    assert (
        recipe.check.sample == 1000
        and recipe.dedup.on == "both"
        and recipe.run.limit == 1000
        and recipe.model.layer == 12
    )
    assert recipe.select.where == "width >= 200 AND caption_chars >= 5" and recipe.outputs[1] == Output(
        "subset.npy", "datacomp"
    )


def test_what_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="'-' is a tar on stdin"):
        look(["-"])
    with pytest.raises(ShardError, match="does not exist"):
        look([f"{tmp_path}/none.tar"])
    empty = write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(RecipeError, match=r"shard '.*empty\.tar' holds no samples: nothing to write a recipe for"):
        look([str(empty)])
    llava = inputs.as_llava(tmp_path / "d.json", inputs.pairs(2), images="elsewhere")
    problem = "none of the first 2 samples of shard '.*d.json' can be used, the first has: no such file: '000000000.jpg'; --images names the folder of its images"
    with pytest.raises(RecipeError, match=problem):
        look([str(llava)])
    with pytest.raises(ShardError, match="would run a shell"):
        look(["pipe:cat a.tar"])
    (tmp_path / "recipe.yaml").write_text("mine")
    with pytest.raises(
        RecipeError, match=r"recipe\.yaml' is there already; name another file with -o, or delete it first"
    ):
        write_draft(tmp_path / "recipe.yaml", "new")
    assert (tmp_path / "recipe.yaml").read_text() == "mine"
    with pytest.raises(RecipeError, match="cannot be written: "):
        write_draft(tmp_path / "recipe.yaml" / "recipe.yaml", "new")
