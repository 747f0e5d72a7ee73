"""CE recovered: the arithmetic, when it means nothing, and a meter over batches of the embedded model."""

from __future__ import annotations

import io
import math

import pytest
import torch
from PIL import Image

from mmfilter.core.evaluation.splice import caption_loss, zeros
from mmfilter.core.evaluation.spliced_loss import LossMeter, SplicedLoss
from mmfilter.core.model.loading import LoadSettings, load_backbone
from mmfilter.core.sides import TEXT
from tests.conftest import caption, picture


def loss(clean: float, zero: float, *, n_tokens: int = 90, context_free: float = 6.0) -> SplicedLoss:
    return SplicedLoss(clean, zero, {"trained": 3.0, "random": 9.0}, n_tokens, 0, 1000, context_free)


def test_the_share_that_is_recovered():
    assert loss(2.0, 7.0).recovered == {"trained": 0.8, "random": -0.4}
    assert loss(2.0, 7.0).meaningless == loss(2.0, 7.0).caution == ""


def test_when_it_means_nothing_and_when_care_is_due():
    bad = loss(7.5, 9.0)
    assert bad.meaningless == (
        "the model's own loss on the captions, 7.50, is no better than guessing evenly among 1,000 tokens (6.91): it is not a language model of them"
    )
    assert all(math.isnan(share) for share in bad.recovered.values())
    assert (
        loss(2.0, 2.005).meaningless
        == "zeroing the states takes the loss from 2.000 to 2.005: there is nothing to recover"
    )
    assert loss(math.nan, math.nan, n_tokens=0).meaningless == "no caption token has a finite loss"
    assert loss(6.5, 8.0).caution == (
        "the model's own loss, 6.50, is above the 6.00 of guessing by the frequencies of these tokens alone: it is a poor language model of these captions"
    )
    assert bad.caution == ""


@pytest.fixture(scope="module")
def whole(tiny):
    card = tiny[0]
    return load_backbone(card.model, card.layer, prompt=card.prompt, settings=LoadSettings(whole=True))


def batches(whole, n: int, size: int):
    for first in range(0, n, size):
        numbers = range(first, min(n, first + size))
        images = [Image.open(io.BytesIO(picture(i))).convert("RGB") for i in numbers]
        yield whole.prepare(images, [caption(i) for i in numbers])


def test_the_meter_takes_means_over_all_tokens(whole):
    def half(states):
        return states / 2

    meter = LossMeter(whole, {"half": half})
    for inputs in batches(whole, 10, 4):
        meter.add(inputs.tensors, inputs.side)
    found = meter.loss
    everything = next(batches(whole, 10, 10))
    args = (everything.tensors, everything.side)
    ids = everything.tensors["input_ids"][everything.side == TEXT]
    for got, way in ((found.clean, None), (found.zero, zeros), (found.spliced["half"], half)):
        assert got == pytest.approx(float(caption_loss(whole, *args, way).total.sum()) / len(ids), rel=1e-5)
    shares = torch.bincount(ids).double() / len(ids)
    assert found.context_free == pytest.approx(-sum(p * math.log(p) for p in shares.tolist() if p), rel=1e-9)
    assert (found.n_tokens, found.n_left_out, found.vocabulary) == (len(ids), 0, 4096)
    assert found.clean < found.spliced["half"] < found.zero and not meter.sees_ahead


def test_pairs_without_a_finite_loss_are_left_out_of_all_means(whole):
    inputs = next(batches(whole, 3, 3))

    def spoilt(states):  # the first pair's image tokens
        return torch.cat([torch.full_like(states[:1], torch.nan), states[1:]])

    meter = LossMeter(whole, {"spoilt": spoilt})
    meter.add(inputs.tensors, inputs.side)
    assert meter.loss.n_left_out == 1
    rest = caption_loss(whole, inputs.tensors, inputs.side)
    assert meter.loss.clean == pytest.approx(float(rest.total[1:].sum() / rest.n_tokens[1:].sum()), rel=1e-6)
