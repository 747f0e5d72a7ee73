"""AuxK: dead features reconstruct what the living ones leave (Gao et al. 2024, arXiv 2406.04093, A.2).

With r = x − x̂ held fixed and a the `aux_k` largest positive activations of dead features at a token,

    L_aux = α/(B·d) ‖r − a·W_dec‖²

Few dead features, the usual case, are a few columns: dense products over them alone are cheaper than any
gather. With many, the chosen ones go through the same sparse products as the living.
"""

from __future__ import annotations

import torch

from mmfilter.core.sae.product import EncoderProduct, linear
from mmfilter.core.training.code_products import decode_with_dots, feature_sums, per_feature
from mmfilter.core.training.settings import ResolvedTrainSettings
from mmfilter.core.training.topk import strongest_of_each
from mmfilter.core.training.weights import Weights

DENSE_UP_TO = 32
"""Dead features for each one chosen up to which dense products are faster (two cores, d_model 1024)"""


def add_auxiliary(
    gradients: Weights,
    inputs: torch.Tensor,
    error: torch.Tensor,
    weights: Weights,
    dead: torch.Tensor,
    settings: ResolvedTrainSettings,
    batch_tokens: int,
) -> torch.Tensor:
    """Add the derivatives of L_aux by W_enc, b_enc and W_dec to `gradients`; returns L_aux.

    `inputs` (tokens, d_model) is what the encoder sees, `error` is x̂ − x, `dead` (n_features,) a mask. What goes
    to b_dec through the encoder follows from b_enc, and is left to the caller.
    """
    columns = dead.nonzero()[:, 0]
    loss = error.new_zeros(())
    if not (settings.aux_coefficient and len(columns)):
        return loss
    scale = settings.aux_coefficient / (batch_tokens * error.shape[1])
    k = min(settings.aux_k, len(columns))
    few = Weights(weights.W_enc[columns], weights.b_enc[columns], weights.W_dec[columns], weights.b_dec)
    add = _add_dense if len(columns) <= DENSE_UP_TO * k else _add_sparse
    sums = few.zeros()
    for start, pre in EncoderProduct(few.W_enc, few.b_enc, inputs.dtype).chunks(inputs):
        part = slice(start, start + len(pre))
        loss = loss + add(sums, inputs[part], error[part], pre, few, k, scale)
    gradients.W_enc.index_add_(0, columns, sums.W_enc)
    gradients.b_enc.index_add_(0, columns, sums.b_enc)
    gradients.W_dec.index_add_(0, columns, sums.W_dec)
    return loss


def _add_dense(
    sums: Weights, inputs: torch.Tensor, error: torch.Tensor, pre: torch.Tensor, few: Weights, k: int, scale: float
) -> torch.Tensor:
    active = pre.relu_()
    if k < pre.shape[1]:
        value, place = active.topk(k, dim=1, sorted=False)
        active = torch.zeros_like(active).scatter_(1, place, value)
    remainder = torch.addmm(error, active, few.W_dec)
    loss = scale * remainder.square().sum()
    slope = remainder.mul_(2 * scale)
    by_value = linear(slope, few.W_dec, few.b_enc.new_zeros(len(few.b_enc))) * (active > 0)
    sums.W_dec.addmm_(active.T, slope)
    sums.W_enc.addmm_(by_value.T, inputs)
    sums.b_enc += by_value.sum(0)
    return loss


def _add_sparse(
    sums: Weights, inputs: torch.Tensor, error: torch.Tensor, pre: torch.Tensor, few: Weights, k: int, scale: float
) -> torch.Tensor:
    codes = strongest_of_each(lambda: [(0, pre)], k, *pre.shape).positive()
    parts, values = decode_with_dots(codes, few.W_dec)
    remainder = parts.detach() + error
    loss = scale * remainder.square().sum()
    slope = remainder.mul_(2 * scale)
    by_value = torch.autograd.grad(parts, values, slope)[0]
    sums.W_dec += feature_sums(codes, slope, codes.value)
    sums.W_enc += feature_sums(codes, inputs, by_value)
    sums.b_enc += per_feature(codes, by_value)
    return loss
