"""Reading a recipe: what it means, and the words for what it cannot mean."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mmfilter.core.cards.card_choice import ModelSettings
from mmfilter.errors import RecipeError, SAEError, SelectionError
from mmfilter.recipes.reading import read_recipe
from mmfilter.recipes.schema import Check, Dedup, Inputs, Output, Recipe, Run, Select

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))

WHOLE = """
inputs: {shards: [a.tar, 'b/{0..3}.tar'], caption: txt}
model: {name: m, layer: 3, sae: s, sae_options: {k: 4}, threshold: 1e-3, text_context: none}
run: {directory: r, batch_size: 8, limit: 10}
check: {sample: 50}
dedup: {threshold: 1, on: image}
select: {top: 5, where: "a = 'on'", diverse: true, shuffle: 3}
outputs:
  - path: x
  - {path: y.txt, format: keys, shard_size: 5}
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_every_section_becomes_its_dataclass(tmp_path):
    assert read_recipe(written(tmp_path, WHOLE)) == Recipe(
        Inputs(shards=("a.tar", "b/{0..3}.tar"), caption="txt"),
        ModelSettings("m", 3, "s", {"k": 4}, None, "none", 0.001),
        Run(run="r", batch_size=8, limit=10),
        Check(50),
        Dedup(1.0, "image"),  # the key is `on`, which YAML 1.1 takes for true
        Select(5, where="a = 'on'", diverse=True, shuffle=3),
        (Output("x"), Output("y.txt", "keys", 5)),
    )


def test_what_is_not_said_has_its_default_and_one_shard_needs_no_list(tmp_path):
    assert read_recipe(written(tmp_path, "inputs: {shards: a.tar}\nmodel:\ndedup:\n")) == Recipe(
        Inputs(shards=("a.tar",))
    )


def test_changes_come_after_the_file_in_their_order(tmp_path):
    changes = [
        "select.top=30%",
        "select.top=40%",
        "outputs.1.path=z",
        "dedup=null",
        "run.limit=null",
        "inputs.shards=[c.tar]",
        "check.seed=2",
        "run.workers= 2",
    ]
    recipe = read_recipe(written(tmp_path, WHOLE), changes)
    assert recipe.select.top == "40%" and recipe.outputs == (Output("x"), Output("z", "keys", 5))
    assert (
        recipe.dedup is None
        and recipe.run == Run(run="r", batch_size=8, workers=2)
        and recipe.inputs.shards == ("c.tar",)
    )
    assert recipe.check == Check(50, 2)


def test_a_change_makes_a_section_that_the_file_does_not_have(tmp_path):
    recipe = read_recipe(
        written(tmp_path, "inputs: {shards: a.tar}"), ["select.where=a = 'b=c'", "select.min=0", "outputs=[{path: x}]"]
    )
    assert recipe.select == Select(min=0.0, where="a = 'b=c'")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_resolved_recipe_reads_back_and_is_the_same_from_any_folder(path, tmp_path, monkeypatch):
    resolved = read_recipe(path).resolved()
    (tmp_path / "manifest.json").write_text(json.dumps({"kind": "selection", "recipe": {"recipe": resolved.values()}}))
    monkeypatch.chdir(tmp_path)
    again = read_recipe(tmp_path / "manifest.json")
    assert again == resolved and again.resolved() == resolved
    assert Path(resolved.run.run).is_absolute() and Path(resolved.outputs[0].path).is_absolute()


def test_the_home_folder_is_known_and_urls_stay_urls(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "inputs: {shards: [~/a.tar, 's3://b/'], images: ~/i}\nrun: {directory: ~/run/}\nselect: {top: 1, match: ~/good}\noutputs: [{path: 's3://b/x'}]"
    resolved = read_recipe(written(tmp_path, text)).resolved()
    assert resolved.inputs == Inputs(shards=(f"{tmp_path}/a.tar", "s3://b/"), images=f"{tmp_path}/i")
    assert (str(resolved.run.run), resolved.select.match) == (f"{tmp_path}/run", f"{tmp_path}/good")
    with pytest.raises(SelectionError, match="output 's3://b/x' is a URL; select into a local folder and upload that"):
        resolved.selection(resolved.outputs[0])


@pytest.mark.parametrize(
    ("dedup", "select", "threshold", "on"),
    [
        ("{threshold: 0.9, on: image}", "{top: 1}", 0.9, "image"),
        ("{threshold: 0.9, on: image}", "{top: 1, dedup: 0.8, dedup_on: text}", 0.8, "text"),
        ("{threshold: 0.9, on: image}", "{top: 1, dedup: false}", None, "image"),
        ("null", "{top: 1}", None, "both"),
        ("null", "{top: 1, dedup: 0.7}", 0.7, "both"),
    ],
)
def test_a_selection_leaves_the_duplicates_of_the_section_dedup_out(tmp_path, dedup, select, threshold, on):
    recipe = read_recipe(
        written(tmp_path, f"inputs: {{shards: a.tar}}\ndedup: {dedup}\nselect: {select}\noutputs: [{{path: x}}]")
    )
    for one in (recipe, recipe.resolved()):
        settings = one.selection(one.outputs[0])
        assert (settings.dedup, settings.dedup_on) == (threshold, on)


S = "inputs: {shards: a.tar}\n"
REFUSED = {
    "unknown section": (S + "selct: {top: 1}", "selct is not a key of a recipe; the nearest is select"),
    "unknown key of inputs": (
        "inputs: {shard: a.tar}",
        "inputs.shard is not a key of a recipe; the nearest is inputs.shards",
    ),
    "unknown key of model": (S + "model: {layr: 1}", "model.layr is not a key of a recipe; the nearest is model.layer"),
    "unknown key of run": (
        S + "run: {batchsize: 1}",
        "run.batchsize is not a key of a recipe; the nearest is run.batch_size",
    ),
    "unknown key of check": (
        S + "check: {samples: 1}",
        "check.samples is not a key of a recipe; the nearest is check.sample",
    ),
    "unknown key of dedup": (
        S + "dedup: {treshold: 1}",
        "dedup.treshold is not a key of a recipe; the nearest is dedup.threshold",
    ),
    "unknown key of select": (
        S + "select: {tpo: 20%}",
        "select.tpo is not a key of a recipe; the nearest is select.top",
    ),
    "unknown key of an output": (
        S + "outputs: [{path: a}, {pth: b}]",
        "outputs.1.pth is not a key of a recipe; the nearest is outputs.1.path",
    ),
    "key of another section": (S + "top: 20%", "top is not a key of a recipe; the nearest is select.top"),
    "output's key elsewhere": (
        S + "select: {shard_size: 5}",
        "select.shard_size is not a key of a recipe; the nearest is outputs.0.shard_size",
    ),
    "no inputs": (
        "model: {name: tiny}",
        "inputs is missing; name the shards there, such as 'inputs: {shards: data/*.tar}'",
    ),
    "no shards": ("inputs: {caption: txt}", "inputs.shards is missing; name paths, globs, brace patterns or URLs"),
    "empty shards": ("inputs: {shards: []}", "inputs.shards names no shard"),
    "stdin": (
        "inputs: {shards: '-'}",
        "inputs.shards is '-', a tar on stdin, which cannot be read again; a recipe names its shards",
    ),
    "no path": (
        S + "outputs: [{format: keys}]",
        "outputs.0.path is missing; name a new folder, or a new file for tar, keys and *.npy",
    ),
    "section is a word": (S + "select: 20%", "select is '20%'; expected keys such as top, min, by"),
    "list is a word": (S + "outputs: best", "outputs is 'best'; expected a list"),
    "whole number": (S + "run: {limit: 1.5}", "run.limit is 1.5; expected a whole number"),
    "no whole number": (S + "run: {workers: true}", "run.workers is True; expected a whole number"),
    "number": (S + "select: {min: lots}", "select.min is 'lots'; expected a number"),
    "truth": (S + "select: {diverse: yes}", "select.diverse is 'yes'; expected true or false"),
    "truth as a number": (S + "select: {top: true}", "select.top is True; expected a text or a number"),
    "cosine or false": (S + "select: {dedup: true}", "select.dedup is True; expected a number or false"),
    "choice": (S + "dedup: {on: sound}", "dedup.on is 'sound'; expected one of both, image, text"),
    "format": (S + "outputs: [{path: a, format: zip}]", "outputs.0.format is 'zip'; expected one of shards, tar, keys"),
    "mapping": (S + "model: {sae_options: 5}", "model.sae_options is 5; expected keys and values"),
    "share": (S + "run: {max_bad: 10}", "run.max_bad is 10.0; expected a share from 0 to 1, such as 0.1"),
    "no select": (S + "outputs: [{path: a}]", "the recipe has outputs and no section select"),
    "no outputs": (S + "select: {top: 5}", "the recipe has a section select and no outputs"),
    "one place twice": (
        S + "select: {top: 5}\noutputs: [{path: a}, {path: ./a}]",
        "outputs.0.path and outputs.1.path are both './a'",
    ),
    "one place in another": (
        S + "select: {top: 5}\noutputs: [{path: a/b}, {path: a}]",
        "outputs.0.path 'a/b' is in outputs.1.path 'a'; name a place beside it",
    ),
    "twice": (
        S + "run: {limit: 1, limit: 2}",
        "recipe.yaml' is not YAML: line 2, column 17: the key 'limit' comes twice",
    ),
    "no YAML": (S + "run: [", "recipe.yaml' is not YAML: line 2, column 7 while parsing a flow node: "),
    "nothing": ("# nothing", "holds no sections; expected lines like 'inputs:'"),
    "list as a key": (S + "? [a]\n: b", "is not YAML: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_and_in_which_words(tmp_path, case):
    text, words = REFUSED[case]
    with pytest.raises(RecipeError) as caught:
        read_recipe(written(tmp_path, text))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("select.top", "--set 'select.top' is not KEY.KEY=VALUE, such as select.top=30%"),
        ("select.tpo=1", "select.tpo is not a key of a recipe; the nearest is select.top"),
        ("outputs.2.path=a", "'2' is none of the 2 parts of that list; they count from 0"),
        ("outputs.path=a", "'path' is none of the 2 parts of that list"),
        ("select.top.x=1", "select.top is 5 in the recipe and has no keys"),
        ("run.limit=[", "is not YAML: line 1, column 2 while parsing"),
        (".top=1", "--set '.top=1' is not KEY.KEY=VALUE, such as select.top=30%"),
        ("select.=1", "--set 'select.=1' is not KEY.KEY=VALUE"),
    ],
)
def test_changes_that_are_refused(tmp_path, change, words):
    with pytest.raises(RecipeError) as caught:
        read_recipe(written(tmp_path, WHOLE), [change])
    assert words in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(
        RecipeError,
        match=r"recipe '.*none\.yaml' cannot be read: No such file or directory; write one with: mmfilter init SHARDS -o ",
    ):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(
        RecipeError, match=r"is a folder; name a recipe, or the manifest\.json of an output that a recipe made"
    ):
        read_recipe(tmp_path)


def test_the_settings_of_the_operations_judge_the_rest():
    recipe = Recipe(Inputs(shards=("a.tar",)), select=Select(top="lots"), outputs=(Output("x"),))
    with pytest.raises(
        SelectionError, match=r"--top '0\.2' is neither a percentage up to 100% nor a count from 1; write 20% or 5000"
    ):
        replace(recipe, select=Select(top=0.2)).selection(recipe.outputs[0])
    with pytest.raises(SelectionError, match="lots"):
        recipe.selection(recipe.outputs[0])
    with pytest.raises(SelectionError, match="the similarity threshold is 2; give one above 0"):
        Dedup(2).settings()
    with pytest.raises(SAEError, match="no SAE option 'kk'"):
        ModelSettings(sae_options={"kk": 2}).card()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            '{"kind": "selection"}',
            r"manifest\.json' holds no recipe; expected the manifest of an output that mmfilter run made",
        ),
        ("[1]", "holds no recipe"),
        ("{", r"manifest\.json' is not valid JSON"),
        ('{"recipe": {"recipe": 5}}', "holds no sections"),
    ],
)
def test_manifests_that_hold_no_recipe(tmp_path, text, words):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(RecipeError, match=words):
        read_recipe(tmp_path / "manifest.json")
