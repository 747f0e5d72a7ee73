"""The random SAE: in the shape of the trained one and exactly as sparse, and its τ lets as many features through."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmfilter.core.evaluation import random_sae as module
from mmfilter.core.evaluation.random_sae import cut_leaving, random_sae, random_twin, with_fitted_decoder
from mmfilter.core.model.backbone import Activations
from mmfilter.core.sae.autoencoder import SAE

D, N, TOKENS = 12, 300, 200


def make(activation: str, **options) -> SAE:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    if activation == "jumprelu":
        options["threshold"] = normal(N).abs() + (7 if "normalisation" in options else 14)
    bias = -20.0 if activation == "relu" else 0.0
    return SAE(normal(D, N), normal(N) + bias, normal(N, D), normal(D), activation=activation, **options)


def states(offset: float = 3.0) -> torch.Tensor:
    return torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(1)) * 2 + offset


KINDS = [("relu", {}), ("jumprelu", {}), ("topk", {"k": 9}), ("jumprelu", {"normalisation": "layer_norm"})]


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize(("activation", "options"), KINDS, ids=str)
def test_it_is_as_sparse_as_the_trained_one(activation, options, subtract):
    sae = make(activation, subtract_b_dec=subtract, **options)
    twin = random_sae(sae, states(), seed=0)
    assert twin.W_enc.shape == sae.W_enc.shape and twin.normalisation == sae.normalisation
    np.testing.assert_allclose(twin.W_dec.norm(dim=1), 1, rtol=1e-5)
    assert torch.equal(twin.W_enc, twin.W_dec.T)
    wanted = len(sae.encode(states()).value)
    assert 100 < wanted < TOKENS * 45
    assert len(twin.encode(states()).value) == wanted
    assert (twin.activation, twin.k) == (("topk", 9) if activation == "topk" else ("jumprelu", None))


def test_an_sae_that_fires_everywhere_has_a_twin_that_does():
    sae = make("jumprelu")
    dense = SAE(sae.W_enc, sae.b_enc + 100, sae.W_dec, sae.b_dec)
    assert (
        len(random_sae(dense, states(), seed=0).encode(states()).value)
        == TOKENS * 50
        == len(dense.encode(states()).value)
    )


def test_without_a_centre_of_its_own_it_is_centred_on_the_states():
    """Far-off states would otherwise all fire the same features."""
    sae = make("jumprelu", subtract_b_dec=False)
    twin = random_sae(sae, states(offset=50.0), seed=0)
    pre = twin.preactivations(states(offset=50.0))
    np.testing.assert_allclose(pre.mean(0), 0, atol=1e-3)


def test_the_seed_decides():
    sae = make("relu")
    once, again, other = (random_sae(sae, states(), seed=seed) for seed in (1, 1, 2))
    assert once.hash == again.hash != other.hash


def test_cuts_leave_what_is_wanted():
    values = torch.tensor([5.0, 1.0, -2.0, 3.0, 0.0, 2.0])
    assert [cut_leaving(values, wanted) for wanted in (1, 2, 3)] == [4.0, 2.5, 1.5]
    assert cut_leaving(values, 4) == cut_leaving(values, 99) == 0.0
    assert cut_leaving(values, 0) > 5
    assert cut_leaving(torch.zeros(3), 0) == 0.0


def test_as_many_features_co_occur_at_its_threshold():
    sae, x = make("jumprelu"), states()
    sample, side = torch.arange(TOKENS) // 20, torch.arange(TOKENS) % 2
    batches = [
        Activations(x[half], sample[half] - sample[half][0], side[half], side[half], 5)
        for half in (slice(0, 100), slice(100, 200))
    ]
    twin = random_twin(sae, batches, 20.0, seed=0)

    def co_occurring(sae: SAE, threshold: float) -> int:
        dense = sae.encode(x).dense()
        present = [[dense[(sample == s) & (side == w)].amax(0) > threshold for w in (0, 1)] for s in range(10)]
        return sum(int((image & text).sum()) for image, text in present)

    assert co_occurring(twin.sae, twin.threshold) == co_occurring(sae, 20.0) > 50
    assert len(twin.sae.encode(x).value) == len(sae.encode(x).value)


@pytest.mark.parametrize("chunk", [N * 7, 10**7])
def test_all_active_features_may_be_counted(monkeypatch, chunk):
    """Far more than 50 are active here; the states may come in pieces."""
    monkeypatch.setattr(module, "DENSE_CHUNK_ELEMENTS", chunk)
    sae = make("jumprelu")
    sae = SAE(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, activation="jumprelu", threshold=torch.full((N,), 1.0))
    wanted = len(sae.encode(states(), max_active=N).value)
    assert wanted > 100 * TOKENS
    twin = random_sae(sae, states(), seed=0, max_active=N)
    assert len(twin.encode(states(), max_active=N).value) == wanted


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize(("activation", "options"), KINDS, ids=str)
def test_the_decoder_has_the_best_scale(activation, options, subtract):
    sae, x = make(activation, subtract_b_dec=subtract, **options), states()
    twin = random_sae(sae, x, seed=0)
    fitted = with_fitted_decoder(twin, x)
    codes = twin.encode(x, max_active=N)
    again = fitted.encode(x, max_active=N)
    assert torch.equal(codes.feature, again.feature) and torch.equal(codes.value, again.value), "the codes stay"

    def error(scale: float) -> float:
        other = SAE(
            fitted.W_enc,
            fitted.b_enc,
            fitted.W_dec * scale,
            fitted.b_dec,
            fitted.activation,
            fitted.threshold,
            fitted.k,
            subtract,
            fitted.normalisation,
        )
        return float((other.decode(codes, x).double() - x.double()).square().sum())

    assert error(1.0) < min(error(0.98), error(1.02))
    if not subtract and "normalisation" not in options:
        assert torch.allclose(fitted.b_dec, x.mean(0))
