"""Duplicates: the rule against brute force, what plays no part in it, selecting by it, settings that are refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmfilter.core.codes import duplicates as pairs_module
from mmfilter.core.codes.duplicate_settings import DuplicateSettings
from mmfilter.core.run.tables import read_table_metadata
from mmfilter.core.selection.select_settings import SelectSettings
from mmfilter.errors import SelectionError
from mmfilter.ops.dedup_settings import DedupSettings
from mmfilter.ops.select import select
from tests.codes import SAMPLES, Sample, clustered, first_of_group, greedy, near, side, similarities, write_run
from tests.duplicates import check_same, crowd, decided, keys_of, run_dedup, small_clusters


@pytest.mark.parametrize("on", ["both", "image", "text"])
@pytest.mark.parametrize("threshold", [0.85, 0.95])
def test_the_rule_is_that_of_a_quadratic_loop(tmp_path, quiet, on, threshold):
    samples = clustered(700, seed=1)
    run = write_run(tmp_path / "run", samples)
    summary = run_dedup(run, quiet, threshold, on)
    wanted = greedy(samples, on, threshold)
    check_same(decided(run / "dedup.parquet"), wanted)
    assert summary.kept == sum(value is None for value in wanted.values()) and summary.scored == len(wanted)
    assert summary.exact > 5 and summary.near > 20  # there was something to decide


def test_every_dropped_sample_has_a_kept_one_and_says_why(tmp_path, quiet):
    run = write_run(tmp_path / "run", clustered(400, seed=2))
    summary = run_dedup(run, quiet, 0.9)
    rows = pq.read_table(run / "dedup.parquet").to_pylist()
    kept = {(row["shard"], row["row"]) for row in rows if row["kept"]}
    reasons = {"exact duplicate (same image and text)": 0, "near-duplicate at 0.9": 0, "no score: no caption: none": 0}
    for row in rows:
        if not row["kept"]:
            reasons[row["reason"]] += 1
            assert (row["duplicate_of"] is None) == row["reason"].startswith("no score")
        if row["duplicate_of"] is not None:
            assert (row["duplicate_shard"], row["duplicate_row"]) in kept and row["similarity"] >= np.float32(0.9)
            other = next(r for r in rows if (r["shard"], r["row"]) == (row["duplicate_shard"], row["duplicate_row"]))
            assert other["key"] == row["duplicate_of"] and other["score"] >= row["score"]
    assert list(reasons.values()) == [summary.exact, summary.near, summary.rows - summary.scored]
    assert read_table_metadata(run / "dedup.parquet")["kept"] == len(kept) == summary.kept


def test_nothing_depends_on_order_shards_or_workers(tmp_path, quiet, monkeypatch):
    small_clusters(monkeypatch)
    samples = clustered(1200, seed=5)
    one = write_run(tmp_path / "one", samples, group=50)
    other = write_run(tmp_path / "other", samples, shards=["/data/s2.tar", "/data/s0.tar", "/data/s1.tar"], group=333)
    run_dedup(one, quiet, 0.9, workers=1)
    run_dedup(other, quiet, 0.9, workers=3)
    assert decided(one / "dedup.parquet") == decided(other / "dedup.parquet")
    pairs = [
        {
            (frozenset([(r["shard"], r["row"]), (r["other_shard"], r["other_row"])]), r["image"], r["text"])
            for r in pq.read_table(run / "duplicates.parquet").to_pylist()
        }
        for run in (one, other)
    ]
    assert pairs[0] == pairs[1]


def test_samples_in_other_rows_and_shards_are_decided_alike(tmp_path, quiet):
    samples = [dataclasses.replace(sample, key=f"{i:05d}") for i, sample in enumerate(clustered(500, seed=6))]
    order = np.random.default_rng(0).permutation(len(samples))
    moved = [
        dataclasses.replace(samples[i], shard=f"/data/s{n % 4}.tar", row=n // 4) for n, i in enumerate(order.tolist())
    ]
    kept = []
    for name, some in (("one", samples), ("other", moved)):
        run_dedup(write_run(tmp_path / name, some), quiet, 0.9)
        kept.append(
            {
                row["key"]: (row["kept"], row["duplicate_of"])
                for row in pq.read_table(tmp_path / name / "dedup.parquet").to_pylist()
            }
        )
    assert kept[0] == kept[1]


def test_a_crowd_with_the_same_codes_keeps_one_at_threshold_1(tmp_path, quiet):
    rng = np.random.default_rng(3)
    image, text = side(rng), side(rng)
    samples = [Sample(f"{i:05d}", "/data/s.tar", i, image, text, i % 7 / 7, f"i{i}", f"t{i}") for i in range(400)]
    samples += [
        dataclasses.replace(
            sample, key=f"far{sample.key}", row=400 + i, image=near(rng, image, 0.3), image_hash=f"far{i}"
        )
        for i, sample in enumerate(samples[:20])
    ]
    run = write_run(tmp_path / "run", samples)
    for threshold in (1.0, 0.99, 0.5):
        summary = run_dedup(run, quiet, threshold)
        check_same(decided(run / "dedup.parquet"), greedy(samples, "both", threshold))
        assert summary.crowded >= 400
    assert run_dedup(run, quiet, 1.0).kept == 21


@pytest.mark.parametrize("threshold", [0.02, 1e-6])
def test_a_threshold_at_which_nearly_all_are_close(tmp_path, quiet, threshold):
    samples = clustered(300, seed=43)
    run = write_run(tmp_path / "run", samples)
    run_dedup(run, quiet, threshold)
    check_same(decided(run / "dedup.parquet"), greedy(samples, "both", threshold))
    quiet.notes.clear()
    run_dedup(run, quiet, threshold)
    assert quiet.notes == []  # the stored pairs go down to it


def test_a_chain_keeps_its_ends(tmp_path, quiet):
    idf = np.log((1 + 1000) / (1 + SAMPLES))
    one, other = (int(j) for j in np.argsort(-idf)[:2])
    angles = (0, 15, 30)  # cosines of 0.966 from one to the next, 0.866 end to end
    images = [
        {one: 4 * np.cos(np.radians(a)) / idf[one], other: 4 * np.sin(np.radians(a)) / idf[other] + 1e-7}
        for a in angles
    ]
    samples = [
        Sample(name, "/data/s.tar", i, image, {5: 1.0}, 0.9 - i / 10, name, f"t{i}")
        for i, (name, image) in enumerate(zip("abc", images, strict=True))
    ]
    run = write_run(tmp_path / "run", samples)
    run_dedup(run, quiet, 0.95)
    rows = {row["key"]: row for row in pq.read_table(run / "dedup.parquet").to_pylist()}
    assert [rows[key]["kept"] for key in "abc"] == [True, False, True]
    assert rows["b"]["duplicate_of"] == "a" and rows["b"]["similarity"] == pytest.approx(
        np.cos(np.radians(15)), abs=1e-3
    )


@pytest.mark.parametrize("seed", range(12))
def test_small_runs_of_any_kind_are_decided_as_by_the_loop(tmp_path, quiet, seed):
    rng = np.random.default_rng(100 + seed)
    samples = clustered(
        int(rng.integers(2, 120)),
        seed=seed,
        share=rng.uniform(0, 1),
        shards=int(rng.integers(1, 6)),
        ties=bool(seed % 2),
    )
    some = [
        dataclasses.replace(
            sample, image={} if rng.random() < 0.1 else sample.image, text={} if rng.random() < 0.1 else sample.text
        )
        for sample in samples
    ]
    run = write_run(tmp_path / "run", some, group=int(rng.integers(1, 60)))
    for on in ("both", "image", "text"):
        threshold = float(np.round(rng.uniform(0.05, 1), 3))
        run_dedup(run, quiet, threshold, on)
        check_same(decided(run / "dedup.parquet"), greedy(some, on, threshold))


def test_scores_that_are_nan_are_no_scores(tmp_path, quiet):
    samples = clustered(60, seed=44)
    wrong = [
        dataclasses.replace(sample, score=float("nan") if i % 5 == 0 and sample.score is not None else sample.score)
        for i, sample in enumerate(samples)
    ]
    run = write_run(tmp_path / "run", wrong)
    summary = run_dedup(run, quiet, 0.9)
    present = [sample for sample in wrong if sample.score is not None and sample.score == sample.score]
    assert (
        summary.scored
        == len(present)
        == sum(row["kept"] or "duplicate" in row["reason"] for row in pq.read_table(run / "dedup.parquet").to_pylist())
    )
    check_same(decided(run / "dedup.parquet"), greedy(wrong, "both", 0.9, lambda sample: sample.score == sample.score))


def test_a_formula_ranks(tmp_path, quiet):
    samples = clustered(200, seed=45)
    run = write_run(tmp_path / "run", samples)
    run_dedup(run, quiet, 0.9, by="1 - similarity")
    turned = [
        dataclasses.replace(sample, score=None if sample.score is None else 1 - np.float32(sample.score))
        for sample in samples
    ]
    check_same(decided(run / "dedup.parquet"), greedy(turned, "both", 0.9))


def test_crowded_samples_are_counted_and_the_rule_holds_all_the_same(tmp_path, quiet, monkeypatch):
    monkeypatch.setattr(pairs_module, "NEIGHBOURS", (4, 16))
    samples = crowd(150)
    run = write_run(tmp_path / "run", samples)
    summary = run_dedup(run, quiet, 0.95)
    assert 200 <= summary.crowded <= 300
    for threshold in (0.95, 0.99):  # the second from the stored pairs
        run_dedup(run, quiet, threshold)
        check_same(decided(run / "dedup.parquet"), greedy(samples, "both", threshold))
    assert read_table_metadata(run / "duplicates.parquet")["crowded"] >= summary.crowded
    without = [row for row in pq.read_table(run / "duplicates.parquet").to_pylist() if row["other_key"] is None]
    assert len(without) >= summary.crowded and all(row["key"] and row["similarity"] > 0.9 for row in without)


def test_borderline_pairs_are_the_closest_on_either_side(tmp_path, quiet):
    samples = clustered(500, seed=12)
    run = write_run(tmp_path / "run", samples)
    found = run_dedup(run, quiet, 0.9, borderline=12).borderline
    similarity, first = similarities(samples, "both"), first_of_group(samples, "both")
    own = [i for i, f in enumerate(first) if i == f and samples[i].score is not None]
    wanted = sorted(abs(float(similarity[i, j]) - 0.9) for i in own for j in own if i < j)[:12]
    assert [abs(pair.similarity - 0.9) for pair in found] == pytest.approx(wanted, abs=1e-6)
    assert min(pair.similarity for pair in found) < 0.9 < max(pair.similarity for pair in found)
    assert all(pair.similarity == min(pair.image, pair.text) for pair in found)


def test_a_side_without_features_is_near_to_nothing(tmp_path, quiet):
    rng = np.random.default_rng(0)
    image = side(rng)
    samples = [
        Sample(f"{i}", "/data/s.tar", i, image, {} if i < 3 else {5: 1.0}, i / 10, f"i{i}", f"t{i}") for i in range(5)
    ]
    run = write_run(tmp_path / "run", samples)
    assert run_dedup(run, quiet, 0.9).near == 1  # only the two with a text
    assert run_dedup(run, quiet, 1.0, "image").near == 4  # the same codes, though their hashes differ


def test_a_run_without_duplicates_and_one_without_a_scored_sample(tmp_path, quiet):
    samples = clustered(50, seed=13, share=0)
    assert run_dedup(write_run(tmp_path / "a", samples), quiet).kept == sum(
        sample.score is not None for sample in samples
    )
    nothing = [dataclasses.replace(sample, score=None) for sample in samples]
    summary = run_dedup(write_run(tmp_path / "b", nothing), quiet)
    assert (summary.rows, summary.scored, summary.kept, summary.pairs) == (50, 0, 0, 0)


# --- selecting ---


@pytest.mark.parametrize("on", ["both", "text"])
@pytest.mark.parametrize("where", [None, "width >= 15"])
def test_select_drops_duplicates_among_the_candidates_and_counts_them(tmp_path, on, where):
    samples = [dataclasses.replace(sample, key=f"{i:05d}") for i, sample in enumerate(clustered(500, seed=14))]
    run = write_run(tmp_path / "run", samples)
    candidates = [sample for sample in samples if where is None or len(sample.text) >= 15]
    wanted = greedy(samples, on, 0.9, lambda sample: where is None or len(sample.text) >= 15)
    left = sorted(
        (sample for sample in candidates if wanted.get((sample.shard, sample.row), 0) is None),
        key=lambda sample: (-sample.score, sample.key),
    )
    quota = int(len(candidates) * 0.3 + 0.5)
    assert len(left) > quota
    assert sorted(keys_of(run, tmp_path, top="30%", where=where, dedup=0.9, dedup_on=on)) == sorted(
        sample.key for sample in left[:quota]
    )
    (tmp_path / "keys.txt").unlink()
    selection = select(
        run, SelectSettings(top="30%", where=where, dedup=0.9, dedup_on=on, format="keys", output=tmp_path / "keys.txt")
    )
    same = "same text" if on == "text" else "same image and text"
    funnel = dict(selection.funnel)
    assert funnel["without near-duplicates (--dedup 0.9)"] == len(left)
    assert funnel["have a score 'similarity'"] > funnel[f"without exact duplicates ({same})"] > len(left)
    assert sum(n for reason, n in selection.dropped.items() if "duplicate" in reason) == len(wanted) - len(left)


def test_select_uses_the_pairs_of_dedup(tmp_path, quiet, monkeypatch):
    run = write_run(tmp_path / "run", clustered(300, seed=15))
    run_dedup(run, quiet, 0.9)
    monkeypatch.setattr(pairs_module, "open_index", None)
    kept = [row["key"] for row in pq.read_table(run / "dedup.parquet").to_pylist() if row["kept"]]
    assert sorted(keys_of(run, tmp_path, top="100%", dedup=0.9)) == sorted(kept)


# --- what is refused ---


@pytest.mark.parametrize("threshold", [0, 1.01, -1, float("nan")])
def test_a_threshold_that_is_no_cosine(threshold):
    with pytest.raises(
        SelectionError, match=r"the similarity threshold is .*; give one above 0 and up to 1, such as 0\.95"
    ):
        DuplicateSettings(threshold)
    with pytest.raises(SelectionError, match="the similarity threshold is"):
        SelectSettings(top="5", dedup=threshold, format="keys")


def test_settings_that_cannot_be():
    with pytest.raises(SelectionError, match="--on is 'sound'; expected one of both, image, text"):
        DuplicateSettings(on="sound")
    with pytest.raises(
        SelectionError, match="--memory is 0; give GiB above 0, or leave it out to use half of what is free"
    ):
        DuplicateSettings(memory=0)
    with pytest.raises(SelectionError, match="--workers is 0; at least 1 is needed"):
        DuplicateSettings(workers=0)
    with pytest.raises(SelectionError, match="--borderline is -1; give a number of pairs from 0"):
        DedupSettings(borderline=-1)
