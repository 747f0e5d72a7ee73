"""AUC against pairwise comparison and SciPy, the bootstrap against explicit resampling and against theory."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mmfilter.core.evaluation import auc as module
from mmfilter.core.evaluation.auc import auc, bootstrap_aucs, interval, rank_correlation


def by_pairs(true: np.ndarray, shuffled: np.ndarray) -> float:
    return float(((true[:, None] > shuffled) + 0.5 * (true[:, None] == shuffled)).mean())


def scores(n: int, *, ties: bool, seed: int = 0, shift: float = 0.7) -> tuple[np.ndarray, np.ndarray]:
    """True and shuffled scores of n pairs that share an image, so that both go up and down together."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=n)
    pair = image + rng.normal(size=n) + shift, image + rng.normal(size=n)
    return tuple(np.round(values * 2) / 2 if ties else values for values in pair)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 7), (40, 23), (300, 300)])
def test_auc_equals_all_comparisons_and_mann_whitney(ties, n, m):
    true, shuffled = scores(n, ties=ties)[0], scores(m, ties=ties, seed=1)[1]
    assert auc(true, shuffled) == pytest.approx(by_pairs(true, shuffled), abs=1e-15)
    assert auc(true, shuffled) == pytest.approx(stats.mannwhitneyu(true, shuffled).statistic / (n * m), abs=1e-15)


def test_known_aucs():
    low, high = np.arange(5.0), np.arange(5.0, 9.0)
    assert (auc(high, low), auc(low, high), auc(low, low), auc(np.zeros(3), np.zeros(8))) == (1.0, 0.0, 0.5, 0.5)
    assert auc(np.array([1.0, 2.0, 2.0]), np.array([2.0, 0.0])) == (0 + 1 + 0.5 + 1 + 0.5 + 1) / 6


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("elements", [1, 500, 10**6])
def test_the_bootstrap_resamples_pairs(monkeypatch, ties, elements):
    monkeypatch.setattr(module, "ELEMENTS", elements)
    n, draws = 60, 25
    columns = [scores(n, ties=ties, seed=seed) for seed in range(3)]
    true, shuffled = (np.stack([column[side] for column in columns]) for side in (0, 1))
    found = bootstrap_aucs(true, shuffled, draws=draws, seed=4)
    rng = np.random.default_rng(4)
    for draw in range(draws):
        rows = rng.integers(0, n, n)
        wanted = [by_pairs(true[k, rows], shuffled[k, rows]) for k in range(3)]
        np.testing.assert_allclose(found[:, draw], wanted, atol=1e-14)


def test_the_bootstrap_spreads_as_theory_says_and_minds_the_pairing():
    """The sampling variance of AUC over pairs, by its influence function, in which a pair's two scores stand together."""
    true, shuffled = scores(500, ties=False)
    influence = (true[:, None] > shuffled).mean(1) + (true[:, None] > shuffled).mean(0)
    paired = influence.std() / np.sqrt(len(true))
    apart = np.sqrt(sum((true[:, None] > shuffled).mean(axis).var() for axis in (0, 1)) / len(true))
    spread = bootstrap_aucs(true[None], shuffled[None], draws=4000, seed=0).std()
    assert spread == pytest.approx(paired, rel=0.05)
    assert spread < 0.9 * apart  # as if the shuffled pairs had other images


def test_intervals_are_percentiles():
    assert interval(np.arange(1001.0)) == pytest.approx((25.0, 975.0))
    assert interval(np.arange(1001.0), 0.5) == pytest.approx((250.0, 750.0))


def test_perfect_and_constant_scores_have_no_spread():
    perfect, constant = (np.ones(30), np.zeros(30)), (np.ones(30), np.ones(30))
    found = bootstrap_aucs(*(np.stack(side) for side in zip(perfect, constant, strict=True)), draws=200, seed=0)
    assert (found[0] == 1).all() and (found[1] == 0.5).all()


def test_many_pairs_draws_and_columns_take_seconds():
    import time

    rng = np.random.default_rng(0)
    started = time.process_time()
    assert bootstrap_aucs(rng.random((20, 1000)), rng.random((20, 1000)), draws=1000, seed=0).shape == (20, 1000)
    assert time.process_time() - started < 10


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlation_equals_scipy(ties):
    a, b = scores(200, ties=ties)
    assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
    assert np.isnan(rank_correlation(a, np.ones(200)))
