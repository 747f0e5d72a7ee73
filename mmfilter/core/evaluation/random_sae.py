"""The control that an SAE is held against: random directions in its shape, as sparse as it is on the same states.

If scores through random directions tell true pairs from shuffled ones as well as the trained SAE does,
then what tells them is the geometry of the model's states, which random projections preserve (Johnson
and Lindenstrauss 1984), and not what the SAE has learned.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from mmfilter.core.model.backbone import Activations
from mmfilter.core.sae.autoencoder import DENSE_CHUNK_ELEMENTS, SAE
from mmfilter.core.sae.token_codes import pool


@dataclass(frozen=True)
class RandomSAE:
    """A random SAE and its τ."""

    sae: SAE
    threshold: float
    """τ at which as many of its features co-occur in a pair, on average, as of the trained SAE's at its τ"""


def random_twin(sae: SAE, batches: Sequence[Activations], threshold: float, *, seed: int) -> RandomSAE:
    """The random SAE for the states of some true pairs, and the τ that makes `cooccurrence` and `saev` comparable.

    Activations of random directions have a scale of their own, so the trained SAE's τ means nothing to
    them. Both scores are sums over C(s), the features j with min(u_j, v_j) > τ; the twin's τ is the one
    that gives these pairs as many of them in all, so the two SAEs differ in which features co-occur and
    not in how many.
    """
    twin = random_sae(sae, torch.cat([batch.states for batch in batches]), seed=seed)
    wanted, found = (torch.cat([_on_both_sides(each, batch) for batch in batches]) for each in (sae, twin))
    return RandomSAE(twin, cut_leaving(found, int((wanted > threshold).sum())))


def random_sae(sae: SAE, states: torch.Tensor, *, seed: int, max_active: int = 50) -> SAE:
    """Random unit directions in the shape of `sae`, encoder and decoder tied, with its mean L0 on `states` (tokens,
    d_model).

    Normalised as `sae` is and centred as it is, on its `b_dec`; where it subtracts none, on the mean of
    the states, since without a centre every state would look alike. A topk SAE keeps its k; any other
    gets one threshold for all features. L0 is counted as the scores see it, at most 50 a token, unless
    `max_active` says otherwise.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(sae.W_dec.shape, generator=generator), dim=1).to(sae.W_dec)
    nothing = torch.zeros_like(sae.b_enc)
    twin = replace(sae, W_enc=rows.T.contiguous(), b_enc=nothing, W_dec=rows, metadata={})
    if not sae.subtract_b_dec:
        twin = replace(twin, b_enc=-_mean_preactivation(twin, states))
    if sae.activation == "topk":
        return twin
    twin = replace(twin, activation="jumprelu", threshold=nothing)
    chunks = states.split(max(1, DENSE_CHUNK_ELEMENTS // sae.n_features))
    wanted = sum(len(sae.encode(part, max_active=max_active).value) for part in chunks)
    values = _largest((twin.encode(part, max_active=max_active).value for part in chunks), wanted + 1)
    return replace(twin, threshold=nothing + cut_leaving(values, wanted))


def _largest(parts: Iterable[torch.Tensor], n: int) -> torch.Tensor:
    """The `n` largest of all values, or more of them, in no order; what cannot be among them is not kept."""
    kept: list[torch.Tensor] = []
    floor, size = -math.inf, 0
    for values in parts:
        kept.append(values[values >= floor])
        size += len(kept[-1])
        if size > 2 * n + DENSE_CHUNK_ELEMENTS:
            kept = [torch.cat(kept).topk(n).values]
            floor, size = float(kept[0][-1]), n
    return torch.cat(kept)


def with_fitted_decoder(twin: SAE, states: torch.Tensor) -> SAE:
    """The random SAE with the same codes and the decoder of the scale that reconstructs `states` (tokens, d_model)
    best.

    The decoder of `random_sae` has unit rows, whose sum is too long when many are active; held against a
    trained SAE it would lose for its scale alone. The scale is the least-squares one of what the features
    add to the offset; the offset is b_dec, or the mean state where the SAE subtracts no b_dec.
    """
    if not twin.subtract_b_dec:
        twin = replace(twin, b_dec=twin.normalised(states).mean(0))
    along = length = 0.0
    for part in states.split(max(1, DENSE_CHUNK_ELEMENTS // twin.n_features)):
        codes = twin.encode(part, max_active=twin.n_features)
        offset = twin.decode(replace(codes, value=torch.zeros_like(codes.value)), part).double()
        added = twin.decode(codes, part).double() - offset
        along += float(((part.double() - offset) * added).sum())
        length += float(added.square().sum())
    return replace(twin, W_dec=twin.W_dec * (along / length if length else 1.0))


def _mean_preactivation(sae: SAE, states: torch.Tensor) -> torch.Tensor:
    """(n_features,), over all states."""
    chunk = max(1, DENSE_CHUNK_ELEMENTS // sae.n_features)
    sums = (sae.preactivations(part).sum(0) for part in states.split(chunk))
    return functools.reduce(torch.add, sums) / len(states)


def cut_leaving(values: torch.Tensor, wanted: int) -> float:
    """The number ≥ 0 above which lie `wanted` of the positive `values`; 0 when there are no more than that."""
    ordered = values[values > 0].sort(descending=True).values.double()
    if wanted >= len(ordered):
        return 0.0
    above = ordered[wanted - 1] if wanted else 2 * ordered[0]
    return float((above + ordered[wanted]) / 2)


def _on_both_sides(sae: SAE, batch: Activations) -> torch.Tensor:
    """min(u_j, v_j) of all features and pairs of the batch where it is positive, in no order."""
    image, text = pool(sae.encode(batch.states), batch.sample, batch.side, batch.n_samples)
    least = torch.minimum(image.maximum, text.maximum)
    return least[least > 0]
