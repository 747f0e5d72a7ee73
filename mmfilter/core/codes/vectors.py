"""Pooled sparse codes of many samples as arrays: exact cosines, and short dense sketches of them.

A side's vector is idf_j · mean_j over its features j, as in the score `similarity`: the mean counts what
fills a picture or a caption, and the rarity takes away what all samples share. Only the features that
the code table keeps take part, the strongest 256 a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmfilter.core.sides import SIDES

_ENTRIES_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class SideCodes:
    """One side of many samples; row i has the entries `starts[i]` to `starts[i + 1]`."""

    starts: np.ndarray
    """(samples + 1,) int64"""
    ids: np.ndarray
    """(entries,) uint32, features"""
    means: np.ndarray
    """(entries,) float16, mean activation over the side's tokens"""

    def __len__(self) -> int:
        return len(self.starts) - 1

    @classmethod
    def empty(cls, n: int) -> SideCodes:
        """Samples without any feature."""
        return cls(np.zeros(n + 1, np.int64), np.zeros(0, np.uint32), np.zeros(0, np.float16))

    @classmethod
    def of_lengths(cls, lengths: np.ndarray, ids: np.ndarray, means: np.ndarray) -> SideCodes:
        return cls(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), ids, means)

    @classmethod
    def concatenate(cls, parts: Sequence[SideCodes]) -> SideCodes:
        if not parts:
            return cls.empty(0)
        lengths = np.concatenate([np.diff(part.starts) for part in parts])
        return cls.of_lengths(
            lengths, np.concatenate([part.ids for part in parts]), np.concatenate([part.means for part in parts])
        )

    @property
    def rows(self) -> np.ndarray:
        """The row of every entry."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def take(self, at: np.ndarray) -> SideCodes:
        """The samples `at`, in that order; one may come more than once."""
        lengths = self.starts[at + 1] - self.starts[at]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        entry = np.arange(starts[-1]) + np.repeat(self.starts[at] - starts[:-1], lengths)
        return SideCodes(starts, self.ids[entry], self.means[entry])

    def by_feature(self) -> SideCodes:
        """The same samples, entries in the order of features."""
        order = np.argsort((self.rows << 32) | self.ids)
        return SideCodes(self.starts, self.ids[order], self.means[order])

    def weights(self, idf: np.ndarray) -> np.ndarray:
        """(entries,) float64: idf_j · mean_j."""
        return self.means.astype(np.float64) * idf[self.ids]

    def norms(self, idf: np.ndarray) -> np.ndarray:
        """(samples,) float64: length of each vector, summed in the order of the entries."""
        norms = np.empty(len(self))
        for first in range(0, len(self), 16_384):
            starts = self.starts[first : first + 16_385]
            some = SideCodes(starts - starts[0], self.ids[starts[0] : starts[-1]], self.means[starts[0] : starts[-1]])
            norms[first : first + len(some)] = np.sqrt(
                np.bincount(some.rows, some.weights(idf) ** 2, minlength=len(some))
            )
        return norms


@dataclass(frozen=True)
class Codes:
    """Both sides of samples."""

    position: np.ndarray
    """(samples,) int64, positions in the run"""
    image: SideCodes
    text: SideCodes

    def __len__(self) -> int:
        return len(self.position)

    @property
    def sides(self) -> dict[str, SideCodes]:
        """Both sides by name."""
        return {"image": self.image, "text": self.text}

    @classmethod
    def concatenate(cls, parts: Sequence[Codes]) -> Codes:
        position = np.concatenate([np.zeros(0, np.int64), *(part.position for part in parts)])
        image, text = (SideCodes.concatenate([part.sides[side] for part in parts]) for side in SIDES)
        return cls(position, image, text)

    def take(self, at: np.ndarray) -> Codes:
        return Codes(self.position[at], self.image.take(at), self.text.take(at))

    def by_feature(self) -> Codes:
        return Codes(self.position, self.image.by_feature(), self.text.by_feature())


def cosines(side: SideCodes, idf: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(pairs,) float32: cosine of rows `first` with rows `second`, 0 where one has no feature.

    Sums in float64. With entries in the order of features (`by_feature`) the result has the same bits
    whichever of a pair comes first and whatever else is asked.
    """
    norms = side.norms(idf)
    dots = np.empty(len(first))
    order = np.argsort(first, kind="stable")
    dense = np.zeros((max(1, min(len(side), (1 << 23) // len(idf))), len(idf)))
    for at in _blocks(first[order], len(dense)):
        pairs = order[at]
        rows, local = np.unique(first[pairs], return_inverse=True)
        left = side.take(rows)
        dense[left.rows, left.ids] = left.weights(idf)
        right = side.take(second[pairs])
        entry = right.rows
        dots[pairs] = np.bincount(entry, dense[local[entry], right.ids] * right.weights(idf), minlength=len(pairs))
        dense[left.rows, left.ids] = 0
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = dots / (norms[first] * norms[second])
    return np.where(np.isfinite(ratio), ratio, 0).astype(np.float32)


def _blocks(rows: np.ndarray, at_most: int) -> list[slice]:
    """Slices of ascending `rows` with at most so many different ones and not too many pairs."""
    if not len(rows):
        return []
    different = np.cumsum(np.concatenate([[0], rows[1:] != rows[:-1]])) // at_most
    pairs = np.arange(len(rows)) // (_ENTRIES_AT_ONCE // 256)
    starts = np.flatnonzero(np.concatenate([[True], (different[1:] != different[:-1]) | (pairs[1:] != pairs[:-1])]))
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True)]


GRID = 2048
"""Sketches are multiples of 1 / GRID. Half precision holds them whole (up to 1 it has steps of 1 / 2048 and
less), and in single precision the cosine of two has no rounding: products are multiples of GRID ** -2, and
no partial sum is larger than 1 or so, which is less than 2 ** 24 of these. So the order of a sum, the
number of threads or a GPU change no bit of it"""


def on_grid(vectors: np.ndarray) -> np.ndarray:
    """(n, dims) float32: the rows brought to length 1 and rounded to multiples of 1 / `GRID`; zeros stay."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (np.rint(vectors / np.where(norms > 0, norms, 1) * GRID) / GRID).astype(np.float32)


class Sketch:
    """A seeded sparse random projection: vectors of a few hundred numbers, of length 1 but for rounding, that keep the
    cosine.

    Each feature of each side adds ±1 to s of the `dims` numbers, one in each of s blocks (Kane & Nelson,
    "Sparser Johnson-Lindenstrauss transforms", J. ACM 2014); with fewer than 16, two strong features
    that meet in a number spoil every pair that has both. Both sides are brought to length 1
    first, so the cosine of two sketches of both sides stands for the mean of the two sides' cosines.
    """

    def __init__(
        self, idf: np.ndarray, sides: Sequence[str], *, dims: int = 256, nonzeros: int = 16, seed: int = 0
    ) -> None:
        self._idf, self._sides, self.dims = idf, tuple(sides), dims
        raw = np.random.PCG64(seed).random_raw(len(SIDES) * len(idf) * nonzeros).reshape(len(SIDES), nonzeros, len(idf))
        block = dims // nonzeros
        self._slot = ((raw >> 8) % block).astype(np.int64) + np.arange(nonzeros)[:, None] * block
        self._sign = np.where(raw & 1, 1.0, -1.0)

    def __call__(self, codes: Codes) -> np.ndarray:
        """(samples, dims) float32, multiples of 1 / `GRID`; zeros where no side has a feature that counts."""
        total = np.zeros(len(codes) * self.dims)
        for number, (name, side) in enumerate(codes.sides.items()):
            if name not in self._sides or not len(side.ids):
                continue
            weights, rows, norms = side.weights(self._idf), side.rows, side.norms(self._idf)
            weights /= np.where(norms > 0, norms, 1)[rows]
            for slot, sign in zip(self._slot[number], self._sign[number], strict=True):
                total += np.bincount(rows * self.dims + slot[side.ids], weights * sign[side.ids], minlength=len(total))
        return on_grid(total.reshape(len(codes), self.dims))


def margin(similarity: float, dims: int) -> float:
    """How far below a pair's cosine the cosine of its sketches may lie, but for 1 pair in 1,000 or so.

    The sketches of unit vectors at cosine c err by (1 − c²)/√dims in standard deviation: the projection
    stretches their difference by a factor of 1 ± 1/√dims, and that is what the angle is made of. Four
    deviations, since what a few strong features share falls off more slowly than a normal law. Rounding
    both to the grid adds a variance of at most GRID^-2 / 3, when they are rounded alike.
    """
    return 4 * float(np.sqrt((1 - similarity**2) ** 2 / dims + 1 / (3 * GRID**2))) + 1e-3
