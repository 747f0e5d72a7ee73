"""An index over the sketches of a run's codes; the one door to FAISS.

Up to `FLAT` samples every query is held against every sample. Above, samples lie in clusters (an
inverted file) and a query looks into the nearest few; how many is settled by what they find of the true
neighbours of sampled queries. The index is only to suggest: whoever uses it asks the codes themselves.

A folder: `index.faiss`, `positions.npy` (of the samples in the run, in the order of FAISS's numbers) and
`manifest.json`. Samples are stored in half precision, beyond some 16 million in 8 and beyond some 32
million in 4 bits a number, so that the index of 100 million samples fits into 16 GB.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from mmfilter import __version__
from mmfilter.core.codes.tables import CodeTables
from mmfilter.core.codes.vectors import SIDES, Sketch, margin
from mmfilter.core.data import artifacts
from mmfilter.core.data.progress import Progress
from mmfilter.core.data.repack import new_folder
from mmfilter.errors import MissingExtra, MMFilterError, RunError, SelectionError

On = Literal["both", "image", "text"]

FLAT = 20_000
"""Samples up to which every pair is looked at"""
TRAINING = 32
"""Samples a cluster that the clusters are fitted on"""
PROBED = 1_000
"""Sampled queries whose true neighbours settle how many clusters are looked into"""
CLOSE = 0.9
"""Cosine of sketches from which a sample counts as a true neighbour there"""
AIM = 0.999
"""Share of the true neighbours to be found from one end of a pair alone"""
AT_LEAST = 8
"""Clusters that are looked into in any case"""
BLOCK = 16_384


@dataclass(frozen=True)
class IndexSettings:
    """What is indexed, and how; an index made with others is made anew."""

    on: On = "both"
    """Which sides count"""
    dims: int = 256
    """Numbers a sketch"""
    nonzeros: int = 16
    """… that a feature adds to"""
    seed: int = 0
    """Of the projection"""

    def __post_init__(self) -> None:
        if self.on not in get_args(On):
            raise SelectionError(f"--on {self.on!r} is unknown; choose from {', '.join(get_args(On))}")

    @property
    def sides(self) -> tuple[str, ...]:
        return SIDES if self.on == "both" else (self.on,)

    def sketch(self, idf: np.ndarray) -> Sketch:
        return Sketch(idf, self.sides, dims=self.dims, nonzeros=self.nonzeros, seed=self.seed)


class CodeIndex:
    """Finds samples with near sketches; positions are those in the run."""

    def __init__(self, faiss_index: Any, positions: np.ndarray, about: dict[str, Any]) -> None:
        self._index, self._searched, self._positions, self.about = faiss_index, faiss_index, positions, about

    def __len__(self) -> int:
        return len(self._positions)

    def margin(self, similarity: float) -> float:
        """How far below `similarity` to look (see `vectors.margin`)."""
        return margin(similarity, self.about["settings"]["dims"], self.about["noise"])

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosine of sketches and positions of the k nearest, (queries, k), nearest first; position −1 where there are fewer."""
        similarity, found = self._searched.search(vectors, k)
        return similarity, np.where(found >= 0, self._positions[found], -1)

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Positions and stored vectors of all samples, those of a cluster together."""
        if not self.about["clusters"]:
            for first in range(0, len(self), BLOCK):
                n = min(BLOCK, len(self) - first)
                yield self._positions[first : first + n], self._index.reconstruct_n(first, n)
            return
        numbers: list[np.ndarray] = []
        vectors: list[np.ndarray] = []
        for cluster in range(self._index.nlist):
            ids, found = _members(self._index, cluster)
            numbers.append(ids)
            vectors.append(found)
            if sum(map(len, numbers)) >= BLOCK or cluster + 1 == self._index.nlist:
                yield self._positions[np.concatenate(numbers)], np.concatenate(vectors)
                numbers, vectors = [], []

    def to_gpu(self) -> None:
        """Search on the GPU from now on; raises `MMFilterError` when FAISS cannot."""
        import faiss

        check_gpu()
        try:
            self._resources = faiss.StandardGpuResources()  # to live as long as the index on the GPU
            self._searched = faiss.index_cpu_to_gpu(self._resources, 0, self._index)
        except RuntimeError as error:
            raise MMFilterError(f"--gpu: the index of {len(self):,} samples cannot be put on the GPU ({str(error).splitlines()[0]}); go without") from error

    def save(self, folder: Path) -> None:
        """Replace `folder` by this index."""
        import faiss

        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".index.", suffix=".tmp") as old, new_folder(folder) as new:
            faiss.write_index(self._index, str(new / "index.faiss"))
            np.save(new / "positions.npy", self._positions)
            artifacts.write_json(new / "manifest.json", self.about)
            if folder.exists():
                folder.rename(Path(old) / "index")


def check_gpu() -> None:
    """Raise `MMFilterError` unless FAISS has GPU support and sees one."""
    faiss = _faiss()
    if not hasattr(faiss, "StandardGpuResources"):
        raise MMFilterError(f"--gpu: this FAISS ({faiss.__version__}) is for CPUs: pip uninstall faiss-cpu, then pip install 'mmfilter[gpu]'")
    if not faiss.get_num_gpus():
        raise MMFilterError(f"--gpu: FAISS ({faiss.__version__}) sees no GPU; go without --gpu")


def check_installed() -> None:
    """Raise `MissingExtra` when there is no FAISS, without loading it."""
    if importlib.util.find_spec("faiss") is None:
        raise MissingExtra("the index over codes", "cpu")


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtra("the index over codes", "cpu") from error
    return faiss


@contextmanager
def threads(workers: int | None) -> Iterator[None]:
    """FAISS with so many threads inside the block; None leaves it as it is."""
    faiss = _faiss()
    before = faiss.omp_get_max_threads()
    if workers is not None:
        faiss.omp_set_num_threads(workers)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


# --- making one ------------------------------------------------------------------------------


def open_index(tables: CodeTables, wanted: np.ndarray, settings: IndexSettings, folder: Path, progress: Progress) -> CodeIndex:
    """The index in `folder` if it is one of these samples, made so; else a new one, saved there.

    `wanted` are the ascending positions of the samples to index.
    """
    faiss = _faiss()
    expected = {"settings": asdict(settings), "inputs": tables.digest, "samples": len(wanted)}
    if (folder / "manifest.json").exists():
        about = artifacts.read_json(folder / "manifest.json")
        if {name: about.get(name) for name in expected} == expected:
            try:
                index = faiss.read_index(str(folder / "index.faiss"))
                return CodeIndex(index, np.load(folder / "positions.npy"), about)
            except (RuntimeError, OSError, ValueError) as error:
                raise RunError(f"index {str(folder)!r} cannot be read ({str(error).splitlines()[0]}); delete the folder and run again") from error
    index = _build(tables, wanted, settings, folder.parent, expected, progress)
    index.save(folder)
    return index


def _build(tables: CodeTables, wanted: np.ndarray, settings: IndexSettings, place: Path, expected: dict[str, Any], progress: Progress) -> CodeIndex:
    about = {"kind": "code index", "version": __version__, "faiss": _faiss().__version__} | expected
    with tempfile.TemporaryDirectory(dir=place, prefix=".index.", suffix=".tmp") as name:
        vectors = _sketches(tables, wanted, settings.sketch(tables.idf), Path(name) / "vectors.npy", progress)
        index, found = _flat(vectors) if len(wanted) <= FLAT else _clustered(vectors, progress)
    return CodeIndex(index, wanted, about | found)


def _sketches(tables: CodeTables, wanted: np.ndarray, sketch: Sketch, path: Path, progress: Progress) -> np.ndarray:
    """The sketches of all samples in half precision, on disk."""
    if not len(wanted):
        return np.zeros((0, sketch.dims), np.float16)
    vectors = np.lib.format.open_memmap(path, "w+", np.float16, (len(wanted), sketch.dims))
    progress.start("reading codes", tables.nbytes)
    done = 0
    for codes, nbytes in tables.read(wanted):
        for first in range(0, len(codes), 2048):
            some = codes.take(np.arange(first, min(first + 2048, len(codes))))
            vectors[done : done + len(some)] = sketch(some)
            done += len(some)
        progress.advance(len(codes), nbytes)
    if done != len(wanted):
        raise RunError(f"the code tables hold {done:,} of {len(wanted):,} samples that have scores; score the shards again")
    return vectors


def _flat(vectors: np.ndarray) -> tuple[Any, dict[str, Any]]:
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    for first in range(0, len(vectors), BLOCK):
        index.add(vectors[first : first + BLOCK].astype(np.float32))
    return index, {"clusters": 0, "clusters_searched": 0, "noise": 0.0, "true_neighbours": 0, "found": 1.0}


def _clustered(vectors: np.ndarray, progress: Progress) -> tuple[Any, dict[str, Any]]:
    """An inverted file. Nothing in it depends on the order of the samples but the numbers."""
    import faiss

    n, dims = vectors.shape
    clusters = min(16_384, round(4 * n**0.5))
    kind = "QT_fp16" if n <= 16_000_000 else "QT_8bit" if n <= 32_000_000 else "QT_4bit"
    storage = getattr(faiss.ScalarQuantizer, kind)
    index = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(dims), dims, clusters, storage, faiss.METRIC_INNER_PRODUCT, False)
    index.cp.niter, index.cp.seed, index.cp.min_points_per_centroid = 8, 1, 1
    chosen = _sampled(vectors, TRAINING * clusters)
    sample = vectors[chosen].astype(np.float32)
    progress.start("clustering", None)
    index.train(sample)
    progress.start("indexing", n)
    for first in range(0, n, BLOCK):
        some = vectors[first : first + BLOCK].astype(np.float32)
        index.add(some)
        progress.advance(len(some), len(some))
    stored = index.sq.decode(index.sq.compute_codes(sample[:PROBED]))
    noise = 0.0 if kind == "QT_fp16" else float(((stored - sample[:PROBED]) ** 2).sum(1).mean())
    progress.start("checking the index", n)
    ranks = _ranks(index, vectors, chosen[:PROBED], progress)
    reached = np.cumsum(ranks) / max(1, ranks.sum())
    index.nprobe = int(max(AT_LEAST, np.searchsorted(reached, AIM) + 1)) if ranks.sum() else 2 * AT_LEAST
    found = float(reached[index.nprobe - 1]) if ranks.sum() else None
    measured = {"clusters": clusters, "clusters_searched": index.nprobe, "noise": noise, "true_neighbours": int(ranks.sum()), "found": found}
    return index, measured | {"storage": kind}


def _sampled(vectors: np.ndarray, n: int) -> np.ndarray:
    """`n` rows by a hash of their content, in its order: the same samples whatever order they come in."""
    words = vectors.shape[1] // 4
    odd = np.random.PCG64(7).random_raw(words) | 1
    digest = np.concatenate([_mixed(vectors[first : first + BLOCK], odd) for first in range(0, len(vectors), BLOCK)])
    n = min(n, len(vectors))
    chosen = np.argpartition(digest, n - 1)[:n]
    return chosen[np.argsort(digest[chosen], kind="stable")]


def _mixed(vectors: np.ndarray, odd: np.ndarray) -> np.ndarray:
    words = np.ascontiguousarray(vectors).view(np.uint64)
    words = (words ^ (words >> np.uint64(29))) * odd
    total = (words ^ (words >> np.uint64(32))).sum(1, dtype=np.uint64)
    return (total ^ (total >> np.uint64(31))) * odd[0]


def _ranks(index: Any, vectors: np.ndarray, chosen: np.ndarray, progress: Progress) -> np.ndarray:
    """Of the true neighbours of the rows `chosen`, how many lie in the nearest cluster, the second nearest, … (clusters,)."""
    home = np.empty(len(vectors), np.int32)
    for cluster in range(index.nlist):
        home[_members(index, cluster)[0]] = cluster
    queries = vectors[chosen].astype(np.float32)
    _, nearest = index.quantizer.search(queries, index.nlist)
    rank = np.empty((len(queries), index.nlist), np.int32)
    np.put_along_axis(rank, nearest, np.arange(index.nlist, dtype=np.int32)[None], axis=1)
    ranks = np.zeros(index.nlist, np.int64)
    for first in range(0, len(vectors), BLOCK):
        some = vectors[first : first + BLOCK].astype(np.float32)
        query, found = np.nonzero(queries @ some.T >= CLOSE)
        other = chosen[query] != first + found
        ranks += np.bincount(rank[query[other], home[first + found[other]]], minlength=index.nlist)
        progress.advance(len(some), len(some))
    return ranks


def _members(index: Any, cluster: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and vectors of the samples in a cluster."""
    import faiss

    n = index.invlists.list_size(cluster)
    if not n:
        return np.zeros(0, np.int64), np.zeros((0, index.d), np.float32)
    ids = faiss.rev_swig_ptr(index.invlists.get_ids(cluster), n).copy()
    codes = faiss.rev_swig_ptr(index.invlists.get_codes(cluster), n * index.code_size).reshape(n, index.code_size)
    return ids, index.sq.decode(np.ascontiguousarray(codes))
