"""Reading ahead: order, bounds, errors where they happened, and samples that a processor refuses."""

from __future__ import annotations

import io
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from PIL import Image

from mmfilter.core.input.decode import DecodeSettings
from mmfilter.core.input.shards import open_source
from mmfilter.core.pipeline.feed import WINDOW_BATCHES, Feed, Prefetched, in_order
from tests.conftest import good, write_tar


def test_in_order_keeps_order_and_bound():
    taken = []

    def items():
        for i in range(50):
            taken.append(i)
            yield i

    def slow_square(i: int) -> int:
        time.sleep(0.002 * (i % 3))
        return i * i

    with ThreadPoolExecutor(4) as pool:
        for done, value in enumerate(in_order(pool, slow_square, items(), 6)):
            assert value == done * done
            assert len(taken) <= done + 8
    assert done == 49


def test_an_error_arrives_after_what_came_before_it():
    def items():
        yield from (1, 2)
        raise ValueError("broke")

    stream = Prefetched(items(), 5)
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(ValueError, match="broke"):
        next(stream)


def test_reading_ahead_is_bounded_and_stops():
    made = []

    def items():
        for i in range(1000):
            made.append(i)
            yield i

    with closing(Prefetched(items(), 3)) as stream:
        assert next(stream) == 0
        time.sleep(0.1)
        assert len(made) <= 6
    assert stream.ended(timeout=30)
    assert len(made) <= 6


class Picky:
    """A backbone whose processor refuses pictures of one width."""

    def __init__(self, backbone, width: int) -> None:
        self._backbone, self._width = backbone, width
        self.max_tokens = backbone.max_tokens
        self.n_caption_tokens, self.n_image_tokens = backbone.n_caption_tokens, backbone.n_image_tokens

    def prepare(self, images: list[Image.Image], captions: list[str]):
        if any(image.width == self._width for image in images):
            raise ValueError("aspect ratio out of bounds")
        return self._backbone.prepare(images, captions)


def windows(tiny, path, n: int, *, batch_size: int, width: int = 0):
    out = io.BytesIO()
    Image.new("RGB", (333, 20)).save(out, "JPEG")
    members = [member for i in range(n) for member in good(f"{i}", i)]
    write_tar(path, [*members[:6], ("odd.jpg", out.getvalue()), ("odd.txt", b"odd"), *members[6:]])
    with closing(Feed(Picky(tiny[1], width), DecodeSettings(), batch_size=batch_size, workers=2)) as feed:
        for window in feed.windows(open_source(str(path)).samples(), str(path)):
            yield [[pair.row for pair in batch.pairs] for batch in window.batches], window.pairs


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_only_what_the_processor_refuses_is_dropped(tiny, tmp_path, batch_size):
    batches, pairs = [], []
    for got, all_pairs in windows(tiny, tmp_path / "a.tar", 10, batch_size=batch_size, width=333):
        batches += got
        pairs += all_pairs
    assert [pair.row for pair in pairs] == list(range(11))
    assert {pair.row: pair.reason for pair in pairs if pair.reason} == {
        2: "the processor refuses it: aspect ratio out of bounds"
    }
    assert sorted(row for batch in batches for row in batch) == [0, 1, *range(3, 11)]


def test_windows_are_bounded_and_batches_sorted_by_length(tiny, tmp_path):
    sizes = []
    for batches, pairs in windows(tiny, tmp_path / "a.tar", 40, batch_size=2):
        sizes.append(len(pairs))
        lengths = {pair.row: len(tiny[1].processor.tokenizer(pair.caption)["input_ids"]) for pair in pairs}
        in_order_of_batches = [lengths[row] for batch in batches for row in batch]
        assert in_order_of_batches == sorted(in_order_of_batches)
        assert all(pair.image is None for pair in pairs)  # pixels are let go
    assert max(sizes) == 2 * WINDOW_BATCHES and sum(sizes) == 41
