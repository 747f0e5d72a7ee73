"""Every layout: small files written the publisher's way, opened here, held against the publisher's own code or its formula.

`CASES` is also the source of the table of formats: `layout`, `publisher`, `verified_by`. Where the publisher's
package is installed, its classes write the files and say what the codes are; else the formula is
written out here in float64.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mmfilter.core.model.layouts import LAYOUTS, NAMED
from mmfilter.core.model.pretrained import load_sae
from mmfilter.core.model.sae_options import SAEOptions, make_options
from mmfilter.errors import SAEError

D, N, K, TOKENS = 6, 24, 5, 19
S = 1.7
"""Activation scale of the cases that have one"""


@dataclass
class Published:
    """Files of an SAE, and what its publisher computes with them."""

    path: Path
    codes: np.ndarray
    """(TOKENS, N)"""
    reconstruction: np.ndarray
    """(TOKENS, D)"""
    options: dict[str, Any] = field(default_factory=dict)
    layout: str | None = None
    """When it is not the case's"""


@dataclass(frozen=True)
class Case:
    """A way of publishing."""

    layout: str
    publisher: str
    verified_by: str
    what: str
    write: Callable[[Path], Published]

    @property
    def id(self) -> str:
        return f"{self.layout} {self.what} [{self.verified_by}]"


CASES: list[Case] = []


def case(layout: str, what: str = "", *, peer: str | None = None) -> Callable:
    """Register a writer; `peer` is the distribution whose code says what is right."""

    def register(write: Callable[[Path], Published]) -> Callable[[Path], Published]:
        names = [what] if what else [write.__name__]
        for name in names:
            CASES.append(Case(layout, NAMED[layout].publisher, f"peer: {peer} {_version(peer)}" if peer else "formula", name, write))
        return write

    return register


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except Exception:
        return "(not installed)"


# --- numbers -----------------------------------------------------------------------------------


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def states() -> torch.Tensor:
    return torch.randn(TOKENS, D, generator=rng(1)) * 2 + 0.3


def parts(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random tensors by name; the usual four in SAELens' orientation unless told otherwise."""
    g = rng()
    shapes = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,), **shapes}
    return {name: torch.randn(*shape, generator=g) for name, shape in shapes.items()}


def f64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def topk(h: np.ndarray, k: int) -> np.ndarray:
    out = np.zeros_like(h)
    for row, kept in zip(h, out, strict=True):
        best = np.argsort(-row, kind="stable")[:k]
        kept[best] = np.maximum(row[best], 0)
    return out


def relu(h: np.ndarray) -> np.ndarray:
    return np.maximum(h, 0)


def jumprelu(h: np.ndarray, threshold: Any) -> np.ndarray:
    return np.where(h > threshold, relu(h), 0)


def layer_norm(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mean, std = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True)
    return (x - mean) / (std + 1e-5), mean, std


def run(w: dict[str, torch.Tensor], activation: Callable[[np.ndarray], np.ndarray], *, subtract: bool, x: np.ndarray | None = None):
    """(codes, reconstruction) of the plain formula with SAELens' orientation."""
    x = f64(states()) if x is None else x
    h = (x - (f64(w["b_dec"]) if subtract else 0)) @ f64(w["W_enc"]) + f64(w["b_enc"])
    codes = activation(h)
    return codes, codes @ f64(w["W_dec"]) + f64(w["b_dec"])


def dump(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def tensors(path: Path, values: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {name: value.contiguous() for name, value in values.items()}
    save_file(values, path) if path.suffix == ".safetensors" else torch.save(values, path)


# --- SAELens -----------------------------------------------------------------------------------


def sae_lens() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("sae_lens")


def randomise(module: Any) -> None:
    g = rng()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g).abs() if "threshold" in name else torch.randn(parameter.shape, generator=g))


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
    base = {"d_in": D, "d_sae": N, "dtype": "torch.float32", "hook_name": "blocks.16.hook_resid_post", "hook_layer": 16, "model_name": "mistral-7b",
            "architecture": "standard", "activation_fn_str": "relu", "activation_fn_kwargs": {}, "apply_b_dec_to_input": True,
            "normalize_activations": "none", "finetuning_scaling_factor": False, "sae_lens_training_version": "3.20.0"}  # fmt: skip
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
def _saev_final(folder: Path) -> Published:
    w = parts()
    old_folder(folder / "final_122880000", w, apply_b_dec_to_input=False, normalize_activations="expected_average_only_in", l1_coefficient=5)
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


# --- sparsify ----------------------------------------------------------------------------------


def sparse_coder(folder: Path, **options: Any) -> Published:
    sparsify = pytest.importorskip("sparsify")
    theirs = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(k=K, **options))
    randomise(theirs)
    theirs.save_to_disk(folder)
    with torch.no_grad():
        found = theirs.encode(states())
        codes = torch.zeros(TOKENS, theirs.num_latents).scatter_(1, found.top_indices, found.top_acts)
        return Published(folder, f64(codes), f64(theirs.decode(found.top_acts, found.top_indices)))


@case("sparsify", "num_latents", peer="eai-sparsify")
def _sparsify(folder: Path) -> Published:
    return sparse_coder(folder / "layers.16", num_latents=N)


@case("sparsify", "num_latents 0, expansion factor", peer="eai-sparsify")
def _sparsify_expansion(folder: Path) -> Published:
    return sparse_coder(folder / "layer_18", expansion_factor=N // D)


@case("sparsify", "LMMs-Lab's folder, with the multi_topk loss", peer="eai-sparsify")
def _sparsify_lmms(folder: Path) -> Published:
    dump(folder / "config.json", {"model": "lmms-lab/llama3-llava-next-8b", "ctx_len": 2048, "dataset": "LLaVA-NeXT-Data"})
    return sparse_coder(folder / "model.layers.24", num_latents=N, multi_topk=True)


@case("sparsify", "square: d_model as many as features", peer="eai-sparsify")
def _sparsify_square(folder: Path) -> Published:
    return sparse_coder(folder / "layers.1", num_latents=D)


# --- dictionary_learning -----------------------------------------------------------------------


def dictionary(
    folder: Path, name: str, build: Callable[[Any], Any], *, config: bool = True, codes_of: Callable[[Any], torch.Tensor] | None = None
) -> Published:
    package = pytest.importorskip("dictionary_learning")
    theirs = build(package)
    randomise(theirs)
    if hasattr(theirs, "threshold") and not isinstance(theirs.threshold, torch.nn.Parameter):
        theirs.threshold = torch.tensor(2.5)
    tensors(folder / "ae.pt", theirs.state_dict())
    if config:
        trainer = {
            "dict_class": name,
            "activation_dim": D,
            "dict_size": N,
            "layer": 15,
            "lm_name": "Qwen/Qwen2.5-7B-Instruct",
            "submodule_name": "resid_post_layer_15",
        }
        dump(folder / "config.json", {"trainer": trainer, "buffer": {"ctx_len": 512}})
    x = states()
    with torch.no_grad():
        if name == "AutoEncoder":
            theirs.normalize_decoder()  # what its from_pretrained does
        codes = theirs.encode(x)
        return Published(folder, f64(codes), f64(theirs.decode(codes)))


def topk_classes(package: Any) -> Any:
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    return {"AutoEncoderTopK": top_k.AutoEncoderTopK, "BatchTopKSAE": batch_top_k.BatchTopKSAE,
            "MatryoshkaBatchTopKSAE": matryoshka_batch_top_k.MatryoshkaBatchTopKSAE}  # fmt: skip


for _layout, _cls in (
    ("dictionary_learning", "AutoEncoder"),
    ("dictionary_learning_new", "AutoEncoderNew"),
    ("dictionary_learning_gated", "GatedAutoEncoder"),
    ("dictionary_learning_jumprelu", "JumpReluAutoEncoder"),
):

    @case(_layout, _cls, peer="dictionary-learning")
    def _dictionary(folder: Path, cls: str = _cls) -> Published:
        return dictionary(folder, cls, lambda package: getattr(package.dictionary, cls)(D, N))

    if _cls != "JumpReluAutoEncoder":

        @case(_layout, f"{_cls} without config.json", peer="dictionary-learning")
        def _alone(folder: Path, cls: str = _cls) -> Published:
            return dictionary(folder, cls, lambda package: getattr(package.dictionary, cls)(D, N), config=False)


@case("dictionary_learning_topk", "AutoEncoderTopK", peer="dictionary-learning")
def _dictionary_topk(folder: Path) -> Published:
    return dictionary(folder, "AutoEncoderTopK", lambda package: topk_classes(package)["AutoEncoderTopK"](D, N, K))


@case("dictionary_learning_topk", "BatchTopKSAE", peer="dictionary-learning")
def _dictionary_batchtopk(folder: Path) -> Published:
    return dictionary(folder, "BatchTopKSAE", lambda package: topk_classes(package)["BatchTopKSAE"](D, N, K))


@case("dictionary_learning_topk", "BatchTopKSAE without config.json, activation said", peer="dictionary-learning")
def _dictionary_batchtopk_alone(folder: Path) -> Published:
    made = dictionary(folder, "BatchTopKSAE", lambda package: topk_classes(package)["BatchTopKSAE"](D, N, K), config=False)
    made.options = {"activation": "batchtopk"}
    return made


@case("dictionary_learning_matryoshka", "MatryoshkaBatchTopKSAE", peer="dictionary-learning")
def _dictionary_matryoshka(folder: Path) -> Published:
    return dictionary(folder, "MatryoshkaBatchTopKSAE", lambda package: topk_classes(package)["MatryoshkaBatchTopKSAE"](D, N, K, [8, N - 8]))


# --- Gemma Scope -------------------------------------------------------------------------------


@case("gemma_scope", "params.npz")
def _gemma_scope(folder: Path) -> Published:
    w = parts(threshold=(N,))
    w["threshold"] = w["threshold"].abs()
    path = folder / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    path.mkdir(parents=True)
    np.savez(path / "params.npz", **{name: value.numpy() for name, value in w.items()})
    return Published(path, *run(w, lambda h: jumprelu(h, f64(w["threshold"])), subtract=False))


@case("gemma_scope_2", "params.safetensors")
def _gemma_scope_2(folder: Path) -> Published:
    w = parts(threshold=(N,))
    w["threshold"] = w["threshold"].abs()
    path = folder / "resid_post" / "layer_17_width_16k_l0_medium"
    tensors(path / "params.safetensors", {name.replace("W_", "w_"): value for name, value in w.items()})
    dump(path / "config.json", {"hf_hook_point_in": "model.layers.17.output", "hf_hook_point_out": "model.layers.17.output", "width": N, "model_name": "gemma-3-4b-it",
                                "architecture": "jump_relu", "l0": 60, "affine_connection": False, "type": "sae"})  # fmt: skip
    return Published(path, *run(w, lambda h: jumprelu(h, f64(w["threshold"])), subtract=False))


# --- Llama Scope -------------------------------------------------------------------------------


def linear(w: dict[str, torch.Tensor], b_dec: str = "decoder.bias") -> dict[str, torch.Tensor]:
    """nn.Linear's names and orientation."""
    return {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T, b_dec: w["b_dec"]}


@case("llama_scope", "dataset-wise, jumprelu on the decoder norm")
def _llama_scope(folder: Path) -> Published:
    """As OpenMOSS' loader of October 2024: biases / s, then unit decoder rows, then the threshold."""
    w, theta = parts(), 0.8
    path = folder / "Llama3_1-8B-Base-L15R-8x"
    tensors(path / "checkpoints" / "final.safetensors", linear(w))
    dump(path / "hyperparams.json", {"d_model": D, "d_sae": N, "expansion_factor": 4, "hook_point_in": "blocks.15.hook_resid_post",
         "hook_point_out": "blocks.15.hook_resid_post", "act_fn": "jumprelu", "jump_relu_threshold": theta, "top_k": 50, "norm_activation": "dataset-wise",
         "dataset_average_activation_norm": {"in": D**0.5 / S, "out": D**0.5 / S}, "sparsity_include_decoder_norm": True,
         "use_decoder_bias": True, "apply_decoder_bias_to_pre_encoder": False, "use_glu_encoder": False})  # fmt: skip
    norms = np.linalg.norm(f64(w["W_dec"]), axis=1)
    h = (f64(states()) @ f64(w["W_enc"]) + f64(w["b_enc"]) / S) * norms
    codes = jumprelu(h, theta)
    return Published(path, codes, codes @ (f64(w["W_dec"]) / norms[:, None]) + f64(w["b_dec"]) / S)


def scope_config(**more: Any) -> dict[str, Any]:
    return {"sae_type": "sae", "d_model": D, "expansion_factor": N / D, "hook_point_in": "blocks.15.hook_resid_post", "hook_point_out": "blocks.15.hook_resid_post",
            "use_glu_encoder": False, "use_decoder_bias": True, "top_k": K, "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True} | more  # fmt: skip


def scope(w: dict[str, torch.Tensor], activation: Callable, *, x: np.ndarray, include: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Llamascopium's encode and decode: the activation sees h·‖W_D‖ and its result is divided by it again."""
    norms = np.linalg.norm(f64(w["W_dec"]), axis=1) if include else 1.0
    codes = activation((x @ f64(w["W_enc"]) + f64(w["b_enc"])) * norms) / norms
    return codes, codes @ f64(w["W_dec"]) + f64(w["b_dec"])


def upper(w: dict[str, torch.Tensor], **more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"W_E": w["W_enc"], "b_E": w["b_enc"], "W_D": w["W_dec"], "b_D": w["b_dec"], **more}


AVERAGE = {"dataset_average_activation_norm.blocks.15.hook_resid_post": torch.tensor(D**0.5 / S)}


@case("llamascopium", "jumprelu, dataset-wise")
def _llamascopium(folder: Path) -> Published:
    w, log_theta = parts(), torch.randn(N, generator=rng(3)) * 0.3
    tensors(folder / "sae_weights.safetensors", upper(w, **{"activation_function.log_jumprelu_threshold": log_theta}, **AVERAGE))
    dump(folder / "config.json", scope_config(act_fn="jumprelu"))
    codes, out = scope(w, lambda h: jumprelu(h, np.exp(f64(log_theta))), x=f64(states()) * S)
    return Published(folder, codes, out / S)


@case("llamascopium", "relu, folded for inference, threshold on h")
def _llamascopium_relu(folder: Path) -> Published:
    w = parts()
    tensors(folder / "sae_weights.safetensors", upper(w, **AVERAGE))
    dump(folder / "config.json", scope_config(act_fn="relu", norm_activation="inference", sparsity_include_decoder_norm=False))
    return Published(folder, *scope(w, relu, x=f64(states()), include=False))


@case("llamascopium", "topk on the decoder norm: activations times it, token-wise norm")
def _llamascopium_topk(folder: Path) -> Published:
    w = parts()
    tensors(folder / "sae_weights.safetensors", upper(w))
    dump(folder / "config.json", scope_config(act_fn="topk", norm_activation="token-wise"))
    x = f64(states())
    factor = D**0.5 / np.linalg.norm(x, axis=1, keepdims=True)
    codes, out = scope(w, lambda h: topk(h, K), x=x * factor)
    return Published(folder, codes * np.linalg.norm(f64(w["W_dec"]), axis=1), out / factor)


@case("llama_scope_r1", "jumprelu, dataset-wise")
def _llama_scope_r1(folder: Path) -> Published:
    w, log_theta = parts(), torch.randn(N, generator=rng(3)) * 0.3
    tensors(folder / "sae_weights.safetensors", {**linear(w), "log_jumprelu_threshold": log_theta})
    dump(folder / "config.json", scope_config(act_fn="jumprelu"))
    codes, out = scope(w, lambda h: jumprelu(h, np.exp(f64(log_theta))), x=f64(states()) * S)
    return Published(folder, codes, out / S, {"scale": S})


# --- single files ------------------------------------------------------------------------------


@case("qwen_scope", "layerN.sae.pt, features first")
def _qwen_scope(folder: Path) -> Published:
    w = parts()
    path = folder / f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}" / "layer12.sae.pt"
    tensors(path, w | {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"].T})
    return Published(path, *run(w, lambda h: topk(h, K), subtract=False))


@case("openai", "TopK: layer norm and its undoing")
def _openai_topk(folder: Path) -> Published:
    w = parts()
    content = {"encoder.weight": w["W_enc"].T, "latent_bias": w["b_enc"], "decoder.weight": w["W_dec"].T, "pre_bias": w["b_dec"],
               "stats_last_nonzero": torch.zeros(N, dtype=torch.long), "activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}  # fmt: skip
    torch.save(content, folder / "8.pt")
    x, mean, std = layer_norm(f64(states()))
    codes, out = run(w, lambda h: topk(h, K), subtract=True, x=x)
    return Published(folder / "8.pt", codes, out * std + mean)


@case("openai", "ReLU: no norm")
def _openai_relu(folder: Path) -> Published:
    w = parts()
    torch.save(
        {"encoder.weight": w["W_enc"].T, "latent_bias": w["b_enc"], "decoder.weight": w["W_dec"].T, "pre_bias": w["b_dec"], "activation": "ReLU"},
        folder / "8.pt",
    )
    return Published(folder / "8.pt", *run(w, relu, subtract=True))


@case("goodfire", "one file")
def _goodfire(folder: Path) -> Published:
    w = parts()
    path = folder / "Llama-3.1-8B-Instruct-SAE-l19.pth"
    tensors(path, {name.replace("coder.", "coder_linear."): value for name, value in linear(w).items()})
    return Published(path, *run(w, relu, subtract=False))


@case("mmdiff", "JumpReLU on PaliGemma 2")
def _mmdiff(folder: Path) -> Published:
    w = parts(threshold=(N,))
    w["threshold"] = w["threshold"].abs()
    tensors(folder / "text-only_layer_13.pt", w)
    return Published(folder / "text-only_layer_13.pt", *run(w, lambda h: jumprelu(h, f64(w["threshold"])), subtract=False))


@case("mmdiff", "TopK on LLaVA-MORE, k said, bfloat16")
def _mmdiff_topk(folder: Path) -> Published:
    w = {name: value.bfloat16() for name, value in parts().items()}
    tensors(folder / "text-only_layer_16.pt", w)
    return Published(folder / "text-only_layer_16.pt", *run(w, lambda h: topk(h, K), subtract=False), {"k": K})


@case("plain", "everything said")
def _plain(folder: Path) -> Published:
    w = parts()
    tensors(folder / "sae.safetensors", w | {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"].T})
    options = {"layout": "plain", "activation": "topk", "k": K, "subtract_b_dec": "true", "scale": S, "normalisation": "none"}
    codes, out = run(w, lambda h: topk(h, K), subtract=True, x=f64(states()) * S)
    return Published(folder, codes, out / S, options)


# --- vision ------------------------------------------------------------------------------------


def prisma_config(**more: Any) -> dict[str, Any]:
    return {"architecture": "standard", "activation_fn_str": "relu", "activation_fn_kwargs": {}, "normalize_activations": "none", "d_in": D, "expansion_factor": N // D,
            "hook_point_layer": 9, "layer_subtype": "hook_resid_post", "model_name": "open-clip:laion/CLIP-ViT-B-32", "is_transcoder": False} | more  # fmt: skip


@case("vit_prisma", "topk with layer norm")
def _prisma_topk(folder: Path) -> Published:
    w = parts()
    tensors(folder / "weights.pt", w)
    dump(folder / "config.json", prisma_config(activation_fn_str="topk", activation_fn_kwargs={"k": K}, normalize_activations="layer_norm"))
    x, mean, std = layer_norm(f64(states()))
    codes, out = run(w, lambda h: topk(h, K), subtract=True, x=x)
    return Published(folder, codes, out * std + mean)


@case("vit_prisma", "relu, tensors and a plain configuration in one file")
def _prisma_relu(folder: Path) -> Published:
    w = parts()
    torch.save({"cfg": prisma_config(), "state_dict": w}, folder / "n_images_2600058.pt")
    return Published(folder, *run(w, relu, subtract=True))


@case("vit_prisma", "gated")
def _prisma_gated(folder: Path) -> Published:
    w = parts(b_gate=(N,), b_mag=(N,), r_mag=(N,))
    tensors(folder / "weights.pt", w)
    dump(folder / "config.json", prisma_config(architecture="gated"))
    g = (f64(states()) - f64(w["b_dec"])) @ f64(w["W_enc"])
    codes = np.where(g + f64(w["b_gate"]) > 0, relu(g * np.exp(f64(w["r_mag"])) + f64(w["b_mag"])), 0)
    return Published(folder, codes, codes @ f64(w["W_dec"]) + f64(w["b_dec"]))


def overcomplete(folder: Path, rows: torch.Tensor, **more: torch.Tensor) -> tuple[dict[str, torch.Tensor], Path]:
    w = parts() | {"W_dec": rows}
    content = {"encoder.final_block.0.weight": w["W_enc"].T, "encoder.final_block.0.bias": w["b_enc"], "dictionary._weights": rows,
               "dictionary.multiplier": torch.tensor(0.4), **more}  # fmt: skip
    tensors(folder / "sae.pt", content)
    return w, folder / "sae.pt"


def used_rows(rows: torch.Tensor) -> torch.Tensor:
    return rows / (rows.norm(dim=1, keepdim=True) + 1e-8) * torch.tensor(0.4).exp()


def nearly_unit() -> torch.Tensor:
    rows = parts()["W_dec"]
    return rows / rows.norm(dim=1, keepdim=True) * (1 + 0.01 * torch.rand(N, 1, generator=rng(5)))


@case("overcomplete", "JumpSAE, linear encoder")
def _overcomplete(folder: Path) -> Published:
    log_theta = torch.randn(N, generator=rng(3)) * 0.3
    w, path = overcomplete(folder, nearly_unit(), thresholds=log_theta)
    x = f64(states())
    h = relu(x @ f64(w["W_enc"]) + f64(w["b_enc"]))
    codes = np.where(h < np.exp(f64(log_theta)), 0, h)
    return Published(path, codes, codes @ f64(used_rows(w["W_dec"])))


@case("overcomplete", "TopKSAE, activation said")
def _overcomplete_topk(folder: Path) -> Published:
    w, path = overcomplete(folder, nearly_unit())
    codes = topk(f64(states()) @ f64(w["W_enc"]) + f64(w["b_enc"]), K)
    return Published(path, codes, codes @ f64(used_rows(w["W_dec"])), {"activation": "topk", "k": K})


def saev_file(path: Path, header: dict[str, Any], content: dict[str, torch.Tensor]) -> Path:
    with path.open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        torch.save(content, file)
    return path


@case("saev", "schema 5, BatchTopK")
def _saev_5(folder: Path) -> Published:
    w, theta = parts(), 1.4
    cfg = {"d_model": D, "d_sae": N, "activation": {"cls": "BatchTopK", "params": {"top_k": K, "momentum": 0.1}}, "normalize_w_dec": True}
    path = saev_file(folder / "sae.pt", {"schema": 5, "cfg": cfg, "commit": "0", "lib": "1"}, w | {"activation.threshold": torch.tensor(theta)})
    return Published(path, *run(w, lambda h: jumprelu(h, theta), subtract=False))


@case("saev", "schema 2, TopK")
def _saev_2(folder: Path) -> Published:
    w = parts()
    cfg = {"d_vit": D, "exp_factor": N // D, "activation": {"cls": "TopK", "params": {"top_k": K}}}
    return Published(saev_file(folder / "sae.pt", {"schema": 2, "cfg": cfg}, w), *run(w, lambda h: topk(h, K), subtract=False))


@case("saev", "before schemas: ReLU, b_dec subtracted")
def _saev_none(folder: Path) -> Published:
    w = parts()
    header = {"d_vit": D, "exp_factor": N // D, "sparsity_coeff": 4e-4, "seed": 42}
    return Published(saev_file(folder / "sae.pt", header, w), *run(w, relu, subtract=True))


@case("saev", "schema 1, the choice said")
def _saev_1(folder: Path) -> Published:
    w = parts()
    header = {"schema": 1, "cls": "TopK", "cfg": {"d_vit": D, "exp_factor": N // D, "top_k": K}}
    return Published(saev_file(folder / "sae.pt", header, w), *run(w, lambda h: topk(h, K), subtract=True), {"subtract_b_dec": True})


# --- the tests ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # peers' own
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_codes_and_reconstructions_are_the_publishers(case, tmp_path, record_property):
    for name in ("layout", "publisher", "verified_by", "what"):
        record_property(name, getattr(case, name))
    made = case.write(tmp_path)
    sae = load_sae(made.path, make_options(made.options))
    assert sae.metadata["layout"] == case.layout
    codes = sae.encode(states(), max_active=sae.n_features)
    np.testing.assert_allclose(codes.dense().numpy(), made.codes, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(sae.decode(codes, states()).numpy(), made.reconstruction, atol=1e-5, rtol=1e-5)
    assert (made.codes > 0).sum() > TOKENS, "the case says nothing: hardly anything fires"


def test_every_layout_has_a_case():
    refused = {"dictionary_learning_backup"}
    assert {layout.name for layout in (*LAYOUTS, NAMED["plain"])} == {case.layout for case in CASES} | refused


def opened(path: Path, **options: Any):
    return load_sae(path, SAEOptions(**options))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gated", "topk, rescaled by decoder norm", "BatchTopKTrainingSAE training checkpoint"])
def test_saelens_opens_what_was_folded_here(name, tmp_path):
    """There and back: SAELens' files, opened and folded here, written, opened by SAELens again, are the same SAE."""
    made = next(case for case in CASES if case.layout == "saelens" and case.what == name).write(tmp_path / "theirs")
    load_sae(made.path).save(tmp_path / "ours")
    again = from_saelens(sae_lens().SAE.load_from_disk(tmp_path / "ours"), tmp_path)
    np.testing.assert_allclose(again.codes, made.codes, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(again.reconstruction, made.reconstruction, atol=1e-5, rtol=1e-5)


STATED = {
    "sparsify": (_sparsify_lmms, {"model_name": "lmms-lab/llama3-llava-next-8b", "hf_hook_name": "model.layers.24", "layer": 24, "context_size": 2048}),
    "gemma_scope": (_gemma_scope, {"hook_name": "blocks.20.hook_resid_post", "layer": 20, "stated_l0": 71}),
    "gemma_scope_2": (
        _gemma_scope_2,
        {"model_name": "gemma-3-4b-it", "hook_name": "blocks.17.hook_resid_post", "hf_hook_name": "model.layers.17.output", "stated_l0": 60},
    ),
    "saelens_old": (_saev_final, {"model_name": "mistral-7b", "hook_name": "blocks.16.hook_resid_post", "layer": 16}),
    "llama_scope": (_llama_scope, {"model_name": "meta-llama/Llama-3.1-8B", "hook_name": "blocks.15.hook_resid_post", "layer": 15}),
    "qwen_scope": (_qwen_scope, {"model_name": "Qwen/Qwen3-1.7B-Base", "layer": 12}),
    "goodfire": (_goodfire, {"model_name": "meta-llama/Llama-3.1-8B-Instruct", "layer": 19}),
    "vit_prisma": (_prisma_topk, {"hook_name": "blocks.9.hook_resid_post", "layer": 9}),
}


@pytest.mark.parametrize("name", STATED)
def test_what_the_publisher_states_is_kept(name, tmp_path):
    write, said = STATED[name]
    made = write(tmp_path)
    metadata = load_sae(made.path, make_options(made.options)).metadata
    assert {key: metadata.get(key) for key in said} == said


# --- refusals ----------------------------------------------------------------------------------


def saelens_folder(folder: Path, shapes: dict | None = None, **config: Any) -> Path:
    tensors(folder / "sae_weights.safetensors", parts(**(shapes or {})))
    dump(folder / "cfg.json", {"architecture": "standard", "d_in": D, "d_sae": N, "metadata": {"sae_lens_version": "6.1.0"}} | config)
    return folder


def sparsify_folder(folder: Path, extra: dict | None = None, **config: Any) -> Path:
    w = parts()
    tensors(folder / "sae.safetensors", {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"], **(extra or {})})
    dump(folder / "cfg.json", {"d_in": D, "num_latents": N, "k": K} | config)
    return folder


def gemma_2_folder(folder: Path, extra: dict | None = None, **config: Any) -> Path:
    w = parts(threshold=(N,))
    tensors(folder / "params.safetensors", {**{name.replace("W_", "w_"): value for name, value in w.items()}, **(extra or {})})
    dump(folder / "config.json", {"architecture": "jump_relu"} | config)
    return folder


def scope_folder(folder: Path, extra: dict | None = None, **config: Any) -> Path:
    tensors(folder / "sae_weights.safetensors", upper(parts(), **(extra or {})))
    dump(folder / "config.json", scope_config(act_fn="relu") | config)
    return folder


def one_file(folder: Path, name: str, **changes: Any) -> Path:
    torch.save({**parts(), **changes}, folder / name)
    return folder / name


def prisma_folder(folder: Path, **config: Any) -> Path:
    tensors(folder / "weights.pt", parts())
    dump(folder / "config.json", prisma_config(**config))
    return folder


def gemma_1_folder(folder: Path, place: str) -> Path:
    (folder / place).mkdir(parents=True)
    np.savez(folder / place / "params.npz", **{name: value.numpy() for name, value in parts(threshold=(N,)).items()})
    return folder / place


TOPK_TENSORS = {"b_dec": torch.zeros(D), "threshold": torch.tensor(-1.0), "k": torch.tensor(K)}

REFUSALS: dict[str, tuple[Callable[[Path], Path], dict[str, Any], str]] = {
    "temporal": (lambda p: saelens_folder(p, architecture="temporal"), {}, "has architecture 'temporal', which is not opened: its features depend on earlier tokens"),
    "matching pursuit": (lambda p: saelens_folder(p, architecture="matching_pursuit"), {}, "it encodes by a search, not by one product"),
    "abstopk": (lambda p: saelens_folder(p, architecture="abstopk"), {}, "its features can be negative"),
    "transcoder": (lambda p: saelens_folder(p, architecture="jumprelu_skip_transcoder"), {}, "it maps one place in the model to another"),
    "unknown architecture": (lambda p: saelens_folder(p, architecture="new"), {}, "has architecture 'new'; expected one of standard, gated, jumprelu, topk, batchtopk"),
    "scale": (
        lambda p: saelens_folder(p, normalize_activations="expected_average_only_in"),
        {},
        "nothing says whether it is (scale=1 when it is); settle it with --sae-option scale=NUMBER",
    ),
    "SAE-V before the end": (
        lambda p: old_folder(p / "40960000", parts(), normalize_activations="expected_average_only_in"),
        {},
        "states normalize_activations 'expected_average_only_in', a factor √d_model / mean norm of the training activations",
    ),
    "whitening": (lambda p: saelens_folder(p, normalize_activations="covariance_whitening"), {}, "to be folded first: save its inference form with SAELens"),
    "unknown normalisation": (lambda p: saelens_folder(p, normalize_activations="rms"), {}, "states normalize_activations 'rms', an unknown normalisation"),
    "batchtopk without threshold": (
        lambda p: saelens_folder(p, architecture="batchtopk"),
        {},
        "is a BatchTopK checkpoint from before its threshold was known; settle it with --sae-option threshold=NUMBER",
    ),
    "topk without k": (lambda p: saelens_folder(p, architecture="topk"), {}, "does not say its k; settle it with --sae-option k=NUMBER"),
    "k beyond": (lambda p: saelens_folder(p, architecture="topk", k=N + 1), {}, f"activation 'topk' with k={N + 1}; expected 1 to {N}"),
    "missing tensor": (lambda p: saelens_folder(p, architecture="jumprelu"), {}, "lacks the tensor 'threshold' (layout saelens); it has W_dec, W_enc, b_dec, b_enc"),
    "other width": (lambda p: saelens_folder(p, d_in=D + 1), {}, f"states {D + 1} d_model, its encoder has {D}: the file belongs to another configuration"),
    "other features": (lambda p: saelens_folder(p, d_sae=N + 1), {}, f"states {N + 1} features, its encoder has {N}"),
    "turned decoder": (lambda p: saelens_folder(p, {"W_dec": (D, N)}), {}, f"has W_dec of shape ({D}, {N}); an encoder of {D} × {N} asks for ({N}, {D})"),
    "tanh-relu": (lambda p: old_folder(p, parts(), activation_fn_str="tanh-relu"), {}, "has the activation 'tanh-relu', which is not opened; expected relu or topk"),
    "factor without fine-tuning": (lambda p: old_folder(p, parts(scaling_factor=(N,))), {}, "has a tensor 'scaling_factor' that is not 1"),
    "sparsify transcoder": (lambda p: sparsify_folder(p, transcode=True), {}, "is a transcoder, which maps one place in the model to another; only autoencoders"),
    "sparsify skip": (lambda p: sparsify_folder(p, skip_connection=True), {}, "is one with a linear skip connection"),
    "sparsify skip tensor": (lambda p: sparsify_folder(p, {"W_skip": torch.zeros(D, D)}), {}, "and a skip connection; only topk is opened"),
    "sparsify groupmax": (lambda p: sparsify_folder(p, activation="groupmax"), {}, "has the activation 'groupmax'; only topk is opened"),
    "sparsify signed": (lambda p: sparsify_folder(p, signed=True), {}, "is one whose features can be negative"),
    "dictionary backup": (lambda p: one_file(p, "ae.pt", ae={"bias": torch.zeros(D)}), {}, "is a backup that dictionary_learning wrote in the middle of training"),
    "dictionary topk or batchtopk": (
        lambda p: (torch.save({**linear(parts(), "b_dec"), "k": torch.tensor(K), "threshold": torch.tensor(1.0)}, p / "ae.pt"), p / "ae.pt")[1],
        {},
        "no config.json beside it that says which; settle it with --sae-option activation=relu|topk|jumprelu",
    ),
    "dictionary batchtopk without threshold": (
        lambda p: (torch.save({**linear(parts(), "b_dec"), **TOPK_TENSORS}, p / "ae.pt"), p / "ae.pt")[1],
        {"activation": "batchtopk"},
        "is a BatchTopK dictionary from before its threshold was known (it is below 0); settle it with --sae-option threshold=NUMBER",
    ),
    "dictionary class": (
        lambda p: (torch.save({**linear(parts(), "b_dec")}, p / "ae.pt"), dump(p / "config.json", {"trainer": {"dict_class": "CrossCoder"}}), p)[2],
        {},
        "is a 'CrossCoder' of dictionary_learning; expected one of AutoEncoder, AutoEncoderNew",
    ),
    "gemma 1 transcoder": (lambda p: gemma_1_folder(p, "gemma-scope-2b-pt-transcoders/layer_3"), {}, "is a transcoder"),
    "gemma 1 embedding": (lambda p: gemma_1_folder(p, "embedding/width_4k/average_l0_6"), {}, "is on the token embeddings, which the image never passes"),
    "gemma 2 affine": (lambda p: gemma_2_folder(p, {"affine_skip_connection": torch.zeros(D, D)}), {}, "is a transcoder with an affine connection"),
    "gemma 2 transcoder": (
        lambda p: gemma_2_folder(p, hf_hook_point_in="model.layers.1.pre_feedforward_layernorm.output", hf_hook_point_out="model.layers.1.x.output"),
        {},
        "is a transcoder, which maps one place",
    ),
    "gemma 2 crosscoder": (lambda p: gemma_2_folder(p / "crosscoder" / "layer_9"), {}, "is a crosscoder"),
    "scope crosscoder": (lambda p: scope_folder(p, sae_type="crosscoder"), {}, "is a 'crosscoder', not an autoencoder of one place in the model"),
    "scope transcoder": (lambda p: scope_folder(p, hook_point_out="blocks.15.hook_mlp_out"), {}, "to 'blocks.15.hook_mlp_out', a transcoder"),
    "scope glu": (lambda p: scope_folder(p, use_glu_encoder=True), {}, "has a gated linear unit as its encoder"),
    "scope batch-wise": (lambda p: scope_folder(p, norm_activation="batch-wise"), {}, "normalises 'batch-wise', which depends on the batch"),
    "scope without its norm": (lambda p: scope_folder(p), {}, "do not hold the mean norm of the training activations; settle it with --sae-option scale=NUMBER"),
    "scope batchtopk": (lambda p: scope_folder(p, act_fn="batchtopk", norm_activation="inference"), {}, "settle it with --sae-option threshold=NUMBER"),
    "qwen without its repository": (lambda p: one_file(p, "layer3.sae.pt", W_enc=torch.ones(N, D), W_dec=torch.ones(D, N)), {}, "settle it with --sae-option k=NUMBER"),
    "openai identity": (
        lambda p: (torch.save({"encoder.weight": parts()["W_enc"].T, "latent_bias": torch.zeros(N), "decoder.weight": parts()["W_dec"].T, "pre_bias": torch.zeros(D),
                               "activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "Identity"}}, p / "8.pt"), p / "8.pt")[1],
        {},
        "has the activation 'TopK' (Identity after it); expected ReLU, or TopK with ReLU after it",
    ),
    "mmdiff topk": (lambda p: one_file(p, "text-only_layer_3.pt"), {}, "does not hold the k of its topk (MMDiff's README states 50); settle it with --sae-option k=NUMBER"),
    "prisma transcoder": (lambda p: prisma_folder(p, is_transcoder=True), {}, "is a transcoder"),
    "prisma tanh": (lambda p: prisma_folder(p, activation_fn_str="tanh-relu"), {}, "has architecture 'standard' with activation 'tanh-relu'; expected standard with relu"),
    "prisma topk without k": (lambda p: prisma_folder(p, activation_fn_str="topk"), {}, "does not say its k; settle it with --sae-option k=NUMBER"),
    "overcomplete silent": (lambda p: overcomplete(p, nearly_unit())[1], {}, "does not hold its activation (overcomplete keeps that in Python); settle it with"),
    "overcomplete batchtopk": (lambda p: overcomplete(p, nearly_unit())[1], {"activation": "batchtopk"}, "settle it with --sae-option threshold=NUMBER"),
    "overcomplete norms": (lambda p: overcomplete(p, parts()["W_dec"])[1], {"activation": "relu"}, "settle it with --sae-option dictionary=l2|as_is"),
    "overcomplete mlp": (
        lambda p: overcomplete(p, nearly_unit(), **{"encoder.final_block.1.weight": torch.ones(N)})[1],
        {"activation": "relu"},
        "has more than overcomplete's linear encoder ('encoder.final_block.1.weight'); only that one is opened",
    ),
    "saev schema": (lambda p: saev_file(p / "sae.pt", {"schema": 9, "cfg": {}}, parts()), {}, "has schema 9 of saev; schemas up to 5 are known"),
    "saev schema 1": (
        lambda p: saev_file(p / "sae.pt", {"schema": 1, "cls": "Relu", "cfg": {"d_vit": D, "exp_factor": 4}}, parts()),
        {},
        "has schema 1 of saev, of which some versions subtract b_dec and some do not; settle it with --sae-option subtract_b_dec=true|false",
    ),
    "saev batchtopk": (
        lambda p: saev_file(p / "sae.pt", {"schema": 2, "cfg": {"d_vit": D, "activation": {"cls": "BatchTopK", "params": {"top_k": 3}}}}, parts()),
        {},
        "is a BatchTopK without its threshold (an older saev); settle it with --sae-option threshold=NUMBER",
    ),
    "unknown names": (
        lambda p: one_file(p, "model.pt"),
        {},
        "is in no layout known here: model.pt holds W_dec, W_enc, b_dec, b_enc; where you know what it is, --sae-option layout=plain",
    ),
    "unknown tensors": (lambda p: (torch.save({"a": torch.zeros(1)}, p / "x.pt"), p)[1], {}, "is in no layout known here: x.pt holds a; --sae-option layout=NAME"),
    "unknown layout": (lambda p: one_file(p, "model.pt"), {"layout": "plane"}, "no SAE layout 'plane'; did you mean 'plain'? There is saelens,"),
    "plain without activation": (lambda p: one_file(p, "m.pt"), {"layout": "plain", "subtract_b_dec": True}, "does not say its activation; settle it with --sae-option activation="),
    "plain square": (
        lambda p: one_file(p, "m.pt", W_enc=torch.ones(D, D), W_dec=torch.ones(D, D), b_enc=torch.ones(D)),
        {"layout": "plain", "activation": "relu", "subtract_b_dec": True},
        f"has a square W_enc ({D} × {D}): settle it with --sae-option orientation=features_last|features_first",
    ),
    "not finite": (
        lambda p: one_file(p, "text-only_layer_3.pt", b_enc=torch.full((N,), torch.nan)),
        {"k": K},
        "has values that are not finite in 'b_enc': the file is damaged, or training failed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_a_doubt_is_refused_in_one_line(name, tmp_path):
    write, options, words = REFUSALS[name]
    path = write(tmp_path)
    with pytest.raises(SAEError) as error:
        opened(path, **options)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("orientation", ["features_last", "features_first"])
def test_a_square_matrix_opens_as_it_is_said_to_lie(orientation, tmp_path):
    w = {"W_enc": torch.randn(D, D, generator=rng()), "W_dec": torch.randn(D, D, generator=rng(2)), "b_enc": torch.zeros(D), "b_dec": torch.zeros(D)}
    torch.save(w, tmp_path / "m.pt")
    sae = opened(tmp_path, layout="plain", activation="relu", subtract_b_dec=False, orientation=orientation)
    turn = (lambda matrix: matrix) if orientation == "features_last" else (lambda matrix: matrix.T)
    assert torch.equal(sae.W_enc, turn(w["W_enc"])) and torch.equal(sae.W_dec, turn(w["W_dec"]))


def test_free_decoder_norms_can_be_kept(tmp_path):
    w = parts()
    torch.save({**linear(w, "bias"), "bias": w["b_dec"]}, tmp_path / "ae.pt")
    kept, unit = opened(tmp_path, unit_decoder=False), opened(tmp_path)
    assert torch.equal(kept.W_dec, w["W_dec"])
    torch.testing.assert_close(unit.W_dec.norm(dim=1), torch.ones(N))
    for sae in (kept, unit):
        _, wanted = run(w, relu, subtract=True)
        np.testing.assert_allclose(sae.decode(sae.encode(states()), states()).numpy(), wanted, atol=1e-5)
