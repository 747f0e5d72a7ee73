"""Selecting: repetitions, dry runs, what is counted, and sources that are no longer what was scored."""

from __future__ import annotations

import dataclasses
import json
import os
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import webdataset

from mmfilter.core.input.shards import open_source
from mmfilter.core.selection.select_settings import SelectSettings
from mmfilter.errors import SelectionError
from mmfilter.ops.dedup import dedup
from mmfilter.ops.dedup_settings import DedupSettings
from mmfilter.ops.select import select
from tests.codes import clustered, write_run
from tests.conftest import Quiet
from tests.runs import kept_keys, listing, make_run, make_shard, refused, samples_of

# --- repetitions ---


@pytest.fixture
def repeated(tmp_path: Path) -> Path:
    """Five samples to be written 2.5, 0.4, 1, no and 2 times."""
    make_shard(tmp_path / "data/a.tar", [f"a/{'k' * 110}{i}" for i in range(5)])
    scores = [{"similarity": 0.5 + i / 10, "saev": times} for i, times in enumerate([2.5, 0.4, 1.0, None, 2.0])]
    return make_run(tmp_path / "run", {str(tmp_path / "data/a.tar"): scores})


EXPECTED = ["0", "2", "4", "0-2", "4-2", "0-3"]


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # webdataset leaves files open
@pytest.mark.parametrize("format", ["shards", "tar"])
def test_repetitions_are_read_as_samples_of_their_own(repeated, tmp_path, format):
    output = tmp_path / ("best" if format == "shards" else "best.tar")
    selection = select(repeated, SelectSettings(top="100%", repeat="saev", output=output, format=format))
    shard = output / "00000000.tar" if format == "shards" else output
    originals = {raw.key: raw.members for raw in open_source(str(tmp_path / "data/a.tar")).samples()}
    found = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    prefix = f"a/{'k' * 110}"
    assert [sample["__key__"] for sample in found] == [prefix + key for key in EXPECTED]
    for sample, key in zip(found, EXPECTED, strict=True):
        assert {name: sample[name] for name in ("jpg", "txt")} == originals[prefix + key.split("-")[0]]
    with tarfile.open(shard) as tar:
        assert {(member.mtime, member.uname, member.mode) for member in tar} == {(1_700_000_000, "bigdata", 0o444)}
    assert (selection.kept, selection.written) == (3, 6)
    assert selection.dropped == {"written 0 times by --repeat 'saev'": 2}
    assert selection.funnel[2:] == [
        ("kept by --top 100%", 5),
        ("at least once by --repeat 'saev'", 3),
        ("with their repetitions", 6),
    ]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_repetitions_of_every_kind_of_tar(tmp_path, format):
    make_shard(tmp_path / "data/a.tar", ["d" * 60 + "/grün.v" + "k" * 60, "b"], format=format)
    run = make_run(tmp_path / "run", {str(tmp_path / "data/a.tar"): [0.5, 0.6]})
    select(run, SelectSettings(top="100%", repeat="2", output=tmp_path / "best.tar", format="tar", shuffle=1))
    originals = {raw.key: raw.members for raw in open_source(str(tmp_path / "data/a.tar")).samples()}
    found = {raw.key: raw.members for raw in open_source(str(tmp_path / "best.tar")).samples()}
    assert found == originals | {f"{key}-2": members for key, members in originals.items()}


def test_repetitions_as_keys_and_in_the_record(repeated, tmp_path):
    ends = [key[-1] for key in kept_keys(repeated, top="100%", repeat="saev")]
    assert ends == ["0", "2", "4", "0", "4", "0"], (
        "a list of keys names samples of the source, as often as they are to be read"
    )
    shuffled = [key[-1] for key in kept_keys(repeated, top="100%", repeat="saev", shuffle=3)]
    select(repeated, SelectSettings(top="100%", repeat="saev", shuffle=3, output=tmp_path / "best", shard_size=2))
    written = [(shard, members[::2]) for shard, members in samples_of(tmp_path / "best")]
    assert [
        name.split(".")[0].rstrip("-23")[-1] if "-" in name else name.split(".")[0][-1]
        for _, some in written
        for name, _ in some
    ] == shuffled
    assert sorted(shuffled) == sorted(ends)
    rows = pq.read_table(tmp_path / "best/selection.parquet").to_pylist()
    assert [row["copies"] for row in rows] == [3, 0, 1, 0, 2]
    assert [(row["kept"], row["reason"]) for row in rows[:2]] == [
        (True, None),
        (False, "written 0 times by --repeat 'saev'"),
    ]
    home = {name.removesuffix(".jpg")[-1]: shard for shard, some in written for name, _ in some if "-" not in name}
    assert {str(i): row["output_shard"] for i, row in enumerate(rows) if row["kept"]} == home
    assert json.loads((tmp_path / "best/sizes.json").read_text()) == {f"0000000{i}.tar": 2 for i in range(3)}


def test_a_copy_whose_key_is_there_already_goes_into_the_next_shard(tmp_path):
    make_shard(tmp_path / "data/a.tar", ["k", "k-2"])
    run = make_run(tmp_path / "run", {str(tmp_path / "data/a.tar"): [0.5, 0.6]})
    selection = select(
        run, SelectSettings(top="100%", repeat="CASE WHEN key = 'k' THEN 2 ELSE 1 END", output=tmp_path / "best")
    )
    assert [[name for name, _ in members[::2]] for _, members in samples_of(tmp_path / "best")] == [
        ["k.jpg", "k-2.jpg"],
        ["k-2.jpg"],
    ]
    assert selection.warnings == (
        "input shards share keys: 1 output shards end early, so that keys are unique in each",
    )


def test_too_many_repetitions(repeated):
    assert (
        refused(repeated, top="100%", repeat="saev * 1000")
        == "--repeat 'saev * 1000' asks for 2500 copies of a sample; up to 1,000 are possible"
    )
    assert kept_keys(repeated, top="100%", repeat="-saev") == []


# --- dry runs, counts, sources ---


@pytest.mark.parametrize(
    "settings",
    [{"top": "2"}, {"top": "50%", "diverse": True}, {"top": "50%", "dedup": 0.9}, {"top": "2", "repeat": "2"}],
)
def test_a_dry_run_writes_nothing(tmp_path, settings):
    shard = tmp_path / "data/s0.tar"
    make_shard(shard, ["x0", "x1", "x2", "x3"])
    samples = [
        dataclasses.replace(sample, key=f"x{i}", shard=str(shard), row=i, score=i / 4)
        for i, sample in enumerate(clustered(4, seed=1))
    ]
    run = write_run(tmp_path / "run", samples)
    before = listing(tmp_path)
    dry = select(run, SelectSettings(**settings, format="keys", output=tmp_path / "keys", dry_run=True))
    assert listing(tmp_path) == before
    wet = select(run, SelectSettings(**settings, format="keys", output=tmp_path / "keys"))
    assert dry.funnel == wet.funnel and dry.dropped == wet.dropped and wet.nbytes_written and not dry.nbytes_written


def test_a_dry_run_uses_pairs_that_are_there(tmp_path):
    run = write_run(tmp_path / "run", clustered(200, seed=8))
    dedup(run, DedupSettings(0.9), Quiet())
    before = listing(tmp_path)
    selection = select(run, SelectSettings(top="100%", dedup=0.9, format="keys", dry_run=True))
    assert listing(tmp_path) == before and selection.not_near < selection.scored


def test_a_dry_run_says_what_would_go_wrong(repeated, tmp_path):
    settings = {"top": "1", "dry_run": True, "format": "shards"}
    assert (
        refused(repeated, **settings, output=tmp_path / "data")
        == f"output {str(tmp_path / 'data')!r} holds shards of the input; name a new folder"
    )
    os.utime(tmp_path / "data/a.tar", ns=(0, 1))
    assert "has changed since it was scored" in refused(repeated, **settings, output=tmp_path / "best")
    assert select(repeated, SelectSettings(**settings)).kept == 1, "to count needs no shard"


def test_a_count_larger_than_what_is_there(repeated, tmp_path):
    before = listing(tmp_path)
    there = "5 samples have a score 'similarity'"
    assert refused(repeated, top="6", output=tmp_path / "best", format="shards") == (
        f"--top 6 is more than there is: {there}; give a smaller number, or --top 100%"
    )
    where = "similarity > 0.55"
    assert refused(repeated, top="5", where=where) == (
        f"--top 5 is more than there is: 4 samples have a score 'similarity' and pass --where {where!r}; "
        f"give a smaller number, or --top 100%"
    )
    assert (
        refused(repeated, top="1", where="similarity > 2")
        == "no sample has a score 'similarity' and passes --where 'similarity > 2'"
    )
    assert listing(tmp_path) == before
    assert len(kept_keys(repeated, top="5")) == len(kept_keys(repeated, top="9", per="shard")) == 5
    assert len(kept_keys(repeated, top="5", min=0.75)) == 2, "with --min fewer is what was asked for"


def test_a_shard_whose_samples_lie_elsewhere(repeated, tmp_path):
    shard = tmp_path / "data/a.tar"
    before, content = shard.stat(), shard.read_bytes()
    make_shard(shard, [f"b/{'k' * 110}{i}" for i in range(5)])  # the same sizes and places, other keys
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert shard.stat().st_size == before.st_size
    key = f"a/{'k' * 110}0"
    message = (
        f"has sample {key.replace('a/', 'b/')!r} at byte 0, where {key!r} was scored: it has changed; score it again"
    )
    assert refused(repeated, top="100%", format="tar", output=tmp_path / "x.tar") == f"shard {str(shard)!r} {message}"
    shard.write_bytes(bytes(512) + content[:-512])
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    message = f"has no sample at byte 0, where {key!r} was scored: it has changed; score it again"
    assert refused(repeated, top="100%", format="tar", output=tmp_path / "x.tar") == f"shard {str(shard)!r} {message}"
    assert not (tmp_path / "x.tar").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"top": "1", "per": "shard", "diverse": True},
            "--per and --diverse are different ways to choose; give one of them",
        ),
        (
            {"top": "1", "diverse": True, "match": Path("x")},
            "--diverse and --match are different ways to choose; give one of them",
        ),
        ({"min": 0.5, "diverse": True}, "--diverse needs to know how many: add --top 20% or --top 5000"),
        ({"min": 0.5, "per": "shard"}, "--per needs to know how many: add --top 20% or --top 5000"),
    ],
)
def test_ways_that_do_not_go_together(settings, message):
    with pytest.raises(SelectionError) as caught:
        SelectSettings(**settings, format="keys")
    assert str(caught.value) == message
