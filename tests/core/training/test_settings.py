"""Settings: defaults by width, schedules, and what is refused in which words."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest

from mmfilter.core.training.settings import ResolvedTrainSettings, TrainSettings
from mmfilter.errors import SAEError


def test_defaults_follow_the_width():
    settings = TrainSettings().resolved(1024)
    assert (settings.architecture, settings.n_features, settings.k, settings.batch_size) == (
        "batchtopk",
        8192,
        32,
        4096,
    )
    assert settings.lr == pytest.approx(2e-4 * 2**0.5) and settings.aux_k == 512 and settings.groups == (8192,)
    assert settings.dead_tokens == 10_000_000 and settings.target_l0 == 32
    small = TrainSettings(n_features=100, k=2, tokens=5000).resolved(1024)
    assert (small.aux_k, small.dead_tokens) == (100, 500)
    assert settings.resolved(1024) == settings


@pytest.mark.parametrize("architecture", ["batchtopk", "topk", "jumprelu", "relu"])
def test_nothing_is_left_to_fill_in_and_what_is_stored_keeps_its_order(architecture):
    given = TrainSettings(architecture=architecture, n_features=64, k=3, lr=0.5, dtype="bfloat16")
    settings = given.resolved(16)
    assert isinstance(settings, ResolvedTrainSettings)
    stored = settings.to_mapping()
    assert list(stored) == [item.name for item in fields(TrainSettings)] and None not in stored.values()
    assert stored["groups"] == ([64] if settings.sparse else [])
    filled = {"n_features", "groups", "lr", "aux_k", "dead_tokens", "target_l0"}
    assert {name: stored[name] for name in stored.keys() - filled} == {
        name: value for name, value in given.to_mapping().items() if name not in filled
    }
    assert ResolvedTrainSettings.from_mapping(json.loads(json.dumps(stored))) == settings


def test_resolved_settings_are_checked_too():
    with pytest.raises(SAEError, match="training has k=32 and n_features=16; k may be at most n_features"):
        TrainSettings().resolved(2)


def test_groups_are_rising_counts():
    assert TrainSettings(n_features=1000, groups=(0.5, 32, 0.0625)).resolved(64).groups == (32, 62, 500, 1000)
    assert TrainSettings(n_features=1000, groups=(1000, 10)).resolved(64).groups == (10, 1000)
    with pytest.raises(SAEError, match=r"training has groups \(2000,\); expected prefixes of 1000 features"):
        TrainSettings(n_features=1000, groups=(2000,)).resolved(64)


def test_the_rate_rises_stays_and_falls():
    settings = TrainSettings(tokens=1000, batch_size=10, lr=1.0, warm_up=0.1, decay=0.2).resolved(64)
    rates = [settings.rate(tokens) for tokens in range(0, 1000, 10)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10:80] == [1.0] * 70
    assert rates[80:] == pytest.approx([0.05 * i for i in range(20, 0, -1)])
    assert TrainSettings(tokens=1000, batch_size=10, lr=1.0, warm_up=0, decay=0).resolved(64).rate(990) == 1.0
    settings = TrainSettings(tokens=1000, batch_size=10).resolved(64)
    assert [settings.sparsity(tokens) for tokens in (0, 20, 40, 50)] == pytest.approx([0.2, 0.6, 1, 1])


def test_a_mapping_and_back():
    settings = TrainSettings(n_features=64, groups=(0.5, 16), k=3)
    assert TrainSettings.from_mapping(json.loads(json.dumps(settings.to_mapping()))) == settings


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(SAEError, match="training has no setting 'n_feature'; the nearest is 'n_features'"):
        TrainSettings.from_mapping({"n_feature": 5})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"architecture": "gated"},
            "training has architecture 'gated'; expected one of batchtopk, topk, jumprelu, relu",
        ),
        ({"dtype": "float16"}, "training has dtype 'float16'; expected one of float32, bfloat16"),
        ({"k": 0}, "training has k 0; expected a whole number from 1"),
        ({"tokens": 1e6}, "training has tokens 1000000.0; expected a whole number from 1"),
        ({"lr": "1e-4"}, "training has lr '1e-4'; expected a number above 0"),
        ({"clip": float("nan")}, "training has clip nan; expected a number above 0"),
        ({"aux_coefficient": -1}, "training has aux_coefficient -1; expected a number from 0"),
        ({"decay": 1.5}, "training has decay 1.5; expected a fraction from 0 to below 1"),
        ({"decay": 0.7, "warm_up": 0.7}, "training has warm_up 0.7 and decay 0.7; together they may be at most 1"),
        ({"k": 9, "n_features": 8}, "training has k=9 and n_features=8; k may be at most n_features"),
        ({"groups": ["half"]}, "training has groups ('half',); expected counts of features, or fractions below 1"),
        (
            {"groups": [0.5], "architecture": "relu"},
            "training has groups with architecture 'relu'; Matryoshka prefixes go with batchtopk and topk",
        ),
        ({"seed": 0.5}, "training has seed 0.5; expected a whole number"),
        ({"subtract_b_dec": "no"}, "training has subtract_b_dec 'no'; expected true or false"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_refused(values, words):
    with pytest.raises(SAEError) as error:
        TrainSettings.from_mapping(values)
    assert str(error.value) == words
