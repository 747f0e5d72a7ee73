"""Which rows a selection keeps, and why it drops the others; numpy only, one value a row."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import numpy as np

from mmfilter.core.run.score_tables import Column
from mmfilter.core.selection.top import Top


class Decision(IntEnum):
    KEPT = 0
    NOT_IN_WHERE = 1
    NO_SCORE = 2
    BELOW_MIN = 3
    BELOW_CUT = 4
    TIED = 5
    """Has the score of the cut, but other rows with that score come first"""
    EXACT_DUPLICATE = 6
    NEAR_DUPLICATE = 7
    NOT_CHOSEN = 8
    """Others were worth more to the set"""
    NO_COPY = 9
    """Is to be written zero times"""


def choose(
    column: Column,
    *,
    top: Top | None,
    minimum: float | None,
    first_by_key: Callable[[np.ndarray, int], np.ndarray],
    duplicates: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None,
    parts: np.ndarray | None = None,
    chooser: Callable[[np.ndarray, int], np.ndarray] | None = None,
) -> np.ndarray:
    """A `Decision` for every row, as int8.

    The candidates are the rows that pass. Of those with a value, and one of at least `minimum`, the
    `top.of(candidates)` largest are kept. `first_by_key(among, n)` gives the positions of the first
    `n` rows of a mask: it is asked only about the rows that tie at the cut. `duplicates(among)` gives
    the exact and the near duplicates among the rows of a mask, as masks; they are dropped before the
    largest are kept, and count as candidates all the same. With `parts`, the number from 0 of the part
    that each candidate is in, the largest of each part are kept, `top.of` its candidates. `chooser(among, n)`
    gives the positions of the n rows of a mask that are kept in place of the largest.
    """
    values, passes = column.values, column.passes
    decision = np.full(len(values), Decision.KEPT, np.int8)
    decision[~column.present] = Decision.NO_SCORE
    decision[~passes] = Decision.NOT_IN_WHERE
    if minimum is not None:
        if values.dtype.kind == "f":
            with np.errstate(over="ignore"):  # what float32 cannot hold is above all that it can
                minimum = values.dtype.type(minimum)  # a stored 0.7 is at least 0.7, also as float32
        decision[(decision == Decision.KEPT) & (values < minimum)] = Decision.BELOW_MIN
    if duplicates is not None:
        exact, near = duplicates(decision == Decision.KEPT)
        decision[exact], decision[near] = Decision.EXACT_DUPLICATE, Decision.NEAR_DUPLICATE
    if top is None:
        return decision
    if parts is not None:
        _keep_largest_of_parts(decision, values, parts, quotas(top, parts[passes]), first_by_key)
    elif chooser is not None:
        _keep_chosen(decision, top.of(int(passes.sum())), chooser)
    else:
        _keep_largest(decision, values, top.of(int(passes.sum())), first_by_key)
    return decision


def positions(decision: np.ndarray, copies: np.ndarray | None) -> np.ndarray:
    """Positions of what is written, in the order of `ScoreTables.members`; `copies` (rows,) is how often each is, None
    for once."""
    kept = np.flatnonzero(decision == Decision.KEPT)
    if copies is None:
        return kept
    return np.concatenate([kept, *(kept[copies[kept] > n] for n in range(1, int(copies.max(initial=0))))])


def _keep_chosen(decision: np.ndarray, n: int, chooser: Callable[[np.ndarray, int], np.ndarray]) -> None:
    left = decision == Decision.KEPT
    if int(left.sum()) > n:
        decision[left] = Decision.NOT_CHOSEN
        decision[chooser(left, n) if n else []] = Decision.KEPT


def quotas(top: Top, parts: np.ndarray) -> np.ndarray:
    """Rows to keep in each part, from the part of every candidate."""
    sizes, which = np.unique(np.bincount(parts), return_inverse=True)
    return np.array([top.of(size) for size in sizes.tolist()], np.int64)[which]


def _keep_largest_of_parts(
    decision: np.ndarray,
    values: np.ndarray,
    parts: np.ndarray,
    allowed: np.ndarray,
    first_by_key: Callable[[np.ndarray, int], np.ndarray],
) -> None:
    left = np.flatnonzero(decision == Decision.KEPT)
    if not len(left):
        return
    left = left[np.lexsort((values[left], parts[left]))]  # part by part, the largest last
    part = parts[left]
    sizes = np.bincount(part, minlength=len(allowed))
    ends = np.cumsum(sizes)
    over = allowed < sizes
    decision[left[over[part] & (allowed[part] == 0)]] = Decision.BELOW_CUT
    cut = np.zeros(len(allowed), values.dtype)
    divided = over & (allowed > 0)
    cut[divided] = values[left[(ends - allowed)[divided]]]
    inside = divided[part]
    left, part = left[inside], part[inside]
    decision[left[values[left] < cut[part]]] = Decision.BELOW_CUT
    free = allowed - np.bincount(part[values[left] > cut[part]], minlength=len(allowed))
    tied = np.zeros(len(values), bool)
    tied[left[values[left] == cut[part]]] = True
    decision[tied] = Decision.TIED
    order = first_by_key(tied, int(tied.sum()))
    order = order[np.argsort(parts[order], kind="stable")]
    counts = np.bincount(parts[order], minlength=len(allowed))
    place = np.arange(len(order)) - (np.cumsum(counts) - counts)[parts[order]]
    decision[order[place < free[parts[order]]]] = Decision.KEPT


def _keep_largest(
    decision: np.ndarray, values: np.ndarray, n: int, first_by_key: Callable[[np.ndarray, int], np.ndarray]
) -> None:
    left = decision == Decision.KEPT
    sizes = values[left]
    if len(sizes) <= n:
        return
    if n == 0:
        decision[left] = Decision.BELOW_CUT
        return
    cut = np.partition(sizes, len(sizes) - n)[len(sizes) - n]
    decision[left & (values < cut)] = Decision.BELOW_CUT
    free = n - int((sizes > cut).sum())
    tied = left & (values == cut)
    if int(tied.sum()) > free:
        decision[tied] = Decision.TIED
        decision[first_by_key(tied, free)] = Decision.KEPT
