"""SAE: every activation against the formula in float64, sparse against dense, saved against loaded."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mmfilter.core.model import sae as module
from mmfilter.core.model.sae import SAE, load_sae
from mmfilter.errors import SAEError

D, N, TOKENS = 8, 160, 33


def make(activation: str = "relu", *, subtract: bool = True, **options) -> SAE:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    if activation == "jumprelu":
        options["threshold"] = normal(N).abs()
    return SAE(normal(D, N), normal(N), normal(N, D), normal(D), activation=activation, subtract_b_dec=subtract, **options)


def states() -> torch.Tensor:
    return torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(1)) * 2


def formula(sae: SAE, x: torch.Tensor, at_most: int) -> np.ndarray:
    """Codes in float64, one token and one feature at a time."""
    x = x.double().numpy()
    if sae.normalisation == "layer_norm":
        x = (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-5)
    if sae.normalisation == "constant_norm_rescale":
        x = x * np.sqrt(D) / np.linalg.norm(x, axis=1, keepdims=True)
    h = (x - (sae.b_dec.double().numpy() if sae.subtract_b_dec else 0)) @ sae.W_enc.double().numpy() + sae.b_enc.double().numpy()
    f = np.where(h > 0, h, 0)
    if sae.activation == "jumprelu":
        f = np.where(h > sae.threshold.double().numpy(), f, 0)
    keep = min(sae.k or N, at_most)
    for row in f:
        row[np.argsort(-row, kind="stable")[keep:]] = 0
    return f


KINDS = [("relu", {}), ("jumprelu", {}), ("topk", {"k": 7}), ("topk", {"k": 100})]


@pytest.mark.parametrize("normalisation", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize(("activation", "options"), KINDS, ids=lambda value: str(value))
@pytest.mark.parametrize("at_most", [50, 5])
def test_codes_follow_the_formula(activation, options, subtract, normalisation, at_most):
    sae = make(activation, subtract=subtract, normalisation=normalisation, **options)
    codes = sae.encode(states(), max_active=at_most)
    np.testing.assert_allclose(codes.dense().numpy(), formula(sae, states(), at_most), atol=1e-5)
    assert (codes.value > 0).all() and (codes.token.diff() >= 0).all()


def test_chunks_change_nothing(monkeypatch):
    sae = make("jumprelu")
    whole = sae.encode(states()).dense()
    monkeypatch.setattr(module, "DENSE_CHUNK_ELEMENTS", 5 * N)
    assert torch.allclose(sae.encode(states()).dense(), whole, atol=1e-6)


@pytest.mark.parametrize("normalisation", ["none", "layer_norm", "constant_norm_rescale"])
def test_decode_follows_the_formula(normalisation):
    sae = make("topk", k=7, normalisation=normalisation)
    x = states()
    out = sae.decode(sae.encode(x), x).double().numpy()
    wanted = formula(sae, x, 50) @ sae.W_dec.double().numpy() + sae.b_dec.double().numpy()
    x = x.double().numpy()
    if normalisation == "layer_norm":
        wanted = wanted * (x.std(1, ddof=1, keepdims=True) + 1e-5) + x.mean(1, keepdims=True)
    if normalisation == "constant_norm_rescale":
        wanted = wanted * np.linalg.norm(x, axis=1, keepdims=True) / np.sqrt(D)
    np.testing.assert_allclose(out, wanted, atol=2e-4)


@pytest.mark.parametrize(("activation", "options"), KINDS, ids=lambda value: str(value))
def test_what_is_saved_is_loaded(tmp_path, activation, options):
    sae = make(activation, subtract=False, metadata={"hook_name": "blocks.1.hook_resid_post"}, **options)
    sae.save(tmp_path / "sae")
    again = load_sae(tmp_path / "sae")
    assert again.hash == sae.hash and again.metadata == sae.metadata
    assert torch.equal(again.encode(states()).dense(), sae.encode(states()).dense())


def test_the_hash_sees_every_part():
    base = make("jumprelu")
    others = [make("jumprelu", subtract=False), make("relu"), make("topk", k=3), make("topk", k=4), make("jumprelu", normalisation="layer_norm")]
    assert len({base.hash, *(other.hash for other in others)}) == 6


def test_another_width_is_refused():
    with pytest.raises(SAEError, match="SAE takes states of width 8, the model gives 9: it belongs to another model"):
        make().encode(torch.zeros(2, 9))


BAD_CONFIGS = {
    "temporal": ({"architecture": "temporal"}, "has architecture 'temporal'; expected one of standard, jumprelu, topk"),
    "folding": ({"normalize_activations": "expected_average_only_in"}, "states normalize_activations 'expected_average_only_in', a factor that must be folded"),
    "rescale": ({"architecture": "topk", "k": 4, "rescale_acts_by_decoder_norm": True}, "save its inference form with SAELens first"),
    "k": ({"architecture": "topk"}, "activation 'topk' with k=None"),
    "threshold": ({"architecture": "jumprelu"}, "lacks the tensor 'threshold'"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_doubtful_folder_is_refused(tmp_path, case):
    changes, words = BAD_CONFIGS[case]
    make("relu").save(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | changes))
    with pytest.raises(SAEError) as error:
        load_sae(tmp_path)
    assert words in str(error.value)


def test_a_folder_without_an_sae(tmp_path):
    with pytest.raises(SAEError, match=r"has no cfg.json: a folder in the SAELens 6 layout holds cfg.json and sae_weights.safetensors"):
        load_sae(tmp_path)


def test_wrong_shapes_are_named(tmp_path):
    make("relu").save(tmp_path)
    tensors = {"W_enc": torch.zeros(N, D), "b_enc": torch.zeros(N), "W_dec": torch.zeros(N, D), "b_dec": torch.zeros(D)}
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    with pytest.raises(SAEError, match=r"SAE tensor 'b_enc' has shape \(160,\); W_enc \(160, 8\) asks for \(8,\)"):
        load_sae(tmp_path)
