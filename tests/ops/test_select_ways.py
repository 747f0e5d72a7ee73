"""Selecting other than the best: coverage, matching, groups, formulas, repetitions, dry runs; against plain loops."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from decimal import ROUND_HALF_UP, Decimal

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.stats

from mmfilter.cli.app import main
from mmfilter.core.files import read_json, write_json
from mmfilter.core.run.directory import RunDirectory
from mmfilter.core.run.score_tables import ScoreTables
from mmfilter.core.selection import matching
from mmfilter.core.selection.select_settings import SelectSettings
from mmfilter.ops.select import select
from tests.codes import FEATURES, REFERENCE, SAMPLES, Sample, clustered, write_run
from tests.runs import kept_keys, listing, make_run, make_shard, refused


def with_own_keys(samples: list[Sample]) -> list[Sample]:
    return [dataclasses.replace(sample, key=f"{i:05d}") for i, sample in enumerate(samples)]


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
    assert set(kept_keys(run, top="30", diverse=True)) == greedy_keys(samples, 30, np.full(FEATURES, 1 / FEATURES))


def test_match_is_a_plain_loop_over_the_definition(tmp_path):
    samples, good = with_own_keys(clustered(150, seed=2, ties=False)), with_own_keys(clustered(20, seed=3, share=0.9))
    run, target = write_run(tmp_path / "run", samples), write_run(tmp_path / "good", good)
    mean = np.mean([profile(sample) for sample in good if sample.score is not None], axis=0)
    found = kept_keys(run, top="25", match=target)
    assert set(found) == greedy_keys(samples, 25, mean / mean.sum())
    at = {sample.key: profile(sample) for sample in samples}

    def distance(keys: list[str]) -> float:
        return 0.5 * float(np.abs(np.mean([at[key] for key in keys], axis=0) - mean).sum())

    assert distance(found) < distance(kept_keys(run, top="25")) - 0.02


@pytest.mark.parametrize("at_once", [matching.AT_ONCE, 60])
@pytest.mark.parametrize("top", ["12", "40%"])
def test_the_order_of_shards_and_row_groups_plays_no_part(tmp_path, monkeypatch, at_once, top):
    monkeypatch.setattr(matching, "AT_ONCE", at_once)
    monkeypatch.setattr(matching, "PIECE", 17)
    samples = clustered(300, seed=4, shards=4)
    one = write_run(tmp_path / "one", samples, group=50)
    other = write_run(
        tmp_path / "other", samples, shards=["/data/s2.tar", "/data/s0.tar", "/data/s3.tar", "/data/s1.tar"], group=333
    )
    kept = [sorted(kept_keys(run, top=top, diverse=True, by="similarity")) for run in (one, other)]
    assert kept[0] == kept[1]
    assert len(kept[0]) == (12 if top == "12" else 120)


def test_samples_in_other_rows_and_shards_are_chosen_alike(tmp_path):
    samples = with_own_keys(clustered(200, seed=5))
    order = np.random.default_rng(0).permutation(len(samples))
    moved = [
        dataclasses.replace(samples[i], shard=f"/data/s{n % 4}.tar", row=n // 4) for n, i in enumerate(order.tolist())
    ]
    runs = [write_run(tmp_path / name, some) for name, some in (("one", samples), ("other", moved))]
    assert sorted(kept_keys(runs[0], top="50", diverse=True)) == sorted(kept_keys(runs[1], top="50", diverse=True))


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
    assert refused(run, top="5", match=target) == (
        f"--match {str(target)!r} was scored otherwise (layer is 3 there and None here): score it with "
        f"the settings of {str(run)!r}"
    )
    empty = write_run(tmp_path / "empty", [Sample("a", "/data/s0.tar", 0, {}, {}, 0.5)])
    assert (
        refused(run, top="5", match=empty)
        == f"--match {str(empty)!r} has no sample with features: there is nothing to match"
    )
    assert refused(run, top="5", match=tmp_path / "none").startswith(
        f"{str(tmp_path / 'none')!r} is not a run: it has no manifest.json"
    )


def test_a_target_with_nothing_in_common_is_refused(tmp_path):
    samples = with_own_keys(clustered(30, seed=7))
    halves = [
        [
            dataclasses.replace(
                sample,
                **{
                    name: {j: value for j, value in getattr(sample, name).items() if j % 2 == odd}
                    for name in ("image", "text")
                },
            )
            for sample in samples
        ]
        for odd in (0, 1)
    ]
    run, target = (write_run(tmp_path / f"half{odd}", half) for odd, half in enumerate(halves))
    blank = write_run(tmp_path / "blank", [dataclasses.replace(sample, image={}, text={}) for sample in samples])
    said = (
        "no candidate has a feature that {} asks for, so none is better than another; leave it out for the "
        "best by score"
    )
    assert refused(run, top="5", match=target) == said.format(f"--match {str(target)!r}")
    assert refused(blank, top="5", diverse=True) == said.format("--diverse")
    assert len(kept_keys(blank, top="100%", diverse=True)) == sum(sample.score is not None for sample in samples), (
        "nothing is chosen among"
    )


# --- groups ---


@pytest.mark.parametrize("seed", range(6))
def test_each_group_keeps_its_share(tmp_path, seed):
    randomness = random.Random(seed)
    samples = with_own_keys(clustered(randomness.choice([7, 60, 300]), seed=seed, shards=4))
    run = write_run(tmp_path / "run", samples)
    per, group = randomness.choice(
        [("shard", lambda s: s.shard), ("width > 12", lambda s: len(s.text) > 12), ("key[5:5]", lambda s: s.key[4])]
    )
    minimum, top = randomness.choice([None, 0.4]), randomness.choice(["10%", "33.3%", "50%", "100%", "3"])
    selection = select(run, SelectSettings(top=top, min=minimum, per=per, where="width <> 3", dry_run=True))
    candidates = [sample for sample in samples if len(sample.text) != 3]
    sizes = Counter(map(group, candidates))
    expected = []
    for name, size in sizes.items():
        left = [
            s
            for s in candidates
            if group(s) == name and s.score is not None and (minimum is None or s.score >= np.float32(minimum))
        ]
        quota = (
            int((Decimal(size) * Decimal(top[:-1]) / 100).quantize(Decimal(1), ROUND_HALF_UP))
            if top[-1] == "%"
            else int(top)
        )
        expected += [s.key for s in sorted(left, key=lambda s: (-s.score, s.key))[:quota]]
    assert sorted(kept_keys(run, top=top, min=minimum, per=per, where="width <> 3")) == sorted(expected)
    assert selection.kept == len(expected) and selection.n_parts == len(sizes)
    assert selection.funnel[-1][0].startswith(f"kept by --top {top} in each of {len(sizes)} groups of --per {per!r}")
    assert selection.kept + sum(selection.dropped.values()) == selection.rows


def test_null_is_a_group_too(tmp_path):
    make_shard(tmp_path / "a.tar", [f"k{i}" for i in range(6)])
    rows = [{"similarity": i / 10, "caption_chars": None if i < 3 else 1} for i in range(6)]
    run = make_run(tmp_path / "run", {str(tmp_path / "a.tar"): rows})
    assert kept_keys(run, top="1", per="caption_chars") == ["k2", "k5"]


# --- formulas ---


def test_a_formula_ranks_as_numpy_says(tmp_path):
    rng = np.random.default_rng(0)
    make_shard(tmp_path / "a.tar", [f"k{i:03d}" for i in range(200)])
    saev = [
        None if i % 7 == 0 else float("nan") if i % 11 == 0 else float(np.float32(x))
        for i, x in enumerate(rng.integers(0, 20, 200) / 4)
    ]
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
    assert kept_keys(run, top="10", where="width >= 20", by="0.7 * similarity + 0.3 * rank(saev)") == [
        f"k{i:03d}" for i in sorted(best)
    ]


def test_a_formula_ties_by_key_and_keeps_the_meaning_of_min(tmp_path):
    make_shard(tmp_path / "b.tar", ["k3", "k1", "k2"])
    run = make_run(tmp_path / "run", {str(tmp_path / "b.tar"): [0.7, 0.7, 0.1]})
    assert kept_keys(run, top="1", by="similarity * 1") == ["k1"]
    assert kept_keys(run, min=0.7, by="similarity * 1") == ["k3", "k1"]
    assert kept_keys(run, min=1, by="similarity > 0.5") == ["k3", "k1"]
    select(run, SelectSettings(top="1", by="2 * similarity", output=tmp_path / "best"))
    assert pq.read_table(tmp_path / "best/selection.parquet").column("score").to_pylist() == pytest.approx(
        [1.4, 1.4, 0.2]
    )


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ("similarity +", 'is not possible: syntax error at or near ")"'),
        (
            "beauty + 1",
            "names a column 'beauty' that the score table does not have; it has key, shard, row, offset, "
            "nbytes, ok, reason",
        ),
        ("avg(similarity) + 1", "is not possible: Binder Error: a formula over one row cannot contain aggregates!"),
        ("rank(similarity) + rank() OVER ()", "is not possible: Binder Error:"),
        ("rank(rank(similarity))", "is not possible: Binder Error: window function calls cannot be nested"),
        ("random() + 1", "uses random(), which is another number each time; the column 'random' is a seeded one"),
        ("", "is no formula; write one over the columns, such as '0.7 * similarity + 0.3 * rank(saev)'"),
        ("COLUMNS('s.*')", "has a * for several columns; name each"),
        (
            "key || 'x'",
            "is not a number but varchar; write a formula that gives one, such as '0.7 * similarity + 0.3 * rank(saev)'",
        ),
        ("(SELECT 1)", "has a sub-query; only a formula over the columns of one row is possible"),
        (
            "(FROM read_text('/etc/hostname'))",
            "has a sub-query; only a formula over the columns of one row is possible",
        ),
        ("1) + (SELECT (1", "is not possible: syntax error at or near"),
        (
            "1) LIMIT (1",
            "is more than a formula; write one over the columns, such as '0.7 * similarity + 0.3 * rank(saev)'",
        ),
        ("CAST(key AS INTEGER) + 1", "fails: Conversion Error: Could not convert string"),
    ],
)
def test_a_formula_that_is_none(tmp_path, by, message):
    run = write_run(tmp_path / "run", [Sample("x", "/data/s0.tar", 0, {}, {}, 0.5)])
    for option in ("by", "repeat"):
        assert refused(run, top="1", **{option: by}).startswith(f"--{option} {by!r} {message}")


def test_a_group_that_is_none(tmp_path):
    run = write_run(tmp_path / "run", [Sample("x", "/data/s0.tar", 0, {}, {}, 0.5)])
    assert refused(run, top="1", per="source").startswith(
        "--per 'source' names a column 'source' that the score table does not have; it has key,"
    )
    assert refused(run, top="1", per="CAST(key AS INTEGER)").startswith(
        "--per 'CAST(key AS INTEGER)' fails: Conversion Error:"
    )
    assert refused(run, top="1", per=" ").startswith("--per ' ' is no formula; write one over the columns")


def test_groups_by_rank_are_those_of_scipy(tmp_path):
    rng = np.random.default_rng(8)
    widths = rng.integers(0, 20, 60)
    make_shard(tmp_path / "x.tar", [f"{i:02d}" for i in range(60)])
    rows = [{"similarity": float(np.float32(rng.random())), "width": int(width)} for width in widths]
    run = make_run(tmp_path / "run", {str(tmp_path / "x.tar"): rows})
    quarter = np.floor(4 * (scipy.stats.rankdata(widths, "min") - 1) / 59)
    best = {max(np.flatnonzero(quarter == group), key=lambda i: rows[i]["similarity"]) for group in np.unique(quarter)}
    assert kept_keys(run, top="1", per="floor(4 * rank(width))") == [f"{i:02d}" for i in sorted(best)]


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
