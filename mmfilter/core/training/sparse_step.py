"""Loss and gradients of the top-k kinds, by hand and sparse: only active features take part.

For a batch of B scaled states x of width d and Matryoshka prefixes i = 1 … G (G = 1 without groups), where
x̂_i = b_dec + Σ f_j W_dec_j over the active features of prefix i:

    L = 1/(B·d·G) Σ_i ‖x̂_i − x‖²  (+ AuxK)

A feature of segment s, first in prefix s, is in all prefixes from s on, so that every derivative by it goes
through E_s = 2/(B·d·G) Σ_{i ≥ s} (x̂_i − x): one table of G·B rows, and a segment and token name a row of it.

    ∂L/∂f = E·W_dec        ∂L/∂W_dec = Σ f E        ∂L/∂W_enc = Σ ∂L/∂f (x − b_dec)        ∂L/∂b_enc = Σ ∂L/∂f
    ∂L/∂b_dec = Σ_tokens E_1 − W_encᵀ ∂L/∂b_enc     (the second part only if the encoder subtracts b_dec)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mmfilter.core.sae.product import EncoderProduct
from mmfilter.core.sae.token_codes import TokenCodes
from mmfilter.core.training.auxiliary import add_auxiliary
from mmfilter.core.training.code_products import decode_with_dots, dots, feature_sums, per_feature
from mmfilter.core.training.outcome import Firing, Outcome
from mmfilter.core.training.settings import ResolvedTrainSettings
from mmfilter.core.training.topk import BatchTopK, strongest_of_each
from mmfilter.core.training.weights import Weights

REFINED_MORE = 4
"""For `topk` in bfloat16, one feature more is looked at for so many"""


def sparse_step(
    x: torch.Tensor,
    side: torch.Tensor,
    weights: Weights,
    settings: ResolvedTrainSettings,
    *,
    dead: torch.Tensor,
    batch_tokens: int,
    batch_topk: BatchTopK,
) -> Outcome:
    """The outcome for scaled states x (tokens, d_model), this process' part of a batch of `batch_tokens`.

    `side` (tokens,) is IMAGE or TEXT; `dead` (n_features,) says which features AuxK may use.
    """
    d = x.shape[1]
    inputs = x - weights.b_dec if settings.subtract_b_dec else x
    codes, threshold = active_codes(inputs, weights, settings, batch_topk)
    layered, token = _by_segment(codes, settings.groups)
    parts, values = decode_with_dots(layered, weights.W_dec)
    errors = _running_sum(parts.detach().view(len(settings.groups), len(x), d)).add_(weights.b_dec - x)
    factor = 1 / (batch_tokens * d * len(settings.groups))
    loss = factor * torch.linalg.vector_norm(errors).square()
    slopes = _running_sum(errors.flip(0)).flip(0) * (2 * factor)
    table = slopes.view(-1, d)
    by_value = torch.autograd.grad(parts, values, table)[0]
    gradients = Weights(
        W_enc=feature_sums(layered, inputs, by_value, token),
        b_enc=per_feature(layered, by_value),
        W_dec=feature_sums(layered, table, layered.value),
        b_dec=slopes[0].sum(0),
    )
    auxiliary = add_auxiliary(gradients, inputs, errors[-1], weights, dead, settings, batch_tokens)
    if settings.subtract_b_dec:
        gradients.b_dec -= gradients.b_enc @ weights.W_enc
    return Outcome(gradients, errors[-1], Firing.of(codes, side), loss + auxiliary, auxiliary, threshold)


def active_codes(
    inputs: torch.Tensor, weights: Weights, settings: ResolvedTrainSettings, batch_topk: BatchTopK
) -> tuple[TokenCodes, torch.Tensor | None]:
    """The features that the encoder's input (tokens, d_model) makes active, and the threshold of `batchtopk`."""
    rounded = settings.dtype == "bfloat16"
    product = EncoderProduct(weights.W_enc, weights.b_enc, torch.bfloat16 if rounded else inputs.dtype)
    tokens, n = len(inputs), settings.n_features

    def chunks() -> Iterator[tuple[int, torch.Tensor]]:
        return product.chunks(inputs)

    def refine(candidates: TokenCodes) -> TokenCodes:
        return candidates.with_values(dots(candidates, inputs, weights.W_enc) + weights.b_enc[candidates.feature])

    if settings.architecture == "batchtopk":
        return batch_topk.choose(
            chunks, settings.k, tokens, n, device=inputs.device, refine=refine if rounded else None
        )
    if not rounded:
        return strongest_of_each(chunks, settings.k, tokens, n).positive(), None
    wider = min(settings.k + -(-settings.k // REFINED_MORE), n)
    candidates = refine(strongest_of_each(chunks, wider, tokens, n))
    place = candidates.value.view(tokens, wider).topk(settings.k, dim=1).indices
    place = (place + torch.arange(0, tokens * wider, wider, device=place.device).unsqueeze(1)).flatten()
    return candidates.where(place).positive(), None


def _running_sum(tables: torch.Tensor) -> torch.Tensor:
    """Over the first dimension; as it is where there is one."""
    return tables.cumsum(0) if len(tables) > 1 else tables


def _by_segment(codes: TokenCodes, groups: tuple[int, ...]) -> tuple[TokenCodes, torch.Tensor]:
    """The codes with the segment · n_tokens + token as their token, and the tokens that these are; as they are where
    there is one group."""
    if len(groups) == 1:
        return codes, codes.token
    ends = torch.tensor(groups, device=codes.feature.device)
    row, order = (torch.bucketize(codes.feature, ends, right=True) * codes.n_tokens + codes.token).sort(stable=True)
    layered = TokenCodes(row, codes.feature[order], codes.value[order], len(groups) * codes.n_tokens, codes.n_features)
    return layered, codes.token[order]
