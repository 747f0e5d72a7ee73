"""The pairs behind `dedup` and their index: against brute force, what is stored and used again, damage, the GPU."""

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
from mmfilter.core.run.directory import RunDirectory
from mmfilter.errors import MissingExtra, MMFilterError, RunError
from mmfilter.ops.search import search
from mmfilter.ops.search_settings import SearchSettings
from tests.codes import clustered, first_of_group, greedy, similarities, write_run
from tests.duplicates import check_same, crowd, decided, keys_of, run_dedup, small_clusters


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


def test_few_samples_in_memory_measure_the_same_pairs(tmp_path, quiet, monkeypatch):
    samples = clustered(400, seed=10)
    monkeypatch.setattr(pairs_module, "ROWS_AT_ONCE", 30)
    run = write_run(tmp_path / "run", samples)
    run_dedup(run, quiet, 0.9)
    check_same(decided(run / "dedup.parquet"), greedy(samples, "both", 0.9))


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
        == f"run {str(run)!r} cannot be written, and its decisions belong there; copy it, or use mmfilter "
        f"select --dedup"
    )
    kept = [sample.key for sample in samples if greedy(samples, "both", 0.9).get((sample.shard, sample.row), 0) is None]
    assert sorted(keys_of(run, tmp_path, top="100%", dedup=0.9)) == kept
    assert len(search(run, SearchSettings(key=kept[0], n=3), quiet)) == 3
    assert quiet.notes[0] == f"{str(run)!r} cannot be written: its index is made now and not kept for the next time"
    assert all(note.startswith("no caption: shard '/data/s") for note in quiet.notes[1:])
    assert sorted(path.name for path in run.iterdir()) == before


def test_the_index_explains_itself_and_is_replaced_whole(tmp_path, quiet):
    run = write_run(tmp_path / "run", clustered(60))
    run_dedup(run, quiet, 0.9)
    about = json.loads((run / "index" / "manifest.json").read_text())
    assert about["kind"] == "code index" and about["settings"] == {"on": "both", "dims": 256, "nonzeros": 16, "seed": 0}
    assert sorted(path.name for path in (run / "index").iterdir()) == ["index.faiss", "manifest.json", "positions.npy"]
    run_dedup(run, quiet, 0.9, "image")
    assert json.loads((run / "index" / "manifest.json").read_text())["settings"]["on"] == "image"
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


# --- damage ---


def test_a_run_without_codes_is_one_line(tmp_path, quiet):
    run = write_run(tmp_path / "run", clustered(30))
    RunDirectory(run).codes("s1").unlink()
    with pytest.raises(RunError) as caught:
        run_dedup(run, quiet)
    assert (
        str(caught.value)
        == f"run {str(run)!r} has no codes of shard '/data/s1.tar': delete scores/s1.parquet in it and run "
        f"mmfilter score again"
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


# --- the GPU ---


def test_no_gpu_is_one_line(tmp_path, quiet):
    import faiss

    run = write_run(tmp_path / "run", clustered(30))
    if not hasattr(faiss, "StandardGpuResources"):
        said = (
            f"--gpu: this FAISS ({faiss.__version__}) is for CPUs: pip uninstall faiss-cpu, then pip install "
            f"'mmfilter[gpu]'"
        )
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
