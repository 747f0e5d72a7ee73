"""What the evidence comes to in words, on made-up scores of which the truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from mmfilter.core.evaluation.auc import auc, bootstrap_aucs
from mmfilter.core.evaluation.evidence import Judgement, weigh
from mmfilter.core.evaluation.fidelity import Fidelity, SideFidelity
from mmfilter.core.scores.registry import formulas

N = 400


def fidelity(image: float = 0.2, text: float = 0.3) -> Fidelity:
    return Fidelity(
        SideFidelity(1000, image, 0.9, 20.0, 90, 3, 1 - image),
        SideFidelity(1000, text, 0.8, 20.0, 80, 3, 1 - text),
        100,
        5,
        75,
    )


def judge(
    trained: dict[str, float],
    random: dict[str, float] | None = None,
    *,
    image_fvu: float = 0.2,
    along: float = 0.0,
    seed: int = 0,
) -> Judgement:
    """Scores that are noise plus a shift for true pairs; `along` adds so much of the caption length to every score."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 50, N).astype(float)

    def column(shift: float) -> np.ndarray:
        return rng.normal(size=(2, N)) + np.array([[shift], [0.0]]) + along * np.stack([lengths, lengths])

    columns = {name: column(trained.get(name, 0.0)) for name in formulas()} | {
        "caption_tokens": np.stack([lengths, lengths])
    }
    twins = {name: column((random or {}).get(name, 0.0)) for name in formulas() if name != "raw"}
    return Judgement(weigh(columns, twins, lengths, draws=400, seed=seed), fidelity(image_fvu))


def test_each_score_has_its_own_figures():
    rng = np.random.default_rng(0)
    columns = {"a": rng.normal(size=(2, N)), "b": rng.normal(size=(2, N)) + np.array([[1.0], [0.0]])}
    twins, lengths = {"b": rng.normal(size=(2, N))}, rng.random(N)
    found = weigh(columns, twins, lengths, draws=300, seed=7)
    assert list(found) == ["a", "b"] and found["a"].random is None
    for name, values in columns.items():
        assert found[name].auc == auc(*values)
        np.testing.assert_array_equal(found[name].draws, bootstrap_aucs(values[:1], values[1:], draws=300, seed=7)[0])
    assert found["b"].random.auc == auc(*twins["b"])
    difference = found["b"].against(found["a"])
    assert difference.auc == found["a"].auc and difference.word == "better"
    assert difference.low < found["b"].auc - found["a"].auc < difference.high
    assert found["a"].against(found["b"]).word == "worse" and found["a"].against(found["a"]).word == "level"


def test_noise_is_not_recommended():
    """Eleven scores are looked at, and the best of them by luck must not pass."""
    passed = [judge({}, seed=seed).recommended is not None for seed in range(40)]
    assert sum(passed) <= 4  # 5 % each, so 2 on average


@pytest.mark.parametrize("case", ["nothing", "trained", "random", "raw", "raw alone", "length", "blind"])
def test_verdicts(case):
    found = {
        "nothing": judge({}),
        "trained": judge({"similarity": 2, "raw": 1}, {"similarity": 1}),
        "random": judge({"similarity": 1, "raw": 1}, {"similarity": 1}),
        "raw": judge({"similarity": 1, "support": 0.5, "raw": 2}, {"similarity": 1.6}),
        "raw alone": judge({"raw": 3}),
        "length": judge({"similarity": 2}, along=0.1),
        "blind": judge({"similarity": 2, "raw": 2}, image_fvu=0.97),
    }[case]
    figures = {name: f"{score.auc:.3f}" for name, score in found.scores.items()}
    twin = f"{found.scores['similarity'].random.auc:.3f}"
    best, sae = found.best, max((score for score in found.scores.values() if score.random), key=lambda score: score.auc)
    correlation = f"{found.scores['similarity'].length_correlation:.2f}"
    wanted = {
        "nothing": (
            None,
            f"No score tells true captions from shuffled ones here (best: {best.name}, AUC {best.auc:.3f}; 0.5 is chance): do not rank by them.",
        ),
        "trained": (
            "similarity",
            f"similarity tells true captions from shuffled ones very well (AUC {figures['similarity']}), better than the raw states without an SAE "
            f"({figures['raw']}) and better than through a random SAE ({twin}): the trained features add to it; rank with --by similarity.",
        ),
        "random": (
            "similarity",
            f"similarity tells true captions from shuffled ones well (AUC {figures['similarity']}), no better than the raw states without an SAE "
            f"({figures['raw']}) and no better than through a random SAE ({twin}): the trained features add nothing to it; rank with --by similarity.",
        ),
        "raw": (
            "raw",
            f"raw tells true captions from shuffled ones very well (AUC {figures['raw']}), better than the best score through the SAE (similarity, "
            f"{figures['similarity']}); that one is worse than through a random SAE ({twin}): the trained features add nothing to it; rank with --by raw.",
        ),
        "raw alone": (
            "raw",
            f"raw tells true captions from shuffled ones very well (AUC {figures['raw']}), while no score through the SAE does (best: "
            f"{sae.name}, {sae.auc:.3f}); rank with --by raw.",
        ),
        "length": (
            "similarity",
            f"it goes with caption length (rank correlation {correlation}), so it will favour long captions; rank with --by similarity.",
        ),
        "blind": (
            "similarity",
            "; the SAE hardly reconstructs image tokens (FVU 0.97), so look for one trained on this model and layer; rank with --by similarity.",
        ),
    }[case]
    assert found.recommended == wanted[0]
    assert wanted[1] in found.verdict


def test_perfect_and_useless_scores():
    perfect, useless = np.stack([np.ones(50), np.zeros(50)]), np.ones((2, 50))
    columns = {name: perfect if name == "similarity" else useless for name in formulas()}
    found = weigh(columns, {"similarity": useless}, np.arange(50.0), draws=200, seed=0)
    assert (found["similarity"].auc, found["similarity"].interval, found["similarity"].above_chance) == (
        1.0,
        (1.0, 1.0),
        True,
    )
    assert (found["raw"].auc, found["raw"].interval, found["raw"].above_chance) == (0.5, (0.5, 0.5), False)
    assert np.isnan(found["raw"].length_correlation)
    assert Judgement(found, fidelity()).recommended == "similarity"


def test_the_default_is_kept_unless_another_score_is_clearly_better():
    assert judge({"similarity": 1, "support": 1.05}).recommended == "similarity"
    assert judge({"similarity": 1, "support": 2}).recommended == "support"
    assert judge({"support": 1, "saev": 0.5}).recommended == "support"


def test_both_sides_that_are_hardly_reconstructed_are_named():
    columns = {name: np.ones((2, 50)) for name in formulas()}
    found = Judgement(weigh(columns, {}, np.arange(50.0), draws=100, seed=0), fidelity(1.2, 0.95)).verdict
    assert found.endswith(
        "; the SAE hardly reconstructs image and text tokens (FVU 1.20, 0.95), so look for one trained on this model and layer."
    )
