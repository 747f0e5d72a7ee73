"""The sketches of an index with clusters, in a file, cluster after cluster."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmfilter.core.codes.faiss_library import load_faiss
from mmfilter.core.codes.vector_file import VectorFile


class ClusterFile:
    """The sketches by cluster; their numbers count through the file."""

    def __init__(self, vectors: VectorFile, starts: np.ndarray) -> None:
        self.vectors, self.starts = vectors, starts

    def load(self, into: Any, some: np.ndarray) -> None:
        """Add these clusters to FAISS's lists."""
        faiss = load_faiss()
        for cluster, first, stop in zip(
            some.tolist(), self.starts[some].tolist(), self.starts[some + 1].tolist(), strict=True
        ):
            if first < stop:
                codes, numbers = self.vectors.read(first, stop).view(np.uint8), np.arange(first, stop)
                into.add_entries(cluster, stop - first, faiss.swig_ptr(numbers), faiss.swig_ptr(codes))

    def parts(self, some: np.ndarray, at_once: int) -> list[np.ndarray]:
        """These clusters in parts of at most so many sketches, or of one cluster that has more."""
        before = np.cumsum(self.starts[some + 1] - self.starts[some])
        cuts, full = [0], 0
        while (cut := int(np.searchsorted(before, full + at_once, side="right"))) < len(some):
            cuts.append(max(cut, cuts[-1] + 1))
            full = int(before[cuts[-1] - 1])
        return [part for part in np.split(some, cuts[1:]) if len(part)]
