"""The same pairs as tar, folder, parquet and LLaVA JSON: the same scores, and the same samples selected."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from mmfilter.core.selection.select_settings import SelectSettings
from mmfilter.errors import RunError, SelectionError, ShardError
from mmfilter.ops import check as check_operation
from mmfilter.ops.score import score
from mmfilter.ops.score_settings import ScoreSettings
from mmfilter.ops.select import select
from tests import inputs

N = 44
PER_PLACE = {"shard", "offset", "nbytes"}


def rows_of(run: Path) -> list[dict]:
    [table] = (run / "scores").glob("*.parquet")
    return pq.read_table(table).to_pylist()


def samples_of(folder: Path) -> dict[str, dict[str, bytes]]:
    """Key -> members, read by webdataset."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with open(path, "rb") as file:
            for sample in group_by_keys(tar_file_expander([{"url": str(path), "stream": file}])):
                found[sample["__key__"]] = {
                    name: content for name, content in sample.items() if not name.startswith("__")
                }
    return found


@pytest.fixture(scope="module")
def scored(tiny, tmp_path_factory) -> Path:
    """A folder with the same pairs in every kind of input, and a run over each."""
    from tests.conftest import Quiet

    base = tmp_path_factory.mktemp("inputs")
    pairs = inputs.pairs(N)
    kinds = {
        "tar": inputs.as_tar(base / "data/00000.tar", pairs),
        "folder": inputs.as_folder(base / "folder", pairs),
        "parquet": inputs.as_parquet(base / "rows/train.parquet", pairs),
        "json": inputs.as_llava(base / "llava/data.json", pairs),
        "jsonl": inputs.as_llava(base / "lines/data.jsonl", pairs),
        "pipe": f"pipe:cat {base}/data/00000.tar",
    }
    for kind, shard in kinds.items():
        images = str(shard.parent / "images") if kind in ("json", "jsonl") else None
        settings = ScoreSettings(
            model=tiny[0], run=base / "runs" / kind, batch_size=8, workers=2, images=images, allow_pipe=kind == "pipe"
        )
        summary = score([str(shard)], settings, Quiet())
        assert (summary.n_samples, summary.n_scored, summary.n_shards) == (N, N, 1), kind
    return base


@pytest.mark.parametrize("kind", ["folder", "parquet", "json", "jsonl", "pipe"])
def test_scores_are_those_of_the_tar(scored, kind):
    wanted, found = rows_of(scored / "runs/tar"), rows_of(scored / "runs" / kind)
    for row, same in zip(wanted, found, strict=True):
        assert {k: v for k, v in row.items() if k not in PER_PLACE} == {
            k: v for k, v in same.items() if k not in PER_PLACE
        }
    if kind != "pipe":
        assert {(row["offset"], row["nbytes"]) for row in found} == {(None, None)}


@pytest.mark.parametrize("kind", ["folder", "parquet", "json", "jsonl"])
@pytest.mark.parametrize("shuffle", [None, 5])
def test_selected_samples_have_the_bytes_of_the_input(scored, tmp_path, kind, shuffle):
    settings = {"top": "10", "shuffle": shuffle, "shard_size": 4}
    select(scored / "runs/tar", SelectSettings(output=tmp_path / "tar", **settings))
    selection = select(scored / "runs" / kind, SelectSettings(output=tmp_path / kind, **settings))
    wanted, found = samples_of(tmp_path / "tar"), samples_of(tmp_path / kind)
    assert list(found) == list(wanted) and len(found) == 10
    assert selection.nbytes_written == sum(path.stat().st_size for path in (tmp_path / kind).glob("*.tar"))
    for key, members in wanted.items():
        assert found[key]["jpg"] == members["jpg"]
        if "txt" in found[key]:
            assert found[key]["txt"] == members["txt"]
    assert {frozenset(members) for members in found.values()} == {
        frozenset({"folder": {"jpg", "txt"}, "parquet": {"jpg", "json", "txt"}}.get(kind, {"jpg", "json"}))
    }


@pytest.mark.parametrize("kind", ["folder", "parquet", "json"])
def test_a_selection_of_everything_scores_the_same_again(scored, tiny, tmp_path, quiet, kind):
    select(scored / "runs" / kind, SelectSettings(top="100%", output=tmp_path / "all"))
    score(
        [str(tmp_path / "all/00000000.tar")],
        ScoreSettings(model=tiny[0], run=tmp_path / "again", batch_size=8, workers=2),
        quiet,
    )
    keep = {"key", "similarity", "support", "image_hash", "text_hash"}
    again, before = rows_of(tmp_path / "again"), rows_of(scored / "runs" / kind)
    assert [{name: row[name] for name in keep} for row in again] == [
        {name: row[name] for name in keep} for row in before
    ]


def test_the_same_selection_is_the_same_bytes(scored, tmp_path):
    for name in "ab":
        select(scored / "runs/parquet", SelectSettings(top="5", format="tar", output=tmp_path / name))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with tarfile.open(tmp_path / "a") as tar:
        assert len(tar.getmembers()) == 15


def test_a_finished_run_is_skipped_and_a_changed_file_is_not(tiny, tmp_path, quiet):
    folder = inputs.as_folder(tmp_path / "folder", inputs.pairs(4))
    settings = ScoreSettings(model=tiny[0], run=tmp_path / "run", workers=1)
    assert score([str(folder)], settings, quiet).n_new == 4
    assert score([str(folder)], settings, quiet).n_new == 0
    (folder / "000000001.txt").write_text("a red apple")
    with pytest.raises(SelectionError) as caught:
        select(tmp_path / "run", SelectSettings(top="2", output=tmp_path / "best"))
    assert (
        str(caught.value)
        == f"shard '{folder}/' has changed since it was scored, its byte ranges may be wrong; score it again"
    )
    assert score([str(folder)], settings, quiet).n_new == 4
    select(tmp_path / "run", SelectSettings(top="2", output=tmp_path / "best"))


def test_nothing_is_written_into_a_folder_that_is_input(scored, tiny, tmp_path, quiet):
    folder = inputs.as_folder(tmp_path / "folder", inputs.pairs(2))
    for run in (folder, folder / "run", folder / "deep/run"):
        with pytest.raises(RunError, match="and nothing is written there: use another --run"):
            score([str(folder)], ScoreSettings(model=tiny[0], run=run, workers=1), quiet)
    with pytest.raises(SelectionError, match="holds shards of the input; name a new folder"):
        select(scored / "runs/folder", SelectSettings(top="2", output=scored / "folder/best"))
    assert sorted(path.name for path in folder.iterdir()) == [
        "000000000.jpg",
        "000000000.txt",
        "000000001.jpg",
        "000000001.txt",
    ]


def test_a_run_of_a_command_gives_keys_only(scored, tmp_path):
    run = scored / "runs/pipe"
    assert (run / "scores/pipe-00000.parquet").exists()
    with pytest.raises(SelectionError) as caught:
        select(run, SelectSettings(top="2", output=tmp_path / "best"))
    command = f"pipe:cat {scored}/data/00000.tar"
    assert (
        str(caught.value)
        == f"run {str(run)!r} was scored from the command {command!r}, so there is no shard to copy from; use --format keys or datacomp"
    )
    assert select(run, SelectSettings(top="2", format="keys", output=tmp_path / "keys")).kept == 2


def test_a_command_is_run_once_also_when_weights_are_fitted(scored, tiny, tmp_path, quiet):
    from dataclasses import replace

    log = tmp_path / "log"
    shards = [f"pipe:echo {i} >> {log}; cat {scored}/data/00000.tar" for i in range(2)]
    settings = ScoreSettings(
        model=replace(tiny[0], weights=None), run=tmp_path / "run", batch_size=8, workers=2, allow_pipe=True
    )
    summary = score(shards, settings, quiet)
    assert (summary.n_samples, summary.n_scored, log.read_text()) == (2 * N, 2 * N, "0\n1\n")
    assert score(shards, settings, quiet).n_skipped == 2 and log.read_text() == "0\n1\n"


def test_a_command_that_fails_is_a_shard_that_failed(scored, tiny, tmp_path, quiet):
    good, bad = f"pipe:cat {scored}/data/00000.tar", "pipe:echo no luck >&2; exit 3"
    summary = score(
        [bad, good], ScoreSettings(model=tiny[0], run=tmp_path / "run", workers=1, batch_size=8, allow_pipe=True), quiet
    )
    assert [str(error) for error in summary.failures] == [
        f"shard {bad!r} failed with exit status 3 (no luck); run the command by itself to see why"
    ]
    assert summary.n_scored == N


def test_images_has_no_meaning_without_json(scored, tiny, tmp_path, quiet):
    with pytest.raises(ShardError) as caught:
        score([f"{scored}/data/00000.tar"], ScoreSettings(model=tiny[0], run=tmp_path / "run", images="x"), quiet)
    assert (
        str(caught.value)
        == f"shard '{scored}/data/00000.tar' is not LLaVA JSON, and --images is the folder of its images; leave it out"
    )


def test_check_takes_them_too(scored, tiny, quiet):
    settings = check_operation.CheckSettings(
        model=tiny[0], sample=N, bootstrap=100, workers=1, images=str(scored / "llava/images")
    )
    report = check_operation.check([str(scored / "llava/data.json")], settings, quiet)
    settings = check_operation.CheckSettings(model=tiny[0], sample=N, bootstrap=100, workers=1)
    assert repr(report.scores) == repr(check_operation.check([str(scored / "data/00000.tar")], settings, quiet).scores)
    with pytest.raises(ShardError, match="would run a shell"):
        check_operation.check([f"pipe:cat {scored}/data/00000.tar"], settings, quiet)
