"""What a training leaves beside the SAE: cross-modal weights of its features."""

from __future__ import annotations

import itertools
from contextlib import closing
from typing import Any

from mmfilter.core.input.decode import DecodeSettings
from mmfilter.core.input.shards import InputOptions, read_samples
from mmfilter.core.model.backbone import Backbone
from mmfilter.core.pipeline.feed import Feed
from mmfilter.core.pipeline.reference import fit_weights
from mmfilter.core.sae.autoencoder import SAE
from mmfilter.core.scores.crossmodal import FeatureWeights


def fit_run_weights(
    shards: list[str], backbone: Backbone, sae: SAE, inputs: InputOptions, pairs: int, workers: int, progress: Any
) -> FeatureWeights:
    """Weights fitted on the heads of the training shards, as `score` fits them."""
    with closing(Feed(backbone, DecodeSettings(inputs.caption), batch_size=pairs, workers=workers)) as feed:
        return fit_weights(
            shards, lambda shard, n: itertools.islice(read_samples(shard, options=inputs), n), feed, backbone, sae.to(backbone.device),
            lambda n: progress.advance(n, 0),
        )  # fmt: skip
