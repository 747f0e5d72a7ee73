"""The scorer: backbone, SAE and feature weights put together, from a batch to scores and codes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mmfilter.core.model.backbone import Activations, Backbone
from mmfilter.core.sae.autoencoder import SAE
from mmfilter.core.sae.token_codes import PooledCodes, TokenCodes, pool
from mmfilter.core.scores.crossmodal import FeatureWeights
from mmfilter.core.scores.pooled_pairs import PooledPairs
from mmfilter.core.scores.registry import formulas
from mmfilter.core.sides import IMAGE, TEXT
from mmfilter.errors import SAEError

STORED_FEATURES = 256
"""Strongest features a side that the code table keeps."""


@dataclass(frozen=True)
class Scored:
    """What a batch came to, on the CPU."""

    scores: dict[str, np.ndarray]
    """Score name -> (samples,) float32; not finite where the model's states are not"""
    n_image_tokens: np.ndarray
    n_text_tokens: np.ndarray
    codes: list[dict[str, np.ndarray]]
    """Per sample the columns of the code table"""


class Scorer:
    """Scores batches of prepared pairs."""

    def __init__(self, backbone: Backbone, sae: SAE, weights: FeatureWeights, threshold: float) -> None:
        check_fit(backbone, sae)
        self._sae = sae
        self._weights, self._threshold = weights.to(backbone.device), threshold

    @torch.inference_mode()
    def score(self, activations: Activations) -> Scored:
        """Scores and codes of a batch; dense per-token activations live for one chunk only."""
        codes = self._sae.encode(activations.states)
        pairs = pool_pairs(activations, codes, self._weights, self._threshold)
        return Scored(
            {name: score(pairs).float().cpu().numpy() for name, score in formulas().items()},
            pairs.image.n_tokens.cpu().numpy(),
            pairs.text.n_tokens.cpu().numpy(),
            _stored(pairs),
        )


def check_fit(backbone: Backbone, sae: SAE) -> None:
    """Raise `SAEError` when the SAE's width is not the model's."""
    if sae.d_model != backbone.d_model:
        raise SAEError(
            f"SAE takes states of width {sae.d_model}, the model gives {backbone.d_model}: it belongs to another model"
        )


def pool_pairs(activations: Activations, codes: TokenCodes, weights: FeatureWeights, threshold: float) -> PooledPairs:
    """Pool codes and raw states of a batch over both sides."""
    sample, side, n = activations.sample, activations.side, activations.n_samples
    image, text = pool(codes, sample, side, n)
    states = activations.states.float()
    sums = states.new_zeros(2 * n, states.shape[1]).index_add_(0, sample * 2 + side, states)
    return PooledPairs(
        image,
        text,
        sums[IMAGE::2] / image.n_tokens.clamp(min=1)[:, None],
        sums[TEXT::2] / text.n_tokens.clamp(min=1)[:, None],
        weights,
        threshold,
    )


def _stored(pairs: PooledPairs) -> list[dict[str, np.ndarray]]:
    image, text = strongest(pairs.image), strongest(pairs.text)
    return [
        {
            f"{side}_{part}": values
            for side, parts in (("image", i), ("text", t))
            for part, values in zip(("ids", "max", "mean"), parts, strict=True)
        }
        for i, t in zip(image, text, strict=True)
    ]


def strongest(pooled: PooledCodes) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(ids, maximum, mean) of each sample's strongest features, strongest first."""
    value, feature = pooled.maximum.topk(min(STORED_FEATURES, pooled.maximum.shape[1]), dim=1)
    mean = pooled.mean.gather(1, feature)
    counts = (value > 0).sum(1).tolist()
    largest = float(np.finfo(np.float16).max)
    ids = feature.cpu().numpy().astype(np.uint32)
    maximum, means = (part.clamp(max=largest).cpu().numpy().astype(np.float16) for part in (value, mean))
    return [(ids[i, :c], maximum[i, :c], means[i, :c]) for i, c in enumerate(counts)]
