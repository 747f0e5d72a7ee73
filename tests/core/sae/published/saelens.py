"""SAELens, held against SAELens; SAE-V's checkpoints by the formula."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.core.sae.published.base import (
    D,
    K,
    N,
    Published,
    S,
    case,
    dump,
    f64,
    parts,
    randomise,
    relu,
    run,
    states,
    tensors,
)


def sae_lens() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("sae_lens")


def from_saelens(theirs: Any, path: Path, **more: Any) -> Published:
    x = states()
    with torch.no_grad():
        codes = theirs.encode(x)
        return Published(path, f64(codes), f64(theirs.decode(codes)), **more)


for _name, _class, _options in (
    ("standard", "StandardSAE", {}),
    ("standard, b_dec not subtracted", "StandardSAE", {"apply_b_dec_to_input": False}),
    ("standard, layer_norm", "StandardSAE", {"normalize_activations": "layer_norm"}),
    ("standard, constant_norm_rescale", "StandardSAE", {"normalize_activations": "constant_norm_rescale"}),
    ("gated", "GatedSAE", {}),
    ("gated, b_dec not subtracted", "GatedSAE", {"apply_b_dec_to_input": False}),
    ("jumprelu", "JumpReLUSAE", {}),
    ("topk", "TopKSAE", {"k": K}),
    ("topk, rescaled by decoder norm", "TopKSAE", {"k": K, "rescale_acts_by_decoder_norm": True}),
):

    @case("saelens", _name, peer="sae-lens")
    def _saelens(folder: Path, cls: str = _class, options: dict = _options) -> Published:
        package = sae_lens()
        theirs = getattr(package, cls)(getattr(package, f"{cls}Config")(d_in=D, d_sae=N, **options))
        randomise(theirs)
        theirs.save_model(folder)
        return from_saelens(theirs, folder)


def trained(cls: str, **options: Any) -> Any:
    package = sae_lens()
    theirs = getattr(package, cls)(getattr(package, f"{cls}Config")(d_in=D, d_sae=N, k=K, **options))
    randomise(theirs)
    if hasattr(theirs, "topk_threshold"):
        theirs.topk_threshold = torch.tensor(2.5, dtype=torch.double)
    return theirs


def saved_for_inference(theirs: Any, folder: Path) -> Any:
    """The publisher's own inference form of a training SAE."""
    theirs.save_inference_model(folder)
    return sae_lens().SAE.load_from_disk(folder)


for _cls in ("BatchTopKTrainingSAE", "MatryoshkaBatchTopKTrainingSAE"):
    _more = {"matryoshka_widths": [8, N]} if "Matryoshka" in _cls else {}

    @case("saelens", f"{_cls} saved for inference", peer="sae-lens")
    def _inference(folder: Path, cls: str = _cls, more: dict = _more) -> Published:
        theirs = trained(cls, **more)
        return from_saelens(saved_for_inference(theirs, folder), folder)

    @case("saelens", f"{_cls} training checkpoint", peer="sae-lens")
    def _checkpoint(folder: Path, cls: str = _cls, more: dict = _more) -> Published:
        theirs = trained(cls, **more)
        theirs.save_model(folder / "1000")
        return from_saelens(saved_for_inference(theirs, folder / "inference"), folder / "1000")


@case("saelens", "training checkpoint whose activation scale is in activation_scaler.json", peer="sae-lens")
def _scaler(folder: Path) -> Published:
    theirs = trained("BatchTopKTrainingSAE", normalize_activations="expected_average_only_in")
    theirs.save_model(folder / "1000")
    dump(folder / "1000" / "activation_scaler.json", {"scaling_factor": S, "has_whitening": False})
    theirs.fold_activation_norm_scaling_factor(S)
    return from_saelens(saved_for_inference(theirs, folder / "inference"), folder / "1000")


def old_folder(folder: Path, w: dict[str, torch.Tensor], **config: Any) -> Path:
    """What SAELens 3 to 5 wrote."""
    base = {
        "d_in": D,
        "d_sae": N,
        "dtype": "torch.float32",
        "hook_name": "blocks.16.hook_resid_post",
        "hook_layer": 16,
        "model_name": "mistral-7b",
        "architecture": "standard",
        "activation_fn_str": "relu",
        "activation_fn_kwargs": {},
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "finetuning_scaling_factor": False,
        "sae_lens_training_version": "3.20.0",
    }
    tensors(folder / "sae_weights.safetensors", w)
    dump(folder / "cfg.json", base | config)
    return folder


for _name, _config, _shapes in (
    ("standard", {}, {}),
    ("topk", {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}, {}),
    ("gated", {"architecture": "gated"}, {"b_gate": (N,), "b_mag": (N,), "r_mag": (N,)}),
    ("jumprelu", {"architecture": "jumprelu"}, {"threshold": (N,)}),
    ("constant_norm_rescale", {"normalize_activations": "constant_norm_rescale"}, {}),
):

    @case("saelens_old", _name, peer="sae-lens")
    def _old(folder: Path, config: dict = _config, shapes: dict = _shapes) -> Published:
        w = parts(**shapes)
        if "b_gate" in shapes:
            w.pop("b_enc")
        old_folder(folder, w, **config)
        return from_saelens(sae_lens().SAE.load_from_disk(folder), folder)


@case("saelens_old", "SAE-V final_*: folded, though cfg.json says otherwise")
def saev_final(folder: Path) -> Published:
    w = parts()
    old_folder(
        folder / "final_122880000",
        w,
        apply_b_dec_to_input=False,
        normalize_activations="expected_average_only_in",
        l1_coefficient=5,
    )
    codes, out = run(w, relu, subtract=False)
    return Published(folder / "final_122880000", codes, out)


@case("saelens_old", "SAE-V before the end, with its scale said")
def _saev_middle(folder: Path) -> Published:
    w = parts()
    old_folder(folder / "40960000", w, apply_b_dec_to_input=False, normalize_activations="expected_average_only_in")
    codes, out = run(w, relu, subtract=False, x=f64(states()) * S)
    return Published(folder / "40960000", codes, out / S, {"scale": S})


@case("saelens_old", "gated, with its scale said")
def _gated_scaled(folder: Path) -> Published:
    w = parts(b_gate=(N,), b_mag=(N,), r_mag=(N,))
    w.pop("b_enc")
    old_folder(folder, w, architecture="gated", normalize_activations=True)
    g = (f64(states()) * S - f64(w["b_dec"])) @ f64(w["W_enc"])
    codes = np.where(g + f64(w["b_gate"]) > 0, relu(g * np.exp(f64(w["r_mag"])) + f64(w["b_mag"])), 0)
    return Published(folder, codes, (codes @ f64(w["W_dec"]) + f64(w["b_dec"])) / S, {"scale": S})


@case("saelens_old", "factor of fine-tuning before decoding")
def _finetuned(folder: Path) -> Published:
    w = parts(scaling_factor=(N,))
    old_folder(folder, w, finetuning_scaling_factor=True)
    codes, _ = run(w, relu, subtract=True)
    return Published(folder, codes, codes * f64(w["scaling_factor"]) @ f64(w["W_dec"]) + f64(w["b_dec"]))
