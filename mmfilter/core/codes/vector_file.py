"""Half-precision vectors one after another in a file, read in pieces: only the piece that is asked for is in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

BLOCK = 16_384
"""Vectors that are read at one time where nothing else is said"""


class VectorFile:
    """Vectors of `dims` numbers; open from when it is made, so it can be read after its folder has been replaced."""

    def __init__(self, path: Path, dims: int, *, new: bool = False) -> None:
        self._file = path.open("w+b" if new else "rb", buffering=0)
        self.dims = dims

    def __len__(self) -> int:
        return self._file.seek(0, 2) // (2 * self.dims)

    def add(self, vectors: np.ndarray) -> None:
        """Append (n, dims); what half precision cannot hold is rounded."""
        self._file.seek(0, 2)
        rest = np.ascontiguousarray(vectors, np.float16).data.cast("B")
        while rest:
            rest = rest[self._file.write(rest) :]

    def read(self, first: int, stop: int) -> np.ndarray:
        """(stop − first, dims) float16. Raises `ValueError` where the file is shorter."""
        vectors = np.empty((stop - first, self.dims), np.float16)
        rest = vectors.data.cast("B") if len(vectors) else memoryview(b"")
        self._file.seek(2 * self.dims * first)
        while rest:
            n = self._file.readinto(rest)
            if not n:
                raise ValueError(f"it ends before vector {stop:,}")
            rest = rest[n:]
        return vectors

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """All vectors in pieces: the number of the first, and (n, dims) float16."""
        n = len(self)
        for first in range(0, n, BLOCK):
            yield first, self.read(first, min(first + BLOCK, n))

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """The vectors of these numbers, in that order, in one pass over the file."""
        taken = np.empty((len(numbers), self.dims), np.float16)
        ascending = np.argsort(numbers, kind="stable")
        numbers = numbers[ascending]
        for first, vectors in self.blocks():
            at = slice(*np.searchsorted(numbers, (first, first + len(vectors))))
            taken[ascending[at]] = vectors[numbers[at] - first]
        return taken

    def rearranged(self, path: Path, order: np.ndarray, at_once: int) -> VectorFile:
        """A new file with vector `order[i]` as its i-th, made with `at_once` vectors in memory, in as many passes as
        that takes."""
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        other = VectorFile(path, self.dims, new=True)
        for start in range(0, len(order), at_once):
            part = np.empty((min(at_once, len(order) - start), self.dims), np.float16)
            for first, vectors in self.blocks():
                to = place[first : first + len(vectors)] - start
                inside = (to >= 0) & (to < len(part))
                part[to[inside]] = vectors[inside]
            other.add(part)
        return other

    def close(self) -> None:
        self._file.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):  # it could be opened
            self._file.close()
