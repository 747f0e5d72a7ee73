"""What a pass over pairs runs on: the card's model up to its layer, its SAE and its feature weights, on one device."""

from __future__ import annotations

from pathlib import Path

import torch

from mmfilter.core.cards.cards import Card
from mmfilter.core.model.backbone import Backbone
from mmfilter.core.model.loading import LoadSettings, load_backbone
from mmfilter.core.pipeline.pass_settings import DeviceSettings
from mmfilter.core.pipeline.scorer import check_fit
from mmfilter.core.sae.autoencoder import SAE
from mmfilter.core.sae.pretrained import load_sae
from mmfilter.core.scores.crossmodal import FeatureWeights, load_weights
from mmfilter.errors import ModelError, SAEError


def resolved_device(settings: DeviceSettings) -> str:
    """The device to use; raises `ModelError` when a GPU is asked for and there is none."""
    if settings.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(
            f"device {settings.device!r} was asked for, but this PyTorch ({torch.__version__}) sees no GPU; "
            "use --device cpu"
        )
    return settings.device


def resolved_dtype(settings: DeviceSettings) -> torch.dtype:
    """The type of the model's weights and states."""
    if settings.dtype == "auto":
        return torch.float32 if resolved_device(settings) == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[settings.dtype]


def load(card: Card, device: DeviceSettings, *, whole: bool = False) -> tuple[Backbone, SAE]:
    """The card's model up to its layer (or `whole`), and its SAE, on the device; raises `ModelError` and `SAEError`."""
    backbone = load_model(card, device, whole=whole)
    sae = load_sae(card.sae, card.sae_options)
    check_fit(backbone, sae)
    return backbone, sae.to(backbone.device)


def load_model(card: Card, device: DeviceSettings, *, whole: bool = False) -> Backbone:
    """The card's model up to its layer (or `whole`); raises `ModelError`, also for a card with which pairs cannot be
    scored."""
    if card.cannot_score:
        raise ModelError(f"card {card.name!r} cannot score pairs: {card.cannot_score}")
    settings = load_settings(device, whole=whole)
    return load_backbone(
        card.model,
        card.layer,
        revision=card.revision,
        prompt=card.prompt,
        text_context=card.text_context,
        settings=settings,
    )


def load_settings(device: DeviceSettings, *, whole: bool = False) -> LoadSettings:
    """How to load a model on the device."""
    return LoadSettings(
        device=resolved_device(device),
        dtype=resolved_dtype(device),
        device_map=device.device_map,
        attention=device.attention,
        compile=device.compile,
        trust_remote_code=device.trust_remote_code,
        whole=whole,
    )


def card_weights(card: Card, sae: SAE) -> FeatureWeights | None:
    """The feature weights that the card brings, None where they have to be fitted; raises `SAEError`."""
    if card.weights is None:
        return None
    weights = load_weights(Path(card.weights))
    check_weights(weights, sae)
    return weights


def check_weights(weights: FeatureWeights, sae: SAE) -> None:
    """Raise `SAEError` when the weights are not of as many features as the SAE has."""
    if len(weights.omega) != sae.n_features:
        raise SAEError(
            f"feature weights are for {len(weights.omega):,} features, the SAE has {sae.n_features:,}: they belong to "
            "another SAE"
        )
