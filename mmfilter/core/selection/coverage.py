"""Choosing samples that together cover a distribution over features: greedy, lazily, in bounded memory.

A sample brings each feature j an amount a_sj ≥ 0. With m_j(S) = Σ_{s ∈ S} a_sj, a target q (Σ q_j = 1) and
k samples to choose, the objective is

    f(S) = Σ_j q_j · log(1 + m_j(S) / (α · k · q_j))

a concave function of modular ones, so monotone and submodular (Lin & Bilmes, "A class of submodular
functions for document summarization", ACL 2011). Written Σ q_j · g(m_j / q_j) with g concave, Jensen's
inequality says that no way to spread a total amount over features has a larger f than q itself: whatever
the α, what f asks for is the target distribution. Features outside the target add nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

SMOOTHING = 0.1
"""α: the smaller, the more what is not covered yet counts against more of what is"""
LOSS = 0.05
"""ε of choosing in chunks: half the work, and in f some thousandths at most (see `lazy_greedy`)"""
_SLACK = 1 + 1e-9
"""Bounds are raised by this, so that rounding makes none of them too low"""
_ENTRIES_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Amounts:
    """What samples bring; row i has the entries `starts[i]` to `starts[i + 1]`, features ascending."""

    starts: np.ndarray
    """(samples + 1,) int64"""
    ids: np.ndarray
    """(entries,) int32, features"""
    amounts: np.ndarray
    """(entries,) float32"""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def take(self, at: np.ndarray) -> Amounts:
        """The samples `at`, in that order."""
        lengths = self.starts[at + 1] - self.starts[at]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        entry = np.arange(starts[-1]) + np.repeat(self.starts[at] - starts[:-1], lengths)
        return Amounts(starts, self.ids[entry], self.amounts[entry])


class Coverage:
    """The objective, and the sum of what is chosen so far."""

    def __init__(self, target: np.ndarray, k: int, *, smoothing: float = SMOOTHING) -> None:
        """`target` (features,) float64, not negative, sums to 1."""
        self.target = target
        self._free = np.where(target > 0, smoothing * max(1, k) * target, 1.0)
        self._filled = self._free.copy()

    def fresh(self) -> Coverage:
        """The same objective with nothing chosen."""
        copy = object.__new__(Coverage)
        copy.target, copy._free, copy._filled = self.target, self._free, self._free.copy()
        return copy

    @property
    def value(self) -> float:
        return float((self.target * np.log(self._filled / self._free)).sum())

    def gain(self, ids: np.ndarray, amounts: np.ndarray) -> float:
        """How much larger the value gets with this sample."""
        return float((self.target[ids] * np.log1p(amounts / self._filled[ids])).sum())

    def add(self, ids: np.ndarray, amounts: np.ndarray) -> None:
        self._filled[ids] += amounts

    def bounds(self, samples: Amounts) -> np.ndarray:
        """(samples,) no less than each sample's gain, now or later."""
        bounds = np.zeros(len(samples))
        step = max(1, _ENTRIES_AT_ONCE * len(samples) // max(1, len(samples.ids)))
        for first in range(0, len(samples), step):
            starts = samples.starts[first : first + step + 1]
            at = slice(int(starts[0]), int(starts[-1]))
            ids = samples.ids[at]
            gains = self.target[ids] * np.log1p(samples.amounts[at] / self._filled[ids])
            rows = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
            bounds[first : first + step] = np.bincount(rows, gains, minlength=len(starts) - 1)
        return bounds * _SLACK


def lazy_greedy(samples: Amounts, coverage: Coverage, n: int, *, loss: float = 0.0) -> np.ndarray:
    """Rows of `n` samples, or of all, each with the largest gain when it was chosen; of equal ones the first.

    What is chosen is what a plain greedy loop chooses, so with nothing chosen before, f is at least 1 − 1/e
    of the best that n samples have (Nemhauser, Wolsey & Fisher, Math. Programming 1978; Krause & Golovin,
    "Submodular function maximization", 2014). Lazy (Minoux 1978): gains only fall, so an old one is a bound,
    and only samples whose bound is the largest are looked at again. With `loss` ε a sample is taken whose gain
    is at least 1 − ε of the largest bound: f is at least 1 − e^(ε − 1) of the best (Goundan & Schulz 2007).
    """
    heap = list(zip((-coverage.bounds(samples)).tolist(), range(len(samples)), strict=True))
    heapq.heapify(heap)
    starts = samples.starts.tolist()
    chosen: list[int] = []
    while heap and len(chosen) < n:
        _, i = heapq.heappop(heap)
        ids, amounts = samples.ids[starts[i] : starts[i + 1]], samples.amounts[starts[i] : starts[i + 1]]
        gain = coverage.gain(ids, amounts)
        if not heap or (-gain, i) < heap[0] or gain > (1 - loss) * -heap[0][0]:
            coverage.add(ids, amounts)
            chosen.append(i)
        else:
            heapq.heappush(heap, (-gain, i))
    return np.array(chosen, np.int64)


def choose_in_chunks(
    chunks: Sequence[np.ndarray], load: Callable[[np.ndarray], Amounts], coverage: Coverage, n: int, at_once: int
) -> np.ndarray:
    """`n` of the numbers in all chunks, chosen with the samples of `at_once` of them in memory, or one chunk's.

    Smaller numbers come first where gains are equal; `load` gives the samples of ascending numbers.

    One chunk: `lazy_greedy`. As long as n of every chunk fit together, GreeDi (Mirzasoleiman et al.,
    "Distributed submodular maximization", NIPS 2013): n of each chunk, then n of those, or the n of the
    best chunk where they are better: at least (1 − e^(ε − 1)) / min(number of chunks, n) of the best, since
    the best set has that share of its value in one chunk. Beyond, each chunk gets its share of n and the
    chunks follow one another, each seeing what was chosen before: at least (1 − ε) / (2 − ε) of the best
    with these shares (Fisher, Nemhauser & Wolsey, Math. Programming Study 1978; Goundan & Schulz 2007).
    """
    if len(chunks) == 1:
        return chunks[0][lazy_greedy(load(chunks[0]), coverage, n)]
    if n * len(chunks) <= at_once:
        return _greedi(chunks, load, coverage, n)
    shares = proportional_shares([len(chunk) for chunk in chunks], n)
    return np.concatenate(
        [
            chunk[lazy_greedy(load(chunk), coverage, share, loss=LOSS)]
            for chunk, share in zip(chunks, shares, strict=True)
        ]
    )


def _greedi(
    chunks: Sequence[np.ndarray], load: Callable[[np.ndarray], Amounts], coverage: Coverage, n: int
) -> np.ndarray:
    choices = []
    for chunk in chunks:
        alone = coverage.fresh()
        choices.append((chunk[lazy_greedy(load(chunk), alone, n, loss=LOSS)], alone.value))
    pool = np.sort(np.concatenate([some for some, _ in choices]))
    together = pool[lazy_greedy(load(pool), coverage, n, loss=LOSS)]
    best, value = max(choices, key=lambda item: item[1])
    if value <= coverage.value:
        return together
    return np.concatenate([best, together[~np.isin(together, best)]])[:n]  # a small chunk may have fewer than n


def proportional_shares(sizes: Sequence[int], n: int) -> list[int]:
    """`n` split in proportion to sizes, by largest remainders."""
    total = max(1, sum(sizes))
    shares = [size * n // total for size in sizes]
    order = sorted(range(len(sizes)), key=lambda i: (-(sizes[i] * n % total), i))
    for i in order[: min(n, sum(sizes)) - sum(shares)]:
        shares[i] += 1
    return shares
