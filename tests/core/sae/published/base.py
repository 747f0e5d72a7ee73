"""What a case is, and the formulas that cases share."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from mmfilter.core.sae.layouts import NAMED

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
            CASES.append(
                Case(
                    layout,
                    NAMED[layout].publisher,
                    f"peer: {peer} {_version(peer)}" if peer else "formula",
                    name,
                    write,
                )
            )
        return write

    return register


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
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


def run(
    w: dict[str, torch.Tensor],
    activation: Callable[[np.ndarray], np.ndarray],
    *,
    subtract: bool,
    x: np.ndarray | None = None,
):
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


def randomise(module: torch.nn.Module) -> None:
    """Random parameters; thresholds positive."""
    g = rng()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=g).abs()
                if "threshold" in name
                else torch.randn(parameter.shape, generator=g)
            )
