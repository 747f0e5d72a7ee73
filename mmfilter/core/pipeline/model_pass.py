"""The pass over the model: samples in, states out, a window at a time.

Everything that looks at pairs through the model goes this way (scoring, fitting, checking, measuring, training), so
that decoding, batching, running out of memory and the reasons of samples that are left out are the same for all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import TypeVar

import torch

from mmfilter.core.input.decode import DecodeSettings
from mmfilter.core.input.sample import RawSample
from mmfilter.core.model.backbone import Activations, Backbone, ModelInputs
from mmfilter.core.pipeline.feed import Batch, Feed, Window
from mmfilter.core.progress import Progress
from mmfilter.errors import ModelError

T = TypeVar("T")


class ModelPass:
    """A model with the threads that feed it; a context manager that lets these go."""

    def __init__(
        self,
        backbone: Backbone,
        decoding: DecodeSettings,
        *,
        batch_size: int,
        workers: int,
        captions_alone: bool = False,
    ) -> None:
        self.backbone = backbone
        self.batch_size = batch_size
        self._feed = Feed(backbone, decoding, batch_size=batch_size, workers=workers)
        self._captions_alone = captions_alone
        """Send captions through without their images"""

    def __enter__(self) -> ModelPass:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._feed.close()

    def windows(self, samples: Iterable[RawSample], shard: str) -> Iterator[Window]:
        """The samples of a shard, decoded and batched; raises `ShardError` where they end too early."""
        return self._feed.windows(samples, shard)

    @torch.inference_mode()
    def through(self, batch: Batch, take: Callable[[Batch, Activations], T]) -> T:
        """What `take` makes of a batch and its states.

        Raises `ModelError` when the device's memory does not suffice for either of both.
        """
        if self._captions_alone and batch.inputs.text_only is not None:
            batch = replace(batch, inputs=ModelInputs(*batch.inputs.text_only))
        with memory_errors(len(batch.pairs)):
            return take(batch, self.backbone.activations(batch.inputs))

    def over(
        self,
        samples: Iterable[RawSample],
        shard: str,
        take: Callable[[Batch, Activations], object],
        progress: Progress,
    ) -> Counter[str]:
        """Send all samples of a shard through; kind of problem -> samples that were left out."""
        reasons: Counter[str] = Counter()
        for window in self.windows(samples, shard):
            for batch in window.batches:
                self.through(batch, take)
            reasons.update(window.reasons)
            progress.advance(len(window.pairs), window.nbytes)
        return reasons


@contextmanager
def memory_errors(n_pairs: int) -> Iterator[None]:
    """Turn the device's running out of memory on a batch of `n_pairs` into a `ModelError` that names the way out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        step = "use a smaller --batch-size" if n_pairs > 1 else "use a larger device, or --dtype bfloat16"
        raise ModelError(
            f"the device ran out of memory on a batch of {n_pairs} pairs: {step}; what is finished is kept"
        ) from error
