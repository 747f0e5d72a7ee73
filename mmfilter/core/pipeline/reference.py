"""The reference sample: about 1,000 pairs of the input, on which feature weights are fitted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from mmfilter.core.input.shards import RawSample
from mmfilter.core.model.backbone import Backbone
from mmfilter.core.pipeline.feed import Batch, Feed
from mmfilter.core.pipeline.scorer import explained_memory
from mmfilter.core.sae.autoencoder import SAE
from mmfilter.core.scores.crossmodal import PER_SIDE, STRONGEST, FeatureWeights, Reference
from mmfilter.errors import ShardError

REFERENCE_PAIRS = 1000
REFERENCE_SHARDS = 10
POSITIONS = 1 << 24
"""A token's number in the reference sample is sample · POSITIONS + position, whatever the batching."""


def fit_weights(
    shards: list[str],
    read: Callable[[str, int], Iterable[RawSample]],
    feed: Feed,
    backbone: Backbone,
    sae: SAE,
    advance: Callable[[int], None],
) -> FeatureWeights:
    """Fit cross-modal weights on the heads of up to 10 shards spread evenly over the input.

    `read(shard, n)` gives the first n samples of a shard, any number of times; `advance` is told the
    number of pairs done. The same input gives the same weights. Raises `ShardError` when no pair of the
    heads is readable.
    """
    return fit_all(shards, read, feed, backbone, [sae], advance)[0]


def fit_all(
    shards: list[str],
    read: Callable[[str, int], Iterable[RawSample]],
    feed: Feed,
    backbone: Backbone,
    saes: Sequence[SAE],
    advance: Callable[[int], None],
) -> list[FeatureWeights]:
    """`fit_weights` for several SAEs on the same states."""
    chosen = spread(shards, REFERENCE_SHARDS)
    each = -(-REFERENCE_PAIRS // len(chosen))
    references = [Reference(sae.n_features, backbone.d_model) for sae in saes]
    for observe in (True, False):
        for number, shard in enumerate(chosen):
            for batch in _batches(feed, read(shard, each), shard):
                with explained_memory(len(batch.pairs)):
                    _add(references, batch, number * each, backbone, saes, observe)
                advance(len(batch.pairs))
        if observe:
            if not references[0].n_samples:
                raise ShardError(
                    shards[0],
                    f"has no usable pair in its first {each:,} samples, and the feature weights are fitted on those",
                )
            for reference in references:
                reference.choose()
    metadata = {"shards": chosen, "first_samples_of_each": each, "strongest": STRONGEST, "per_side": PER_SIDE}
    return [reference.weights(metadata) for reference in references]


def spread(shards: list[str], at_most: int) -> list[str]:
    """Up to `at_most` shards, evenly spaced, the first among them."""
    n = min(len(shards), at_most)
    return [shards[i * len(shards) // n] for i in range(n)]


def _batches(feed: Feed, samples: Iterable[RawSample], shard: str) -> Iterator[Batch]:
    """Batches of a shard up to where it breaks; the scoring pass reports the break."""
    try:
        for window in feed.windows(samples, shard):
            yield from window.batches
    except ShardError:
        return


@torch.inference_mode()
def _add(
    references: Sequence[Reference], batch: Batch, first: int, backbone: Backbone, saes: Sequence[SAE], observe: bool
) -> None:
    activations = backbone.activations(batch.inputs)
    rows = torch.tensor([first + pair.row for pair in batch.pairs], device=activations.sample.device)
    # half of a pair's numbers for each side: with text context `none` both streams start at position 0
    token = rows[activations.sample] * POSITIONS + activations.side * (POSITIONS // 2) + activations.position
    for sae, reference in zip(saes, references, strict=True):
        if observe:
            reference.observe(
                sae.encode(activations.states), token, activations.sample, activations.side, activations.n_samples
            )
        else:
            reference.add_states(activations.states, token)
