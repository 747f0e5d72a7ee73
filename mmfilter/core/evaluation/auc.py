"""How well a score tells true pairs from shuffled ones: exact ROC AUC, and its bootstrap over pairs.

AUC = P(a true pair scores above a shuffled one) + ½ P(both score the same): the Mann-Whitney U over the
number of comparisons (Mann and Whitney 1947). 0.5 is chance, 1 is perfect, ties count half.

The bootstrap draws *pairs* with replacement, and a pair brings its true and its shuffled score with it.
All columns see the same draws, so that two columns can be compared draw by draw. Percentile intervals.
"""

from __future__ import annotations

import numpy as np

ELEMENTS = 2_000_000
"""Most counts (draws × pairs) that exist at once."""


def auc(true: np.ndarray, shuffled: np.ndarray) -> float:
    """AUC of the finite scores `true` (n,) against `shuffled` (m,), in O((n + m) log m)."""
    low, high = _places(true, np.sort(shuffled))
    return float((low + high).sum() / (2 * len(true) * len(shuffled)))


def bootstrap_aucs(true: np.ndarray, shuffled: np.ndarray, *, draws: int, seed: int) -> np.ndarray:
    """AUCs of resampled pairs, (columns, draws), for finite scores `true` and `shuffled`, both (columns, n).

    A draw in which pair i comes c_i times has the AUC Σ_ij c_i c_j [t_i > s_j] / n², ties half; with the
    shuffled scores sorted once, the inner sum is a difference of cumulated counts.
    """
    columns, n = true.shape
    orders = np.argsort(shuffled, axis=1, kind="stable")
    places = [_places(true[k], shuffled[k, orders[k]]) for k in range(columns)]
    result, rng = np.empty((columns, draws)), np.random.default_rng(seed)
    step = max(1, ELEMENTS // n)
    for first in range(0, draws, step):
        counts = _draw(rng, min(step, draws - first), n)
        for k, (low, high) in enumerate(places):
            below = np.zeros((len(counts), n + 1), dtype=np.int64)
            np.cumsum(counts[:, orders[k]], axis=1, out=below[:, 1:])
            wins = (counts * (below[:, low] + below[:, high])).sum(1)
            result[k, first : first + len(counts)] = wins / (2 * n * n)
    return result


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of bootstrap `values` (draws,)."""
    low, high = np.quantile(values, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: Pearson's correlation of the ranks, ties at their mean rank; NaN where one of both is constant."""
    ranks = [_ranks(values) for values in (a, b)]
    deviations = [rank - rank.mean() for rank in ranks]
    norm = np.sqrt((deviations[0] @ deviations[0]) * (deviations[1] @ deviations[1]))
    return float(deviations[0] @ deviations[1] / norm) if norm else float("nan")


def _places(values: np.ndarray, ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many of `ordered` are below each value, and how many are at most as large."""
    return np.searchsorted(ordered, values, "left"), np.searchsorted(ordered, values, "right")


def _draw(rng: np.random.Generator, draws: int, n: int) -> np.ndarray:
    """(draws, n) int64: how often each of n pairs comes when n are drawn with replacement."""
    drawn = rng.integers(0, n, (draws, n)) + n * np.arange(draws)[:, None]
    return np.bincount(drawn.ravel(), minlength=draws * n).reshape(draws, n)


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[place.reshape(-1)]
