"""Fidelity against its formula in float64 on dense arrays, whatever the batches and however far off the mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmfilter.core.evaluation import fidelity as module
from mmfilter.core.evaluation.fidelity import Fidelity, FidelityMeter
from mmfilter.core.sae.autoencoder import SAE
from mmfilter.core.sides import IMAGE, TEXT

D, N = 8, 160


def make(activation: str = "relu", **options) -> SAE:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    if activation == "jumprelu":
        options["threshold"] = normal(N).abs()
    return SAE(normal(D, N), normal(N), normal(N, D) / 10, normal(D), activation=activation, **options)


def tokens(n: int = 400, *, offset: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    side = (torch.rand(n, generator=g) < 0.3).long()
    scale = torch.where(side == TEXT, 0.5, 2.0)[:, None]
    return torch.randn(n, D, generator=g) * scale + offset + side[:, None], side


def measured(sae: SAE, states: torch.Tensor, side: torch.Tensor, *, batch: int = 10**6) -> Fidelity:
    meter = FidelityMeter(sae)
    for first in range(0, len(states), batch):
        meter.add(states[first : first + batch], side[first : first + batch])
    return meter.fidelity


def formula(sae: SAE, x: torch.Tensor) -> dict[str, float]:
    """FVU, cosine, L0 and active features of one side's tokens, with all features at once."""
    tensors = {name: getattr(sae, name).double().numpy() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    x = x.double().numpy()
    mean, std = np.zeros((len(x), 1)), np.ones((len(x), 1))
    if sae.normalisation == "layer_norm":
        mean, std = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True)
    z = (x - mean) / std
    h = (z - tensors["b_dec"] * sae.subtract_b_dec) @ tensors["W_enc"] + tensors["b_enc"]
    f = np.where(h > (sae.threshold.double().numpy() if sae.threshold is not None else 0), np.maximum(h, 0), 0)
    if sae.k:
        f = np.where(h >= np.sort(h, 1)[:, -sae.k][:, None], f, 0)
    again = (f @ tensors["W_dec"] + tensors["b_dec"]) * std + mean
    cosine = (x * again).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(again, axis=1)
    error, spread = ((x - again) ** 2).sum(0), ((x - x.mean(0)) ** 2).sum(0)
    return {
        "n_tokens": len(x), "fvu": error.sum() / spread.sum(), "cosine": cosine.mean(), "l0": (f > 0).sum(1).mean(),
        "n_active": (f > 0).any(0).sum(), "n_dense": ((f > 0).mean(0) > 0.1).sum(), "explained_by_dimension": (1 - error / spread).mean(),
    }  # fmt: skip


KINDS = {
    "relu": {},
    "relu not centred": {"subtract_b_dec": False},
    "jumprelu": {"activation": "jumprelu"},
    "topk": {"activation": "topk", "k": 100},
    "layer norm": {"normalisation": "layer_norm"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [7, 10**6])
def test_figures_follow_the_formula(monkeypatch, kind, batch):
    monkeypatch.setattr(module, "DENSE_CHUNK_ELEMENTS", 16 * N)
    sae, (states, side) = make(**KINDS[kind]), tokens()
    found = measured(sae, states, side, batch=batch)
    for name, which in (("image", IMAGE), ("text", TEXT)):
        wanted = formula(sae, states[side == which])
        assert vars(found.sides[name]) == pytest.approx(wanted, rel=2e-4)
    assert found.image.l0 > 50 or kind == "jumprelu"  # all active features count, not only the 50 that scores use


def test_a_large_mean_costs_no_digits():
    """Residual streams have dimensions with means hundreds of times their spread; x² − x̄² would lose it."""
    sae = SAE(torch.zeros(D, N), torch.zeros(N), torch.zeros(N, D), torch.full((D,), 30_000.0))
    states, side = tokens(offset=30_000.0)
    x = states[side == IMAGE].double()
    wanted = (x - 30_000).square().sum() / (x - x.mean(0)).square().sum()
    assert measured(sae, states, side, batch=9).image.fvu == pytest.approx(wanted.item(), rel=1e-9)


def test_exact_and_empty_reconstructions():
    eye, none = torch.eye(D), torch.zeros(D)
    exact = SAE(torch.cat([eye, -eye], 1), torch.zeros(2 * D), torch.cat([eye, -eye]), none)
    states, side = tokens()
    found = measured(exact, states, side)
    assert (found.image.fvu, found.text.fvu) == pytest.approx((0, 0), abs=1e-12)
    assert (found.image.l0, found.n_dead, found.hardly_reconstructed) == (D, 0, [])
    mean = states[side == IMAGE].double().mean(0).float()
    silent = SAE(eye, torch.full((D,), -1e9), eye, mean)
    found = measured(silent, states, side)
    assert found.image.fvu == pytest.approx(1, abs=1e-6) and found.text.fvu > 1
    assert (found.n_dead, found.fraction_dead, found.hardly_reconstructed) == (D, 1.0, ["image", "text"])


def test_dead_features_are_silent_on_both_sides():
    sae = SAE(torch.eye(D), torch.zeros(D), torch.eye(D), torch.zeros(D))
    states = torch.zeros(3, D)
    states[0, 0], states[1, 1], states[2, 1] = 1, 1, 1
    found = measured(sae, states, torch.tensor([IMAGE, TEXT, TEXT]))
    assert (found.image.n_active, found.text.n_active, found.n_dead) == (1, 1, D - 2)
    assert found.fraction_silent == {"image": 1 - 1 / D, "text": 1 - 1 / D}
    assert (found.n_shared, found.fraction_shared) == (0, 0.0)
    found = measured(sae, states, torch.tensor([IMAGE, TEXT, IMAGE]))
    assert (found.n_shared, found.fraction_shared) == (1, 1 / 2)


def test_dense_features_fire_on_more_than_a_tenth_of_a_side():
    sae = SAE(torch.eye(D), torch.zeros(D), torch.eye(D), torch.zeros(D))
    states = torch.zeros(20, D)
    states[:2, 0] = states[:3, 1] = states[10:, 1] = states[10:, 2] = 1
    found = measured(sae, states, torch.tensor([IMAGE] * 20))
    assert (found.image.n_dense, found.text.n_dense) == (2, 0)  # feature 0 is on exactly a tenth
    assert found.image.explained_variance == 1 - found.image.fvu


def test_dimensions_that_do_not_vary_are_left_out():
    sae = SAE(torch.zeros(2, 1), torch.zeros(1), torch.zeros(1, 2), torch.tensor([1.0, 5.0]))
    states = torch.tensor([[0.0, 5.0], [1.0, 5.0]])
    found = measured(sae, states, torch.tensor([TEXT, TEXT])).text
    assert found.explained_by_dimension == found.explained_variance == -1.0


def test_states_that_are_not_finite_and_sides_without_tokens():
    states, side = tokens(50)
    wanted = measured(make(), states, side)
    spoilt = torch.cat([states, torch.full((2, D), torch.nan)])
    assert measured(make(), spoilt, torch.cat([side, torch.tensor([IMAGE, TEXT])])) == wanted
    only = measured(make(), states[side == IMAGE], side[side == IMAGE])
    assert only.text.n_tokens == 0 and np.isnan([only.text.fvu, only.text.cosine, only.text.l0]).all()
    assert only.hardly_reconstructed in ([], ["image"])
