"""`run` and `init` through `main`: what goes where, exit codes, words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmfilter.cli.app import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def here(make_shard, tmp_path, monkeypatch) -> Path:
    """A current directory with `source/00000.tar` of 20 pairs."""
    make_shard()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_from_init_to_a_selection_and_again(here, capsys):
    assert main(["init", "source/*.tar"]) == 0
    assert (
        capsys.readouterr().err
        == "mmfilter: 1 shard with about 20 samples; wrote recipe.yaml, next: mmfilter run recipe.yaml --dry-run\n"
    )
    assert main(["run", "recipe.yaml", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [
        f"score   would score 1 shard with 'tiny' into {here}/mmfilter-run; finished ones are skipped",
        f"select  would write {here}/best (shards)",
    ]
    assert main(["run", "recipe.yaml", "--set", "select.top=30%", "--set", "outputs.0.shard_size=4"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [
        f"score   20 of 20 samples have scores -> {here}/mmfilter-run",
        f"select  6 samples, 30.0% of the candidates -> {here}/best (shards)",
        "  20  in the run",
        "  20  have a score 'similarity'",
        "   6  kept by --top 30%",
    ]
    assert json.loads((here / "best/sizes.json").read_text()) == {"00000000.tar": 4, "00000001.tar": 2}
    assert main(["run", "best/manifest.json"]) == 0
    assert [line.split("  ")[-1].split(":")[0].split()[-2:] for line in capsys.readouterr().err.splitlines()] == [
        ["finished", "before"]
    ] * 2


def test_json_on_stdout(here, capsys):
    assert main(["init", "source/*.tar"]) == 0
    assert main(["run", "recipe.yaml", "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [(step["name"], step["state"]) for step in steps] == [("score", "done"), ("select", "done")]
    assert steps[0]["facts"] == {"samples": 20, "scored": 20}
    assert steps[1]["facts"] == {"output": f"{here}/best", "format": "shards", "written": 4} and steps[1]["funnel"][
        0
    ] == {"step": "in the run", "samples": 20}


def test_init_to_stdout(here, capsys):
    assert main(["init", "source/*.tar", "-o", "-"]) == 0
    out, err = capsys.readouterr()
    assert (
        out.startswith("# Written by mmfilter init: 1 shard with about 20 samples.\n")
        and err == ""
        and not (here / "recipe.yaml").exists()
    )


EXPLAINED = {
    "unknown key": (
        ["run", "recipe.yaml", "--set", "select.tpo=5"],
        "select.tpo is not a key of a recipe; the nearest is select.top",
    ),
    "no recipe": (
        ["run", "none.yaml"],
        "recipe 'none.yaml' cannot be read: No such file or directory; write one with: mmfilter init SHARDS -o none.yaml",
    ),
    "no shards": (["run", "recipe.yaml", "--set", "inputs.shards=none/*.tar"], "matches no file"),
    "bad selection": (["run", "recipe.yaml", "--set", "select.top=lots"], "lots"),
    "no card": (["run", "recipe.yaml", "--set", "model.name=huge"], "no card 'huge'"),
    "there already": (
        ["init", "source/*.tar"],
        "'recipe.yaml' is there already; name another file with -o, or delete it first",
    ),
    "stdin": (["init", "-"], "'-' is a tar on stdin"),
    "run among shards": (["run", "recipe.yaml", "--set", "run.directory=source"], "is the folder of shard"),
}


@pytest.mark.parametrize("case", EXPLAINED)
def test_what_cannot_be_done_is_one_line_and_exit_1_and_nothing_is_written(here, capsys, case):
    assert main(["init", "source/*.tar"]) == 0
    capsys.readouterr()
    before = sorted(here.rglob("*"))
    arguments, words = EXPLAINED[case]
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert (
        out == ""
        and err.startswith("mmfilter: ")
        and words in err
        and err.count("\n") == 1
        and sorted(here.rglob("*")) == before
    )


@pytest.mark.parametrize("argv", [["run"], ["init"], ["run", "a.yaml", "--top", "5"]])
def test_wrong_usage_exits_2(argv, capsys):
    assert main(argv) == 2
    assert "Usage: mmfilter" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["run", "--help"], ["init", "--help"]])
def test_help_imports_nothing_heavy(argv):
    heavy = "('torch', 'transformers', 'pyarrow', 'duckdb', 'faiss', 'numpy')"
    script = f"import sys; from mmfilter.cli.app import main; main({argv!r}); print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()[
            -1
        ]
        == "[]"
    )


def test_init_says_how_the_example_shards_are(capsys):
    assert main(["init", f"{ROOT}/examples/shards/*.tar", "-o", "-"]) == 0
    out = capsys.readouterr().out
    assert "2 shards with about 990 samples" in out and "  caption: txt " in out and "format: datacomp" in out
