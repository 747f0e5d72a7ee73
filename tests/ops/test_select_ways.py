"""Selecting other than the best: coverage, matching, groups, formulas, repetitions, dry runs; each against a plain loop."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import tarfile
from collections import Counter
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from mmfilter.cli.app import main
from mmfilter.core.codes import matching
from mmfilter.core.data.artifacts import RunDirectory, read_json, write_json
from mmfilter.core.data.score_tables import ScoreTables
from mmfilter.core.data.shards import read_samples
from mmfilter.errors import RunError, SelectionError
from mmfilter.ops.dedup import DedupSettings, DuplicateSettings, dedup
from mmfilter.ops.select import SelectSettings, select
from tests.codes import FEATURES, REFERENCE, SAMPLES, Sample, clustered, write_run
from tests.conftest import Quiet
from tests.runs import collect, make_run, make_shard, samples_of


def with_own_keys(samples: list[Sample]) -> list[Sample]:
    return [dataclasses.replace(sample, key=f"{i:05d}") for i, sample in enumerate(samples)]


def keys_of(run: Path, **settings) -> list[str]:
    return collect(run, SelectSettings(format="keys", **settings))[0].decode().split()


def error_of(run: Path, **settings) -> str:
    with pytest.raises((SelectionError, RunError)) as caught:
        select(run, SelectSettings(**{"format": "keys", **settings}))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


# --- coverage and matching ---


def profile(sample: Sample) -> np.ndarray:
    """(features,) the definition, straight."""
    idf = np.log((1 + REFERENCE) / (1 + SAMPLES))
    total = np.zeros(FEATURES)
    for features in (sample.image, sample.text):
        squares = np.zeros(FEATURES)
        for j, mean in features.items():
            squares[j] = (float(np.float16(mean)) * idf[j]) ** 2
        if squares.sum():
            total += squares / squares.sum() / 2
    return total


def greedy_keys(samples: list[Sample], n: int, target: np.ndarray) -> set[str]:
    """The keys that a plain loop over the definition chooses."""
    some = sorted((sample for sample in samples if sample.score is not None), key=lambda s: (-s.score, s.key))
    ranks = [sum(other.score <= sample.score for other in some) / len(some) for sample in some]
    brought = np.stack([rank * profile(sample) for rank, sample in zip(ranks, some, strict=True)])
    mass, left = np.zeros(FEATURES), np.ones(len(some), bool)
    scale = 0.1 * n * np.where(target > 0, target, 1)
    for _ in range(n):
        gains = (target * (np.log(1 + (mass + brought) / scale) - np.log(1 + mass / scale))).sum(1)
        i = int(np.argmax(np.where(left, gains, -1)))
        left[i] = False
        mass += brought[i]
    return {sample.key for sample, free in zip(some, left.tolist(), strict=True) if not free}


def test_diverse_is_a_plain_loop_over_the_definition(tmp_path):
    samples = with_own_keys(clustered(150, seed=1, ties=False))
    run = write_run(tmp_path / "run", samples)
    assert set(keys_of(run, top="30", diverse=True)) == greedy_keys(samples, 30, np.full(FEATURES, 1 / FEATURES))


def test_match_is_a_plain_loop_over_the_definition(tmp_path):
    samples, good = with_own_keys(clustered(150, seed=2, ties=False)), with_own_keys(clustered(20, seed=3, share=0.9))
    run, target = write_run(tmp_path / "run", samples), write_run(tmp_path / "good", good)
    mean = np.mean([profile(sample) for sample in good if sample.score is not None], axis=0)
    found = keys_of(run, top="25", match=target)
    assert set(found) == greedy_keys(samples, 25, mean / mean.sum())
    at = {sample.key: profile(sample) for sample in samples}

    def distance(keys: list[str]) -> float:
        return 0.5 * float(np.abs(np.mean([at[key] for key in keys], axis=0) - mean).sum())

    assert distance(found) < distance(keys_of(run, top="25")) - 0.02


@pytest.mark.parametrize("at_once", [matching.AT_ONCE, 60])
@pytest.mark.parametrize("top", ["12", "40%"])
def test_the_order_of_shards_and_row_groups_plays_no_part(tmp_path, monkeypatch, at_once, top):
    monkeypatch.setattr(matching, "AT_ONCE", at_once)
    monkeypatch.setattr(matching, "PIECE", 17)
    samples = clustered(300, seed=4, shards=4)
    one = write_run(tmp_path / "one", samples, group=50)
    other = write_run(tmp_path / "other", samples, shards=["/data/s2.tar", "/data/s0.tar", "/data/s3.tar", "/data/s1.tar"], group=333)
    kept = [sorted(keys_of(run, top=top, diverse=True, by="similarity")) for run in (one, other)]
    assert kept[0] == kept[1]
    assert len(kept[0]) == (12 if top == "12" else 120)


def test_samples_in_other_rows_and_shards_are_chosen_alike(tmp_path):
    samples = with_own_keys(clustered(200, seed=5))
    order = np.random.default_rng(0).permutation(len(samples))
    moved = [dataclasses.replace(samples[i], shard=f"/data/s{n % 4}.tar", row=n // 4) for n, i in enumerate(order.tolist())]
    runs = [write_run(tmp_path / name, some) for name, some in (("one", samples), ("other", moved))]
    assert sorted(keys_of(runs[0], top="50", diverse=True)) == sorted(keys_of(runs[1], top="50", diverse=True))


def test_the_candidates_of_a_coverage_are_those_of_any_selection(tmp_path):
    run = write_run(tmp_path / "run", with_own_keys(clustered(200, seed=6)))
    selection = select(run, SelectSettings(top="20%", min=0.3, where="width >= 10", diverse=True, dry_run=True))
    steps = dict(selection.funnel)
    assert steps["kept by --top 20% --diverse"] == selection.kept == int(selection.candidates * 0.2 + 0.5)
    assert selection.dropped["not chosen by --diverse"] == selection.at_least_min - selection.kept
    few = select(run, SelectSettings(top="100%", diverse=True, dry_run=True))
    assert few.kept == few.scored, "with no more than is asked for nothing is chosen among"


def test_a_target_that_was_scored_otherwise(tmp_path):
    run, target = (write_run(tmp_path / name, with_own_keys(clustered(30, seed=7))) for name in ("run", "good"))
    write_json(target / "manifest.json", read_json(target / "manifest.json") | {"settings": {"layer": 3}})
    assert error_of(run, top="5", match=target) == (
        f"--match {str(target)!r} was scored otherwise (layer is 3 there and None here): score it with the settings of {str(run)!r}"
    )
    empty = write_run(tmp_path / "empty", [Sample("a", "/data/s0.tar", 0, {}, {}, 0.5)])
    assert error_of(run, top="5", match=empty) == f"--match {str(empty)!r} has no sample with features: there is nothing to match"
    assert error_of(run, top="5", match=tmp_path / "none").startswith(f"{str(tmp_path / 'none')!r} is no run: it has no manifest.json")


# --- groups ---


@pytest.mark.parametrize("seed", range(6))
def test_each_group_keeps_its_share(tmp_path, seed):
    randomness = random.Random(seed)
    samples = with_own_keys(clustered(randomness.choice([7, 60, 300]), seed=seed, shards=4))
    run = write_run(tmp_path / "run", samples)
    per, group = randomness.choice([("shard", lambda s: s.shard), ("width > 12", lambda s: len(s.text) > 12), ("key[5:5]", lambda s: s.key[4])])
    minimum, top = randomness.choice([None, 0.4]), randomness.choice(["10%", "33.3%", "50%", "100%", "3"])
    selection = select(run, SelectSettings(top=top, min=minimum, per=per, where="width <> 3", dry_run=True))
    candidates = [sample for sample in samples if len(sample.text) != 3]
    sizes = Counter(map(group, candidates))
    expected = []
    for name, size in sizes.items():
        left = [s for s in candidates if group(s) == name and s.score is not None and (minimum is None or s.score >= np.float32(minimum))]
        quota = int((Decimal(size) * Decimal(top[:-1]) / 100).quantize(Decimal(1), ROUND_HALF_UP)) if top[-1] == "%" else int(top)
        expected += [s.key for s in sorted(left, key=lambda s: (-s.score, s.key))[:quota]]
    assert sorted(keys_of(run, top=top, min=minimum, per=per, where="width <> 3")) == sorted(expected)
    assert selection.kept == len(expected) and selection.n_parts == len(sizes)
    assert selection.funnel[-1][0].startswith(f"kept by --top {top} in each of {len(sizes)} groups of --per {per!r}")
    assert selection.kept + sum(selection.dropped.values()) == selection.rows


def test_null_is_a_group_too(tmp_path):
    make_shard(tmp_path / "a.tar", [f"k{i}" for i in range(6)])
    rows = [{"similarity": i / 10, "caption_chars": None if i < 3 else 1} for i in range(6)]
    run = make_run(tmp_path / "run", {str(tmp_path / "a.tar"): rows})
    assert keys_of(run, top="1", per="caption_chars") == ["k2", "k5"]


# --- formulas ---


def test_a_formula_ranks_as_numpy_says(tmp_path):
    rng = np.random.default_rng(0)
    make_shard(tmp_path / "a.tar", [f"k{i:03d}" for i in range(200)])
    saev = [None if i % 7 == 0 else float("nan") if i % 11 == 0 else float(np.float32(x)) for i, x in enumerate(rng.integers(0, 20, 200) / 4)]
    rows = [{"similarity": float(np.float32(rng.random())), "saev": value, "width": i} for i, value in enumerate(saev)]
    run = make_run(tmp_path / "run", {str(tmp_path / "a.tar"): rows})
    column = ScoreTables(RunDirectory(run)).column("0.7 * similarity + 0.3 * rank(saev)", "width >= 20")
    assert column.passes.tolist() == [i >= 20 for i in range(200)]
    among = [value for value in saev[20:] if value is not None and value == value]
    for i, row in enumerate(rows):
        there = i >= 20 and saev[i] is not None and saev[i] == saev[i]
        assert column.present[i] == there
        if there:
            percentile = sum(other < saev[i] for other in among) / (len(among) - 1)
            assert column.values[i] == pytest.approx(0.7 * row["similarity"] + 0.3 * percentile, rel=1e-6)
    assert sorted(column.values[column.present])[0] >= 0
    best = [i for i in np.argsort(-np.where(column.present, column.values, -1), kind="stable")[:10]]
    assert keys_of(run, top="10", where="width >= 20", by="0.7 * similarity + 0.3 * rank(saev)") == [f"k{i:03d}" for i in sorted(best)]


def test_a_formula_ties_by_key_and_keeps_the_meaning_of_min(tmp_path):
    make_shard(tmp_path / "b.tar", ["k3", "k1", "k2"])
    run = make_run(tmp_path / "run", {str(tmp_path / "b.tar"): [0.7, 0.7, 0.1]})
    assert keys_of(run, top="1", by="similarity * 1") == ["k1"]
    assert keys_of(run, min=0.7, by="similarity * 1") == ["k3", "k1"]
    assert keys_of(run, min=1, by="similarity > 0.5") == ["k3", "k1"]
    select(run, SelectSettings(top="1", by="2 * similarity", output=tmp_path / "best"))
    assert pq.read_table(tmp_path / "best/selection.parquet").column("score").to_pylist() == pytest.approx([1.4, 1.4, 0.2])


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ("similarity +", 'is not possible: syntax error at or near ")"'),
        ("beauty + 1", "names a column 'beauty' that the score table does not have; it has key, shard, row, offset, nbytes, ok, reason"),
        ("avg(similarity) + 1", "is not possible: Binder Error: a formula over one row cannot contain aggregates!"),
        ("rank(similarity) + rank() OVER ()", "is not possible: Binder Error:"),
        ("rank(rank(similarity))", "is not possible: Binder Error: window function calls cannot be nested"),
        ("random() + 1", "uses random(), which is another number each time; the column 'random' is a seeded one"),
        ("key || 'x'", "is no number but varchar; write a formula that gives one, such as '0.7 * similarity + 0.3 * rank(saev)'"),
        ("(SELECT 1)", "has a sub-query; only a formula over the columns of one row is possible"),
        ("(FROM read_text('/etc/hostname'))", "has a sub-query; only a formula over the columns of one row is possible"),
        ("1) + (SELECT (1", "is not possible: syntax error at or near"),
        ("1) LIMIT (1", "is more than a formula; write one over the columns, such as '0.7 * similarity + 0.3 * rank(saev)'"),
        ("CAST(key AS INTEGER) + 1", "fails: Conversion Error: Could not convert string"),
    ],
)
def test_a_formula_that_is_none(tmp_path, by, message):
    run = write_run(tmp_path / "run", [Sample("x", "/data/s0.tar", 0, {}, {}, 0.5)])
    for option in ("by", "repeat"):
        assert error_of(run, top="1", **{option: by}).startswith(f"--{option} {by!r} {message}")


def test_a_group_that_is_none(tmp_path):
    run = write_run(tmp_path / "run", [Sample("x", "/data/s0.tar", 0, {}, {}, 0.5)])
    assert error_of(run, top="1", per="source").startswith("--per 'source' names a column 'source' that the score table does not have; it has key,")
    assert error_of(run, top="1", per="CAST(key AS INTEGER)").startswith("--per 'CAST(key AS INTEGER)' fails: Conversion Error:")


# --- repetitions ---


@pytest.fixture
def repeated(tmp_path: Path) -> Path:
    """Five samples to be written 2.5, 0.4, 1, no and 2 times."""
    make_shard(tmp_path / "data/a.tar", [f"a/{'k' * 110}{i}" for i in range(5)])
    scores = [{"similarity": 0.5 + i / 10, "saev": times} for i, times in enumerate([2.5, 0.4, 1.0, None, 2.0])]
    return make_run(tmp_path / "run", {str(tmp_path / "data/a.tar"): scores})


EXPECTED = ["0", "2", "4", "0-2", "4-2", "0-3"]


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves files open
@pytest.mark.parametrize("format", ["shards", "tar"])
def test_repetitions_are_read_as_samples_of_their_own(repeated, tmp_path, format):
    output = tmp_path / ("best" if format == "shards" else "best.tar")
    selection = select(repeated, SelectSettings(top="100%", repeat="saev", output=output, format=format))
    shard = output / "00000000.tar" if format == "shards" else output
    originals = {raw.key: raw.members for raw in read_samples(str(tmp_path / "data/a.tar"))}
    found = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    prefix = f"a/{'k' * 110}"
    assert [sample["__key__"] for sample in found] == [prefix + key for key in EXPECTED]
    for sample, key in zip(found, EXPECTED, strict=True):
        assert {name: sample[name] for name in ("jpg", "txt")} == originals[prefix + key.split("-")[0]]
    with tarfile.open(shard) as tar:
        assert {(member.mtime, member.uname, member.mode) for member in tar} == {(1_700_000_000, "bigdata", 0o444)}
    assert (selection.kept, selection.written) == (3, 6)
    assert selection.dropped == {"written 0 times by --repeat 'saev'": 2}
    assert selection.funnel[2:] == [("kept by --top 100%", 5), ("at least once by --repeat 'saev'", 3), ("with their repetitions", 6)]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_repetitions_of_every_kind_of_tar(tmp_path, format):
    make_shard(tmp_path / "data/a.tar", ["d" * 60 + "/grün.v" + "k" * 60, "b"], format=format)
    run = make_run(tmp_path / "run", {str(tmp_path / "data/a.tar"): [0.5, 0.6]})
    select(run, SelectSettings(top="100%", repeat="2", output=tmp_path / "best.tar", format="tar", shuffle=1))
    originals = {raw.key: raw.members for raw in read_samples(str(tmp_path / "data/a.tar"))}
    found = {raw.key: raw.members for raw in read_samples(str(tmp_path / "best.tar"))}
    assert found == originals | {f"{key}-2": members for key, members in originals.items()}


def test_repetitions_as_keys_and_in_the_record(repeated, tmp_path):
    ends = [key[-1] for key in keys_of(repeated, top="100%", repeat="saev")]
    assert ends == ["0", "2", "4", "0", "4", "0"], "a list of keys names samples of the source, as often as they are to be read"
    shuffled = [key[-1] for key in keys_of(repeated, top="100%", repeat="saev", shuffle=3)]
    select(repeated, SelectSettings(top="100%", repeat="saev", shuffle=3, output=tmp_path / "best", shard_size=2))
    written = [(shard, members[::2]) for shard, members in samples_of(tmp_path / "best")]
    assert [name.split(".")[0].rstrip("-23")[-1] if "-" in name else name.split(".")[0][-1] for _, some in written for name, _ in some] == shuffled
    assert sorted(shuffled) == sorted(ends)
    rows = pq.read_table(tmp_path / "best/selection.parquet").to_pylist()
    assert [row["copies"] for row in rows] == [3, 0, 1, 0, 2]
    assert [(row["kept"], row["reason"]) for row in rows[:2]] == [(True, None), (False, "written 0 times by --repeat 'saev'")]
    home = {name.removesuffix(".jpg")[-1]: shard for shard, some in written for name, _ in some if "-" not in name}
    assert {str(i): row["output_shard"] for i, row in enumerate(rows) if row["kept"]} == home
    assert json.loads((tmp_path / "best/sizes.json").read_text()) == {f"0000000{i}.tar": 2 for i in range(3)}


def test_a_copy_whose_key_is_there_already_goes_into_the_next_shard(tmp_path):
    make_shard(tmp_path / "data/a.tar", ["k", "k-2"])
    run = make_run(tmp_path / "run", {str(tmp_path / "data/a.tar"): [0.5, 0.6]})
    selection = select(run, SelectSettings(top="100%", repeat="CASE WHEN key = 'k' THEN 2 ELSE 1 END", output=tmp_path / "best"))
    assert [[name for name, _ in members[::2]] for _, members in samples_of(tmp_path / "best")] == [["k.jpg", "k-2.jpg"], ["k-2.jpg"]]
    assert selection.warnings == ("input shards share keys: 1 output shards end early, so that keys are unique in each",)


def test_too_many_repetitions(repeated):
    assert error_of(repeated, top="100%", repeat="saev * 1000") == "--repeat 'saev * 1000' asks for 2500 copies of a sample; up to 1,000 are possible"
    assert keys_of(repeated, top="100%", repeat="-saev") == []


# --- dry runs, counts, sources ---


@pytest.mark.parametrize("settings", [{"top": "2"}, {"top": "50%", "diverse": True}, {"top": "50%", "dedup": 0.9}, {"top": "2", "repeat": "2"}])
def test_a_dry_run_writes_nothing(tmp_path, settings):
    shard = tmp_path / "data/s0.tar"
    make_shard(shard, ["x0", "x1", "x2", "x3"])
    samples = [dataclasses.replace(sample, key=f"x{i}", shard=str(shard), row=i, score=i / 4) for i, sample in enumerate(clustered(4, seed=1))]
    run = write_run(tmp_path / "run", samples)
    before = listing(tmp_path)
    dry = select(run, SelectSettings(**settings, format="keys", output=tmp_path / "keys", dry_run=True))
    assert listing(tmp_path) == before
    wet = select(run, SelectSettings(**settings, format="keys", output=tmp_path / "keys"))
    assert dry.funnel == wet.funnel and dry.dropped == wet.dropped and wet.nbytes_written and not dry.nbytes_written


def test_a_dry_run_uses_pairs_that_are_there(tmp_path):
    run = write_run(tmp_path / "run", clustered(200, seed=8))
    dedup(run, DedupSettings(DuplicateSettings(0.9)), Quiet())
    before = listing(tmp_path)
    selection = select(run, SelectSettings(top="100%", dedup=0.9, format="keys", dry_run=True))
    assert listing(tmp_path) == before and selection.not_near < selection.scored


def test_a_dry_run_says_what_would_go_wrong(repeated, tmp_path):
    settings = {"top": "1", "dry_run": True, "format": "shards"}
    assert error_of(repeated, **settings, output=tmp_path / "data") == f"output {str(tmp_path / 'data')!r} holds shards of the input; name a new folder"
    os.utime(tmp_path / "data/a.tar", ns=(0, 1))
    assert "has changed since it was scored" in error_of(repeated, **settings, output=tmp_path / "best")
    assert select(repeated, SelectSettings(**settings)).kept == 1, "to count needs no shard"


def test_a_count_larger_than_what_is_there(repeated, tmp_path):
    before = listing(tmp_path)
    there = "5 samples have a score 'similarity'"
    assert error_of(repeated, top="6", output=tmp_path / "best", format="shards") == (
        f"--top 6 is more than there is: {there}; give a smaller number, or --top 100%"
    )
    where = "similarity > 0.55"
    assert error_of(repeated, top="5", where=where) == (
        f"--top 5 is more than there is: 4 samples have a score 'similarity' and pass --where {where!r}; give a smaller number, or --top 100%"
    )
    assert listing(tmp_path) == before
    assert len(keys_of(repeated, top="5")) == len(keys_of(repeated, top="9", per="shard")) == 5
    assert len(keys_of(repeated, top="5", min=0.75)) == 2, "with --min fewer is what was asked for"


def test_a_shard_whose_samples_lie_elsewhere(repeated, tmp_path):
    shard = tmp_path / "data/a.tar"
    before, content = shard.stat(), shard.read_bytes()
    make_shard(shard, [f"b/{'k' * 110}{i}" for i in range(5)])  # the same sizes and places, other keys
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert shard.stat().st_size == before.st_size
    key = f"a/{'k' * 110}0"
    message = f"has sample {key.replace('a/', 'b/')!r} at byte 0, where {key!r} was scored: it has changed; score it again"
    assert error_of(repeated, top="100%", format="tar", output=tmp_path / "x.tar") == f"shard {str(shard)!r} {message}"
    shard.write_bytes(bytes(512) + content[:-512])
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    message = f"has no sample at byte 0, where {key!r} was scored: it has changed; score it again"
    assert error_of(repeated, top="100%", format="tar", output=tmp_path / "x.tar") == f"shard {str(shard)!r} {message}"
    assert not (tmp_path / "x.tar").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top": "1", "per": "shard", "diverse": True}, "--per and --diverse are different ways to choose; give one of them"),
        ({"top": "1", "diverse": True, "match": Path("x")}, "--diverse and --match are different ways to choose; give one of them"),
        ({"min": 0.5, "diverse": True}, "--diverse needs to know how many: add --top 20% or --top 5000"),
        ({"min": 0.5, "per": "shard"}, "--per needs to know how many: add --top 20% or --top 5000"),
    ],
)
def test_ways_that_do_not_go_together(settings, message):
    with pytest.raises(SelectionError) as caught:
        SelectSettings(**settings, format="keys")
    assert str(caught.value) == message


# --- the command line ---


def test_the_words_of_the_command_line(tmp_path, capfd, monkeypatch):
    samples = with_own_keys(clustered(60, seed=9))
    run, target = write_run(tmp_path / "run", samples), write_run(tmp_path / "good", samples[:20])
    monkeypatch.chdir(tmp_path)
    before = listing(tmp_path)
    words = {
        "kept by --top 10 --diverse": ["--top", "10", "--diverse"],
        f"kept by --top 10 --match '{target}'": ["--top", "10", "--match", str(target)],
        "kept by --top 10% in each of 3 groups of --per 'shard'": ["--top", "10%", "--per", "shard"],
        "have a score 'similarity / 2 + rank(width)'": ["--top", "10", "--by", "similarity / 2 + rank(width)"],
        "with their repetitions": ["--top", "10", "--repeat", "width"],
    }
    for step, arguments in words.items():
        assert main(["select", str(run), *arguments, "--dry-run", "--format", "keys"]) == 0
        out, err = capfd.readouterr()
        assert not out and step in " ".join(err.split())
    assert listing(tmp_path) == before
    assert main(["select", str(run), "--top", "6000", "--format", "keys"]) == 1
    err = capfd.readouterr().err
    assert err.startswith("mmfilter: --top 6000 is more than there is:") and err.count("\n") == 1
    assert main(["select", str(run), "--top", "10", "--repeat", "2", "--format", "keys", "--json"]) == 0
    out, err = capfd.readouterr()
    assert len(out.split()) == json.loads(err)["written"] == 20
