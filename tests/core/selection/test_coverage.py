"""Coverage: lazy greedy against the plain loop and the best of all sets, chunks against their bounds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from mmfilter.core.selection.coverage import (
    LOSS,
    SMOOTHING,
    Amounts,
    Coverage,
    choose_in_chunks,
    lazy_greedy,
    proportional_shares,
)

GOOD = 1 - 1 / math.e


def random_amounts(rng: np.random.Generator, n: int, features: int, *, repeats: bool = False) -> np.ndarray:
    dense = rng.gamma(0.5, 1, (n, features)) * (rng.random((n, features)) < 0.4)
    if repeats:
        dense[n // 2 :] = dense[: n - n // 2]
    return dense.astype(np.float32)


def sparse(dense: np.ndarray) -> Amounts:
    rows, ids = np.nonzero(dense)
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(dense)))])
    return Amounts(starts, ids.astype(np.int32), dense[rows, ids])


def value(dense: np.ndarray, target: np.ndarray, k: int, chosen) -> float:
    """f by its definition, in float64."""
    mass = dense[list(chosen)].astype(np.float64).sum(0)
    some = target > 0
    return float((target[some] * np.log(1 + mass[some] / (SMOOTHING * k * target[some]))).sum())


def best_value(dense: np.ndarray, target: np.ndarray, k: int) -> float:
    return max(value(dense, target, k, some) for some in itertools.combinations(range(len(dense)), k))


def plain_greedy(dense: np.ndarray, target: np.ndarray, k: int) -> list[int]:
    chosen: list[int] = []
    while len(chosen) < min(k, len(dense)):
        left = [i for i in range(len(dense)) if i not in chosen]
        chosen.append(max(left, key=lambda i: (round(value(dense, target, k, [*chosen, i]), 12), -i)))
    return chosen


def random_target(rng: np.random.Generator, features: int) -> np.ndarray:
    target = rng.gamma(0.5, 1, features) * (rng.random(features) < 0.8)
    target[0] += 0.1
    return target / target.sum()


@pytest.mark.parametrize("seed", range(8))
def test_lazy_greedy_is_the_plain_loop(seed):
    rng = np.random.default_rng(seed)
    dense, target, k = (
        random_amounts(rng, 40, 15, repeats=seed % 2 == 1),
        random_target(rng, 15),
        int(rng.integers(1, 45)),
    )
    coverage = Coverage(target, k)
    chosen = lazy_greedy(sparse(dense), coverage, k)
    assert chosen.tolist() == plain_greedy(dense, target, k)
    assert coverage.value == pytest.approx(value(dense, target, k, chosen), rel=1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_lazy_greedy_is_within_its_bound_of_the_best_set(seed):
    rng = np.random.default_rng(100 + seed)
    dense, target, k = random_amounts(rng, 11, 6), random_target(rng, 6), int(rng.integers(1, 6))
    found = value(dense, target, k, lazy_greedy(sparse(dense), Coverage(target, k), k))
    best = best_value(dense, target, k)
    assert found >= GOOD * best
    for loss in (0.05, 0.5):
        assert (
            value(dense, target, k, lazy_greedy(sparse(dense), Coverage(target, k), k, loss=loss))
            >= (1 - math.exp(loss - 1)) * best
        )


@pytest.mark.parametrize("seed", range(10))
def test_chunks_are_within_their_bounds(seed):
    rng = np.random.default_rng(200 + seed)
    dense, target, k, m = (
        random_amounts(rng, 12, 6),
        random_target(rng, 6),
        int(rng.integers(1, 5)),
        int(rng.integers(2, 5)),
    )
    samples, chunks = sparse(dense), [np.sort(part) for part in np.array_split(rng.permutation(12), m)]
    best = best_value(dense, target, k)
    together = choose_in_chunks(chunks, samples.take, Coverage(target, k), k, at_once=100)
    assert len(set(together.tolist())) == k
    assert value(dense, target, k, together) >= (1 - math.exp(LOSS - 1)) / min(m, k) * best - 1e-9
    shares = proportional_shares([len(chunk) for chunk in chunks], k)
    in_turn = choose_in_chunks(chunks, samples.take, Coverage(target, k), k, at_once=1)
    assert [int(np.isin(in_turn, chunk).sum()) for chunk in chunks] == shares
    sets = itertools.product(
        *(itertools.combinations(chunk.tolist(), share) for chunk, share in zip(chunks, shares, strict=True))
    )
    best_of_shares = max(value(dense, target, k, itertools.chain(*some)) for some in sets)
    assert value(dense, target, k, in_turn) >= best_of_shares * (1 - LOSS) / (2 - LOSS) - 1e-9


def test_chunks_whose_samples_are_all_wanted():
    dense = random_amounts(np.random.default_rng(0), 9, 4)
    chunks = [np.array([0, 3]), np.array([1]), np.array([2, 4, 5, 6, 7, 8])]
    for at_once in (1, 100):
        assert sorted(
            choose_in_chunks(chunks, sparse(dense).take, Coverage(np.full(4, 0.25), 9), 9, at_once).tolist()
        ) == list(range(9))


def test_what_f_asks_for_is_the_target():
    """Of all ways to spread a total over features the target has the largest f (Jensen)."""
    rng = np.random.default_rng(1)

    def value_of(mass: np.ndarray, target: np.ndarray) -> float:
        return float((target * np.log(1 + mass / (SMOOTHING * 50 * target))).sum())

    for total in (0.1, 5.0, 1000.0):
        target = rng.dirichlet(np.ones(8))
        best = value_of(total * target, target)
        assert all(best >= value_of(total * rng.dirichlet(np.ones(8)), target) for _ in range(500))


def test_shares_add_up_and_are_in_proportion():
    rng = np.random.default_rng(2)
    for _ in range(300):
        sizes = rng.integers(1, 50, rng.integers(1, 8)).tolist()
        n = int(rng.integers(0, sum(sizes) + 1))
        shares = proportional_shares(sizes, n)
        assert sum(shares) == n
        assert all(
            abs(share - n * size / sum(sizes)) < 1 and share <= size for share, size in zip(shares, sizes, strict=True)
        )


def test_samples_that_bring_nothing_come_last_in_their_order():
    dense = np.array([[0, 0], [1, 0], [0, 0], [0, 2]], np.float32)
    assert lazy_greedy(sparse(dense), Coverage(np.array([0.5, 0.5]), 4), 4).tolist() == [3, 1, 0, 2]
