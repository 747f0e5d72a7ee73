"""From a publisher's tensors and what they mean to the canonical form, with everything foldable folded.

    gated         f = 1[g + b_gate > 0] · relu(e^r·g + b_mag), g = u @ W_enc, is a JumpReLU with encoder
                  e^r·W_enc, bias b_mag and threshold b_mag − e^r·b_gate (arXiv 2404.16014, section 3.2)
    batchtopk     jumprelu with the one threshold that training froze
    bias factor   training saw s·x, and the activations are wanted in units of x: b_enc/s, b_dec/s
    scale s       training saw s·x: W_enc·s, W_dec/s, b_dec/s; biases and thresholds of the encoder stay
    unit decoder  with norms n of the decoder's rows: W_enc·n, b_enc·n, threshold·n, W_dec/n

Every fold leaves the reconstructions as they are and is listed in the SAE's metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar, get_args

import torch

from mmfilter.core.cards.sae_options import SAEOptions
from mmfilter.core.sae.autoencoder import SAE, Activation, Normalisation
from mmfilter.core.sae.checkpoints import Checkpoint
from mmfilter.core.sae.layouts.base import Layout, Reading, refuse

T = TypeVar("T")


def build(checkpoint: Checkpoint, layout: Layout, options: SAEOptions) -> SAE:
    """The SAE that these files hold; raises `SAEError` where they leave a doubt that no option settles."""
    settled = _settled(checkpoint, layout, options)
    reading = settled.reading
    parts = _fetched(checkpoint, layout, reading, options)
    _check_widths(checkpoint, parts, reading)
    folded = _fold_in_place(parts, reading, settled.scale)
    threshold = parts.get("threshold") if settled.activation == "jumprelu" else None
    tensors = {name: parts.pop(name).contiguous() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    for name, tensor in {**tensors, "threshold": threshold}.items():
        if tensor is not None and not tensor.isfinite().all():
            refuse(checkpoint, f"has values that are not finite in {name!r}: the file is damaged, or training failed")
    return SAE(
        **tensors,
        activation=settled.activation,
        threshold=threshold,
        k=reading.k if settled.activation == "topk" else None,
        subtract_b_dec=settled.subtract_b_dec,
        normalisation=settled.normalisation,
        metadata=_metadata(reading, folded),
    )


CANONICAL: Mapping[str, Activation] = {
    "relu": "relu",
    "topk": "topk",
    "batchtopk": "jumprelu",
    "jumprelu": "jumprelu",
    "gated": "jumprelu",
}
"""What each published activation is once it is folded"""
NORMALISATIONS: Mapping[str, Normalisation] = {name: name for name in get_args(Normalisation)}


@dataclass(frozen=True)
class Settled:
    """A reading, and of it what has to be known, in the terms of the canonical form."""

    reading: Reading
    activation: Activation
    """Once it is folded"""
    subtract_b_dec: bool
    normalisation: Normalisation
    scale: float


def _settled(checkpoint: Checkpoint, layout: Layout, options: SAEOptions) -> Settled:
    """What the layout reads, with the user's statements in it; refuses what is still open."""
    reading = _stated(checkpoint, layout, options)
    activation = _sure(checkpoint, reading, "activation", reading.activation)
    subtract_b_dec = _sure(checkpoint, reading, "subtract_b_dec", reading.subtract_b_dec)
    normalisation = _sure(checkpoint, reading, "normalisation", reading.normalisation)
    scale = _sure(checkpoint, reading, "scale", reading.scale)
    if activation == "topk":
        _sure(checkpoint, reading, "k", reading.k)
    if activation in ("jumprelu", "batchtopk") and "threshold" not in {**layout.tensors, **reading.tensors}:
        _sure(checkpoint, reading, "threshold", reading.threshold)
    for option, value, known in (
        ("activation", activation, CANONICAL),
        ("normalisation", normalisation, NORMALISATIONS),
    ):
        if value not in known:
            refuse(checkpoint, f"has the {option} {value!r}; expected one of {', '.join(known)}")
    return Settled(reading, CANONICAL[activation], subtract_b_dec, NORMALISATIONS[normalisation], scale)


def _stated(checkpoint: Checkpoint, layout: Layout, options: SAEOptions) -> Reading:
    """What the layout reads, with the user's statements in it."""
    stated: dict[str, Any] = {
        name: value
        for name, value in options.stated().items()
        if name in ("activation", "k", "threshold", "scale", "normalisation", "subtract_b_dec")
    }
    if options.unit_decoder is not None:
        stated["unit_decoder"] = options.unit_decoder
    try:
        return replace(layout.read(checkpoint, options), **stated)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # the publisher's own code writes none of these
        refuse(
            checkpoint,
            f"has a configuration that is not as layout {layout.name} has it ({type(error).__name__}: {error})",
        )


WORDS = {
    "activation": "relu|topk|batchtopk|jumprelu",
    "normalisation": "none|layer_norm|constant_norm_rescale",
    "subtract_b_dec": "true|false",
}


def _sure(checkpoint: Checkpoint, reading: Reading, option: str, value: T | None) -> T:
    """The value of an option; refuses the SAE where neither its files nor the user say it."""
    if value is None:
        why = reading.doubts.get(option, f"does not say its {option}")
        refuse(checkpoint, f"{why}; settle it with --sae-option {option}={WORDS.get(option, 'NUMBER')}")
    return value


def _fetched(checkpoint: Checkpoint, layout: Layout, reading: Reading, options: SAEOptions) -> dict[str, torch.Tensor]:
    """The tensors in float32 under our names, W_enc as (d_model, features), W_dec as (features, d_model)."""
    names = {**layout.tensors, **reading.tensors}
    if reading.activation == "gated":
        names.pop("b_enc", None)
    missing = [
        theirs for ours, theirs in names.items() if theirs not in checkpoint.tensors and ours not in layout.optional
    ]
    if missing:
        refuse(
            checkpoint,
            f"lacks the tensor {missing[0]!r} (layout {layout.name}); it has {', '.join(sorted(checkpoint.tensors))}",
        )
    # taken out, so that a matrix of gigabytes is not kept twice
    parts = {
        ours: checkpoint.tensors.pop(theirs).float() for ours, theirs in names.items() if theirs in checkpoint.tensors
    }
    for name in ("W_enc", "W_dec"):
        if parts[name].ndim != 2:
            refuse(checkpoint, f"has {names[name]!r} of shape {tuple(parts[name].shape)}, expected a matrix")
    features_last = _features_last(checkpoint, layout, reading, options, parts)
    if not features_last:
        parts["W_enc"] = parts["W_enc"].T
    if layout.decoder == "features_last" or (layout.decoder is None and not features_last):
        parts["W_dec"] = parts["W_dec"].T
    d, n = parts["W_enc"].shape
    parts.setdefault("b_enc", torch.zeros(n))
    parts.setdefault("b_dec", torch.zeros(d))
    return parts


def _features_last(
    checkpoint: Checkpoint, layout: Layout, reading: Reading, options: SAEOptions, parts: dict[str, torch.Tensor]
) -> bool:
    """Whether W_enc is (d_model, features); a square one is believed only where the layout says it."""
    if options.orientation is not None:
        return options.orientation == "features_last"
    if layout.encoder is not None:
        return layout.encoder == "features_last"
    rows, columns = parts["W_enc"].shape
    if rows == columns:
        refuse(
            checkpoint,
            f"has a square W_enc ({rows} × {columns}): settle it with --sae-option "
            "orientation=features_last|features_first",
        )
    n = reading.n_features or len(parts["b_enc"])
    return columns == n


def _check_widths(checkpoint: Checkpoint, parts: dict[str, torch.Tensor], reading: Reading) -> None:
    d, n = parts["W_enc"].shape
    for what, stated, width in (("d_model", reading.d_model, d), ("features", reading.n_features, n)):
        if stated is not None and stated != width:
            refuse(
                checkpoint,
                f"states {stated} {what}, its encoder has {width}: the file belongs to another configuration",
            )
    for name, shape in (("W_dec", (n, d)), ("b_enc", (n,)), ("b_dec", (d,))):
        if tuple(parts[name].shape) != shape:
            refuse(
                checkpoint, f"has {name} of shape {tuple(parts[name].shape)}; an encoder of {d} × {n} asks for {shape}"
            )


def _fold_in_place(parts: dict[str, torch.Tensor], reading: Reading, scale: float) -> list[str]:
    """Fold what is stated into the tensors; says what was folded."""
    folded = []
    if reading.activation == "gated":
        gain = parts["r_mag"].exp()
        parts["threshold"] = parts["b_mag"] - gain * parts["b_gate"]
        parts["W_enc"], parts["b_enc"] = parts["W_enc"] * gain, parts["b_mag"]
        folded.append("gate and magnitude as one encoder with a threshold")
    elif reading.activation in ("jumprelu", "batchtopk"):
        _spread_threshold(parts, reading)
        if reading.activation == "batchtopk":
            folded.append(f"batchtopk as its frozen threshold {float(parts['threshold'][0]):.6g}")
    if reading.decoder_gain is not None:
        parts["W_dec"] = parts["W_dec"] * reading.decoder_gain.float()[:, None]
        folded.append("factor on the activations before decoding")
    if reading.bias_factor != 1:
        parts["b_enc"], parts["b_dec"] = parts["b_enc"] * reading.bias_factor, parts["b_dec"] * reading.bias_factor
        folded.append(f"activation scale {1 / reading.bias_factor:.6g} into the biases")
    if scale != 1:
        parts["W_enc"] = parts["W_enc"] * scale
        parts["W_dec"], parts["b_dec"] = parts["W_dec"] / scale, parts["b_dec"] / scale
        if reading.threshold_on_unit_decoder and "threshold" in parts:
            parts["threshold"] = parts["threshold"] / scale
        folded.append(f"activation scale {scale:.6g}")
    folded += _fold_norms(parts, reading)
    return folded


def _spread_threshold(parts: dict[str, torch.Tensor], reading: Reading) -> None:
    threshold = reading.threshold if reading.threshold is not None else parts["threshold"]
    threshold = torch.as_tensor(threshold).float().flatten()
    parts["threshold"] = threshold.expand(parts["W_enc"].shape[1]).clone() if len(threshold) == 1 else threshold


def _fold_norms(parts: dict[str, torch.Tensor], reading: Reading) -> list[str]:
    on_norm = "threshold" in parts and reading.threshold_on_unit_decoder
    if not (reading.unit_decoder or on_norm):
        return []
    norms = parts["W_dec"].norm(dim=1).clamp(min=1e-8)
    if reading.unit_decoder:
        parts["W_enc"], parts["b_enc"] = parts["W_enc"] * norms, parts["b_enc"] * norms
        parts["W_dec"] = parts["W_dec"] / norms[:, None]
        if "threshold" in parts and not on_norm:
            parts["threshold"] = parts["threshold"] * norms
        return ["decoder norms, so that every decoder row has norm 1"]
    parts["threshold"] = parts["threshold"] / norms
    return ["decoder norms into the thresholds"]


def _metadata(reading: Reading, folded: list[str]) -> dict[str, Any]:
    stated = {
        name: value
        for name, value in reading.metadata.items()
        if isinstance(value, (str, int, float, bool, list, dict))
    }
    layer = stated.get("layer", _layer_of(stated.get("hook_name")))
    extra = {"layer": layer, "folded": folded, "notes": reading.notes}
    return stated | {name: value for name, value in extra.items() if value not in (None, [])}


def _layer_of(hook: Any) -> int | None:
    digits = [part for part in str(hook).split(".") if part.isdigit()]
    return int(digits[0]) if digits else None
