"""Batches of a shard, read, decoded and pre-processed in parallel with the model.

    samples ─► decode (threads) ─► window ─► sort by length ─► batches ─► prepare (threads) ─► queue

A window is a bounded number of decoded samples; sorting inside it keeps padding low, and everything that
is alive at once is bounded by it, whatever the size of the shard.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from mmfilter.core.input.decode import DecodeSettings, Pair, decode
from mmfilter.core.input.sample import RawSample, problem_kind
from mmfilter.core.model.backbone import Backbone, ModelInputs

WINDOW_BATCHES = 8
WINDOW_PIXELS = 128_000_000
"""Decoded pixels that end a window early (384 MB of RGB)."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Batch:
    """Pairs that go through the model together, with what the model needs."""

    pairs: list[Pair]
    inputs: ModelInputs


@dataclass(frozen=True)
class Window:
    """A stretch of consecutive samples of one shard: its batches, and the pairs that have no score."""

    batches: Iterator[Batch]
    pairs: list[Pair]
    """All samples of the stretch, in row order; `reason` says which have no score"""

    @property
    def reasons(self) -> Counter[str]:
        """Kind of problem -> samples; complete once the batches have been taken."""
        return Counter(problem_kind(pair.reason) for pair in self.pairs if pair.reason is not None)

    @property
    def nbytes(self) -> int:
        """What the samples take in their shard, as far as that is known."""
        return sum(pair.columns["nbytes"] or 0 for pair in self.pairs)


class Feed:
    """Turns raw samples into prepared batches; owns the threads that do it."""

    def __init__(self, backbone: Backbone, settings: DecodeSettings, *, batch_size: int, workers: int) -> None:
        self._backbone, self._settings, self._batch_size = backbone, settings, batch_size
        self._decoders = ThreadPoolExecutor(workers, "decode")
        self._preparers = ThreadPoolExecutor(max(1, workers // 2), "prepare")
        self._ahead = 4 * workers

    def close(self) -> None:
        """Let the threads go; what they have not started is dropped."""
        for pool in (self._decoders, self._preparers):
            pool.shutdown(wait=False, cancel_futures=True)

    def windows(self, samples: Iterable[RawSample], shard: str) -> Iterator[Window]:
        """The shard's samples, window by window."""
        decoded = in_order(self._decoders, lambda raw: self._decode(raw, shard), samples, self._ahead)
        with closing(
            Prefetched(self._stretches(decoded), 1)
        ) as stretches:  # decode the next one while this one is in the model
            for stretch in stretches:
                yield self._window(stretch)

    def _window(self, stretch: list[tuple[Pair, int]]) -> Window:
        lengths = {pair.row: length for pair, length in stretch}
        pairs = [pair for pair, _ in stretch]
        good = sorted((pair for pair in pairs if pair.reason is None), key=lambda pair: (lengths[pair.row], pair.row))
        groups = [good[i : i + self._batch_size] for i in range(0, len(good), self._batch_size)]
        prepared = in_order(self._preparers, self._prepare, groups, 2)
        return Window((batch for batches in prepared for batch in batches), pairs)

    def _decode(self, raw: RawSample, shard: str) -> tuple[Pair, int]:
        pair = decode(raw, shard, self._settings)
        if pair.reason is not None:
            return pair, 0
        length = self._backbone.n_caption_tokens(pair.caption)
        if length == 0:
            pair.reason, pair.image = "caption has no tokens", None
        elif length >= self._backbone.max_tokens:
            pair.reason = (
                f"caption has {length:,} tokens; the model has positions for {self._backbone.max_tokens:,} with the "
                "image"
            )
            pair.image = None
        elif pair.image is not None:
            length += self._backbone.n_image_tokens(pair.image.width, pair.image.height)
        return pair, length

    def _stretches(self, decoded: Iterable[tuple[Pair, int]]) -> Iterator[list[tuple[Pair, int]]]:
        stretch: list[tuple[Pair, int]] = []
        pixels = 0
        for pair, length in decoded:
            stretch.append((pair, length))
            pixels += pair.image.width * pair.image.height if pair.image else 0
            if len(stretch) >= WINDOW_BATCHES * self._batch_size or pixels > WINDOW_PIXELS:
                yield stretch
                stretch, pixels = [], 0
        if stretch:
            yield stretch

    def _prepare(self, pairs: list[Pair]) -> list[Batch]:
        """Pre-process a batch; when the processor refuses it, find the samples that it refuses."""
        images = [pair.image for pair in pairs if pair.image is not None]  # all: those without have a reason
        try:
            inputs = self._backbone.prepare(images, [pair.caption for pair in pairs])
        except Exception as error:  # processors raise anything for odd images; each is one bad sample
            if len(pairs) > 1:
                middle = len(pairs) // 2
                return self._prepare(pairs[:middle]) + self._prepare(pairs[middle:])
            pairs[0].reason, pairs[0].image = f"the processor refuses it: {str(error)[:120]}", None
            return []
        good = (inputs.tokens > 0).all(1) & (inputs.longest <= self._backbone.max_tokens)
        if not good.all():
            return self._without(pairs, good.tolist(), inputs)
        for pair in pairs:
            pair.image = None  # the pixels live in `inputs` now
        return [Batch(pairs, inputs)]

    def _without(self, pairs: list[Pair], good: list[bool], inputs: ModelInputs) -> list[Batch]:
        """Name what is wrong with single samples, and prepare the others again."""
        lengths = inputs.lengths.tolist()
        kept = []
        for pair, fine, length in zip(pairs, good, lengths, strict=True):
            if fine or (len(pairs) > 1 and length <= self._backbone.max_tokens):
                kept.append(pair)
            elif length > self._backbone.max_tokens:
                pair.reason = f"pair has {length:,} tokens; the model has positions for {self._backbone.max_tokens:,}"
            else:
                pair.reason = "pair has no image tokens or no text tokens"
        if len(kept) == len(pairs):
            return [batch for pair in pairs for batch in self._prepare([pair])]
        return self._prepare(kept) if kept else []


def in_order(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """`map` in threads, in order, never more than `ahead` items in front of the consumer."""
    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class Prefetched(Iterator[T]):
    """Runs an iterator in a thread, at most `ahead` items in front; errors arrive where they happened."""

    _END = object()

    def __init__(self, items: Iterable[T], ahead: int) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(ahead)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(items,), daemon=True, name="prefetch")
        self._thread.start()

    def _run(self, items: Iterable[T]) -> None:
        try:
            for item in items:
                if not self._put((item, None)):
                    return
            self._put((self._END, None))
        except BaseException as error:  # handed to the consumer
            self._put((self._END, error))

    def _put(self, entry: tuple[Any, BaseException | None]) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __next__(self) -> T:
        item, error = self._queue.get()
        if error is not None:
            raise error
        if item is self._END:
            self._queue.put((self._END, None))
            raise StopIteration
        return cast(T, item)

    def ended(self, timeout: float) -> bool:
        """Whether nothing is read any more; waits up to so many seconds for it."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Stop reading ahead."""
        self._stopped.set()
