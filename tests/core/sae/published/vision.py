"""ViT-Prisma, overcomplete and saev, by their formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.core.sae.published.base import (
    D,
    K,
    N,
    Published,
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


def prisma_config(**more: Any) -> dict[str, Any]:
    return {
        "architecture": "standard",
        "activation_fn_str": "relu",
        "activation_fn_kwargs": {},
        "normalize_activations": "none",
        "d_in": D,
        "expansion_factor": N // D,
        "hook_point_layer": 9,
        "layer_subtype": "hook_resid_post",
        "model_name": "open-clip:laion/CLIP-ViT-B-32",
        "is_transcoder": False,
    } | more


@case("vit_prisma", "topk with layer norm")
def prisma_topk(folder: Path) -> Published:
    w = parts()
    tensors(folder / "weights.pt", w)
    dump(
        folder / "config.json",
        prisma_config(activation_fn_str="topk", activation_fn_kwargs={"k": K}, normalize_activations="layer_norm"),
    )
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
    content = {
        "encoder.final_block.0.weight": w["W_enc"].T,
        "encoder.final_block.0.bias": w["b_enc"],
        "dictionary._weights": rows,
        "dictionary.multiplier": torch.tensor(0.4),
        **more,
    }
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
    cfg = {
        "d_model": D,
        "d_sae": N,
        "activation": {"cls": "BatchTopK", "params": {"top_k": K, "momentum": 0.1}},
        "normalize_w_dec": True,
    }
    path = saev_file(
        folder / "sae.pt",
        {"schema": 5, "cfg": cfg, "commit": "0", "lib": "1"},
        w | {"activation.threshold": torch.tensor(theta)},
    )
    return Published(path, *run(w, lambda h: jumprelu(h, theta), subtract=False))


@case("saev", "schema 2, TopK")
def _saev_2(folder: Path) -> Published:
    w = parts()
    cfg = {"d_vit": D, "exp_factor": N // D, "activation": {"cls": "TopK", "params": {"top_k": K}}}
    return Published(
        saev_file(folder / "sae.pt", {"schema": 2, "cfg": cfg}, w), *run(w, lambda h: topk(h, K), subtract=False)
    )


@case("saev", "before schemas: ReLU, b_dec subtracted")
def _saev_none(folder: Path) -> Published:
    w = parts()
    header = {"d_vit": D, "exp_factor": N // D, "sparsity_coeff": 4e-4, "seed": 42}
    return Published(saev_file(folder / "sae.pt", header, w), *run(w, relu, subtract=True))


@case("saev", "schema 1, the choice said")
def _saev_1(folder: Path) -> Published:
    w = parts()
    header = {"schema": 1, "cls": "TopK", "cfg": {"d_vit": D, "exp_factor": N // D, "top_k": K}}
    return Published(
        saev_file(folder / "sae.pt", header, w), *run(w, lambda h: topk(h, K), subtract=True), {"subtract_b_dec": True}
    )
