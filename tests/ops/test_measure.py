"""`measure` with the embedded model: figures against float64, notes, and what the publisher states."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mmfilter.core.sae.autoencoder import SAE
from mmfilter.core.sides import IMAGE, TEXT
from mmfilter.errors import MMFilterError, SAEError
from mmfilter.ops.measure import flat, measure
from mmfilter.ops.measure_settings import MeasureSettings
from tests.conftest import caption, picture, write_tar


def run(card, shard, progress, **options):
    return measure([str(shard)], MeasureSettings(card, workers=2, **options), progress)


def test_figures_equal_a_float64_computation(tiny, make_shard, quiet):
    card, backbone, sae = tiny
    found = run(card, make_shard(n=30), quiet, sample=25, batch_size=7)
    sides = ([], [])
    for i in range(25):
        image = Image.open(io.BytesIO(picture(i))).convert("RGB")
        got = backbone.activations(backbone.prepare([image], [caption(i)]))
        for side, states in zip((IMAGE, TEXT), sides, strict=True):
            states.append(got.states[got.side == side].double().numpy())
    W, b, back, centre, threshold = (
        getattr(sae, name).double().numpy() for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    )
    for name, parts in zip(("image", "text"), sides, strict=True):
        x = np.concatenate(parts)
        pre = (x - centre) @ W + b
        f = np.where(pre > threshold, pre, 0)
        again = f @ back + centre
        side = found.fidelity.sides[name]
        assert side.n_tokens == len(x) and side.n_active == (f > 0).any(0).sum()
        assert side.fvu == pytest.approx(((x - again) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(), rel=1e-4)
        assert side.l0 == pytest.approx((f > 0).sum(1).mean(), rel=1e-4)
    assert (
        found.n_pairs == 25 and found.published["training_settings.k"] == 32 and found.published["model_name"] == "tiny"
    )
    assert found.notes == ["measured on only 25 pairs; 50 or more make the figures steady"]
    assert found.verdict == (
        f"The SAE explains {100 * (1 - found.fidelity.image.fvu):.0f} % of the variance of image tokens "
        f"and {100 * (1 - found.fidelity.text.fvu):.0f} % of that of text tokens."
    )


def test_an_sae_that_fires_on_nothing(tiny, make_shard, quiet, tmp_path):
    card, _, sae = tiny
    SAE(sae.W_enc, sae.b_enc - 1e6, sae.W_dec, sae.b_dec).save(tmp_path / "sae")
    found = run(replace(card, sae=str(tmp_path / "sae")), make_shard(n=5), quiet)
    assert found.fidelity.n_dead == sae.n_features and found.published.keys() <= {"sae_lens_version"}
    levels = f"FVU {found.fidelity.image.fvu:.2f}, {found.fidelity.text.fvu:.2f}"
    assert (
        found.verdict
        == f"The SAE hardly reconstructs image and text tokens ({levels}; 1 is no better than their mean): scores through it mean little."
    )


def test_bad_samples_are_counted_and_nothing_usable_is_an_error(tiny, make_shard, quiet, tmp_path):
    bad = [("x.jpg", b"no image"), ("x.txt", b"words")]
    assert run(tiny[0], make_shard(n=2, extra=bad), quiet).reasons == {"image cannot be decoded": 1}
    with pytest.raises(MMFilterError) as caught:
        run(tiny[0], write_tar(tmp_path / "b.tar", bad), quiet)
    assert str(caught.value) == "the shards hold no usable pair to measure the SAE on (1: image cannot be decoded)"


def test_what_does_not_fit_is_an_error(tiny, make_shard, quiet, tmp_path):
    sae = tiny[2]
    SAE(sae.W_enc[:8], sae.b_enc, sae.W_dec[:, :8], sae.b_dec[:8]).save(tmp_path / "sae")
    with pytest.raises(SAEError, match="SAE takes states of width 8, the model gives 192"):
        run(replace(tiny[0], sae=str(tmp_path / "sae")), make_shard(n=2), quiet)
    with pytest.raises(MMFilterError, match="--sample is 0; at least 1 is needed"):
        MeasureSettings(tiny[0], sample=0)


def test_metadata_is_flattened():
    assert flat({"k": 3, "stats": {"fvu": 0.2, "by": {"side": "image"}}, "list": [1]}) == {
        "k": 3,
        "stats.fvu": 0.2,
        "stats.by.side": "image",
    }
