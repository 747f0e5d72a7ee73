"""The samples of a run's shards, as many as are asked for."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from mmfilter.core.input.sample import RawSample
from mmfilter.core.input.source import Source


class Intake:
    """The samples within `limit`, shard after shard; a stream can be read once, so its head is kept for the pass."""

    def __init__(self, limit: int | None = None) -> None:
        self._limit = self._left = limit
        self._streams: dict[str, tuple[list[RawSample], Iterator[RawSample]]] = {}

    def head(self, source: Source, n: int) -> Iterable[RawSample]:
        """The first `n` samples of a shard, any number of times, without using them up."""
        n = n if self._limit is None else min(n, self._limit)
        if not source.once:
            return itertools.islice(source.samples(), n)
        if source.path not in self._streams:
            rest = source.samples()
            self._streams[source.path] = list(itertools.islice(rest, n)), rest
        return self._streams[source.path][0]

    def samples(self, source: Source) -> Iterator[RawSample]:
        """The samples of a shard that the limit leaves."""
        if source.path in self._streams:
            head, rest = self._streams.pop(source.path)
            samples: Iterator[RawSample] = itertools.chain(head, rest)
        else:
            samples = source.samples()
        for raw in itertools.islice(samples, self._left):
            self.use_up(1)
            yield raw

    def use_up(self, n: int) -> None:
        """Count samples as scored."""
        if self._left is not None:
            self._left = max(0, self._left - n)

    @property
    def exhausted(self) -> bool:
        """Whether the limit is reached."""
        return self._left == 0
