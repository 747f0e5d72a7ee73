"""What a layout is: names of files and tensors, and a reader that says what the numbers mean.

A layout is data. Its `read` turns a publisher's configuration into a `Reading`, statements in the terms
of the canonical form (`core/sae/autoencoder.py`); `build` does the rest, the same for all: it fetches and
turns the tensors, checks them against what is stated, and folds what can be folded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import PurePath
from typing import Any, Literal, NoReturn, TypedDict

import torch

from mmfilter.core.cards.sae_options import SAEOptions
from mmfilter.core.sae.checkpoints import Checkpoint
from mmfilter.errors import SAEError

Orientation = Literal["features_last", "features_first"]
SAELENS_NAMES = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
LINEAR_NAMES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}


class Orientations(TypedDict):
    """How a layout's two matrices lie."""

    encoder: Orientation
    decoder: Orientation


@dataclass
class Reading:
    """What a publisher's files state, in the terms of the canonical form; None where they are silent."""

    activation: str | None
    """relu, topk, batchtopk, jumprelu or gated"""
    k: int | None = None
    threshold: torch.Tensor | float | None = None
    threshold_on_unit_decoder: bool = False
    """The threshold is compared with h·‖W_dec‖, not with h"""
    subtract_b_dec: bool | None = None
    normalisation: str | None = "none"
    scale: float | None = 1.0
    """Factor on the activations, to be folded into the weights; 1: none"""
    unit_decoder: bool = False
    """Decoder rows are to be scaled to norm 1, and the activations by what they had"""
    decoder_gain: torch.Tensor | None = None
    """Factor on each activation before decoding"""
    bias_factor: float = 1.0
    """Factor on b_enc and b_dec, which brings activations from normalised into the model's units"""
    d_model: int | None = None
    n_features: int | None = None
    tensors: Mapping[str, str] = field(default_factory=dict)
    """Names of tensors beside those of the layout: ours -> theirs"""
    doubts: Mapping[str, str] = field(default_factory=dict)
    """Option -> why the files leave it open"""
    notes: list[str] = field(default_factory=list)
    """What the reader should know of this SAE"""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """One way in which SAEs are published."""

    name: str
    publisher: str
    """Who writes it"""
    files: tuple[str, ...]
    """Patterns of the weights' file; with a slash they look at its folder too"""
    tensors: Mapping[str, str]
    """Ours -> theirs"""
    read: Callable[[Checkpoint, SAEOptions], Reading]
    keys: frozenset[str] = frozenset()
    """Keys that the configuration must have"""
    values: frozenset[str] = frozenset()
    """Further names that must be among the weights"""
    encoder: Orientation | None = "features_last"
    """Of W_enc, `features_last` being (d_model, features); None: only the shapes tell"""
    decoder: Orientation | None = "features_first"
    """Of W_dec, `features_first` being (features, d_model)"""
    optional: frozenset[str] = frozenset()
    """Tensors (our names) that may be missing and are zero then"""
    fits: Callable[[Checkpoint], bool] = lambda _: True
    """What names alone do not tell"""

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """Whether these files look like this layout."""
        required = {theirs for ours, theirs in self.tensors.items() if ours not in self.optional}
        return (
            any(_matches(checkpoint.path, pattern) for pattern in self.files)
            and self.keys <= set(checkpoint.config)
            and required <= set(checkpoint.tensors)
            and self.values <= {*checkpoint.tensors, *checkpoint.values}
            and self.fits(checkpoint)
        )


def _matches(path: PurePath, pattern: str) -> bool:
    return fnmatch("/".join(path.parts[-1 - pattern.count("/") :]), pattern)


def refuse(checkpoint: Checkpoint, reason: str) -> NoReturn:
    """Raise `SAEError` with the SAE's name and why it is not opened."""
    raise SAEError(f"SAE {checkpoint.where!r} {reason}")


def number_in(pattern: str, text: str) -> int | None:
    """The first group of `pattern` in `text` as a number."""
    match = re.search(pattern, text)
    return int(match[1]) if match else None


def residual_hook(layer: int | None) -> dict[str, Any]:
    """Metadata of the output of a decoder layer."""
    return (
        {}
        if layer is None
        else {"hook_name": f"blocks.{layer}.hook_resid_post", "hf_hook_name": f"model.layers.{layer}", "layer": layer}
    )


def stated(config: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Those of the keys that the configuration has a value for."""
    return {key: config[key] for key in keys if config.get(key) is not None}
