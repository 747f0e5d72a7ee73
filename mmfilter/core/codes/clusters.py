"""Clusters of sketches: where they lie, and how many of them a query has to look into.

Sketches and centroids are multiples of 1 / `GRID` (see `vectors.Sketch`), so the products and sums below
have no rounding, and whatever the order of the samples, the number of threads or the machine, every
vector has the same nearest cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from mmfilter.core.codes.vector_file import VectorFile
from mmfilter.core.codes.vectors import on_grid

ROUNDS = 8
PROBED = 1_000
"""Sampled queries whose true neighbours settle how many clusters are looked into"""
CLOSE = 0.9
"""Cosine of sketches from which a sample counts as a true neighbour there"""
AIM = 0.999
"""Share of the true neighbours to be found from one end of a pair alone"""
AT_LEAST = 8
"""Clusters that are looked into in any case"""

Nearest = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(centroids, vectors) to the cosine with the nearest centroid and its number, each (vectors,)"""


def centroids_of(sample: np.ndarray, k: int, nearest: Nearest) -> np.ndarray:
    """(k, dims) float32: spherical k-means over a sample (n, dims) float32 in a random order, n at least k.

    Starts from the first k. A cluster that loses all its vectors gets one of those that are farthest from
    their own.
    """
    centroids = sample[:k].copy()
    for _ in range(ROUNDS):
        similarity, cluster = nearest(centroids, sample)
        order = np.argsort(cluster, kind="stable")
        used, starts = np.unique(cluster[order], return_index=True)
        sums = np.add.reduceat(sample[order], starts, axis=0, dtype=np.float64)
        empty = np.setdiff1d(np.arange(k), used)
        centroids[used] = on_grid(sums)
        centroids[empty] = sample[np.argsort(similarity, kind="stable")[: len(empty)]]
    return centroids


def sampled(vectors: VectorFile, n: int) -> np.ndarray:
    """`n` rows by a hash of their content, in its order: the same samples whatever order they come in."""
    odd = np.random.PCG64(7).random_raw(vectors.dims // 4) | 1
    digest = np.concatenate([_mixed(some, odd) for _, some in vectors.blocks()])
    n = min(n, len(digest))
    chosen = np.argpartition(digest, n - 1)[:n]
    return chosen[np.argsort(digest[chosen], kind="stable")]


def _mixed(vectors: np.ndarray, odd: np.ndarray) -> np.ndarray:
    words = np.ascontiguousarray(vectors).view(np.uint64)
    words = (words ^ (words >> np.uint64(29))) * odd
    total = (words ^ (words >> np.uint64(32))).sum(1, dtype=np.uint64)
    return (total ^ (total >> np.uint64(31))) * odd[0]


def to_look_into(
    chosen: np.ndarray, queries: np.ndarray, centroids: np.ndarray, pieces: Iterable[tuple[int, np.ndarray, np.ndarray]]
) -> dict[str, Any]:
    """How many of the nearest clusters hold the share `AIM` of the true neighbours of the vectors `chosen`, and what
    they hold.

    `queries` (n, dims) are those vectors; `pieces` of all of them: the number of the first, vectors and clusters.
    """
    order = np.argsort(-(queries @ centroids.T), axis=1, kind="stable")
    rank = np.empty(order.shape, np.int32)
    np.put_along_axis(rank, order, np.arange(len(centroids), dtype=np.int32)[None], axis=1)
    ranks = np.zeros(len(centroids), np.int64)
    for first, vectors, home in pieces:
        query, neighbour = np.nonzero(queries @ vectors.astype(np.float32).T >= CLOSE)
        other = chosen[query] != first + neighbour
        ranks += np.bincount(rank[query[other], home[neighbour[other]]], minlength=len(centroids))
    n = int(ranks.sum())
    if not n:
        return {"clusters_searched": min(2 * AT_LEAST, len(centroids)), "true_neighbours": 0, "found": None}
    reached = np.cumsum(ranks) / n
    searched = min(max(AT_LEAST, int(np.searchsorted(reached, AIM)) + 1), len(centroids))
    return {"clusters_searched": searched, "true_neighbours": n, "found": float(reached[searched - 1])}
