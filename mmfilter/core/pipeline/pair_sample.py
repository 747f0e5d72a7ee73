"""A sample of the user's own pairs, kept on disk, so that their captions can be exchanged and every pass sees the same
ones.

The input is read once, the heads of a few shards spread evenly over it, so a tar on stdin will do.
Encoded images go to a temporary file (in memory while they are few), captions stay in memory, and
nothing is ever written beside the input.
"""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from mmfilter.core.input.decode import DecodeSettings, Pair, decode
from mmfilter.core.input.sample import IMAGE_EXTENSIONS, RawSample, problem_kind
from mmfilter.core.input.source import Source
from mmfilter.core.pipeline.feed import in_order
from mmfilter.core.pipeline.reference import REFERENCE_SHARDS, spread
from mmfilter.core.progress import Progress
from mmfilter.errors import ShardError

CAPTION = "txt"
"""Where a sample that is read back has its caption: for `DecodeSettings.caption`."""
MEMORY_BYTES = 64 << 20
DISK_BYTES = 8 << 30
"""Images beyond this are not sampled."""


@dataclass(frozen=True)
class SampledPair:
    """One usable pair of the input."""

    key: str
    caption: str
    image_hash: str
    extension: str
    start: int
    """Where its image is in the temporary file"""
    nbytes: int


class PairSample:
    """Usable pairs from the heads of up to 10 shards, evenly spaced; a context manager that owns the temporary file."""

    def __init__(self) -> None:
        self.pairs: list[SampledPair] = []
        self.reasons: Counter[str] = Counter()
        """Kind of problem -> samples that cannot be used"""
        self.failures: list[ShardError] = []
        """Shards that broke within their head; what came before is kept"""
        self.shards: list[str] = []
        self._images = tempfile.SpooledTemporaryFile(MEMORY_BYTES)  # noqa: SIM115 (closed by __exit__)
        self._nbytes = 0

    def __enter__(self) -> PairSample:
        return self

    def __exit__(self, *_: object) -> None:
        self._images.close()

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def n_read(self) -> int:
        """Samples looked at, bad ones too."""
        return len(self.pairs) + sum(self.reasons.values())

    def gather(
        self, sources: Sequence[Source], wanted: int, settings: DecodeSettings, *, workers: int, progress: Progress
    ) -> None:
        """Look at `wanted` samples in all and keep the usable ones."""
        chosen = spread(sources, REFERENCE_SHARDS)
        self.shards = [source.path for source in chosen]
        each = -(-wanted // len(chosen))
        progress.start("reading pairs", None)
        with ThreadPoolExecutor(workers, "decode") as decoders:
            for source in chosen:
                decoded = partial(_decoded, shard=source.path, settings=settings)
                for raw, pair in in_order(decoders, decoded, self._head(source, each), 4 * workers):
                    self._keep(raw, pair)
                    progress.advance(1, raw.nbytes or 0)

    def _head(self, source: Source, n: int) -> Iterator[RawSample]:
        """The first `n` samples of a shard; one that breaks ends early."""
        try:
            yield from itertools.islice(source.samples(), n)
        except ShardError as error:
            self.failures.append(error)

    def _keep(self, raw: RawSample, pair: Pair) -> None:
        if pair.reason is not None:
            self.reasons[problem_kind(pair.reason)] += 1
            return
        extension = next(name for name in raw.members if name in IMAGE_EXTENSIONS)
        image = raw.members[extension]
        if self._nbytes + len(image) > DISK_BYTES:
            self.reasons[f"sampled images take more than {DISK_BYTES >> 30} GiB"] += 1
            return
        self._images.write(image)
        self.pairs.append(
            SampledPair(raw.key, pair.caption, pair.columns["image_hash"], extension, self._nbytes, len(image))
        )
        self._nbytes += len(image)

    def read(self, pairs: Iterable[int], captions: Iterable[str] | None = None) -> Iterator[RawSample]:
        """The pairs of these numbers as samples in rows 0, 1, …, with their own captions or with these."""
        numbers = list(pairs)
        words = (self.pairs[number].caption for number in numbers) if captions is None else captions
        for row, (number, caption) in enumerate(zip(numbers, words, strict=True)):
            pair = self.pairs[number]
            self._images.seek(pair.start)
            members = {pair.extension: self._images.read(pair.nbytes), CAPTION: caption.encode("utf-8-sig")}
            yield RawSample(pair.key, row, 0, pair.nbytes, members, None)

    def nbytes(self, pairs: Iterable[int]) -> int:
        """Size of the images of these pairs."""
        return sum(self.pairs[number].nbytes for number in pairs)


def _decoded(raw: RawSample, shard: str, settings: DecodeSettings) -> tuple[RawSample, Pair]:
    """The sample, and what came of decoding it, without the pixels."""
    pair = decode(raw, shard, settings)
    pair.image = None
    return raw, pair
