"""The embedded model and the example shards keep what the README promises."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import rankdata

from mmfilter.cli.app import main
from mmfilter.core.input.shards import open_source

ROOT = Path(__file__).parents[1]
TINY = ROOT / "models" / "tiny"
SHARDS = sorted((ROOT / "examples" / "shards").glob("*.tar"))


def auc(true: np.ndarray, wrong: np.ndarray) -> float:
    """Probability that a true pair scores above a wrong one, ties half."""
    ranks = rankdata(np.concatenate([true, wrong]))
    return (ranks[: len(true)].sum() - len(true) * (len(true) + 1) / 2) / (len(true) * len(wrong))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("examples") / "run"
    assert main(["score", *map(str, SHARDS), "--run", str(run)]) == 0
    return run


def test_the_package_is_small_and_safe():
    files = [path for path in TINY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 24_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md"}
    assert sum(path.stat().st_size for path in SHARDS) + sum(path.stat().st_size for path in files) < 40_000_000


def test_the_shards_are_as_described():
    records = [json.loads(raw.members["json"]) for shard in SHARDS for raw in open_source(str(shard)).samples()]
    assert len(records) == 1000 and sum(record["mismatched"] for record in records) == 150
    assert len({record["uid"] for record in records}) == 1000


@pytest.mark.slow
def test_scores_tell_true_pairs_from_mismatched_ones(run):
    """On drawings and concepts that were not trained on, with captions that the scores never saw labelled."""
    wrong = np.array(
        [json.loads(raw.members["json"])["mismatched"] for shard in SHARDS for raw in open_source(str(shard)).samples()]
    )
    table = pq.read_table(run / "scores", columns=["shard", "row", "similarity", "support", "random", "l0"]).sort_by(
        [("shard", "ascending"), ("row", "ascending")]
    )
    auc_of = {
        name: auc(column[~wrong], column[wrong])
        for name in ("similarity", "support", "random", "l0")
        for column in [table[name].to_numpy()]
    }
    assert auc_of["similarity"] > 0.84 and auc_of["support"] > 0.82
    assert 0.42 < auc_of["random"] < 0.58 and 0.38 < auc_of["l0"] < 0.62


@pytest.mark.slow
@pytest.mark.parametrize("way", [[], ["--stream"]], ids=["pipe", "stream"])
def test_a_training_loop_reads_the_selection(run, way):
    command = [sys.executable, ROOT / "examples" / "finetune_pipe.py", run, "--top", "20%", "--epochs", "3", *way]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    losses = [float(line.rsplit(" ", 1)[1]) for line in done.stdout.splitlines()]
    assert len(losses) == 3 and losses[2] < losses[0]
    assert "200 pairs" in done.stdout.splitlines()[0]


@pytest.mark.slow
def test_the_wheel_carries_package_cards_and_model(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = {path.relative_to(ROOT) for path in (ROOT / "mmfilter").rglob("*.py")}
    cards = {Path("mmfilter") / path.relative_to(ROOT) for path in (ROOT / "models").glob("*.yaml")}
    tiny = {Path("mmfilter") / path.relative_to(ROOT) for path in (ROOT / "models/tiny").rglob("*") if path.is_file()}
    assert {str(path) for path in sources | cards | tiny | {Path("mmfilter/py.typed")}} <= names
    assert not [name for name in names if "recipe/" in name or name.startswith(("tests/", "benchmarks/"))]
