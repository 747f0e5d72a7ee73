"""The pass over the model: its states are those of single pairs, and what it cannot hold it says."""

from __future__ import annotations

import itertools

import pytest
import torch

from mmfilter.core.input.decode import DecodeSettings
from mmfilter.core.input.shards import open_source
from mmfilter.core.pipeline.model_pass import ModelPass
from mmfilter.errors import ModelError
from tests.conftest import good

BROKEN = [("broken.jpg", b"not an image"), ("broken.txt", b"a caption")]


@pytest.fixture
def model_pass(tiny):
    _, backbone, _ = tiny
    with ModelPass(backbone, DecodeSettings(), batch_size=4, workers=2) as opened:
        yield opened


def states_by_row(model_pass, source):
    found = {}

    def take(batch, activations):
        for i, pair in enumerate(batch.pairs):
            found[pair.row] = activations.states[activations.sample == i]

    return found, take


def test_every_good_sample_goes_through_once(make_shard, quiet, model_pass, tiny):
    source = open_source(str(make_shard(n=11, extra=[*BROKEN, *good("last", 99)])))
    found, take = states_by_row(model_pass, source)
    reasons = model_pass.over(source.samples(), source.path, take, quiet)
    assert sorted(found) == [*range(11), 12]
    assert sum(reasons.values()) == 1
    assert quiet.samples == 13
    with ModelPass(tiny[1], DecodeSettings(), batch_size=1, workers=1) as single:
        alone, take = states_by_row(single, source)
        single.over(source.samples(), source.path, take, quiet)
    for row, states in found.items():
        torch.testing.assert_close(states, alone[row], rtol=0, atol=0)


def test_it_goes_on_from_any_sample(make_shard, quiet, model_pass):
    source = open_source(str(make_shard(n=20)))
    whole, take = states_by_row(model_pass, source)
    model_pass.over(source.samples(), source.path, take, quiet)
    rest, take = states_by_row(model_pass, source)
    model_pass.over(itertools.islice(source.samples(), 7, None), source.path, take, quiet)
    assert sorted(rest) == list(range(7, 20))
    for row, states in rest.items():
        torch.testing.assert_close(states, whole[row], rtol=0, atol=0)


@pytest.mark.parametrize(("n", "step"), [(4, "use a smaller --batch-size"), (1, "use a larger device, or --dtype")])
def test_running_out_of_memory_names_the_way_out(make_shard, quiet, tiny, n, step):
    def take(_batch, _activations):
        raise torch.OutOfMemoryError("CUDA out of memory")

    source = open_source(str(make_shard(n=4)))
    with (
        ModelPass(tiny[1], DecodeSettings(), batch_size=n, workers=1) as opened,
        pytest.raises(ModelError, match=f"on a batch of {n} pairs: {step}"),
    ):
        opened.over(source.samples(), source.path, take, quiet)


def test_captions_alone(make_shard, quiet, tiny):
    from mmfilter.core.sides import TEXT

    source = open_source(str(make_shard(n=3)))
    sides = []
    backbone = tiny[1].with_text_context("none")
    with ModelPass(backbone, DecodeSettings(), batch_size=3, workers=1, captions_alone=True) as opened:
        opened.over(source.samples(), source.path, lambda _, states: sides.append(states.side), quiet)
    assert torch.cat(sides).unique().tolist() == [TEXT]
