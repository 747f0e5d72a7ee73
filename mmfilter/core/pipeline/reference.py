"""The reference sample: about 1,000 pairs of the input, on which feature weights are fitted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

import torch

from mmfilter.core.input.sample import RawSample
from mmfilter.core.input.source import Source
from mmfilter.core.model.backbone import Activations
from mmfilter.core.pipeline.feed import Batch
from mmfilter.core.pipeline.model_pass import ModelPass
from mmfilter.core.progress import Progress
from mmfilter.core.sae.autoencoder import SAE
from mmfilter.core.scores.crossmodal import PER_SIDE, STRONGEST, FeatureWeights, Reference
from mmfilter.errors import ShardError

T = TypeVar("T")

REFERENCE_PAIRS = 1000
REFERENCE_SHARDS = 10
POSITIONS = 1 << 24
"""A token's number in the reference sample is sample · POSITIONS + position, whatever the batching."""


Head = Callable[[Source, int], Iterable[RawSample]]
"""(shard, n) to its first n samples, any number of times"""


def fit_weights(
    sources: Sequence[Source], head: Head, model_pass: ModelPass, sae: SAE, progress: Progress
) -> FeatureWeights:
    """Fit cross-modal weights on the heads of up to 10 shards spread evenly over the input.

    The same input gives the same weights. Raises `ShardError` when no pair of the heads is readable.
    """
    chosen = spread(sources, REFERENCE_SHARDS)
    each = -(-REFERENCE_PAIRS // len(chosen))
    samples = [(source.path, partial(head, source, each)) for source in chosen]
    [weights] = fit_all(samples, each, model_pass, [sae], progress)
    return weights


def fit_all(
    parts: Sequence[tuple[str, Callable[[], Iterable[RawSample]]]],
    each: int,
    model_pass: ModelPass,
    saes: Sequence[SAE],
    progress: Progress,
) -> list[FeatureWeights]:
    """Weights of several SAEs on the same states: those of parts of up to `each` samples, (name, how to read it)."""
    references = [Reference(sae.n_features, model_pass.backbone.d_model) for sae in saes]
    for observe in (True, False):
        for number, (name, read) in enumerate(parts):
            take = partial(_add, references, saes, number * each, observe=observe)
            with suppress(ShardError):  # up to where it breaks; the scoring pass reports the break
                model_pass.over(read(), name, take, progress)
        if observe:
            if not references[0].n_samples:
                raise ShardError(
                    parts[0][0],
                    f"has no usable pair in its first {each:,} samples, and the feature weights are fitted on those",
                )
            for reference in references:
                reference.choose()
    metadata = {
        "shards": [name for name, _ in parts],
        "first_samples_of_each": each,
        "strongest": STRONGEST,
        "per_side": PER_SIDE,
    }
    return [reference.weights(metadata) for reference in references]


def spread(sources: Sequence[T], at_most: int) -> list[T]:
    """Up to `at_most` of them, evenly spaced, the first among them."""
    n = min(len(sources), at_most)
    return [sources[i * len(sources) // n] for i in range(n)]


def _add(
    references: Sequence[Reference],
    saes: Sequence[SAE],
    first: int,
    batch: Batch,
    activations: Activations,
    *,
    observe: bool,
) -> None:
    rows = torch.tensor([first + pair.row for pair in batch.pairs], device=activations.sample.device)
    # half of a pair's numbers for each side: with text context `none` both streams start at position 0
    token = rows[activations.sample] * POSITIONS + activations.side * (POSITIONS // 2) + activations.position
    for sae, reference in zip(saes, references, strict=True):
        if observe:
            codes = sae.encode(activations.states)
            reference.observe(codes, token, activations.sample, activations.side, activations.n_samples)
        else:
            reference.add_states(activations.states, token)
