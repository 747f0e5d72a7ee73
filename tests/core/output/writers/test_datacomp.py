"""DataComp's subset file, held against a plain re-telling of how its resharder reads one."""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from mmfilter.core.files import write_json
from mmfilter.core.output.writers.datacomp import subset
from mmfilter.core.output.writers.kept import Kept
from mmfilter.core.run.directory import RunDirectory
from mmfilter.core.run.score_tables import ScoreTables
from mmfilter.core.selection.select_settings import SelectSettings
from mmfilter.errors import SelectionError
from mmfilter.ops.select import select
from tests.conftest import good, write_tar
from tests.runs import add_table, make_run

U16 = np.dtype("u8,u8")


def uid(i: int) -> str:
    return hashlib.md5(str(i).encode()).hexdigest()


def run_of(folder: Path, uids: list[str | None]) -> Path:
    """A run over one shard that is not there: a subset file needs none. Row i scores i."""
    rows = [
        {
            "key": f"k{i}",
            "shard": "/gone.tar",
            "row": i,
            "offset": 0,
            "nbytes": 512,
            "ok": True,
            "uid": value,
            "similarity": float(i),
        }
        for i, value in enumerate(uids)
    ]
    add_table(folder / "run", "gone", "/gone.tar", rows)
    write_json(folder / "run/manifest.json", {"inputs": [{"name": "gone", "shard": "/gone.tar"}]})
    return folder / "run"


def copies(path: Path, uids: list[str]) -> list[int]:
    """How often the resharder writes the sample of each uid."""
    ids = np.load(path, mmap_mode="r")
    assert ids.dtype == U16
    keys = [np.array([divmod(int(text, 16), 2**64)], U16)[0] for text in uids]
    return [int(np.searchsorted(ids, key, "right") - np.searchsorted(ids, key, "left")) for key in keys]


def error_of(run: Path, **settings) -> str:
    with pytest.raises(SelectionError) as caught:
        select(run, SelectSettings(**({"top": "100%", "format": "datacomp"} | settings)))
    return str(caught.value)


def test_the_resharder_finds_what_is_kept_and_nothing_else(tmp_path):
    uids = [uid(i) for i in range(500)] + ["0" * 32, "f" * 32, "0" * 16 + "f" * 16, "f" * 16 + "0" * 16]
    random.Random(0).shuffle(uids)
    run = run_of(tmp_path, uids)
    selection = select(run, SelectSettings(min=300.0, format="datacomp", output=tmp_path / "best.npy"))
    assert copies(tmp_path / "best.npy", uids) == [int(i >= 300) for i in range(504)]
    ids = np.load(tmp_path / "best.npy")
    assert [f"{high:016x}{low:016x}" for high, low in ids.tolist()] == sorted(uids[300:])
    assert np.array_equal(ids, np.sort(ids))
    assert (selection.kept, selection.nbytes_written) == (204, (tmp_path / "best.npy").stat().st_size)


def test_upper_case_is_the_same_number(tmp_path):
    run = run_of(tmp_path, [uid(0).upper(), uid(1)])
    select(run, SelectSettings(top="100%", format="datacomp", output=tmp_path / "best.npy"))
    assert copies(tmp_path / "best.npy", [uid(0), uid(1)]) == [1, 1]


def test_a_folder_says_why(tmp_path):
    run = run_of(tmp_path, [uid(i) for i in range(5)])
    select(run, SelectSettings(top="2", format="datacomp", output=tmp_path / "best"))
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == [
        "manifest.json",
        "sample_ids.npy",
        "selection.parquet",
    ]
    assert copies(tmp_path / "best/sample_ids.npy", [uid(i) for i in range(5)]) == [0, 0, 0, 1, 1]
    assert pq.read_table(tmp_path / "best/selection.parquet").to_pydict()["kept"] == [False, False, False, True, True]


def test_stdout_gets_the_same_bytes(tmp_path):
    run = run_of(tmp_path, [uid(i) for i in range(50)])
    select(run, SelectSettings(top="50%", format="datacomp", output=tmp_path / "best.npy"))
    receive, send = os.pipe()
    with os.fdopen(receive, "rb") as reader, os.fdopen(send, "wb") as writer:
        select(run, SelectSettings(top="50%", format="datacomp"), stdout=writer)
        writer.close()
        assert reader.read() == (tmp_path / "best.npy").read_bytes()


def test_a_uid_of_several_samples_is_written_once(tmp_path):
    run = run_of(tmp_path, [uid(0), uid(1), uid(0), uid(0), uid(2)])
    selection = select(run, SelectSettings(top="100%", format="datacomp", output=tmp_path / "best.npy"))
    assert copies(tmp_path / "best.npy", [uid(0), uid(1), uid(2), uid(3)]) == [1, 1, 1, 0]
    assert selection.warnings == (
        "1 uids belong to several kept samples: each is written once, and resharder copies every sample of the pool that has it",
    )


def test_a_sample_that_comes_several_times_has_its_id_as_many_times(tmp_path):
    tables = ScoreTables(RunDirectory(run_of(tmp_path, [uid(i) for i in range(4)])))
    ids, n_shared = subset(Kept(tables, np.array([3, 0, 3, 1, 3]), 10, {}))
    assert [f"{high:016x}{low:016x}" for high, low in ids.tolist()] == sorted([uid(3)] * 3 + [uid(0), uid(1)])
    assert n_shared == 0


def test_nothing_kept_is_an_empty_array(tmp_path):
    select(run_of(tmp_path, [uid(0)]), SelectSettings(min=9.0, format="datacomp", output=tmp_path / "best.npy"))
    assert copies(tmp_path / "best.npy", [uid(0)]) == [0]


def test_samples_without_a_uid(tmp_path):
    run = run_of(tmp_path, [uid(0), None, "abc", None])
    assert error_of(run, output=tmp_path / "best") == (
        "2 of 4 kept samples have no value in column 'uid' of the score table (first: key 'k1'), by which a DataComp subset names samples; "
        "add --where 'uid IS NOT NULL', or use --format keys"
    )
    assert error_of(run, where="uid IS NOT NULL", output=tmp_path / "best.npy") == (
        "1 of 2 kept samples have a uid that is not 32 hexadecimal digits (first: 'abc' of key 'k2'), as a DataComp subset needs; use --format keys"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_score_table_without_the_column(tmp_path):
    tables = ScoreTables(RunDirectory(run_of(tmp_path, [uid(0)])))
    del tables.types["uid"]
    with pytest.raises(
        SelectionError,
        match=r"^the score table has no column 'uid', by which a DataComp subset names samples; use --format keys$",
    ):
        subset(Kept(tables, np.array([0]), 10, {}))


def test_it_is_sorted_and_cannot_be_shuffled(tmp_path):
    run = run_of(tmp_path, [uid(0)])
    assert (
        error_of(run, shuffle=1) == "--format datacomp is sorted by uid, so --shuffle has nothing to do: leave it out"
    )


def test_repeat_is_what_the_resharder_understands(tmp_path):
    uids = [uid(i) for i in range(5)]
    select(
        run_of(tmp_path, uids),
        SelectSettings(top="100%", repeat="row", format="datacomp", output=tmp_path / "best.npy"),
    )
    assert copies(tmp_path / "best.npy", uids) == [0, 1, 2, 3, 4]


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # webdataset leaves files open
def test_the_resharder_makes_the_shards_that_are_asked_for(tmp_path):
    """Its loop re-told: of each sample of the pool the uid of the JSON, and as many copies as the array has of it, as UID-0, UID-1, …"""
    shards, pool = {}, {}
    for n in range(3):
        members = [member for i in range(10 * n, 10 * n + 10) for member in good(f"{n:08d}{i:04d}", i, uid=uid(i))]
        pool |= {uid(i): [content for _, content in members[3 * i - 30 * n :][:3]] for i in range(10 * n, 10 * n + 10)}
        shard = write_tar(tmp_path / f"{n:08d}.tar", members)
        shards[str(shard)] = [{"similarity": i / 30, "uid": uid(i)} for i in range(10 * n, 10 * n + 10)]
    run = make_run(tmp_path / "run", shards)
    select(run, SelectSettings(top="50%", repeat="row % 3", format="datacomp", output=tmp_path / "best.npy"))
    wanted = {uid(i): i % 10 % 3 for i in range(15, 30) if i % 10 % 3}
    subset = np.load(tmp_path / "best.npy")
    made = {}
    for sample in webdataset.WebDataset(list(shards), shardshuffle=False):
        name = json.loads(sample["json"])["uid"]
        key = np.array([divmod(int(name, 16), 2**64)], U16)[0]
        for j in range(np.searchsorted(subset, key, "right") - np.searchsorted(subset, key, "left")):
            made[f"{name}-{j}"] = [sample[ext] for ext in ("jpg", "json", "txt")]
    assert made == {f"{name}-{j}": pool[name] for name, n in wanted.items() for j in range(n)}
