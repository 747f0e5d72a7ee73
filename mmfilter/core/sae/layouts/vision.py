"""Layouts of SAEs on vision encoders: ViT-Prisma, overcomplete, saev (OSU)."""

from __future__ import annotations

from typing import Any

import torch

from mmfilter.core.cards.sae_options import SAEOptions
from mmfilter.core.sae.checkpoints import Checkpoint
from mmfilter.core.sae.layouts.base import SAELENS_NAMES, Layout, Reading, refuse, stated

TORCH = ("*.pt", "*.pth")


# --- ViT-Prisma --------------------------------------------------------------------------------


def _prisma(checkpoint: Checkpoint, _: SAEOptions) -> Reading:
    """Always subtracts b_dec, after the normalisation."""
    config = checkpoint.config
    architecture, activation = config.get("architecture", "standard"), config.get("activation_fn_str", "relu")
    if config.get("is_transcoder"):
        refuse(
            checkpoint, "is a transcoder, which maps one place in the model to another; only autoencoders are opened"
        )
    if (
        architecture not in ("standard", "gated")
        or activation not in ("relu", "topk")
        or (architecture, activation) == ("gated", "topk")
    ):
        refuse(
            checkpoint,
            f"has architecture {architecture!r} with activation {activation!r}; expected standard with relu or topk, "
            "or gated with relu",
        )
    arguments = config.get("activation_fn_kwargs") or {}
    if "postact_fn" in arguments:
        refuse(checkpoint, "has an activation of its own after its topk; only relu is opened")
    normalise = config.get("normalize_activations") or "none"
    if normalise not in ("none", "layer_norm", "constant_norm_rescale"):
        refuse(
            checkpoint,
            f"states normalize_activations {normalise!r}; expected none, layer_norm or constant_norm_rescale",
        )
    gated = architecture == "gated"
    return Reading(
        "gated" if gated else activation,
        k=arguments.get("k"),
        subtract_b_dec=True,
        normalisation=normalise,
        d_model=config.get("d_in"),
        n_features=config["d_in"] * config["expansion_factor"] if {"d_in", "expansion_factor"} <= set(config) else None,
        tensors={name: name for name in ("b_gate", "b_mag", "r_mag")} if gated else {},
        metadata=stated(config, "model_name", "dataset_name", "cls_token_only", "use_patches_only")
        | {"hook_name": _prisma_hook(config)},
    )


def _prisma_hook(config: dict[str, Any]) -> str | None:
    layer, subtype = config.get("hook_point_layer"), config.get("layer_subtype")
    return f"blocks.{layer}.{subtype}" if layer is not None and subtype else None


# --- overcomplete ------------------------------------------------------------------------------


def _overcomplete(checkpoint: Checkpoint, options: SAEOptions) -> Reading:
    """The linear encoder. The dictionary's rows are brought to norm 1 when it is used, then times exp(multiplier)."""
    others = [
        name
        for name in checkpoint.tensors
        if name.startswith("encoder.") and not name.startswith("encoder.final_block.0.")
    ]
    if others:
        refuse(checkpoint, f"has more than overcomplete's linear encoder ({others[0]!r}); only that one is opened")
    norms = checkpoint.tensors["dictionary._weights"].float().norm(dim=1) + 1e-8
    if options.dictionary is None and not torch.allclose(norms, torch.ones_like(norms), atol=0.1):
        refuse(
            checkpoint,
            "has dictionary rows whose norms are not 1, so overcomplete did not use its normalisation 'l2'; "
            "settle it with --sae-option dictionary=l2|as_is",
        )
    multiplier = checkpoint.tensors.get("dictionary.multiplier", torch.zeros(())).float().exp()
    thresholds = checkpoint.tensors.get("thresholds")
    return Reading(
        "jumprelu" if thresholds is not None else None,
        decoder_gain=multiplier.expand_as(norms) if options.dictionary == "as_is" else multiplier / norms,
        # there a feature fires *at* its threshold too
        threshold=None if thresholds is None else _just_below(thresholds.float().exp()),
        subtract_b_dec=False,
        doubts={
            "activation": "does not hold its activation (overcomplete keeps that in Python)",
            "threshold": "does not hold the running threshold of its BatchTopK (overcomplete keeps that in Python)",
        },
    )


def _just_below(values: torch.Tensor) -> torch.Tensor:
    return torch.nextafter(values, torch.full_like(values, -torch.inf))


# --- saev (OSU) --------------------------------------------------------------------------------


def _saev(checkpoint: Checkpoint, _: SAEOptions) -> Reading:
    """A line of JSON, then the tensors. Before its schema 1 the encoder subtracted b_dec, from schema 2 on it does
    not."""
    header = checkpoint.config
    schema = header.get("schema")
    if schema not in (None, 1, 2, 3, 4, 5):
        refuse(checkpoint, f"has schema {schema!r} of saev; schemas up to 5 are known")
    config = header if schema is None else header["cfg"]
    activation, parameters = _saev_activation(header, config)
    if activation not in ("Relu", "TopK", "BatchTopK"):
        refuse(checkpoint, f"has the activation {activation!r}; expected Relu, TopK or BatchTopK")
    zero = not bool(checkpoint.tensors["b_dec"].any())
    d = config.get("d_model", config.get("d_vit"))
    threshold = checkpoint.tensors.get("activation.threshold")
    return Reading(
        {"Relu": "relu", "TopK": "topk", "BatchTopK": "batchtopk"}[activation],
        k=parameters.get("top_k"),
        threshold=None if threshold is None else float(threshold),
        subtract_b_dec=False if zero or (schema or 0) > 1 else True if schema is None else None,
        d_model=d,
        n_features=config.get("d_sae", d * config["exp_factor"] if d and "exp_factor" in config else None),
        doubts={
            "threshold": "is a BatchTopK without its threshold (an older saev)",
            "subtract_b_dec": "has schema 1 of saev, of which some versions subtract b_dec and some do not",
        },
        notes=["saev's topk keeps negative values when fewer than k are positive; here they are dropped"]
        if activation == "TopK"
        else [],
    )


def _saev_activation(header: dict[str, Any], config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if header.get("cls") in ("Relu", "TopK", "BatchTopK"):
        return header["cls"], config
    stored = config.get("activation")
    return (stored["cls"], stored.get("params") or {}) if isinstance(stored, dict) else ("Relu", {})


def _is_saev(checkpoint: Checkpoint) -> bool:
    return checkpoint.config_name is None and bool({"schema", "d_vit"} & set(checkpoint.config))


LINEAR_ENCODER = {
    "W_enc": "encoder.final_block.0.weight",
    "b_enc": "encoder.final_block.0.bias",
    "W_dec": "dictionary._weights",
}
LAYOUTS = (
    Layout("saev", "saev (OSU)", TORCH, SAELENS_NAMES, _saev, fits=_is_saev),
    Layout("vit_prisma", "ViT-Prisma", TORCH, SAELENS_NAMES, _prisma, keys=frozenset({"hook_point_layer"})),
    Layout(
        "overcomplete",
        "overcomplete",
        TORCH,
        LINEAR_ENCODER,
        _overcomplete,
        encoder="features_first",
        optional=frozenset({"b_dec"}),
    ),
)
