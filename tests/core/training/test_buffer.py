"""The buffer: what goes in comes out once, mixed, balanced, and the same however it was split."""

from __future__ import annotations

import json

import pytest
import torch

from mmfilter.core.sides import IMAGE, TEXT
from mmfilter.core.training.buffer import BufferSettings, ShuffleBuffer
from mmfilter.errors import SAEError

D = 4


def numbered(n: int, text_every: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """States whose first number says which they are, all of norm close to 1; every fifth is text."""
    which = torch.arange(n)
    states = torch.zeros(n, D, dtype=torch.float64)
    states[:, 0], states[:, 1] = which * 1e-6, 1
    return states.float(), torch.where(which % text_every == 0, TEXT, IMAGE)


def number(states: torch.Tensor) -> list[int]:
    return (states[:, 0].double() * 1e6).round().long().tolist()


def run(
    settings: BufferSettings, n: int, sizes: list[int], *, last: bool = True, text_every: int = 5
) -> tuple[list, ShuffleBuffer]:
    """The batches as (numbers, sides) when `n` states come in pieces of these sizes, again and again."""
    buffer = ShuffleBuffer(settings, D)
    states, side = numbered(n, text_every)
    out, start, turn = [], 0, 0
    while start < n:
        size = sizes[turn % len(sizes)]
        buffer.add(states[start : start + size], side[start : start + size], "a.tar, sample 'x'")
        start, turn = start + size, turn + 1
        out += [(number(batch), sides.tolist()) for batch, sides in buffer.batches()]
    if last:
        out += [(number(batch), sides.tolist()) for batch, sides in buffer.batches(last=True)]
    return out, buffer


SETTINGS = {
    "as they come": BufferSettings(batch_size=50, capacity=400),
    "balanced": BufferSettings(batch_size=50, capacity=400, image_fraction=0.3),
    "no sinks": BufferSettings(batch_size=50, capacity=400, image_fraction=0.55, sink_factor=None),
    "all images": BufferSettings(batch_size=50, capacity=400, image_fraction=1.0),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_the_split_over_calls_does_not_matter(case):
    batches, buffer = run(SETTINGS[case], 3000, [3000])
    assert len(batches) > 10
    for sizes in ([1], [7, 300, 0, 41], [1999]):
        again, other = run(SETTINGS[case], 3000, sizes)
        assert again == batches and other.counts == buffer.counts


def test_each_state_comes_out_once_and_with_its_side():
    batches, buffer = run(SETTINGS["as they come"], 3000, [130])
    out = [i for batch, _ in batches for i in batch]
    assert sorted(out) == list(range(3000))
    assert all(side == [TEXT if i % 5 == 0 else IMAGE for i in batch] for batch, side in batches)
    assert buffer.counts.seen == (2400, 600) and buffer.counts.displaced == (0, 0)


def test_batches_are_mixed():
    """A batch draws evenly from what the buffer holds; its states are not neighbours."""
    batches, _ = run(BufferSettings(batch_size=100, capacity=2000), 12_000, [500], last=False)
    first = torch.tensor(batches[0][0]).double()
    assert abs(first.mean() - 999.5) < 3 * 577 / 10 and first.sort().values.diff().max() < 150
    later = torch.tensor(batches[40][0]).double()
    assert later.std() > 800
    assert batches[0][0] != sorted(batches[0][0])
    other, _ = run(BufferSettings(batch_size=100, capacity=2000, seed=1), 12_000, [500], last=False)
    assert other[0][0] != batches[0][0]


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.55, 1.0])
def test_every_batch_has_its_share_of_images(fraction):
    settings = BufferSettings(batch_size=50, capacity=400, image_fraction=fraction)
    batches, buffer = run(settings, 5000, [77])
    assert all(side.count(IMAGE) == round(fraction * 50) and len(side) == 50 for _, side in batches)
    out = [i for batch, _ in batches for i in batch]
    assert len(out) == len(set(out))
    assert sum(buffer.counts.displaced) + len(out) + buffer.level == 5000
    if fraction == 0.3:  # 35 texts a batch of the 1,000 there are: all but the few left at the end come out
        assert len(out) > 5000 / 5 / 35 * 50 - 100 and buffer.counts.displaced[1] == 0


def test_what_is_displaced_is_spread_evenly():
    """Where images are too many, those that stay come evenly from the whole stream, once the buffer has been filled."""
    batches, _ = run(
        BufferSettings(batch_size=50, capacity=400, image_fraction=0.5), 20_000, [500], last=False, text_every=20
    )
    images = torch.tensor([i for batch, side in batches for i, s in zip(batch, side, strict=True) if s == IMAGE])
    count = torch.histc(images[(images >= 6000) & (images < 18_000)].double(), 4, 6000, 18_000)
    assert len(images) > 300 and (count / count.sum() - 0.25).abs().max() < 0.05


def test_sinks_are_left_out_by_side():
    buffer = ShuffleBuffer(BufferSettings(batch_size=50, capacity=400, sink_factor=10.0), D)
    states, side = numbered(2003)
    states[side == TEXT, 1] = 30.0  # text has larger norms, which is no reason to leave it out
    states[7, 1], states[11, 1], states[10, 1], states[1995, 1], states[15, 1] = 30.0, 9.0, 2000.0, 500.0, 250.0
    buffer.add(states, side, "a.tar")
    out = [i for batch, _ in buffer.batches(last=True) for i in number(batch)]
    assert sorted(out) == sorted(set(range(2003)) - {7, 10, 1995})
    assert buffer.counts.sinks == (1, 2)


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("stop", [3, 11])
def test_a_restored_buffer_goes_on_as_the_first_would(case, stop):
    """Also in the middle of what one `add` brought."""
    states, side = numbered(3000)
    buffer = ShuffleBuffer(SETTINGS[case], D)
    buffer.add(states, side, "a.tar")
    ready = buffer.batches(last=True)
    for _ in range(stop):
        next(ready)
    tensors, values = buffer.state()
    again = ShuffleBuffer(SETTINGS[case], D)
    again.restore({name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(values)))
    wanted = [(number(batch), sides.tolist()) for batch, sides in ready]
    assert [(number(batch), sides.tolist()) for batch, sides in again.batches(last=True)] == wanted and wanted
    assert again.counts == buffer.counts


def test_bfloat16_is_held_as_such():
    buffer = ShuffleBuffer(BufferSettings(batch_size=2, capacity=4, dtype="bfloat16"), D)
    buffer.add(torch.full((4, D), 1 / 3), torch.zeros(4, dtype=torch.long), "a.tar")
    batch, _ = next(buffer.batches())
    assert batch.dtype == torch.bfloat16 and torch.equal(batch, torch.full((2, D), 1 / 3).bfloat16())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_is_named(value):
    buffer = ShuffleBuffer(BufferSettings(batch_size=2, capacity=8), D)
    states, side = numbered(6)
    states[5, 2] = value
    with pytest.raises(SAEError) as error:
        buffer.add(states, side, "shard '00012.tar', sample 'cat'")
    assert str(error.value) == (
        "shard '00012.tar', sample 'cat' has a state that is not finite (text token 5 of 6): "
        "run the model in float32 or leave the sample out"
    )
    assert buffer.counts.seen == (0, 0) and list(buffer.batches(last=True)) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"capacity": 4096}, "the buffer has capacity 4096; expected at least 2 batches of 4096, better 32"),
        ({"batch_size": 0}, "the buffer has batch_size 0; expected a whole number from 1"),
        ({"image_fraction": 40}, "the buffer has image_fraction 40; expected a fraction from 0 to 1"),
        ({"sink_factor": 1.0}, "the buffer has sink_factor 1.0; expected a number above 1"),
        ({"dtype": "float16"}, "the buffer has dtype 'float16'; expected one of float32, bfloat16"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_settings_that_are_refused(options, words):
    with pytest.raises(SAEError) as error:
        BufferSettings(**options)
    assert str(error.value) == words


def test_wrong_shapes():
    buffer = ShuffleBuffer(BufferSettings(batch_size=2, capacity=8), D)
    with pytest.raises(
        SAEError, match=r"a.tar gives states \(3, 5\) and sides \(3,\); expected \(tokens, 4\) and \(tokens,\)"
    ):
        buffer.add(torch.zeros(3, 5), torch.zeros(3), "a.tar")
