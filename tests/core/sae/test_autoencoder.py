"""SAE: every activation against the formula in float64, sparse against dense, saved against loaded, SAELens' too."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from mmfilter.core.sae import autoencoder as module
from mmfilter.core.sae import product as module_of_product
from mmfilter.core.sae.autoencoder import SAE
from mmfilter.core.sae.pretrained import load_sae
from mmfilter.core.sae.token_codes import TokenCodes
from mmfilter.errors import SAEError

D, N, TOKENS = 8, 160, 33


def make(activation: str = "relu", *, subtract: bool = True, **options) -> SAE:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    if activation == "jumprelu":
        options.setdefault("threshold", normal(N).abs())
    return SAE(
        normal(D, N), normal(N), normal(N, D), normal(D), activation=activation, subtract_b_dec=subtract, **options
    )


def states() -> torch.Tensor:
    return torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(1)) * 2


def formula(sae: SAE, x: torch.Tensor, at_most: int) -> np.ndarray:
    """Codes in float64, one token and one feature at a time."""
    x = x.double().numpy()
    if sae.normalisation == "layer_norm":
        x = (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-5)
    if sae.normalisation == "constant_norm_rescale":
        x = x * np.sqrt(D) / np.linalg.norm(x, axis=1, keepdims=True)
    h = (
        x - (sae.b_dec.double().numpy() if sae.subtract_b_dec else 0)
    ) @ sae.W_enc.double().numpy() + sae.b_enc.double().numpy()
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
        wanted = wanted * x.std(1, ddof=1, keepdims=True) + x.mean(1, keepdims=True)
    if normalisation == "constant_norm_rescale":
        wanted = wanted * np.linalg.norm(x, axis=1, keepdims=True) / np.sqrt(D)
    np.testing.assert_allclose(out, wanted, atol=2e-4)


@pytest.mark.parametrize(("activation", "options"), KINDS, ids=lambda value: str(value))
def test_no_states_have_no_codes(activation, options):
    sae = make(activation, **options)
    codes = sae.encode(torch.zeros(0, D))
    assert codes.n_tokens == 0 and codes.n_features == N and len(codes.value) == 0
    assert sae.decode(codes, torch.zeros(0, D)).shape == (0, D)


def test_tokens_without_features_decode_to_the_bias():
    sae = make("jumprelu", threshold=torch.full((N,), 1e6))
    codes = sae.encode(states())
    assert len(codes.value) == 0
    assert torch.equal(sae.decode(codes, states()), sae.b_dec.expand(TOKENS, -1))


@pytest.mark.parametrize(("activation", "options"), KINDS, ids=lambda value: str(value))
def test_what_is_saved_is_loaded(tmp_path, activation, options):
    sae = make(activation, subtract=False, metadata={"hook_name": "blocks.1.hook_resid_post"}, **options)
    sae.save(tmp_path / "sae")
    again = load_sae(tmp_path / "sae")
    assert again.hash == sae.hash and again.metadata["hook_name"] == "blocks.1.hook_resid_post"
    assert torch.equal(again.encode(states()).dense(), sae.encode(states()).dense())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("normalisation", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize(("activation", "options"), KINDS, ids=lambda value: str(value))
def test_saelens_opens_what_is_saved(tmp_path, activation, options, normalisation):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = pytest.importorskip("sae_lens")
    sae = make(activation, normalisation=normalisation, metadata={"sae_lens_version": "3.20.0"}, **options)
    sae.save(tmp_path)
    theirs = package.SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        codes = theirs.encode(states())
        wanted = theirs.decode(codes)
    ours = sae.encode(states(), max_active=N)
    torch.testing.assert_close(ours.dense(), codes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.decode(ours, states()), wanted, atol=2e-4, rtol=1e-5)


def choice(rows: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest of each row by a stable sort, so that ties go to lower columns; those not positive are dropped."""
    out = torch.zeros_like(rows)
    for row, kept in zip(rows, out, strict=True):
        best = sorted(range(len(row)), key=lambda j: (-float(row[j]), j))[:k]
        kept[best] = row[best].clamp(min=0)
    return out


@pytest.mark.parametrize("kind", ["all differ", "few values", "all equal", "infinite", "none positive"])
@pytest.mark.parametrize(("width", "k"), [(5, 5), (40, 7), (1000, 3), (1003, 20), (4096, 32), (4099, 1)])
def test_the_strongest_are_exact_and_ties_go_to_lower_features(width, k, kind):
    g = torch.Generator().manual_seed(width + k)
    rows = torch.randn(13, width, generator=g)
    if kind == "few values":
        rows = (rows * 2).round()
    if kind == "all equal":
        rows = torch.ones(13, width)
    if kind == "infinite":
        rows[:, ::3] = torch.inf
    if kind == "none positive":
        rows = -rows.abs()
    codes = TokenCodes.strongest(rows, k)
    assert torch.equal(codes.dense(), choice(rows, k))
    order = codes.token * width + codes.feature
    assert (order.diff() > 0).all(), "sorted by token, then feature"


@pytest.mark.parametrize(
    "kind", ["all differ", "few values", "all equal", "infinite", "none positive", "some thresholds negative"]
)
@pytest.mark.parametrize(("share", "k"), [(0.01, 3), (0.01, 50), (0.05, 20), (0.6, 5), (0.6, 900)])
def test_above_the_threshold_at_most_k_exact_and_ties_go_to_lower_features(share, k, kind):
    width = 1003
    g = torch.Generator().manual_seed(k)
    rows, threshold = (
        torch.randn(13, width, generator=g),
        torch.full((width,), float(torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - share)))),
    )
    if kind == "few values":
        rows = (rows * 2).round() + threshold
    if kind == "all equal":
        rows = torch.where(torch.rand(13, width, generator=g) < share, threshold + 1, -1)
    if kind == "infinite":
        rows[:, ::300] = torch.inf
    if kind == "none positive":
        rows = -rows.abs()
    if kind == "some thresholds negative":
        threshold = torch.where(torch.arange(width) % 100 == 0, -3.0, 2.0)
    rows[4] = -1
    codes = TokenCodes.above(rows, threshold, k)
    assert torch.equal(codes.dense(), choice(torch.where(rows > threshold, rows, 0), k))
    order = codes.token * width + codes.feature
    assert (order.diff() > 0).all(), "sorted by token, then feature"
    assert (codes.value > 0).all()


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
def test_a_token_alone_has_the_codes_it_has_in_a_batch(activation):
    """To the bit: at a threshold a rounding decides whether a feature is there."""
    sae, x = make(activation, **({"k": 7} if activation == "topk" else {})), states()
    codes = sae.encode(x)
    for i in range(len(x)):
        assert torch.equal(sae.encode(x[i : i + 1]).dense()[0], codes.dense()[i])


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
def test_no_tokens_have_no_codes(activation):
    codes = make(activation, **({"k": 7} if activation == "topk" else {})).encode(torch.zeros(0, D))
    assert (codes.n_tokens, len(codes.value), codes.dense().shape) == (0, 0, (0, N))


def test_products_of_many_lengths_have_few_shapes(monkeypatch):
    """oneDNN keeps memory for every shape that it meets."""
    shapes, product = set(), module_of_product.linear
    monkeypatch.setattr(module_of_product, "linear", lambda x, *rest: shapes.add(len(x)) or product(x, *rest))
    monkeypatch.setattr(module, "DENSE_CHUNK_ELEMENTS", 64 * N)
    sae, x = make("relu"), torch.randn(300, D, generator=torch.Generator().manual_seed(3))
    whole = sae.encode(x).dense()
    for n in range(1, 300):
        assert torch.equal(sae.encode(x[:n]).dense(), whole[:n])
    assert shapes == {8 * i for i in range(1, 9)}


def test_the_hash_sees_every_part():
    base = make("jumprelu")
    others = [
        make("jumprelu", subtract=False),
        make("relu"),
        make("topk", k=3),
        make("topk", k=4),
        make("jumprelu", normalisation="layer_norm"),
    ]
    assert len({base.hash, *(other.hash for other in others)}) == 6


def test_another_width_is_refused():
    with pytest.raises(SAEError, match="SAE takes states of width 8, the model gives 9: it belongs to another model"):
        make().encode(torch.zeros(2, 9))
