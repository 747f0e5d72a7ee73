"""The package as a library: the menu, `Run`, and every example of docstrings and of docs/python.md."""

from __future__ import annotations

import doctest
import inspect
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import mmfilter
from mmfilter import menu, notebook, streaming
from mmfilter.core.selection.select_settings import ChoiceSettings
from mmfilter.errors import RunError, SelectionError
from mmfilter.ops.score_settings import ScoreSettings
from tests.conftest import good, write_tar

ROOT = Path(__file__).parents[1]
EXAMPLES = [
    *((f"mmfilter.{name}", getattr(menu, name)) for name in ("score", "select", "check", "dedup", "search")),
    ("mmfilter.Run", notebook.Run),
    ("mmfilter.Run.codes", notebook.Run.codes),
    ("mmfilter.Run.top", notebook.Run.top),
    ("mmfilter.Run.find", notebook.Run.find),
    ("mmfilter.stream", streaming.stream),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a shard of 40 pairs, and a run of it."""
    folder = tmp_path_factory.mktemp("menu")
    write_tar(folder / "pairs.tar", [member for i in range(40) for member in good(f"{i:04d}", i)])
    summary = menu.score(folder / "pairs.tar", run=folder / "runs/icons")
    assert summary.n_scored == 40
    return folder


@pytest.fixture
def here(folder, monkeypatch) -> Path:
    """It as the current folder, without what other examples have written."""
    for written in ("best", "runs/pairs"):
        shutil.rmtree(folder / written, ignore_errors=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "function"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_every_docstring_has_an_example_that_runs(here, name, function):
    source = inspect.getdoc(function)
    example = doctest.DocTestParser().get_doctest(source, {}, name, None, 0)
    assert len(example.examples) >= 2
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert runner.run(example).failed == 0


@pytest.mark.slow
def test_the_blocks_of_the_document_run(here, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 4
    names: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for block in blocks:
            exec(compile(block, "docs/python.md", "exec"), names)
    out = capsys.readouterr().out
    assert "40 of 40 samples have scores" in out and "no column 'beauty'" in out
    assert repr(names["run"]) == "Run('runs/pairs'): 40 of 40 samples scored, 1 shard"


@pytest.mark.slow
def test_a_run_answers_with_what_its_tables_hold(folder):
    run = mmfilter.Run(folder / "runs/icons")
    table = pq.read_table(folder / "runs/icons/scores/pairs.parquet")
    assert run.scores.equals(table) and len(run) == 40 and run.settings["layer"] == 1
    assert run.shards == [str(folder / "pairs.tar")]
    best = run.top("5")
    wanted = sorted(table.to_pylist(), key=lambda row: -row["similarity"])[:5]
    assert best["key"].to_pylist() == [row["key"] for row in wanted]
    assert run.top("100%", where="key >= '0030'").num_rows == 10
    stored = pq.read_table(folder / "runs/icons/codes/pairs.parquet").to_pylist()
    codes = run.codes("0007")
    row = next(row for row in stored if row["key"] == "0007")
    for side in ("image", "text"):
        code = getattr(codes, side)
        assert code.ids.tolist() == row[f"{side}_ids"]
        np.testing.assert_array_equal(code.maximum, np.array(row[f"{side}_max"], np.float16))
        np.testing.assert_array_equal(code.mean, np.array(row[f"{side}_mean"], np.float16))
    hits = run.find(feature=int(codes.image.ids[0]), on="image", n=3)
    assert len(hits) == 3 and hits[0].measures["image"] >= hits[-1].measures["image"]
    page = run._repr_html_()
    assert "40 of 40 scored" in page and page.startswith("<table>")


@pytest.mark.slow
def test_what_cannot_be_is_an_error_of_ours(folder, tmp_path):
    with pytest.raises(RunError, match="has no manifest"):
        mmfilter.Run(tmp_path)
    run = mmfilter.Run(folder / "runs/icons")
    with pytest.raises(SelectionError, match="there is no sample with key 'zzz'"):
        run.codes("zzz")
    with pytest.raises(SelectionError, match="nothing says what to keep"):
        run.top()
    with pytest.raises(SelectionError, match="say where to: output='best'"):
        mmfilter.select(folder / "runs/icons", top="5")
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        mmfilter.score("pairs.tar", colour="red")
    assert issubclass(SelectionError, mmfilter.MMFilterError)


def test_keywords_are_the_fields_of_the_settings():
    signature = inspect.signature(mmfilter.score)
    assert next(iter(signature.parameters)) == "shards"
    assert set(signature.parameters) - {"shards"} == {item.name for item in fields(ScoreSettings)}
    assert signature.parameters["batch_size"].default == 32
    assert {item.name for item in fields(ChoiceSettings)} < set(inspect.signature(mmfilter.stream).parameters)


def test_nothing_heavy_is_imported_before_it_is_needed():
    script = (
        "import sys, mmfilter; dir(mmfilter); print([m for m in ('torch', 'pyarrow', 'duckdb') if m in sys.modules]);"
        "mmfilter.score, mmfilter.select, mmfilter.check, mmfilter.dedup, mmfilter.search;"
        "print([m for m in ('torch', 'transformers', 'webdataset') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.split("\n")[:2] == ["[]", "[]"]


@pytest.mark.slow
def test_a_run_and_a_selection_need_no_torch(folder):
    script = (
        "import sys, mmfilter; run = mmfilter.Run(sys.argv[1]); run.scores, run.top('5'), run.codes('0003');"
        "mmfilter.select(sys.argv[1], top='5', dry_run=True); mmfilter.dedup(sys.argv[1]); run.find(key='0003');"
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(folder / "runs/icons")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"


def test_an_unknown_name_is_said_as_python_says_it():
    with pytest.raises(AttributeError, match="module 'mmfilter' has no attribute 'scores'"):
        _ = mmfilter.scores
    assert set(mmfilter.__all__) < set(dir(mmfilter))
