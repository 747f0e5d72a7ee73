"""States of a few pairs of a sample, on which a random SAE is set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mmfilter.core.model.backbone import Activations, Backbone
from mmfilter.core.pipeline.feed import Batch, Feed
from mmfilter.core.pipeline.pair_sample import PairSample
from mmfilter.core.pipeline.scorer import explained_memory
from mmfilter.errors import MMFilterError

FEW_PAIRS = 64
FEW_ELEMENTS = 1 << 26
"""Pairs, and numbers in their states, that are enough."""


def few_states(
    sample: PairSample, numbers: Sequence[int], feed: Feed, backbone: Backbone, *, batch_size: int, seed: int
) -> list[Activations]:
    """States of some of the pairs of these numbers, drawn at random, batch by batch, in bounded memory.

    Raises `MMFilterError` when the model takes none of them.
    """
    few = np.random.default_rng(seed).permutation(numbers)[:FEW_PAIRS].tolist()
    found: list[Activations] = []
    for first in range(0, len(few), batch_size):  # one batch at a time: a feed sorts what it is given by length
        for window in feed.windows(sample.read(few[first : first + batch_size]), "sample"):
            found += [activations_of(backbone, batch) for batch in window.batches]
        if sum(batch.states.numel() for batch in found) > FEW_ELEMENTS:
            break
    if not found:
        raise MMFilterError(
            f"none of {len(few)} pairs tried can be sent through the model; score a shard with --max-bad 100% to see why"
        )
    return found


@torch.inference_mode()
def activations_of(backbone: Backbone, batch: Batch) -> Activations:
    """A batch's states; raises `ModelError` when the device's memory does not suffice."""
    with explained_memory(len(batch.pairs)):
        return backbone.activations(batch.inputs)
