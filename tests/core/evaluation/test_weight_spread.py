"""The groups of features and the quantiles of ω, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mmfilter.core.evaluation.weight_spread import weight_spread
from mmfilter.core.scores.crossmodal import FeatureWeights


def weights(omega: list[float], image: list[int], text: list[int]) -> FeatureWeights:
    n = len(omega)
    none, counts = torch.zeros(n), torch.zeros(n, dtype=torch.int64)
    return FeatureWeights(
        torch.tensor(omega),
        counts,
        counts,
        counts,
        torch.tensor(image),
        torch.tensor(text),
        none,
        none,
        n_samples=12,
        metadata={},
    )


def test_every_feature_is_in_one_group():
    nan = math.nan
    found = weight_spread(weights([0.5, -0.1, nan, nan, nan, nan, 0.2], [9, 9, 3, 0, 4, 0, 9], [5, 6, 1, 7, 0, 0, 9]))
    assert (found.n_weighted, found.n_one_sided, found.n_text_only, found.n_image_only, found.n_never) == (
        3,
        1,
        1,
        1,
        1,
    )
    assert found.n_features == 7 and found.n_pairs == 12 and found.mean == pytest.approx(0.2)
    wanted = np.quantile([0.5, -0.1, 0.2], [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1])
    assert list(found.quantiles.values()) == pytest.approx(wanted, rel=1e-6)


def test_no_weight_at_all():
    found = weight_spread(weights([math.nan] * 2, [0, 1], [0, 0]))
    assert (found.n_weighted, found.n_image_only, found.n_never, found.quantiles) == (0, 1, 1, {})
    assert math.isnan(found.mean)
