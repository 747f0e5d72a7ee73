"""Cross-modal weights and rarity against brute force, and pooling against dense arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmfilter.core.sae.token_codes import TokenCodes, pool
from mmfilter.core.scores import crossmodal
from mmfilter.core.scores.crossmodal import Reference, load_weights
from mmfilter.errors import SAEError
from tests import reference as brute

D, N = 6, 40


def pairs(n: int, seed: int = 0):
    """Random states and sparse codes of n pairs: [(image, text)], float32."""
    rng = np.random.default_rng(seed)
    states, codes = [], []
    for _ in range(n):
        lengths = (int(rng.integers(3, 7)), int(rng.integers(1, 5)))
        states.append(tuple(rng.normal(size=(length, D)).astype(np.float32) for length in lengths))
        dense = [rng.random((length, N)).astype(np.float32) for length in lengths]
        codes.append(tuple(np.where(rng.random(part.shape) < 0.15, part, 0).astype(np.float32) for part in dense))
    codes = [
        tuple(np.where(np.arange(N) < 36, side, 0).astype(np.float32) for side in pair) for pair in codes
    ]  # four dead features
    return states, codes


def flat(states, codes, first: int):
    """A batch as the backbone and the SAE give it."""
    rows, sample, side, position = [], [], [], []
    for i, pair in enumerate(codes):
        for which, part in enumerate(pair):
            rows += list(part)
            sample += [i] * len(part)
            side += [which] * len(part)
            position += range(len(part))
    dense = torch.tensor(np.array(rows))
    token, feature = dense.nonzero(as_tuple=True)
    all_states = torch.tensor(np.concatenate([part for pair in states for part in pair]))
    sample, side, position = (torch.tensor(part) for part in (sample, side, position))
    token_id = (first + sample) * 1000 + side * 500 + position
    return TokenCodes(token, feature, dense[token, feature], len(dense), N), all_states, sample, side, token_id


def fit(states, codes, batch: int):
    reference = Reference(N, D)
    for second in (False, True):
        for start in range(0, len(codes), batch):
            part, all_states, sample, side, token = flat(
                states[start : start + batch], codes[start : start + batch], start
            )
            if second:
                reference.add_states(all_states, token)
            else:
                reference.observe(part, token, sample, side, int(sample.max()) + 1)
        if not second:
            reference.choose()
    return reference.weights({"made": "here"})


@pytest.mark.parametrize("batch", [1, 7, 60])
def test_weights_equal_brute_force(batch):
    states, codes = pairs(60)
    omega, idf = brute.crossmodal(states, codes)
    weights = fit(states, codes, batch)
    assert 10 < weights.n_weighted < N
    np.testing.assert_allclose(weights.omega.numpy(), omega, atol=1e-6)
    np.testing.assert_allclose(weights.idf.numpy(), idf, atol=1e-6)
    stacked = [np.concatenate([pair[side] for pair in codes]) for side in (0, 1)]
    np.testing.assert_array_equal(weights.image_tokens.numpy(), (stacked[0] > 0).sum(0))
    np.testing.assert_array_equal(weights.text_samples.numpy(), sum((pair[1] > 0).any(0) for pair in codes))
    np.testing.assert_array_equal(weights.text_maximum.numpy(), stacked[1].max(0))


def test_cutting_the_buffer_back_changes_nothing(monkeypatch):
    states, codes = pairs(60)
    wanted = fit(states, codes, 5)
    monkeypatch.setattr(crossmodal, "BUFFER_ENTRIES", 50)
    assert torch.equal(fit(states, codes, 5).omega.nan_to_num(9), wanted.omega.nan_to_num(9))


def test_a_feature_of_one_side_has_no_weight():
    states, codes = pairs(60)
    codes = [(image, np.where(np.arange(N) == 3, 0, text).astype(np.float32)) for image, text in codes]
    weights = fit(states, codes, 10)
    assert weights.omega[3].isnan() and weights.text_samples[3] == 0 < weights.image_samples[3]


def test_weights_are_saved_and_loaded(tmp_path):
    weights = fit(*pairs(40), 10)
    weights.save(tmp_path / "weights.safetensors")
    again = load_weights(tmp_path / "weights.safetensors")
    assert again.hash == weights.hash and again.metadata == {"made": "here"} and again.n_samples == 40
    assert all(
        torch.equal(getattr(again, name).nan_to_num(9), getattr(weights, name).nan_to_num(9))
        for name in crossmodal.TENSORS
    )
    (tmp_path / "weights.safetensors").write_bytes(b"garbage")
    with pytest.raises(SAEError, match="delete the file to fit them again"):
        load_weights(tmp_path / "weights.safetensors")


def test_pooling_equals_dense_pooling():
    states, codes = pairs(9)
    part, _, sample, side, _ = flat(states, codes, 0)
    for which, pooled in enumerate(pool(part, sample, side, 9)):
        dense = [pair[which] for pair in codes]
        np.testing.assert_allclose(pooled.maximum, np.stack([d.max(0) for d in dense]))
        np.testing.assert_allclose(pooled.mean, np.stack([d.mean(0) for d in dense]), atol=1e-6)
        np.testing.assert_array_equal(pooled.l0, [(d > 0).sum() for d in dense])
        np.testing.assert_allclose(pooled.l1, [d.sum() for d in dense], rtol=1e-5)
        np.testing.assert_array_equal(pooled.n_tokens, [len(d) for d in dense])
