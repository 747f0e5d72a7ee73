"""The index in memory and on disk: the same answers, those of brute force, whatever the order and the threads."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest

from mmfilter.core.codes import clusters
from mmfilter.core.codes import index as index_module
from mmfilter.core.codes.cluster_file import ClusterFile
from mmfilter.core.codes.code_tables import CodeTables
from mmfilter.core.codes.faiss_library import load_faiss, threads
from mmfilter.core.codes.index import IndexSettings, open_index
from mmfilter.core.codes.vector_file import VectorFile
from mmfilter.core.codes.vectors import GRID, on_grid
from mmfilter.core.run.directory import RunDirectory
from mmfilter.core.run.score_tables import ScoreTables
from mmfilter.errors import MMFilterError, RunError
from tests.codes import clustered, write_run


def sketches(n: int, seed: int = 0, dims: int = 64) -> np.ndarray:
    """Unit vectors on the grid, half of them near to another."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((n, dims))
    vectors[n // 2 :] = vectors[: n - n // 2] + 0.2 * rng.standard_normal((n - n // 2, dims))
    return on_grid(vectors)


# --- what has no rounding ---


def test_the_grid_is_whole_in_half_precision_and_its_cosines_are_exact():
    vectors = sketches(500)
    assert np.array_equal(vectors, vectors.astype(np.float16).astype(np.float32))
    assert (
        np.array_equal(vectors * GRID, np.rint(vectors * GRID))
        and np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 2e-3
    )
    whole = np.rint(vectors * GRID).astype(np.int64)
    exact = whole @ whole.T
    order = np.random.default_rng(1).permutation(64)
    for some in (vectors, vectors[:, order]):
        assert np.array_equal((some @ some.T).astype(np.float64) * GRID**2, exact)
    assert np.array_equal(on_grid(np.zeros((2, 8))), np.zeros((2, 8)))


def test_k_means_puts_every_vector_into_its_nearest_cluster_and_loses_none():
    sample = sketches(2000)
    centroids = clusters.centroids_of(sample, 40, index_module.nearest_centroids)
    again = clusters.centroids_of(sample, 40, lambda c, v: ((v @ c.T).max(1), (v @ c.T).argmax(1)))
    assert np.array_equal(centroids, again)  # FAISS or numpy
    home = (sample @ centroids.T).argmax(1)
    spread = (sample * centroids[home]).sum(1).mean()
    assert (
        len(np.unique(home)) == 40
        and spread > (sample * sample[:40][(sample @ sample[:40].T).argmax(1)]).sum(1).mean() + 0.05
    )


def test_identical_vectors_leave_no_centroid_undefined():
    sample = np.repeat(sketches(1), 100, axis=0)
    centroids = clusters.centroids_of(sample, 10, index_module.nearest_centroids)
    assert np.isfinite(centroids).all() and np.array_equal(centroids, np.repeat(sample[:1], 10, axis=0))


# --- the file ---


def test_a_file_of_vectors_is_read_in_any_part_and_order(tmp_path, monkeypatch):
    monkeypatch.setattr("mmfilter.core.codes.vector_file.BLOCK", 7)
    vectors = sketches(100).astype(np.float16)
    file = VectorFile(tmp_path / "a", 64, new=True)
    for part in np.split(vectors, [1, 40]):
        file.add(part)
    assert len(file) == 100 and np.array_equal(file.read(13, 57), vectors[13:57]) and file.read(5, 5).shape == (0, 64)
    assert np.array_equal(np.concatenate([some for _, some in file.blocks()]), vectors)
    wanted = np.random.default_rng(0).integers(0, 100, 30)
    assert np.array_equal(file.take(wanted), vectors[wanted])
    order = np.random.default_rng(1).permutation(100)
    for at_once in (9, 100, 1000):
        other = file.rearranged(tmp_path / f"b{at_once}", order, at_once)
        assert np.array_equal(other.read(0, 100), vectors[order])
        other.close()
    with pytest.raises(ValueError, match="it ends before vector 101"):
        file.read(90, 101)


def test_parts_hold_so_many_or_one_cluster():
    lists = ClusterFile(None, np.cumsum([0, 3, 0, 5, 20, 1, 1, 9]))
    parts = lists.parts(np.array([0, 1, 2, 3, 4, 5, 6]), 8)
    assert [part.tolist() for part in parts] == [[0, 1, 2], [3], [4, 5], [6]]
    assert [part.tolist() for part in lists.parts(np.array([3, 6]), 8)] == [[3], [6]]
    assert [part.tolist() for part in lists.parts(np.arange(7), 1000)] == [list(range(7))]
    assert lists.parts(np.zeros(0, np.int64), 8) == []


# --- the index ---


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("index") / "run", clustered(1500, seed=40))


def opened(run, folder, quiet, at_most):
    scores = ScoreTables(RunDirectory(run))
    return open_index(
        CodeTables(scores), np.flatnonzero(scores.scored), IndexSettings(), folder, quiet, at_most=at_most
    )


@pytest.fixture
def small(monkeypatch):
    """Clusters from 100 samples on, and as little memory as is asked for."""
    monkeypatch.setattr(index_module, "FLAT", 100)
    monkeypatch.setattr(index_module, "LEAST_AT_ONCE", 0)


@pytest.mark.parametrize("flat", [True, False])
def test_what_is_found_is_that_of_brute_force(run, tmp_path, quiet, monkeypatch, flat):
    monkeypatch.setattr(index_module, "FLAT", 20_000 if flat else 100)
    index = opened(run, tmp_path / "index", quiet, 1 << 30)
    assert bool(index.about["clusters"]) != flat
    position, vectors = (np.concatenate(parts) for parts in zip(*index.blocks(), strict=True))
    similarity, found = index.search(vectors, 12)
    exact = vectors @ vectors.T
    place = np.argsort(position)
    assert np.array_equal(np.sort(position), np.flatnonzero(ScoreTables(RunDirectory(run)).scored))
    assert np.array_equal(
        exact[np.arange(len(position))[:, None], place[np.searchsorted(position, found, sorter=place)]], similarity
    )
    wanted = -np.sort(-exact, axis=1)[:, :12]
    close = wanted >= 0.8
    assert np.mean(similarity[close] == wanted[close]) >= (1 if flat else 0.999) and close.sum() > 2000


@pytest.mark.parametrize("at_most", [600, 60_000, 400_000])
def test_on_disk_it_finds_what_it_finds_in_memory(run, tmp_path, quiet, small, at_most):
    one = opened(run, tmp_path / "index", quiet, 1 << 30)
    other = opened(run, tmp_path / "index", quiet, at_most)
    made = opened(run, tmp_path / "made", quiet, at_most)
    assert (one.fits, other.fits, made.fits) == (True, False, False)
    for name in ("vectors.f16", "starts.npy", "positions.npy", "index.faiss"):
        assert (tmp_path / "index" / name).read_bytes() == (tmp_path / "made" / name).read_bytes(), name
    _, vectors = next(one.blocks())
    for k in (5, 64):
        for queries in (vectors, vectors[:3]):
            wanted, position = one.search(queries, k)
            for index in (other, made):
                similarity, found = index.search(queries, k)
                assert np.array_equal(similarity, wanted)
                listed = wanted > wanted[:, -1:]  # of those at the end of a list any may be on it
                assert all(set(a[m]) == set(b[m]) for a, b, m in zip(found, position, listed, strict=True))


def test_no_more_is_in_memory_than_was_asked_for(run, tmp_path, quiet, small, monkeypatch):
    loaded: list[int] = []
    load = ClusterFile.load

    def counted(self, into, some):
        loaded.append(sum(self.starts[c + 1] - self.starts[c] for c in some.tolist()))
        load(self, into, some)

    monkeypatch.setattr(ClusterFile, "load", counted)
    index = opened(run, tmp_path / "index", quiet, 300 * 520)
    assert not index.fits and loaded == []
    _, vectors = next(index.blocks())
    index.search(vectors, 8)
    assert len(loaded) >= 4 and max(loaded) <= 300


def test_few_queries_read_their_clusters_and_many_read_all_once(run, tmp_path, quiet, small, monkeypatch):
    read: list[int] = []
    load = ClusterFile.load
    monkeypatch.setattr(ClusterFile, "load", lambda self, into, some: (read.append(len(some)), load(self, into, some)))
    index = opened(run, tmp_path / "index", quiet, 1 << 30)
    _, vectors = next(index.blocks())
    few = index.search(vectors[:2], 5)
    assert len(read) == 1 and read[0] <= 2 * index.about["clusters_searched"]
    many = index.search(vectors, 5)
    assert read[1:] == [index.about["clusters"]] and all(
        np.array_equal(a, b[:2]) for a, b in zip(few, many, strict=True)
    )
    index.search(vectors[:2], 5)
    assert len(read) == 2


def test_clusters_are_the_same_in_any_order_and_with_any_number_of_threads(run, tmp_path, quiet, small):
    from tests.codes import Sample

    samples = clustered(1500, seed=40)
    order = np.random.default_rng(2).permutation(len(samples))
    moved = [
        Sample(**{**vars(samples[i]), "shard": f"/data/m{n % 5}.tar", "row": n // 5})
        for n, i in enumerate(order.tolist())
    ]
    other = write_run(tmp_path / "other", moved, group=77)
    found = []
    for path, n in ((run, 1), (other, 3)):
        with threads(n):
            index = opened(path, tmp_path / f"index{n}", quiet, 1 << 30)
        starts = np.load(tmp_path / f"index{n}" / "starts.npy")
        vectors = np.concatenate([some for _, some in index.blocks()])
        found.append([sorted(map(bytes, vectors[a:b].astype(np.float16))) for a, b in itertools.pairwise(starts)])
        assert (tmp_path / f"index{n}" / "index.faiss").read_bytes() == (
            tmp_path / "index1" / "index.faiss"
        ).read_bytes()
    assert found[0] == found[1]


def test_an_index_of_another_format_is_made_anew(run, tmp_path, quiet, small):
    opened(run, tmp_path / "index", quiet, 1 << 30)
    manifest = tmp_path / "index" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"format": 2', '"format": 1'))
    (tmp_path / "index" / "vectors.f16").unlink()
    opened(run, tmp_path / "index", quiet, 1 << 30)
    assert manifest.read_text() == text and (tmp_path / "index" / "vectors.f16").exists()


def test_a_damaged_index_is_named(run, tmp_path, quiet, small):
    folder = tmp_path / "index"
    for name, wrong in (
        ("vectors.f16", b"short"),
        ("index.faiss", b"nothing"),
        ("positions.npy", b""),
        ("starts.npy", b"x"),
    ):
        opened(run, tmp_path / "index", quiet, 1 << 30)
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(wrong)
        with pytest.raises(RunError, match=r"index '.*index' cannot be read \(.*\); delete the folder and run again"):
            opened(run, tmp_path / "index", quiet, 1 << 30)
        (folder / name).write_bytes(kept)


def test_several_at_once_leave_one_whole_index(run, tmp_path, quiet, small):
    failed: list[BaseException] = []

    def one() -> None:
        try:
            opened(run, tmp_path / "index", quiet, 1 << 30)
        except BaseException as error:
            failed.append(error)

    running = [threading.Thread(target=one) for _ in range(3)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert failed == [] and [path.name for path in tmp_path.iterdir()] == ["index"]
    assert len(opened(run, tmp_path / "index", quiet, 1 << 30)) == len(np.load(tmp_path / "index" / "positions.npy"))


class Broken:
    """A GPU index that runs out of memory."""

    def search(self, vectors, k):
        raise RuntimeError(
            "Error in virtual void* x() at y.cpp:67: Error: 'err == cudaSuccess' failed: "
            "StandardGpuResources: alloc fail"
        )


def test_a_gpu_that_gives_up_is_a_note_and_the_cpu_goes_on(run, tmp_path, quiet):
    index = opened(run, tmp_path / "index", quiet, 1 << 30)
    _, vectors = next(index.blocks())
    wanted = index.search(vectors, 5)
    index.gpu, index.progress = Broken(), quiet
    assert all(np.array_equal(a, b) for a, b in zip(index.search(vectors, 5), wanted, strict=True))
    assert quiet.notes == ["the GPU cannot search on (StandardGpuResources: alloc fail): searching on the CPU"]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("faiss-gpu installed but libx is missing"),
        OSError("libcublas.so.12: cannot open"),
        ImportError("no symbol"),
    ],
)
def test_a_faiss_that_cannot_be_loaded_is_one_line(monkeypatch, error):
    import builtins

    real = builtins.__import__

    def failing(name, *rest, **more):
        if name == "faiss":
            raise error
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", failing)
    with pytest.raises(MMFilterError) as caught:
        load_faiss()
    anew = "pip uninstall faiss-cpu faiss-gpu, then pip install 'mmfilter[cpu]'"
    assert (
        str(caught.value)
        == f"FAISS is installed but cannot be loaded ({error}); install what it lacks, or it anew: {anew}"
    )
