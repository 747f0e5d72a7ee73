"""An index over the sketches of a run's codes.

Up to `FLAT` samples every query is held against every sample. Above, samples lie in clusters (an
inverted file) and a query looks into the nearest few; how many is settled by what they find of the true
neighbours of sampled queries. The index is only to suggest: whoever uses it asks the codes themselves.

A folder: `index.faiss`, `positions.npy` (of the samples in the run, in the order of FAISS's numbers) and
`manifest.json`. With clusters, `index.faiss` has the centroids, `vectors.f16` the sketches in half
precision, cluster after cluster, and `starts.npy` where each begins. A search of many reads all of them
into memory when they fit into what the index may take; else it reads the clusters that it looks into, a
part at a time. What is found is the same either way.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmfilter import __version__
from mmfilter.core import memory
from mmfilter.core.codes import clusters
from mmfilter.core.codes.cluster_file import ClusterFile
from mmfilter.core.codes.code_tables import CodeTables
from mmfilter.core.codes.duplicate_settings import On, sides_of
from mmfilter.core.codes.faiss_library import faiss_message, load_faiss
from mmfilter.core.codes.vector_file import BLOCK, VectorFile
from mmfilter.core.codes.vectors import Sketch, margin
from mmfilter.core.files import read_json, write_json
from mmfilter.core.progress import Progress
from mmfilter.errors import RunError

FLAT = 20_000
"""Samples up to which every pair is looked at"""
MOST_CLUSTERS = 16_384
TRAINING = 32
"""Samples a cluster that the clusters are fitted on"""
FORMAT = 2
"""Of the folder; an index of another one is made anew"""
MANY = 256
"""Queries at one time from which all of the sketches are read, if they fit; fewer have their clusters read"""
KEEP, BY_RESIDUAL = False, False
"""What FAISS takes by position: whether an index owns its lists, and whether it encodes differences from centroids"""
LEAST_AT_ONCE = 64 << 20
"""Bytes of sketches that are in memory at one time in any case"""


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

    @property
    def sides(self) -> tuple[str, ...]:
        return sides_of(self.on)

    def sketch(self, idf: np.ndarray) -> Sketch:
        return Sketch(idf, self.sides, dims=self.dims, nonzeros=self.nonzeros, seed=self.seed)


class CodeIndex:
    """Finds samples with near sketches; positions are those in the run."""

    def __init__(
        self, faiss_index: Any, lists: ClusterFile | None, positions: np.ndarray, about: dict[str, Any], at_most: int
    ) -> None:
        """`lists` are the sketches by cluster where there are clusters; those in memory take `at_most` bytes."""
        self._index, self._lists, self._positions, self.about = faiss_index, lists, positions, about
        self.gpu: Any = None
        self._at_once = max(at_most, LEAST_AT_ONCE) // _nbytes(1, self._index.d)
        self.fits = lists is None or len(positions) <= self._at_once
        """Whether all of it may be in memory"""
        self._in_memory = lists is None

    def __len__(self) -> int:
        return len(self._positions)

    def margin(self, similarity: float) -> float:
        """How far below `similarity` to look (see `vectors.margin`)."""
        return margin(similarity, self.about["settings"]["dims"])

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosine of sketches and positions of the k nearest, (queries, k), nearest first; position −1 where there are
        fewer."""
        if self.fits and len(vectors) >= MANY:
            self._read_all()
        look = self._on_gpu if self.gpu is not None else self._index.search if self._in_memory else self._from_disk
        similarity, number = look(vectors, k)
        return similarity, np.where(number >= 0, self._positions[number], -1) if len(self) else number

    def _read_all(self) -> None:
        if not self._in_memory:
            self._read(np.arange(self._index.nlist))
            self._in_memory = True

    @property
    def _file(self) -> ClusterFile:
        assert self._lists is not None  # an index without clusters is in memory
        return self._lists

    def _read(self, some: np.ndarray) -> None:
        """Let FAISS have these clusters and no others."""
        faiss = load_faiss()
        part = faiss.ArrayInvertedLists(self._index.nlist, self._index.code_size)
        self._file.load(part, some)
        self._index.replace_invlists(part, KEEP)
        self._part = part  # the index holds no reference

    def _from_disk(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `search`, by numbers: the clusters that the queries look into are read in parts, the best of all parts
        kept."""
        closeness, cluster = self._index.quantizer.search(vectors, self._index.nprobe)
        best = np.full((len(vectors), k), -np.inf, np.float32), np.full((len(vectors), k), -1)
        half = max(1, self._at_once // 2)  # a part goes when the next is there
        for some in self._file.parts(np.unique(cluster), half):
            self._read(some)
            query = np.flatnonzero(np.isin(cluster, some).any(1))
            hits = self._index.search_preassigned(
                vectors[query], k, np.where(np.isin(cluster[query], some), cluster[query], -1), closeness[query]
            )
            both = [np.concatenate([old[query], new], axis=1) for old, new in zip(best, hits, strict=True)]
            order = np.argsort(-both[0], axis=1, kind="stable")[:, :k]
            for old, new in zip(best, both, strict=True):
                old[query] = np.take_along_axis(new, order, 1)
        return best

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Positions and sketches of all samples, those of a cluster together."""
        for first in range(0, len(self), BLOCK):
            stop = min(first + BLOCK, len(self))
            vectors = (
                self._index.reconstruct_n(first, stop - first)
                if self._lists is None
                else self._lists.vectors.read(first, stop)
            )
            yield self._positions[first:stop], vectors.astype(np.float32)

    def to_gpu(self, progress: Progress) -> None:
        """Search on the GPU from now on, or go on without where it cannot hold this index, with a note."""
        faiss = load_faiss()
        if not self.fits:
            progress.note("the index does not fit into memory: searching on the CPU, a part at a time")
            return
        self._read_all()
        try:
            self._resources = faiss.StandardGpuResources()  # to live as long as the index on the GPU
            self.gpu = faiss.index_cpu_to_gpu(self._resources, 0, self._index)
            self.progress = progress
        except RuntimeError as error:
            progress.note(f"the GPU cannot take the index ({faiss_message(error)}): searching on the CPU")

    def _on_gpu(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        try:
            return self.gpu.search(vectors, k)
        except RuntimeError as error:  # out of its memory, most likely
            self.gpu = None
            self.progress.note(f"the GPU cannot search on ({faiss_message(error)}): searching on the CPU")
            return self._index.search(vectors, k)


def _nbytes(n: int, dims: int) -> int:
    """What FAISS holds of so many sketches in clusters: the numbers in half precision, and which sample it is."""
    return n * (2 * dims + 8)


# --- making one ------------------------------------------------------------------------------


def open_index(
    tables: CodeTables,
    positions: np.ndarray,
    settings: IndexSettings,
    folder: Path,
    progress: Progress,
    *,
    at_most: int | None = None,
    keep: bool = True,
) -> CodeIndex:
    """The index in `folder` if it is one of these samples, made so; else a new one, saved there if it is to be kept and
    can be.

    `positions` are the ascending ones of the samples to index, `at_most` the bytes of memory that their sketches
    may take, half of what is free if None.
    """
    load_faiss()  # before anything is read
    at_most = memory.available() // 2 if at_most is None else at_most
    expected = {"format": FORMAT, "settings": asdict(settings), "inputs": tables.digest, "samples": len(positions)}
    index = _stored(folder, expected, at_most)
    if index is not None:
        return index
    if keep and not os.access(folder.parent, os.W_OK):
        progress.note(f"{str(folder.parent)!r} cannot be written: its index is made now and not kept for the next time")
        keep = False
    with tempfile.TemporaryDirectory(dir=folder.parent if keep else None, prefix=".index.", suffix=".tmp") as name:
        index, new = _build(tables, positions, settings, Path(name), expected, progress, at_most)
        if keep:
            _put(new, folder, Path(name))
    return index


def _stored(folder: Path, expected: dict[str, Any], at_most: int) -> CodeIndex | None:
    manifest = folder / "manifest.json"
    if not manifest.exists():
        return None
    about = read_json(manifest)
    if not isinstance(about, dict) or {name: about.get(name) for name in expected} != expected:
        return None
    try:
        index = _loaded(folder, about, at_most)
    except (RuntimeError, OSError, ValueError, KeyError, EOFError) as error:
        raise RunError(
            f"index {str(folder)!r} cannot be read ({faiss_message(error)}); delete the folder and run again"
        ) from error
    return index if read_json(manifest) == about else None  # another process may have replaced it meanwhile


def _loaded(folder: Path, about: dict[str, Any], at_most: int) -> CodeIndex:
    """Raises `ValueError` and what numpy and FAISS raise where the files are not what the manifest says."""
    faiss = load_faiss()
    index, positions, lists = faiss.read_index(str(folder / "index.faiss")), np.load(folder / "positions.npy"), None
    if about["clusters"]:
        lists = ClusterFile(VectorFile(folder / "vectors.f16", index.d), np.load(folder / "starts.npy"))
        index.ntotal, index.nprobe = len(lists.vectors), about["clusters_searched"]
    if not index.ntotal == len(positions) == about["samples"]:
        raise ValueError(f"it has {index.ntotal:,} sketches of {about['samples']:,} samples")
    return CodeIndex(index, lists, positions, about, at_most)


def _build(
    tables: CodeTables,
    positions: np.ndarray,
    settings: IndexSettings,
    place: Path,
    expected: dict[str, Any],
    progress: Progress,
    at_most: int,
) -> tuple[CodeIndex, Path]:
    """A new index, and the folder in `place` that it is in."""
    about = {"kind": "code index", "version": __version__, "faiss": load_faiss().__version__} | expected
    new = place / "new"
    new.mkdir()
    vectors = _sketches(tables, positions, settings.sketch(tables.idf), place / "vectors.f16", progress)
    at_once = max(at_most, LEAST_AT_ONCE) // _nbytes(1, vectors.dims)
    order, facts = _flat(vectors, new) if len(positions) <= FLAT else _clustered(vectors, new, at_once, progress)
    np.save(new / "positions.npy", positions[order])
    write_json(new / "manifest.json", about | facts)
    vectors.close()
    return _loaded(new, about | facts, at_most), new


def _put(new: Path, folder: Path, aside: Path) -> None:
    """Replace `folder` by `new`; the last of several processes that do so at once wins."""
    for attempt in range(100):
        with suppress(FileNotFoundError):
            folder.rename(aside / f"old{attempt}")
        try:
            new.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return
    raise RunError(f"index {str(folder)!r} is replaced by other processes all the time; run one at a time")


def _sketches(tables: CodeTables, positions: np.ndarray, sketch: Sketch, path: Path, progress: Progress) -> VectorFile:
    """The sketches of the samples at `positions`, on disk."""
    vectors = VectorFile(path, sketch.dims, new=True)
    if not len(positions):
        return vectors
    progress.start("reading codes", tables.nbytes)
    for codes, nbytes in tables.read(positions):
        for first in range(0, len(codes), 2048):
            vectors.add(sketch(codes.take(np.arange(first, min(first + 2048, len(codes))))))
        progress.advance(len(codes), nbytes)
    if len(vectors) != len(positions):
        raise RunError(
            f"the code tables hold {len(vectors):,} of {len(positions):,} samples that have scores; score the shards "
            "again"
        )
    return vectors


def _flat(vectors: VectorFile, folder: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The order of the samples in it, and what to say of it."""
    faiss = load_faiss()
    index = faiss.IndexFlatIP(vectors.dims)
    for _, some in vectors.blocks():
        index.add(some.astype(np.float32))
    _write(index, folder)
    return np.arange(index.ntotal), {"clusters": 0, "clusters_searched": 0, "true_neighbours": 0, "found": 1.0}


def _clustered(
    vectors: VectorFile, folder: Path, at_once: int, progress: Progress
) -> tuple[np.ndarray, dict[str, Any]]:
    """Clusters; as `_flat`. Nothing depends on the order of the samples but their order within a cluster."""
    faiss = load_faiss()
    n = len(vectors)
    k = min(MOST_CLUSTERS, round(4 * n**0.5))
    progress.start("clustering", None)
    chosen = clusters.sampled(vectors, TRAINING * k)
    sample = vectors.take(chosen).astype(np.float32)
    centroids = clusters.centroids_of(sample, k, nearest_centroids)
    quantizer = faiss.IndexFlatIP(vectors.dims)
    quantizer.add(centroids)
    index = faiss.IndexIVFScalarQuantizer(
        quantizer, vectors.dims, k, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, BY_RESIDUAL
    )
    index.train(sample[:1])  # there is nothing left to train; FAISS wants to be asked
    _write(index, folder)
    progress.start("indexing", None)
    home = np.empty(n, np.int32)
    for first, some in vectors.blocks():
        home[first : first + len(some)] = quantizer.search(some.astype(np.float32), 1)[1][:, 0]
        progress.advance(len(some), 0)
    order = np.argsort(home, kind="stable")
    np.save(folder / "starts.npy", np.searchsorted(home[order], np.arange(k + 1)))
    vectors.rearranged(folder / "vectors.f16", order, at_once).close()
    progress.start("checking the index", None)
    queries = sample[: clusters.PROBED]
    pieces = ((first, some, home[first : first + len(some)]) for first, some in vectors.blocks())
    return order, {"clusters": k} | clusters.to_look_into(chosen[: len(queries)], queries, centroids, pieces)


def _write(index: Any, folder: Path) -> None:
    """Not by `faiss.write_index`: on a full disk that raises what is not an `OSError`."""
    faiss = load_faiss()
    (folder / "index.faiss").write_bytes(memoryview(faiss.serialize_index(index)))


def nearest_centroids(centroids: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    faiss = load_faiss()
    index = faiss.IndexFlatIP(centroids.shape[1])
    index.add(centroids)
    similarity, cluster = index.search(vectors, 1)
    return similarity[:, 0], cluster[:, 0]
