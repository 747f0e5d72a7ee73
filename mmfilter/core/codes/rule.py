"""The rule of duplicates: best score first, a sample is kept if no kept one is as close as the threshold.

So every dropped sample has a kept one that it is close to, and the order of the input plays no part:
scores that tie are ordered by key, then shard, then row. Samples of one group (the same hashes) are at
similarity 1 to each other and share their similarity to all others: the best of them is kept, or all
are dropped for the same one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mmfilter.core.codes.code_tables import CodeTables
from mmfilter.core.codes.duplicate_settings import DuplicateSettings
from mmfilter.core.codes.duplicates import Pairs, find_pairs
from mmfilter.core.codes.index import IndexSettings
from mmfilter.core.codes.vectors import cosines
from mmfilter.core.progress import Progress
from mmfilter.core.run.score_tables import ScoreTables

Compare = Callable[[int, np.ndarray], np.ndarray]
"""Similarity of a position to others"""


@dataclass(frozen=True)
class Duplicates:
    """What the rule drops; one value a row of the run."""

    of: np.ndarray
    """int64, position of the kept sample that the row is a duplicate of: of those that rank before the
    best of its group the closest, then the best; −1 if none"""
    similarity: np.ndarray
    """float32, to that one; 1 for an exact duplicate"""
    exact: np.ndarray
    """True where the two have the same hashes"""

    @property
    def near(self) -> np.ndarray:
        return (self.of >= 0) & ~self.exact


class Deduplicator:
    """The close pairs of a run, and the rule applied to some of its samples."""

    def __init__(
        self, scores: ScoreTables, settings: DuplicateSettings, progress: Progress, *, keep: bool = True
    ) -> None:
        """Without `keep` nothing is written into the run."""
        self._scores, self._settings = scores, settings
        self._groups = scores.groups(*settings.hashes)
        self._tables = CodeTables(scores, workers=settings.workers)
        self.pairs = find_pairs(scores, self._tables, self._groups, settings, progress, keep=keep)

    def __call__(self, values: np.ndarray, among: np.ndarray) -> Duplicates:
        """The duplicates among the rows of a mask, ranked by `values`, the largest first."""
        pairs = self.pairs.at_least(self._settings.threshold)
        compare = self._comparison(pairs.crowded)
        return apply_rule(values, among, self._groups, pairs, first_by_key=self._scores.first_by_key, compare=compare)

    def _comparison(self, crowded: np.ndarray) -> Compare:
        codes = self._tables.take(crowded).by_feature()
        sides = IndexSettings(self._settings.on).sides

        def compare(position: int, others: np.ndarray) -> np.ndarray:
            some = codes.take(np.searchsorted(codes.position, np.append(others, position)))
            one, rest = np.full(len(others), len(others)), np.arange(len(others))
            return np.min([cosines(some.sides[side], self._tables.idf, one, rest) for side in sides], axis=0)

        return compare


def apply_rule(
    values: np.ndarray,
    among: np.ndarray,
    groups: np.ndarray,
    pairs: Pairs,
    *,
    first_by_key: Callable[[np.ndarray, int], np.ndarray],
    compare: Compare,
) -> Duplicates:
    """The rule over the rows of the mask `among`.

    `groups` (rows,) is the position that stands for a row's group; `pairs`, between those, are all at or
    above the threshold. `first_by_key(mask, n)` gives the first n rows of a mask by key, shard and row.
    The lists of `pairs.crowded` lack neighbours that are crowded too: those of them that are kept are
    compared with directly.
    """
    n = len(values)
    result = Duplicates(np.full(n, -1), np.zeros(n, np.float32), np.zeros(n, bool))
    involved = among & _in_question(groups, pairs, among)
    if not involved.any():
        return result
    order = first_by_key(involved, int(involved.sum()))
    order = order[::-1][np.argsort(values[order[::-1]], kind="stable")][::-1]  # descending, ties stay by key
    group, start, member_of = np.unique(groups[order], return_index=True, return_inverse=True)
    head = order[start]  # the best of each group
    ranked = np.argsort(start)  # groups, best first
    dropped_by, similarity = _greedy(group[ranked], pairs, compare)
    place = np.argsort(ranked)[member_of]
    near = dropped_by[place] >= 0
    result.of[order] = np.where(
        near, head[ranked[dropped_by[place]]], np.where(head[member_of] != order, head[member_of], -1)
    )
    result.similarity[order] = np.where(near, similarity[place], np.where(head[member_of] != order, 1, 0))
    result.exact[order] = ~near & (head[member_of] != order)
    return result


def _in_question(groups: np.ndarray, pairs: Pairs, among: np.ndarray) -> np.ndarray:
    """Rows whose group has a close pair or more than one row in the mask."""
    questionable = np.zeros(len(groups), bool)
    questionable[pairs.first] = questionable[pairs.second] = questionable[pairs.crowded] = True
    shared = among & (groups != np.arange(len(groups)))
    questionable[groups[shared]] = True
    return questionable[groups]


def _greedy(ranked: np.ndarray, pairs: Pairs, compare: Compare) -> tuple[np.ndarray, np.ndarray]:
    """For groups in the order of rank: the rank of the kept one that drops it (−1 if kept), and the similarity."""
    m = len(ranked)
    lists, closeness = _better_neighbours(ranked, pairs)
    crowded = np.isin(ranked, pairs.crowded).tolist()
    dropped_by, similarity = [-1] * m, [0.0] * m
    leaders: list[int] = []
    for i, (start, stop) in enumerate(zip(lists.starts, lists.starts[1:], strict=False)):
        for at in range(start, stop):
            if dropped_by[lists.better[at]] < 0:
                dropped_by[i], similarity[i] = lists.better[at], closeness[at]
                break
        if crowded[i]:
            _against_leaders(i, leaders, ranked, pairs.floor, compare, dropped_by, similarity)
    return np.array(dropped_by, np.int64), np.array(similarity, np.float32)


@dataclass(frozen=True)
class _Neighbours:
    """For each rank its better-ranked neighbours, the closest first, then the best."""

    starts: list[int]
    better: list[int]


def _better_neighbours(ranked: np.ndarray, pairs: Pairs) -> tuple[_Neighbours, list[float]]:
    by_position = np.argsort(ranked)
    at = [np.searchsorted(ranked, part, sorter=by_position) for part in (pairs.first, pairs.second)]
    ranked_both = np.logical_and(
        *(
            ranked[by_position[np.minimum(a, len(ranked) - 1)]] == p
            for a, p in zip(at, (pairs.first, pairs.second), strict=True)
        )
    )
    ranks = [by_position[a[ranked_both]] for a in at]
    better, worse, similarity = np.minimum(*ranks), np.maximum(*ranks), pairs.similarity[ranked_both]
    order = np.lexsort((better, -similarity, worse))
    starts = np.searchsorted(worse[order], np.arange(len(ranked) + 1))
    return _Neighbours(starts.tolist(), better[order].tolist()), similarity[order].tolist()


def _against_leaders(
    i: int,
    leaders: list[int],
    ranked: np.ndarray,
    threshold: float,
    compare: Compare,
    dropped_by: list[int],
    similarity: list[float],
) -> None:
    """Hold a crowded group against the kept crowded ones; a kept one joins them."""
    if leaders:
        closeness = compare(int(ranked[i]), ranked[leaders])
        best = int(closeness.argmax())
        closer = (float(closeness[best]), -leaders[best]) > (similarity[i], -dropped_by[i])
        if closeness[best] >= np.float32(threshold) and (dropped_by[i] < 0 or closer):
            dropped_by[i], similarity[i] = leaders[best], float(closeness[best])
    if dropped_by[i] < 0:
        leaders.append(i)
