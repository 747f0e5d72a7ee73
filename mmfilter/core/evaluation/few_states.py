"""States of a few pairs of a sample, on which a random SAE is set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmfilter.core.model.backbone import Activations
from mmfilter.core.pipeline.feed import Batch
from mmfilter.core.pipeline.model_pass import ModelPass
from mmfilter.core.pipeline.pair_sample import PairSample
from mmfilter.errors import MMFilterError

FEW_PAIRS = 64
FEW_ELEMENTS = 1 << 26
"""Pairs, and numbers in their states, that are enough."""


def few_states(sample: PairSample, numbers: Sequence[int], model_pass: ModelPass, *, seed: int) -> list[Activations]:
    """States of some of the pairs of these numbers, drawn at random, batch by batch, in bounded memory.

    Raises `MMFilterError` when the model takes none of them.
    """
    few = np.random.default_rng(seed).permutation(numbers)[:FEW_PAIRS].tolist()
    states: list[Activations] = []
    step = model_pass.batch_size  # one batch at a time: a feed sorts what it is given by length
    for first in range(0, len(few), step):
        for window in model_pass.windows(sample.read(few[first : first + step]), "sample"):
            states += [model_pass.through(batch, _states) for batch in window.batches]
        if sum(batch.states.numel() for batch in states) > FEW_ELEMENTS:
            break
    if not states:
        raise MMFilterError(
            f"none of {len(few)} pairs tried can be sent through the model; score a shard with --max-bad 100% to see "
            "why"
        )
    return states


def _states(_: Batch, activations: Activations) -> Activations:
    return activations
