"""Duplicates: the pairs and the rule against brute force, what plays no part, what is stored, what is refused."""

from __future__ import annotations

import builtins
import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmfilter.core.codes import duplicates as pairs_module
from mmfilter.core.codes import index as index_module
from mmfilter.core.codes.duplicate_settings import DuplicateSettings
from mmfilter.core.run.directory import RunDirectory
from mmfilter.core.run.tables import read_table_metadata
from mmfilter.core.selection.select_settings import SelectSettings
from mmfilter.errors import MissingExtra, MMFilterError, RunError, SelectionError
from mmfilter.ops.dedup import dedup
from mmfilter.ops.dedup_settings import DedupSettings
from mmfilter.ops.search import search
from mmfilter.ops.search_settings import SearchSettings
from mmfilter.ops.select import select
from tests.codes import SAMPLES, Sample, clustered, first_of_group, greedy, near, side, similarities, write_run
from tests.conftest import Quiet


def run_dedup(run: Path, quiet: Quiet, threshold: float = 0.9, on: str = "both", **settings):
    return dedup(run, DedupSettings(threshold, on, **settings), quiet)


def decided(path: Path) -> dict:
    """What `greedy` gives, out of a table of decisions."""
    result = {}
    for row in pq.read_table(path).to_pylist():
        if row["kept"]:
            result[row["shard"], row["row"]] = None
        elif "duplicate" in row["reason"]:
            result[row["shard"], row["row"]] = (row["duplicate_shard"], row["duplicate_row"], row["similarity"])
    return result


def check_same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for where, one in wanted.items():
        other = found[where]
        assert (one is None) == (other is None), where
        if one is not None:
            assert other[:2] == one[:2] and other[2] == pytest.approx(one[2], abs=1e-6)


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


@pytest.mark.parametrize("on", ["both", "image", "text"])
def test_the_stored_pairs_are_all_and_exact(tmp_path, quiet, on):
    samples = clustered(600, seed=3)
    run = write_run(tmp_path / "run", samples)
    run_dedup(run, quiet, 0.9, on)
    found = {
        ((r["shard"], r["row"]), (r["other_shard"], r["other_row"])): r
        for r in pq.read_table(run / "duplicates.parquet").to_pylist()
    }
    similarity, first = similarities(samples, on), first_of_group(samples, on)
    scored = [i for i, sample in enumerate(samples) if sample.score is not None and first[i] == i]
    wanted = {}
    for i in scored:
        for j in scored:
            if i < j and similarity[i, j] >= np.float32(0.88):
                wanted[frozenset([(samples[i].shard, samples[i].row), (samples[j].shard, samples[j].row)])] = float(
                    similarity[i, j]
                )
    assert {frozenset(pair) for pair in found} <= wanted.keys()
    missed = [value for pair, value in wanted.items() if pair not in {frozenset(pair) for pair in found}]
    assert len(missed) <= 0.005 * len(wanted) and all(value < 0.9 for value in missed) and len(wanted) > 50
    for pair, row in found.items():
        assert row["similarity"] == pytest.approx(wanted[frozenset(pair)], abs=1e-6)
        assert (
            row["similarity"]
            == {"both": min(row["image"], row["text"]), "image": row["image"], "text": row["text"]}[on]
        )


def small_clusters(monkeypatch) -> None:
    """Clusters from 100 samples on, so that a test of a few thousand goes through them."""
    monkeypatch.setattr(index_module, "FLAT", 100)


def test_clusters_find_what_brute_force_finds(tmp_path, quiet, monkeypatch):
    small_clusters(monkeypatch)
    samples = clustered(3000, seed=4)
    run = write_run(tmp_path / "run", samples, group=500)
    summary = run_dedup(run, quiet, 0.9)
    assert (
        summary.index["clusters"] == round(4 * summary.index["samples"] ** 0.5)
        and summary.index["clusters_searched"] >= 8
    )
    assert summary.index["found"] >= 0.999 and summary.index["true_neighbours"] > 100
    first, similarity = np.array(first_of_group(samples, "both")), similarities(samples, "both")
    own = np.array([i == f and samples[i].score is not None for i, f in enumerate(first)])
    n_true = int((np.triu(similarity >= np.float32(0.9), 1) & own & own[:, None]).sum())
    assert summary.pairs >= 0.995 * n_true and n_true > 500


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


def test_clusters_in_another_order_with_other_threads_and_less_memory_decide_the_same(tmp_path, quiet, monkeypatch):
    small_clusters(monkeypatch)
    monkeypatch.setattr(index_module, "LEAST_AT_ONCE", 0)
    samples = [dataclasses.replace(sample, key=f"{i:05d}") for i, sample in enumerate(clustered(2000, seed=41))]
    order = np.random.default_rng(1).permutation(len(samples))
    moved = [
        dataclasses.replace(samples[i], shard=f"/data/m{n % 7}.tar", row=n // 7) for n, i in enumerate(order.tolist())
    ]
    decisions, pairs = [], []
    for name, some, settings in (
        ("a", samples, {"workers": 1}),
        ("b", moved, {"workers": 3}),
        ("c", moved, {"memory": 300 * 520 / 2**30}),
    ):
        run = write_run(tmp_path / name, some, group=50 if name == "a" else 333)
        run_dedup(run, quiet, 0.9, **settings)
        table = pq.read_table(run / "dedup.parquet").select(
            ["key", "score", "kept", "reason", "duplicate_of", "similarity"]
        )
        decisions.append(table.sort_by("key"))
        rows = pq.read_table(run / "duplicates.parquet").to_pylist()
        pairs.append({(*sorted([r["key"], r["other_key"]]), r["image"], r["text"], r["similarity"]) for r in rows})
    assert decisions[0].equals(decisions[1]) and decisions[0].equals(decisions[2])
    assert pairs[0] == pairs[1] == pairs[2] and len(pairs[0]) > 500
    assert {(s, r): v for (s, r), v in decided(tmp_path / "a" / "dedup.parquet").items() if v is None} == {
        where: None for where, v in greedy(samples, "both", 0.9).items() if v is None
    }


@pytest.mark.parametrize("at_most", [None, 1 << 20, 200 * 520], ids=["flat", "in memory", "on disk"])
def test_every_kind_of_index_finds_995_of_1000_pairs_at_the_threshold(tmp_path, quiet, monkeypatch, at_most):
    if at_most is not None:
        small_clusters(monkeypatch)
    monkeypatch.setattr(index_module, "LEAST_AT_ONCE", 0)
    samples = clustered(3000, seed=42)
    run = write_run(tmp_path / "run", samples, group=500)
    run_dedup(run, quiet, 0.9, memory=None if at_most is None else at_most / 2**30)
    first, similarity = np.array(first_of_group(samples, "both")), similarities(samples, "both")
    own = np.array([i == f and samples[i].score is not None for i, f in enumerate(first)])
    where = [(sample.shard, sample.row) for sample in samples]
    wanted = {
        frozenset([where[i], where[j]])
        for i, j in np.argwhere(np.triu(similarity >= np.float32(0.9), 1) & own & own[:, None]).tolist()
    }
    rows = pq.read_table(run / "duplicates.parquet").to_pylist()
    found = {
        frozenset([(r["shard"], r["row"]), (r["other_shard"], r["other_row"])])
        for r in rows
        if r["similarity"] >= np.float32(0.9)
    }
    assert found <= wanted and len(found) >= 0.995 * len(wanted) and len(wanted) > 1000


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


def test_a_higher_threshold_needs_no_search_and_a_lower_one_says_so(tmp_path, quiet, monkeypatch):
    samples = clustered(400, seed=7)
    run = write_run(tmp_path / "run", samples)
    run_dedup(run, quiet, 0.85)

    def no_search(*_, **__):
        raise AssertionError("searched")

    with monkeypatch.context() as patch:
        patch.setattr(pairs_module, "open_index", no_search)
        for threshold in (0.85, 0.9, 0.97, 0.83):
            run_dedup(run, quiet, threshold)
            check_same(decided(run / "dedup.parquet"), greedy(samples, "both", threshold))
        assert quiet.notes == []
        with pytest.raises(AssertionError, match="searched"):
            run_dedup(run, quiet, 0.8)
    assert quiet.notes.pop() == "the stored duplicates go down to 0.83, not to 0.8: searching again"
    run_dedup(run, quiet, 0.8)
    check_same(decided(run / "dedup.parquet"), greedy(samples, "both", 0.8))
    quiet.notes.clear()
    run_dedup(run, quiet, 0.9, "text")
    assert quiet.notes == ["the stored duplicates are for --on both: searching again for text"]
    check_same(decided(run / "dedup.parquet"), greedy(samples, "text", 0.9))


def test_a_run_that_grew_is_searched_again(tmp_path, quiet):
    samples = clustered(400, seed=8)
    run = write_run(tmp_path / "run", [sample for sample in samples if sample.shard != "/data/s1.tar"])
    run_dedup(run, quiet, 0.9)
    write_run(run, samples)
    run_dedup(run, quiet, 0.9)
    assert quiet.notes == ["the run has changed since its duplicates were searched: searching again"]
    check_same(decided(run / "dedup.parquet"), greedy(samples, "both", 0.9))


def test_a_shard_that_is_scored_again_with_other_codes_is_searched_again(tmp_path, quiet):
    samples = clustered(200, seed=46)
    lost = next(i for i, sample in enumerate(samples) if sample.score is not None)
    run = write_run(
        tmp_path / "run",
        [dataclasses.replace(sample, score=None) if i == lost else sample for i, sample in enumerate(samples)],
    )
    run_dedup(run, quiet, 0.9)
    write_run(run, samples)
    run_dedup(run, quiet, 0.9)
    assert quiet.notes == ["the run has changed since its duplicates were searched: searching again"]
    check_same(decided(run / "dedup.parquet"), greedy(samples, "both", 0.9))


def crowd(n: int) -> list[Sample]:
    """Two crowds of n near one another, some between them and some apart."""
    rng = np.random.default_rng(9)
    centres = [(side(rng), side(rng)) for _ in range(2)]
    samples = []
    for i in range(2 * n + 40):
        image, text = centres[i % 2] if i < 2 * n else (side(rng), side(rng))
        image, text = near(rng, image, rng.choice([0.02, 0.15, 0.25])), near(rng, text, 0.05)
        samples.append(
            Sample(
                f"{i:05d}",
                f"/data/s{i % 3}.tar",
                i // 3,
                image,
                text,
                float(np.float32(rng.random())),
                f"i{i}",
                f"t{i}",
            )
        )
    return samples


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


def test_few_samples_in_memory_measure_the_same_pairs(tmp_path, quiet, monkeypatch):
    samples = clustered(400, seed=10)
    monkeypatch.setattr(pairs_module, "ROWS_AT_ONCE", 30)
    run = write_run(tmp_path / "run", samples)
    run_dedup(run, quiet, 0.9)
    check_same(decided(run / "dedup.parquet"), greedy(samples, "both", 0.9))


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


def test_a_run_that_cannot_be_written_is_searched_and_nothing_is_kept(tmp_path, quiet, monkeypatch):
    samples = [dataclasses.replace(sample, key=f"{i:05d}") for i, sample in enumerate(clustered(200, seed=47))]
    run = write_run(tmp_path / "run", samples)
    before = sorted(path.name for path in run.iterdir())
    monkeypatch.setattr(
        "os.access", lambda path, _: run not in (Path(path), *Path(path).parents)
    )  # root may write everywhere
    with pytest.raises(RunError) as caught:
        run_dedup(run, quiet, 0.9)
    assert (
        str(caught.value)
        == f"run {str(run)!r} cannot be written, and its decisions belong there; copy it, or use mmfilter select --dedup"
    )
    kept = [sample.key for sample in samples if greedy(samples, "both", 0.9).get((sample.shard, sample.row), 0) is None]
    assert sorted(keys_of(run, tmp_path, top="100%", dedup=0.9)) == kept
    assert len(search(run, SearchSettings(key=kept[0], n=3), quiet)) == 3
    assert quiet.notes[0] == f"{str(run)!r} cannot be written: its index is made now and not kept for the next time"
    assert all(note.startswith("no caption: shard '/data/s") for note in quiet.notes[1:])
    assert sorted(path.name for path in run.iterdir()) == before


def test_a_run_without_duplicates_and_one_without_a_scored_sample(tmp_path, quiet):
    samples = clustered(50, seed=13, share=0)
    assert run_dedup(write_run(tmp_path / "a", samples), quiet).kept == sum(
        sample.score is not None for sample in samples
    )
    nothing = [dataclasses.replace(sample, score=None) for sample in samples]
    summary = run_dedup(write_run(tmp_path / "b", nothing), quiet)
    assert (summary.rows, summary.scored, summary.kept, summary.pairs) == (50, 0, 0, 0)


# --- selecting ---


def keys_of(run: Path, tmp_path: Path, **settings) -> list[str]:
    target = tmp_path / "keys.txt"
    target.unlink(missing_ok=True)
    select(run, SelectSettings(format="keys", output=target, **settings))
    return target.read_text().split()


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


def test_a_run_without_codes_is_one_line(tmp_path, quiet):
    run = write_run(tmp_path / "run", clustered(30))
    RunDirectory(run).codes("s1").unlink()
    with pytest.raises(RunError) as caught:
        run_dedup(run, quiet)
    assert (
        str(caught.value)
        == f"run {str(run)!r} has no codes of shard '/data/s1.tar': delete scores/s1.parquet in it and run mmfilter score again"
    )


def test_damage_is_named(tmp_path, quiet):
    run = write_run(tmp_path / "run", clustered(30))
    RunDirectory(run).codes("s1").write_bytes(b"PAR1 no more")
    with pytest.raises(
        RunError, match=r"code table '.*s1\.parquet' cannot be read \(.*\); delete it and score the shard again"
    ):
        run_dedup(run, quiet)
    write_run(run, clustered(30))
    RunDirectory(run).weights.write_bytes(b"nothing")
    with pytest.raises(
        RunError, match=r"feature weights '.*' cannot be read \(.*\); score into another --run to fit them again"
    ):
        run_dedup(run, quiet)
    write_run(run, clustered(30))
    run_dedup(run, quiet)
    (run / "index" / "index.faiss").write_bytes(b"nothing")
    (run / "duplicates.parquet").unlink()
    with pytest.raises(RunError, match=r"index '.*index' cannot be read \(.*\); delete the folder and run again"):
        run_dedup(run, quiet)


def test_damaged_pairs_are_named(tmp_path, quiet):
    run = write_run(tmp_path / "run", clustered(30))
    run_dedup(run, quiet)
    path = run / "duplicates.parquet"
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(
            RunError, match=r"'.*duplicates\.parquet' is not a readable parquet file: .*; delete the file and run again"
        ):
            run_dedup(run, quiet)
    path.write_bytes((run / "dedup.parquet").read_bytes())
    with pytest.raises(
        RunError, match=r"'.*duplicates\.parquet' is not a table of close pairs; move it away and run again"
    ):
        run_dedup(run, quiet)
    start = whole.rindex(b"\x28\xb5\x2f\xfd")  # where the last compressed page begins
    path.write_bytes(whole[: start + 4] + b"\xff" * 20 + whole[start + 24 :])
    before = (run / "dedup.parquet").read_bytes()
    with pytest.raises(
        RunError, match=r"the stored duplicates '.*' cannot be read \(.*\); delete the file and run again"
    ):
        run_dedup(run, quiet)
    assert (run / "dedup.parquet").read_bytes() == before


def test_codes_of_another_sae_and_codes_that_lack_samples(tmp_path, quiet):
    samples = clustered(30)
    strange = dataclasses.replace(samples[0], image={100_000: 1.0}, score=0.5)
    run = write_run(tmp_path / "a", [strange, *samples[1:]])
    with pytest.raises(
        RunError, match=r"code table '.*' has features that '.*weights.safetensors' lacks: it belongs to another SAE"
    ):
        run_dedup(run, quiet)
    run = write_run(tmp_path / "b", samples)
    fewer = [dataclasses.replace(sample, score=None) if i == 2 else sample for i, sample in enumerate(samples)]
    other = write_run(tmp_path / "c", fewer)
    name = Path(samples[2].shard).stem
    RunDirectory(other).codes(name).rename(RunDirectory(run).codes(name))
    n = sum(sample.score is not None for sample in samples)
    with pytest.raises(
        RunError, match=f"the code tables hold {n - 1} of {n} samples that have scores; score the shards again"
    ):
        run_dedup(run, quiet)


def test_without_faiss_the_line_to_type_is_named(tmp_path, quiet, monkeypatch):
    run = write_run(tmp_path / "run", clustered(30))
    real = builtins.__import__

    def without(name, *rest, **more):
        if name == "faiss":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra) as caught:
        run_dedup(run, quiet)
    assert str(caught.value) == "the index over codes needs an optional package: pip install 'mmfilter[cpu]'"


def test_no_gpu_is_one_line(tmp_path, quiet):
    import faiss

    run = write_run(tmp_path / "run", clustered(30))
    if not hasattr(faiss, "StandardGpuResources"):
        said = f"--gpu: this FAISS ({faiss.__version__}) is for CPUs: pip uninstall faiss-cpu, then pip install 'mmfilter[gpu]'"
    elif not faiss.get_num_gpus():
        said = f"--gpu: FAISS ({faiss.__version__}) cannot use a GPU here (it sees none); go without --gpu"
    else:
        pytest.skip("there is a GPU")
    with pytest.raises(MMFilterError) as caught:
        run_dedup(run, quiet, gpu=True)
    assert str(caught.value) == said and not (run / "index").exists()


def needs_gpu() -> None:
    faiss = pytest.importorskip("faiss")
    if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
        pytest.skip("needs faiss-gpu and a GPU")


@pytest.mark.gpu
@pytest.mark.parametrize("flat", [100, 20_000])
@pytest.mark.parametrize("on", ["both", "image"])
def test_the_gpu_decides_the_same(tmp_path, quiet, monkeypatch, flat, on):
    needs_gpu()
    monkeypatch.setattr(index_module, "FLAT", flat)
    samples = clustered(3000, seed=16)
    for name, gpu in (("cpu", False), ("gpu", True)):
        run_dedup(write_run(tmp_path / name, samples), quiet, 0.9, on, gpu=gpu)
    assert quiet.notes == []  # nothing was left to the CPU
    assert decided(tmp_path / "cpu/dedup.parquet") == decided(tmp_path / "gpu/dedup.parquet")
    assert pq.read_table(tmp_path / "cpu/duplicates.parquet").equals(pq.read_table(tmp_path / "gpu/duplicates.parquet"))


@pytest.mark.gpu
def test_the_gpu_decides_on_a_crowd_the_same(tmp_path, quiet):
    needs_gpu()
    for name, gpu in (("cpu", False), ("gpu", True)):
        run_dedup(write_run(tmp_path / name, crowd(300)), quiet, 0.95, gpu=gpu)
    assert decided(tmp_path / "cpu/dedup.parquet") == decided(tmp_path / "gpu/dedup.parquet")


@pytest.mark.gpu
def test_what_is_too_much_for_the_gpu_is_searched_on_the_cpu(tmp_path, quiet, monkeypatch):
    needs_gpu()
    small_clusters(monkeypatch)
    monkeypatch.setattr(index_module, "LEAST_AT_ONCE", 0)
    samples = clustered(1500, seed=17)
    run_dedup(write_run(tmp_path / "cpu", samples), quiet, 0.9)
    run_dedup(write_run(tmp_path / "gpu", samples), quiet, 0.9, gpu=True, memory=300 * 520 / 2**30)
    assert quiet.notes == ["the index does not fit into memory: searching on the CPU, a part at a time"]
    assert decided(tmp_path / "cpu/dedup.parquet") == decided(tmp_path / "gpu/dedup.parquet")


def test_the_index_explains_itself_and_is_replaced_whole(tmp_path, quiet):
    run = write_run(tmp_path / "run", clustered(60))
    run_dedup(run, quiet, 0.9)
    about = json.loads((run / "index" / "manifest.json").read_text())
    assert about["kind"] == "code index" and about["settings"] == {"on": "both", "dims": 256, "nonzeros": 16, "seed": 0}
    assert sorted(path.name for path in (run / "index").iterdir()) == ["index.faiss", "manifest.json", "positions.npy"]
    run_dedup(run, quiet, 0.9, "image")
    assert json.loads((run / "index" / "manifest.json").read_text())["settings"]["on"] == "image"
    assert not [path for path in run.iterdir() if path.name.startswith(".")]
