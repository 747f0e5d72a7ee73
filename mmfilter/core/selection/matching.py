"""Coverage over a run's codes: the amounts that samples bring, the distribution of a target run, and who is chosen.

A sample's *profile* p_s says how its two sides are spread over features: with x_sj = idf_j · mean_j of a side,
p_sj is the mean over both sides of x_sj² / Σ_i x_si². The squares are the shares of the cosine of a side with
itself, so features weigh as in the score `similarity` and in `dedup`; a sample's profile sums to 1, a half
where a side has no feature.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mmfilter.core.codes.code_tables import CodeTables
from mmfilter.core.codes.vectors import Codes, SideCodes
from mmfilter.core.files import read_json
from mmfilter.core.progress import Progress
from mmfilter.core.run.score_tables import ScoreTables
from mmfilter.core.selection.coverage import Amounts, Coverage, choose_in_chunks
from mmfilter.errors import RunError, SelectionError

AT_ONCE = 100_000
"""Candidates whose codes are in memory at one time (up to 4 KB each); more are chosen from in chunks"""
PIECE = 5_000
"""Candidates of one shard that go into a chunk together"""
SAME_CODES = ("model_hash", "revision", "layer", "prompt", "text_context", "sae_hash")
"""Settings of a run without which the codes of another are not comparable"""


def profiles(codes: Codes, idf: np.ndarray) -> Amounts:
    """The profiles of samples, as amounts."""
    rows, ids, shares = (
        np.concatenate(parts) for parts in zip(*(_shares(side, idf) for side in codes.sides.values()), strict=True)
    )
    # at most two of a kind, and a + b is b + a: no need for a stable one, which is slower
    order = np.argsort((rows << 32) | ids)
    rows, ids, shares = rows[order], ids[order], shares[order]
    first = np.flatnonzero(np.r_[len(rows) > 0, (rows[1:] != rows[:-1]) | (ids[1:] != ids[:-1])])
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows[first], minlength=len(codes)))])
    summed = np.add.reduceat(shares, first) if len(first) else np.zeros(0)
    return Amounts(starts, ids[first].astype(np.int32), summed.astype(np.float32))


def _shares(side: SideCodes, idf: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, feature and half the share in its side of each entry that has one."""
    rows, squares = side.rows, side.weights(idf) ** 2
    shares = 0.5 * squares / np.maximum(np.bincount(rows, squares, minlength=len(side)), 1e-300)[rows]
    some = shares > 0
    return rows[some], side.ids[some].astype(np.int64), shares[some]


def target_of(target: ScoreTables, candidates: ScoreTables, idf: np.ndarray) -> np.ndarray:
    """(features,) float64, sums to 1: the mean profile of all scored samples of a target run, with the candidates'
    `idf`.

    Raises `SelectionError` when the two runs were made with another model or SAE.
    """
    mine, theirs = (_settings(tables) for tables in (candidates, target))
    differing = [name for name in SAME_CODES if mine.get(name) != theirs.get(name)]
    if differing:
        which = ", ".join(f"{name} is {theirs.get(name)!r} there and {mine.get(name)!r} here" for name in differing[:2])
        raise SelectionError(
            f"--match {str(target.run.path)!r} was scored otherwise ({which}): score it with the settings of "
            f"{str(candidates.run.path)!r}"
        )
    total = np.zeros(len(idf))
    for codes, _ in CodeTables(target).read():
        if any(len(side.ids) and side.ids.max() >= len(idf) for side in (codes.image, codes.text)):
            raise SelectionError(
                f"--match {str(target.run.path)!r} has features that {str(candidates.run.path)!r} lacks: it belongs to "
                "another SAE"
            )
        amounts = profiles(codes, idf)
        total += np.bincount(amounts.ids, amounts.amounts, minlength=len(idf))
    if not total.sum():
        raise SelectionError(f"--match {str(target.run.path)!r} has no sample with features: there is nothing to match")
    return total / total.sum()


def _settings(tables: ScoreTables) -> Mapping[str, Any]:
    return read_json(tables.run.manifest).get("settings", {})


class Covering:
    """Chooses candidates that together cover a target distribution, each counting by its rank.

    A candidate brings r_s · p_s: its profile times the share of candidates whose score is no better.
    Equal gains go to the better score, then by key, shard and row.
    """

    def __init__(self, scores: ScoreTables, values: np.ndarray, target: ScoreTables | None, progress: Progress) -> None:
        self._scores, self._values, self._progress = scores, values, progress
        self._tables = CodeTables(scores)
        self._option = "--diverse" if target is None else f"--match {str(target.run.path)!r}"
        n = len(self._tables.idf)
        self._target = np.full(n, 1 / n) if target is None else target_of(target, scores, self._tables.idf)

    def __call__(self, among: np.ndarray, n: int) -> np.ndarray:
        """Positions of `n` of the rows of a mask; raises `SelectionError` when none of them has a feature of the
        target."""
        order = self._scores.first_by_key(among, int(among.sum()))
        # the best first, ties stay by key
        order = order[::-1][np.argsort(self._values[order[::-1]], kind="stable")][::-1]
        sizes = np.sort(self._values[order])
        ranks = np.searchsorted(sizes, self._values[order], side="right") / len(order)
        self._progress.start("choosing", None)
        coverage = Coverage(self._target, n)
        chosen = choose_in_chunks(self._chunks(order), self._loader(order, ranks), coverage, n, AT_ONCE)
        if not coverage.value:
            raise SelectionError(
                f"no candidate has a feature that {self._option} asks for, so none is better than another; leave it "
                "out for the best by score"
            )
        return order[chosen]

    def _chunks(self, order: np.ndarray) -> list[np.ndarray]:
        """Places in the order, split by shards in the order of their paths: every m-th piece into one of m chunks.

        So each chunk has something of every source, the same whatever the order of the shards in the run.
        """
        m = -(-len(order) // AT_ONCE)
        if m <= 1:
            return [np.arange(len(order))]
        starts = self._scores.starts
        shard = np.searchsorted(starts, order, side="right") - 1
        by_path = np.argsort(np.argsort([item.path for item in self._scores.shards]))
        place = np.lexsort((order, by_path[shard]))
        pieces = [
            some[first : first + PIECE]
            for some in np.split(place, np.flatnonzero(np.diff(shard[place])) + 1)
            for first in range(0, len(some), PIECE)
        ]
        return [np.sort(np.concatenate(list(itertools.islice(pieces, i, None, m)))) for i in range(min(m, len(pieces)))]

    def _loader(self, order: np.ndarray, ranks: np.ndarray) -> Callable[[np.ndarray], Amounts]:
        def load(places: np.ndarray) -> Amounts:
            by_position = np.argsort(order[places])
            parts, n = [], 0
            for codes, _ in self._tables.read(order[places][by_position]):
                some = profiles(codes, self._tables.idf)
                inside = self._target[some.ids] > 0  # what the target lacks counts for nothing
                rows = np.repeat(np.arange(len(some)), np.diff(some.starts))[inside]
                lengths = np.bincount(rows, minlength=len(some))
                weights = ranks[places[by_position[n : n + len(some)]]]
                parts.append((lengths, some.ids[inside], some.amounts[inside] * weights[rows].astype(np.float32)))
                n += len(some)
            if n != len(places):
                raise RunError(
                    f"the code tables of run {str(self._scores.run.path)!r} lack samples that have scores; score the "
                    "shards again"
                )
            if not parts:
                return Amounts(np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
            lengths, ids, amounts = (np.concatenate(column) for column in zip(*parts, strict=True))
            read = Amounts(np.concatenate([[0], np.cumsum(lengths)]), ids, amounts)
            return read.take(np.argsort(by_position))

        return load
