"""SAELens, version 6 and before it, with the checkpoints of SAE-V."""

from __future__ import annotations

import re
from typing import Any

import torch

from mmfilter.core.cards.sae_options import SAEOptions
from mmfilter.core.sae.checkpoints import Checkpoint
from mmfilter.core.sae.layouts.base import Layout, Reading, refuse, stated

FILES = ("sae_weights.safetensors",)
BASE = {name: name for name in ("W_enc", "W_dec", "b_dec")}
GATED = {name: name for name in ("b_gate", "b_mag", "r_mag")}
REFUSED = {
    "temporal": "its features depend on earlier tokens",
    "matching_pursuit": "it encodes by a search, not by one product",
    "abstopk": "its features can be negative",
    "transcoder": "it maps one place in the model to another",
    "clt": "it maps one place in the model to others",
}
KEPT = (
    "model_name",
    "hook_name",
    "hook_head_index",
    "hf_hook_name",
    "dataset_path",
    "context_size",
    "prepend_bos",
    "neuronpedia_id",
    "l0",
    "training_tokens",
    "sae_lens_training_version",
)


def _architecture(checkpoint: Checkpoint, architecture: Any) -> Reading:
    """What an architecture's name says of activation and tensors."""
    name = str(architecture)
    for refused, reason in REFUSED.items():
        if refused in name:
            refuse(checkpoint, f"has architecture {name!r}, which is not opened: {reason}")
    activations = {
        "standard": "relu",
        "gated": "gated",
        "jumprelu": "jumprelu",
        "topk": "topk",
        "batchtopk": "batchtopk",
        "matryoshka_batchtopk": "batchtopk",
    }
    if name not in activations:
        refuse(checkpoint, f"has architecture {name!r}; expected one of {', '.join(activations)}")
    reading = Reading(activations[name], tensors=GATED if name == "gated" else {"b_enc": "b_enc"})
    if name == "jumprelu":
        reading.tensors = {"b_enc": "b_enc", "threshold": "threshold"}
    return reading


def _read(checkpoint: Checkpoint, _: SAEOptions) -> Reading:
    config = checkpoint.config
    reading = _architecture(checkpoint, config.get("architecture"))
    reading.k = config.get("k") if reading.activation == "topk" else None
    reading.d_model, reading.n_features = config.get("d_in"), config.get("d_sae")
    reading.subtract_b_dec = bool(config.get("apply_b_dec_to_input", True))
    metadata = dict(config.get("metadata") or {})
    reading.metadata = {**metadata, "stated_l0": metadata.pop("l0", metadata.get("stated_l0"))}
    reading.metadata.pop("l0", None)
    if config.get("rescale_acts_by_decoder_norm"):
        reading.unit_decoder = reading.threshold_on_unit_decoder = True
    if reading.activation == "batchtopk":
        frozen = checkpoint.tensors.get("topk_threshold")
        reading.threshold = frozen if frozen is not None and float(frozen) > 0 else None
        reading.doubts = {"threshold": "is a BatchTopK checkpoint from before its threshold was known"}
    return _normalised(checkpoint, reading, config.get("normalize_activations"))


def _read_old(checkpoint: Checkpoint, _: SAEOptions) -> Reading:
    config = checkpoint.config
    activation = config.get("activation_fn_str") or config.get("activation_fn") or "relu"
    arguments = config.get("activation_fn_kwargs") or {}
    architecture = config.get("architecture") or "standard"
    if activation not in ("relu", "topk"):
        refuse(checkpoint, f"has the activation {activation!r}, which is not opened; expected relu or topk")
    reading = _architecture(checkpoint, "topk" if activation == "topk" else architecture)
    reading.k = arguments.get("k", config.get("k"))
    reading.d_model, reading.n_features = config.get("d_in"), config.get("d_sae")
    reading.subtract_b_dec = bool(config.get("apply_b_dec_to_input", True))
    reading.metadata = stated({**config, "hook_name": config.get("hook_name") or config.get("hook_point")}, *KEPT)
    reading.decoder_gain = _gain(checkpoint)
    normalise = config.get("normalize_activations")
    if isinstance(normalise, bool):
        normalise = "expected_average_only_in" if normalise else "none"
    return _normalised(checkpoint, reading, normalise)


def _gain(checkpoint: Checkpoint) -> torch.Tensor | None:
    """The factor that fine-tuning put on each activation before decoding; None where it is 1."""
    gain = checkpoint.tensors.get("scaling_factor", checkpoint.tensors.get("finetuning_scaling_factor"))
    if gain is None or bool((gain == 1).all()):
        return None
    if not checkpoint.config.get("finetuning_scaling_factor"):
        refuse(
            checkpoint,
            "has a tensor 'scaling_factor' that is not 1, and its cfg.json says nothing of fine-tuning: which of them "
            "is right is not known",
        )
    return gain


def _normalised(checkpoint: Checkpoint, reading: Reading, stated_as: Any) -> Reading:
    """Put what is said of normalisation into the reading.

    `expected_average_only_in` is a factor on the activations that must be in the weights. Training folds
    it in at its end, into `final_*`, but versions before 6 then overwrite cfg.json with the run's own,
    which still names it; their earlier checkpoints have neither the fold nor the factor. Version 6 keeps
    the factor in activation_scaler.json and says `none` once it is folded.
    """
    stated_as = stated_as or "none"
    if stated_as != "expected_average_only_in":
        if stated_as not in ("none", "layer_norm", "constant_norm_rescale"):
            reason = (
                "an unknown normalisation"
                if stated_as != "covariance_whitening"
                else "to be folded first: save its inference form with SAELens"
            )
            refuse(checkpoint, f"states normalize_activations {stated_as!r}, {reason}")
        reading.normalisation = stated_as
        return reading
    reading.scale = checkpoint.json("activation_scaler.json").get("scaling_factor")
    if reading.scale is None and re.match("final_", checkpoint.folder.name):
        reading.scale = 1.0
        reading.notes.append(
            "a final checkpoint: the activation scale is in the weights, but SAELens 3 left it out of b_dec, so "
            "reconstructions may be shifted"
        )
    reading.doubts = {
        "scale": "states normalize_activations 'expected_average_only_in', a factor √d_model / mean norm of the "
        "training activations that must be in the weights, and nothing says whether it is (scale=1 when it is)"
    }
    return reading


def _is_new(checkpoint: Checkpoint) -> bool:
    version = checkpoint.config.get("sae_lens_version") or (checkpoint.config.get("metadata") or {}).get(
        "sae_lens_version"
    )
    return int(str(version).split(".")[0]) >= 6 if version else "metadata" in checkpoint.config


LAYOUTS = (
    Layout("saelens", "SAELens 6", FILES, BASE, _read, keys=frozenset({"architecture", "d_in"}), fits=_is_new),
    Layout(
        "saelens_old",
        "SAELens before 6, SAE-V",
        FILES,
        BASE,
        _read_old,
        keys=frozenset({"d_in"}),
        fits=lambda checkpoint: not _is_new(checkpoint),
    ),
)
