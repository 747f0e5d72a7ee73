"""Gemma Scope, Llama Scope and single files, by their formulas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
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
    jumprelu,
    layer_norm,
    parts,
    relu,
    rng,
    run,
    states,
    tensors,
    topk,
)

# --- Gemma Scope -------------------------------------------------------------------------------


@case("gemma_scope", "params.npz")
def gemma_scope(folder: Path) -> Published:
    w = parts(threshold=(N,))
    w["threshold"] = w["threshold"].abs()
    path = folder / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    path.mkdir(parents=True)
    np.savez(path / "params.npz", **{name: value.numpy() for name, value in w.items()})
    return Published(path, *run(w, lambda h: jumprelu(h, f64(w["threshold"])), subtract=False))


@case("gemma_scope_2", "params.safetensors")
def gemma_scope_2(folder: Path) -> Published:
    w = parts(threshold=(N,))
    w["threshold"] = w["threshold"].abs()
    path = folder / "resid_post" / "layer_17_width_16k_l0_medium"
    tensors(path / "params.safetensors", {name.replace("W_", "w_"): value for name, value in w.items()})
    dump(
        path / "config.json",
        {
            "hf_hook_point_in": "model.layers.17.output",
            "hf_hook_point_out": "model.layers.17.output",
            "width": N,
            "model_name": "gemma-3-4b-it",
            "architecture": "jump_relu",
            "l0": 60,
            "affine_connection": False,
            "type": "sae",
        },
    )
    return Published(path, *run(w, lambda h: jumprelu(h, f64(w["threshold"])), subtract=False))


# --- Llama Scope -------------------------------------------------------------------------------


def linear(w: dict[str, torch.Tensor], b_dec: str = "decoder.bias") -> dict[str, torch.Tensor]:
    """nn.Linear's names and orientation."""
    return {
        "encoder.weight": w["W_enc"].T,
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T,
        b_dec: w["b_dec"],
    }


@case("llama_scope", "dataset-wise, jumprelu on the decoder norm")
def llama_scope(folder: Path) -> Published:
    """As OpenMOSS' loader of October 2024: biases / s, then unit decoder rows, then the threshold."""
    w, theta = parts(), 0.8
    path = folder / "Llama3_1-8B-Base-L15R-8x"
    tensors(path / "checkpoints" / "final.safetensors", linear(w))
    dump(
        path / "hyperparams.json",
        {
            "d_model": D,
            "d_sae": N,
            "expansion_factor": 4,
            "hook_point_in": "blocks.15.hook_resid_post",
            "hook_point_out": "blocks.15.hook_resid_post",
            "act_fn": "jumprelu",
            "jump_relu_threshold": theta,
            "top_k": 50,
            "norm_activation": "dataset-wise",
            "dataset_average_activation_norm": {"in": D**0.5 / S, "out": D**0.5 / S},
            "sparsity_include_decoder_norm": True,
            "use_decoder_bias": True,
            "apply_decoder_bias_to_pre_encoder": False,
            "use_glu_encoder": False,
        },
    )
    norms = np.linalg.norm(f64(w["W_dec"]), axis=1)
    h = (f64(states()) @ f64(w["W_enc"]) + f64(w["b_enc"]) / S) * norms
    codes = jumprelu(h, theta)
    return Published(path, codes, codes @ (f64(w["W_dec"]) / norms[:, None]) + f64(w["b_dec"]) / S)


def scope_config(**more: Any) -> dict[str, Any]:
    return {
        "sae_type": "sae",
        "d_model": D,
        "expansion_factor": N / D,
        "hook_point_in": "blocks.15.hook_resid_post",
        "hook_point_out": "blocks.15.hook_resid_post",
        "use_glu_encoder": False,
        "use_decoder_bias": True,
        "top_k": K,
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
    } | more


def scope(
    w: dict[str, torch.Tensor], activation: Callable, *, x: np.ndarray, include: bool = True
) -> tuple[np.ndarray, np.ndarray]:
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
    tensors(
        folder / "sae_weights.safetensors",
        upper(w, **{"activation_function.log_jumprelu_threshold": log_theta}, **AVERAGE),
    )
    dump(folder / "config.json", scope_config(act_fn="jumprelu"))
    codes, out = scope(w, lambda h: jumprelu(h, np.exp(f64(log_theta))), x=f64(states()) * S)
    return Published(folder, codes, out / S)


@case("llamascopium", "relu, folded for inference, threshold on h")
def _llamascopium_relu(folder: Path) -> Published:
    w = parts()
    tensors(folder / "sae_weights.safetensors", upper(w, **AVERAGE))
    dump(
        folder / "config.json",
        scope_config(act_fn="relu", norm_activation="inference", sparsity_include_decoder_norm=False),
    )
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
def qwen_scope(folder: Path) -> Published:
    w = parts()
    path = folder / f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}" / "layer12.sae.pt"
    tensors(path, w | {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"].T})
    return Published(path, *run(w, lambda h: topk(h, K), subtract=False))


@case("openai", "TopK: layer norm and its undoing")
def _openai_topk(folder: Path) -> Published:
    w = parts()
    content = {
        "encoder.weight": w["W_enc"].T,
        "latent_bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T,
        "pre_bias": w["b_dec"],
        "stats_last_nonzero": torch.zeros(N, dtype=torch.long),
        "activation": "TopK",
        "activation_state_dict": {"k": K, "postact_fn": "ReLU"},
    }
    torch.save(content, folder / "8.pt")
    x, mean, std = layer_norm(f64(states()))
    codes, out = run(w, lambda h: topk(h, K), subtract=True, x=x)
    return Published(folder / "8.pt", codes, out * std + mean)


@case("openai", "ReLU: no norm")
def _openai_relu(folder: Path) -> Published:
    w = parts()
    torch.save(
        {
            "encoder.weight": w["W_enc"].T,
            "latent_bias": w["b_enc"],
            "decoder.weight": w["W_dec"].T,
            "pre_bias": w["b_dec"],
            "activation": "ReLU",
        },
        folder / "8.pt",
    )
    return Published(folder / "8.pt", *run(w, relu, subtract=True))


@case("goodfire", "one file")
def goodfire(folder: Path) -> Published:
    w = parts()
    path = folder / "Llama-3.1-8B-Instruct-SAE-l19.pth"
    tensors(path, {name.replace("coder.", "coder_linear."): value for name, value in linear(w).items()})
    return Published(path, *run(w, relu, subtract=False))


@case("mmdiff", "JumpReLU on PaliGemma 2")
def _mmdiff(folder: Path) -> Published:
    w = parts(threshold=(N,))
    w["threshold"] = w["threshold"].abs()
    tensors(folder / "text-only_layer_13.pt", w)
    return Published(
        folder / "text-only_layer_13.pt", *run(w, lambda h: jumprelu(h, f64(w["threshold"])), subtract=False)
    )


@case("mmdiff", "TopK on LLaVA-MORE, k said, bfloat16")
def _mmdiff_topk(folder: Path) -> Published:
    w = {name: value.bfloat16() for name, value in parts().items()}
    tensors(folder / "text-only_layer_16.pt", w)
    return Published(folder / "text-only_layer_16.pt", *run(w, lambda h: topk(h, K), subtract=False), {"k": K})


@case("plain", "everything said")
def _plain(folder: Path) -> Published:
    w = parts()
    tensors(folder / "sae.safetensors", w | {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"].T})
    options = {
        "layout": "plain",
        "activation": "topk",
        "k": K,
        "subtract_b_dec": "true",
        "scale": S,
        "normalisation": "none",
    }
    codes, out = run(w, lambda h: topk(h, K), subtract=True, x=f64(states()) * S)
    return Published(folder, codes, out / S, options)
