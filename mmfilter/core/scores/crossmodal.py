"""How far each SAE feature means the same in image and text: cross-modal weights and rarity.

For feature j, over a reference sample of pairs, take its 30 strongest tokens. If at least 5 of them are
text tokens and 5 image tokens, its weight ω_j is the mean of the 25 cosines between the residual states
of the 5 strongest text and the 5 strongest image tokens; otherwise it has no weight (SAE-V, Lou et al.,
ICML 2025, arXiv 2502.17514, Algorithm 1).

The mean of all cosines between two sets of vectors is the dot product of the means of the unit vectors,
so two sums of d_model numbers a feature are enough, and no state is kept. That takes two passes over the
reference sample: `Reference.observe` finds the strongest tokens, `Reference.add_states` sums their states.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mmfilter.core.files import atomic
from mmfilter.core.sae.token_codes import TokenCodes
from mmfilter.core.sides import IMAGE, TEXT
from mmfilter.errors import SAEError

STRONGEST = 30
PER_SIDE = 5
BUFFER_ENTRIES = 4_000_000
"""Entries kept before the buffer is cut back to the strongest tokens (about 100 MB)."""


@dataclass(frozen=True)
class FeatureWeights:
    """What a reference sample says of each feature; all tensors are (n_features,)."""

    omega: torch.Tensor
    """Cross-modal weight, NaN where the feature has none"""
    image_samples: torch.Tensor
    """Reference samples in which the feature fires on the image side"""
    text_samples: torch.Tensor
    """… on the text side"""
    samples: torch.Tensor
    """… on either side"""
    image_tokens: torch.Tensor
    """Image tokens on which the feature fires"""
    text_tokens: torch.Tensor
    """Text tokens on which the feature fires"""
    image_maximum: torch.Tensor
    """Strongest activation on an image token"""
    text_maximum: torch.Tensor
    """Strongest activation on a text token"""
    n_samples: int
    metadata: dict[str, Any]
    """Where the reference sample came from"""

    @property
    def idf(self) -> torch.Tensor:
        """Rarity of each feature: ln((1 + N) / (1 + samples in which it fires on either side))."""
        return torch.log((1 + self.n_samples) / (1 + self.samples.float()))

    @property
    def n_weighted(self) -> int:
        """How many features have a cross-modal weight."""
        return int((~self.omega.isnan()).sum())

    @property
    def hash(self) -> str:
        digest = hashlib.sha256(self.omega.numpy().tobytes())
        digest.update(self.samples.numpy().tobytes() + str(self.n_samples).encode())
        return digest.hexdigest()[:16]

    def to(self, device: torch.device | str) -> FeatureWeights:
        moved = {name: getattr(self, name).to(device) for name in TENSORS}
        return FeatureWeights(**moved, n_samples=self.n_samples, metadata=self.metadata)

    def save(self, path: Path) -> None:
        metadata = {"n_samples": str(self.n_samples), "reference": json.dumps(self.metadata)}
        with atomic(path) as temporary:
            save_file({name: getattr(self, name).contiguous() for name in TENSORS}, temporary, metadata)


TENSORS = (
    "omega",
    "image_samples",
    "text_samples",
    "samples",
    "image_tokens",
    "text_tokens",
    "image_maximum",
    "text_maximum",
)


def load_weights(path: Path) -> FeatureWeights:
    """Read what `FeatureWeights.save` wrote."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in TENSORS}
        return FeatureWeights(
            **tensors, n_samples=int(metadata["n_samples"]), metadata=json.loads(metadata["reference"])
        )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise SAEError(
            f"feature weights {str(path)!r} cannot be read ({error}); delete the file to fit them again"
        ) from error


class Reference:
    """Accumulates the reference sample, in two passes over the same tokens.

    A token is named by a number that does not depend on batching (`token_id`): sample · 2^24 + position.
    """

    def __init__(self, n_features: int, d_model: int) -> None:
        self._n, self._d = n_features, d_model
        self._samples = torch.zeros(3, n_features, dtype=torch.int64)
        self._tokens = torch.zeros(2, n_features, dtype=torch.int64)
        self._maximum = torch.zeros(2, n_features)
        self._feature: list[torch.Tensor] = []
        self._value: list[torch.Tensor] = []
        self._token: list[torch.Tensor] = []
        self._side: list[torch.Tensor] = []
        self._buffered = 0
        self._winners: _Winners | None = None
        self.n_samples = 0

    def observe(
        self, codes: TokenCodes, token_id: torch.Tensor, sample: torch.Tensor, side: torch.Tensor, n_samples: int
    ) -> None:
        """First pass. `token_id`, `sample` (0 … n_samples − 1) and `side` are (n_tokens,)."""
        side_of, feature = side[codes.token].cpu(), codes.feature.cpu()
        value, sample_of = codes.value.float().cpu(), sample[codes.token].cpu()
        fired = torch.zeros(2, n_samples, self._n, dtype=torch.bool)
        fired[side_of, sample_of, feature] = True
        self._samples[:2] += fired.sum(1)
        self._samples[2] += fired.any(0).sum(0)
        flat = side_of * self._n + feature
        self._tokens += torch.bincount(flat, minlength=2 * self._n).view(2, self._n)
        self._maximum.view(-1).scatter_reduce_(0, flat, value, "amax")
        self.n_samples += n_samples
        for buffer, entries in (
            (self._feature, feature),
            (self._value, value),
            (self._token, token_id[codes.token].cpu()),
            (self._side, side_of),
        ):
            buffer.append(entries)
        self._buffered += len(value)
        if self._buffered > BUFFER_ENTRIES:
            self._compact()

    def _compact(self) -> None:
        """Keep each feature's strongest tokens; ties go to the earlier token."""
        feature, value, token, side = (
            torch.cat(part) for part in (self._feature, self._value, self._token, self._side)
        )
        order = token.argsort(stable=True)
        order = order[value[order].argsort(stable=True, descending=True)]
        order = order[feature[order].argsort(stable=True)]
        kept = order[_rank_in_group(feature[order]) < STRONGEST]
        self._feature, self._value, self._token, self._side = (
            [feature[kept]],
            [value[kept]],
            [token[kept]],
            [side[kept]],
        )
        self._buffered = len(kept)

    def choose(self) -> None:
        """Between the passes: settle which tokens' states each weighted feature needs."""
        self._compact()
        feature, token, side = self._feature[0], self._token[0], self._side[0]
        chosen = torch.zeros(len(feature), dtype=torch.bool)
        enough = torch.ones(self._n, dtype=torch.bool)
        for which in (IMAGE, TEXT):
            at = (side == which).nonzero()[:, 0]
            first = at[_rank_in_group(feature[at]) < PER_SIDE]
            chosen[first] = True
            enough &= torch.bincount(feature[first], minlength=self._n) == PER_SIDE
        chosen &= enough[feature]
        self._winners = _Winners(feature[chosen], token[chosen], side[chosen], enough.nonzero()[:, 0], self._n, self._d)

    def add_states(self, states: torch.Tensor, token_id: torch.Tensor) -> None:
        """Second pass over the same tokens: `states` (n_tokens, d_model)."""
        if self._winners is None:
            raise AssertionError("choose() comes between the passes")
        self._winners.add(states, token_id)

    def weights(self, metadata: dict[str, Any]) -> FeatureWeights:
        """The finished weights."""
        if self._winners is None:
            raise AssertionError("choose() comes between the passes")
        image_samples, text_samples, samples = self._samples
        image_tokens, text_tokens = self._tokens
        image_maximum, text_maximum = self._maximum
        return FeatureWeights(
            self._winners.omega(),
            image_samples,
            text_samples,
            samples,
            image_tokens,
            text_tokens,
            image_maximum,
            text_maximum,
            n_samples=self.n_samples,
            metadata=metadata,
        )


class _Winners:
    """The tokens whose states are wanted, and the sums of their unit states."""

    def __init__(
        self, feature: torch.Tensor, token: torch.Tensor, side: torch.Tensor, weighted: torch.Tensor, n: int, d: int
    ) -> None:
        order = token.argsort()
        self._token, self._feature, self._side = token[order], feature[order], side[order]
        self._place = torch.full((n,), -1, dtype=torch.int64)
        self._place[weighted] = torch.arange(len(weighted))
        self._weighted, self._n = weighted, n
        self._sums = torch.zeros(2, len(weighted), d)

    def add(self, states: torch.Tensor, token_id: torch.Tensor) -> None:
        token_id = token_id.cpu()
        first = torch.searchsorted(self._token, token_id)
        count = torch.searchsorted(self._token, token_id, right=True) - first
        owner = torch.repeat_interleave(torch.arange(len(token_id)), count)
        if not len(owner):
            return
        within = torch.arange(len(owner)) - torch.repeat_interleave(count.cumsum(0) - count, count)
        entry = first[owner] + within
        unit = torch.nn.functional.normalize(states[owner.to(states.device)].float(), dim=1).cpu()
        place = self._place[self._feature[entry]]
        for which in (IMAGE, TEXT):
            at = self._side[entry] == which
            self._sums[which].index_add_(0, place[at], unit[at])

    def omega(self) -> torch.Tensor:
        out = torch.full((self._n,), torch.nan)
        out[self._weighted] = (self._sums[IMAGE] * self._sums[TEXT]).sum(1) / PER_SIDE**2
        return out


def _rank_in_group(group: torch.Tensor) -> torch.Tensor:
    """0, 1, 2 … within each run of equal numbers in `group`, which is grouped already."""
    if not len(group):
        return group
    _, counts = torch.unique_consecutive(group, return_counts=True)
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.arange(len(group)) - starts
