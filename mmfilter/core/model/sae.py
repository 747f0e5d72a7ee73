"""Sparse autoencoders: encode residual states to sparse codes, decode them, save and load.

The maths, for a state x of width d_model and n features (orientation as in SAELens):

    h    = (norm(x) - [b_dec]) @ W_enc + b_enc        b_dec only if `subtract_b_dec`
    f    = relu(h)                                    relu
    f    = relu(h) where h > threshold, else 0        jumprelu (also what BatchTopK is saved as)
    f    = relu(h) where h is among the k largest     topk
    x̂    = unnorm(f @ W_dec + b_dec)

Sources: Gao et al. 2024 (arXiv 2406.04093, topk), Rajamanoharan et al. 2024 (arXiv 2407.14435,
jumprelu), Bussmann et al. 2024 (arXiv 2412.06410, batchtopk). Encoding is sparse end to end: the dense
(tokens × features) array exists for one chunk of tokens only.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mmfilter.core.model.codes import TokenCodes
from mmfilter.errors import SAEError

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
DENSE_CHUNK_ELEMENTS = 8_000_000
"""Most elements of the dense pre-activation array that exist at once (32 MB in float32)."""

Activation = Literal["relu", "jumprelu", "topk"]
Normalisation = Literal["none", "layer_norm", "constant_norm_rescale"]


@dataclass(frozen=True)
class SAE:
    """One trained sparse autoencoder on one residual stream."""

    W_enc: torch.Tensor
    """(d_model, n_features)"""
    b_enc: torch.Tensor
    """(n_features,)"""
    W_dec: torch.Tensor
    """(n_features, d_model)"""
    b_dec: torch.Tensor
    """(d_model,)"""
    activation: Activation = "relu"
    threshold: torch.Tensor | None = None
    """(n_features,), jumprelu only"""
    k: int | None = None
    """topk only"""
    subtract_b_dec: bool = True
    normalisation: Normalisation = "none"
    metadata: dict[str, Any] = field(default_factory=dict)
    """What the publisher says of it: model, hook point, versions."""

    def __post_init__(self) -> None:
        d, n = self.W_enc.shape
        wanted = {"b_enc": (n,), "W_dec": (n, d), "b_dec": (d,)}
        if self.activation == "jumprelu":
            wanted["threshold"] = (n,)
        for name, shape in wanted.items():
            tensor = getattr(self, name)
            if tensor is None or tuple(tensor.shape) != shape:
                found = "nothing" if tensor is None else str(tuple(tensor.shape))
                raise SAEError(f"SAE tensor {name!r} has shape {found}; W_enc {(d, n)} asks for {shape}")
        if self.activation == "topk" and not (self.k and 0 < self.k <= n):
            raise SAEError(f"SAE has activation 'topk' with k={self.k!r}; expected 1 to {n}")

    @property
    def d_model(self) -> int:
        return self.W_enc.shape[0]

    @property
    def n_features(self) -> int:
        return self.W_enc.shape[1]

    @property
    def hash(self) -> str:
        """Digest of everything that changes a code, for manifests."""
        digest = hashlib.sha256(f"{self.activation} {self.k} {self.subtract_b_dec} {self.normalisation}".encode())
        for tensor in (self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.threshold):
            if tensor is not None:
                digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> SAE:
        """The same SAE on another device."""
        moved = {
            name: None if tensor is None else tensor.to(device=device, dtype=dtype or tensor.dtype)
            for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
            for tensor in [getattr(self, name)]
        }
        return SAE(**moved, activation=self.activation, k=self.k, subtract_b_dec=self.subtract_b_dec,
                   normalisation=self.normalisation, metadata=self.metadata)  # fmt: skip

    def encode(self, states: torch.Tensor, *, max_active: int = 50) -> TokenCodes:
        """Positive features of each state, at most the `max_active` strongest (SAE-V keeps 50).

        `states` is (tokens, d_model) in any float type; ties at the cut go to the lower feature id.
        Raises `SAEError` when the width differs.
        """
        if states.shape[-1] != self.d_model:
            raise SAEError(f"SAE takes states of width {self.d_model}, the model gives {states.shape[-1]}: it belongs to another model")
        chunk = max(1, DENSE_CHUNK_ELEMENTS // self.n_features)
        parts = [self._encode_chunk(part, max_active) for part in states.split(chunk)]
        return TokenCodes.concatenate(parts, self.n_features)

    def _encode_chunk(self, states: torch.Tensor, max_active: int) -> TokenCodes:
        pre = self.preactivations(states)
        if self.activation == "topk":
            return TokenCodes.strongest(pre, min(self.k or max_active, max_active))
        if self.activation == "jumprelu":
            active = pre > self.threshold.clamp(min=0)
        else:
            active = pre > 0
        return TokenCodes.active(pre, active, max_active)

    def preactivations(self, states: torch.Tensor) -> torch.Tensor:
        """h of every feature, dense (tokens, n_features)."""
        x, _ = self._normalise(states.to(self.W_enc.dtype))
        bias = self.b_enc - self.b_dec @ self.W_enc if self.subtract_b_dec else self.b_enc
        return torch.addmm(bias, x, self.W_enc)

    def decode(self, codes: TokenCodes, states: torch.Tensor) -> torch.Tensor:
        """Reconstructed states, (tokens, d_model); `states` are needed to undo a per-token scaling."""
        _, undo = self._normalise(states.to(self.W_dec.dtype))
        out = self.b_dec.expand(len(states), -1).clone()
        rows = self.W_dec[codes.feature] * codes.value.to(self.W_dec.dtype)[:, None]
        return undo(out.index_add_(0, codes.token, rows))

    def _normalise(self, x: torch.Tensor):
        if self.normalisation == "layer_norm":
            mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True) + 1e-5
            return (x - mean) / std, lambda y: y * std + mean
        if self.normalisation == "constant_norm_rescale":
            scale = self.d_model**0.5 / x.norm(dim=-1, keepdim=True)
            return x * scale, lambda y: y / scale
        return x, lambda y: y

    def save(self, folder: Path) -> None:
        """Write the SAELens 6 layout: `cfg.json` and `sae_weights.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        if self.threshold is not None:
            tensors["threshold"] = self.threshold
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
        config = {
            "architecture": "standard" if self.activation == "relu" else self.activation,
            "d_in": self.d_model,
            "d_sae": self.n_features,
            "dtype": str(self.W_enc.dtype).removeprefix("torch."),
            "device": "cpu",
            "apply_b_dec_to_input": self.subtract_b_dec,
            "normalize_activations": self.normalisation,
            "reshape_activations": "none",
            "metadata": self.metadata,
        }
        if self.activation == "topk":
            config |= {"k": self.k, "rescale_acts_by_decoder_norm": False}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_sae(folder: Path) -> SAE:
    """Open an SAE in the SAELens 6 layout; raises `SAEError` where the layout leaves a doubt."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise SAEError(f"SAE {str(folder)!r} has no {name}: a folder in the SAELens 6 layout holds {CONFIG} and {WEIGHTS}")
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (ValueError, SafetensorError) as error:
        raise SAEError(f"SAE {str(folder)!r} is damaged: {error}") from error
    activation = _activation(folder, config)
    missing = {"W_enc", "b_enc", "W_dec", "b_dec", *(["threshold"] if activation == "jumprelu" else [])} - set(tensors)
    if missing:
        raise SAEError(f"SAE {str(folder)!r} lacks the tensor {sorted(missing)[0]!r}; it has {', '.join(sorted(tensors))}")
    floats = {name: tensor.float() for name, tensor in tensors.items()}
    return SAE(
        floats["W_enc"],
        floats["b_enc"],
        floats["W_dec"],
        floats["b_dec"],
        activation=activation,
        threshold=floats.get("threshold") if activation == "jumprelu" else None,
        k=config.get("k"),
        subtract_b_dec=bool(config.get("apply_b_dec_to_input", True)),
        normalisation=_normalisation(folder, config),
        metadata=config.get("metadata") or {},
    )


def _activation(folder: Path, config: dict[str, Any]) -> Activation:
    architecture = config.get("architecture")
    if architecture == "topk" and config.get("rescale_acts_by_decoder_norm"):
        raise SAEError(f"SAE {str(folder)!r} rescales by decoder norms while training; save its inference form with SAELens first")
    known: dict[Any, Activation] = {"standard": "relu", "jumprelu": "jumprelu", "topk": "topk"}
    if architecture not in known:
        raise SAEError(f"SAE {str(folder)!r} has architecture {architecture!r}; expected one of {', '.join(known)}")
    return known[architecture]


def _normalisation(folder: Path, config: dict[str, Any]) -> Normalisation:
    stated = config.get("normalize_activations") or "none"
    if stated not in ("none", "layer_norm", "constant_norm_rescale"):
        raise SAEError(f"SAE {str(folder)!r} states normalize_activations {stated!r}, a factor that must be folded into its weights first")
    return stated
