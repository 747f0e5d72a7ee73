"""Sparse autoencoders: encode residual states to sparse codes, decode them, save them.

The maths, for a state x of width d_model and n features (orientation as in SAELens):

    h    = (norm(x) - [b_dec]) @ W_enc + b_enc        b_dec only if `subtract_b_dec`
    f    = relu(h)                                    relu
    f    = relu(h) where h > threshold, else 0        jumprelu
    f    = relu(h) where h is among the k largest     topk
    x̂    = unnorm(f @ W_dec + b_dec)

Three activations cover what is published, because the others fold into them (`core/sae/layouts`):
BatchTopK is kept as jumprelu with its frozen threshold, and a gated SAE *is* a jumprelu one. Sources:
Gao et al. 2024 (arXiv 2406.04093, topk), Rajamanoharan et al. 2024 (arXiv 2407.14435, jumprelu; arXiv
2404.16014, gated), Bussmann et al. 2024 (arXiv 2412.06410, batchtopk).

Encoding is sparse end to end: the dense (tokens × features) array exists for one chunk of tokens only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from mmfilter.core.files import atomic
from mmfilter.core.sae.product import linear_of_any_length
from mmfilter.core.sae.token_codes import TokenCodes
from mmfilter.errors import SAEError

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
SAE_LENS_VERSION = "6.54.12"
"""Version of the layout that `save` writes; SAELens reads folders without one as its old layout."""
DENSE_CHUNK_ELEMENTS = 1 << 22
"""Most elements of the dense pre-activation array that exist at once (16 MB in float32): memory of that size is used
again, not mapped anew."""

Activation = Literal["relu", "jumprelu", "topk"]
Normalisation = Literal["none", "layer_norm", "constant_norm_rescale"]
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


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
    """What the publisher says of it (model, hook point, stated L0, …), and how it was opened"""

    def __post_init__(self) -> None:
        d, n = self.W_enc.shape
        shapes: dict[str, tuple[int, ...]] = {"b_enc": (n,), "W_dec": (n, d), "b_dec": (d,)}
        if self.activation == "jumprelu":
            shapes["threshold"] = (n,)
        for name, shape in shapes.items():
            given = tuple(self.tensors[name].shape) if name in self.tensors else "nothing"
            if given != shape:
                raise SAEError(f"SAE tensor {name!r} has shape {given}; W_enc {(d, n)} asks for {shape}")
        if self.activation == "topk" and not (self.k and 0 < self.k <= n):
            raise SAEError(f"SAE has activation 'topk' with k={self.k!r}; expected 1 to {n}")

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What it has of `TENSORS`, by name."""
        tensors = zip(TENSORS, (self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.threshold), strict=True)
        return {name: tensor for name, tensor in tensors if tensor is not None}

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
        for tensor in self.tensors.values():
            digest.update(tensor.detach().cpu().float().contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> SAE:
        """The same SAE on another device."""
        moved: dict[str, Any] = {
            name: tensor.to(device=device, dtype=dtype or tensor.dtype) for name, tensor in self.tensors.items()
        }
        return replace(self, **moved)

    def encode(self, states: torch.Tensor, *, max_active: int = 50) -> TokenCodes:
        """Positive features of each state, at most the `max_active` strongest (SAE-V keeps 50).

        `states` is (tokens, d_model) in any float type; ties at the cut go to the lower feature id.
        Raises `SAEError` when the width differs.
        """
        if states.shape[-1] != self.d_model:
            raise SAEError(
                f"SAE takes states of width {self.d_model}, the model gives {states.shape[-1]}: it belongs to another "
                "model"
            )
        return TokenCodes.concatenate(
            [self._encode_chunk(part, max_active) for part in states.split(self._chunk)], self.n_features
        )

    @property
    def _chunk(self) -> int:
        """States that are encoded at one time."""
        return max(1, DENSE_CHUNK_ELEMENTS // self.n_features)

    def _encode_chunk(self, states: torch.Tensor, max_active: int) -> TokenCodes:
        pre = self.preactivations(states)
        if self.activation == "jumprelu" and self.threshold is not None:
            return TokenCodes.above(pre, self.threshold, max_active)
        return TokenCodes.strongest(pre, min(self.k or max_active, max_active))

    def preactivations(self, states: torch.Tensor) -> torch.Tensor:
        """h of every feature, dense (tokens, n_features)."""
        x = self.normalised(states)
        if self.subtract_b_dec:
            x = x - self.b_dec
        return linear_of_any_length(x, self.W_enc.t(), self.b_enc, self._chunk)

    def normalised(self, states: torch.Tensor) -> torch.Tensor:
        """The states as `normalisation` leaves them, before any centring."""
        return self._normalise(states.to(self.W_enc.dtype))[0]

    def decode(self, codes: TokenCodes, states: torch.Tensor) -> torch.Tensor:
        """Reconstructed states, (tokens, d_model); `states` are needed to undo a per-token scaling."""
        _, undo = self._normalise(states.to(self.W_dec.dtype))
        starts = torch.searchsorted(codes.token, torch.arange(len(states), device=codes.token.device))
        sums = torch.nn.functional.embedding_bag(
            codes.feature, self.W_dec, starts, mode="sum", per_sample_weights=codes.value.to(self.W_dec.dtype)
        )
        return undo(sums + self.b_dec)

    def _normalise(self, x: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """(normalised x, the function that undoes it), as SAELens does it: the 1e-5 is not undone."""
        if self.normalisation == "layer_norm":
            mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
            return (x - mean) / (std + 1e-5), lambda y: y * std + mean
        if self.normalisation == "constant_norm_rescale":
            scale = self.d_model**0.5 / x.norm(dim=-1, keepdim=True)
            return x * scale, lambda y: y / scale
        return x, lambda y: y

    def save(self, folder: Path) -> None:
        """Write the SAELens 6 layout: `cfg.json` and `sae_weights.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(folder / WEIGHTS) as temporary:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}, temporary)
        config: dict[str, Any] = {
            "architecture": "standard" if self.activation == "relu" else self.activation,
            "d_in": self.d_model,
            "d_sae": self.n_features,
            "dtype": str(self.W_enc.dtype).removeprefix("torch."),
            "device": "cpu",
            "apply_b_dec_to_input": self.subtract_b_dec,
            "normalize_activations": self.normalisation,
            "reshape_activations": "none",
            "metadata": {**self.metadata, "sae_lens_version": SAE_LENS_VERSION},
        }
        if self.activation == "topk":
            config |= {"k": self.k, "rescale_acts_by_decoder_norm": False}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
