"""The products of sparse codes against dense ones in float64."""

from __future__ import annotations

import torch

from mmfilter.core.sae.token_codes import TokenCodes
from mmfilter.core.training.code_products import decode, decode_with_dots, dots, feature_sums, per_feature

TOKENS, FEATURES, D = 7, 11, 5
G = torch.Generator().manual_seed(0)
A = torch.randn(TOKENS, FEATURES, generator=G, dtype=torch.float64) * (torch.rand(TOKENS, FEATURES, generator=G) < 0.4)
A[3] = 0  # a token without codes
W = torch.randn(FEATURES, D, generator=G, dtype=torch.float64)
TABLE = torch.randn(TOKENS, D, generator=G, dtype=torch.float64)


def codes_of(dense: torch.Tensor) -> TokenCodes:
    token, feature = dense.nonzero(as_tuple=True)
    return TokenCodes(token, feature, dense[token, feature], *dense.shape)


def test_the_products_are_those_of_dense_arrays():
    codes = codes_of(A)
    at = codes.token, codes.feature
    torch.testing.assert_close(decode(codes, W), A @ W)
    torch.testing.assert_close(dots(codes, TABLE, W), (TABLE @ W.T)[at])
    parts, values = decode_with_dots(codes, W)
    assert torch.equal(parts, decode(codes, W))
    assert torch.equal(torch.autograd.grad(parts, values, TABLE)[0], dots(codes, TABLE, W))
    torch.testing.assert_close(feature_sums(codes, TABLE, codes.value), A.T @ TABLE)
    other = TOKENS - 1 - codes.token
    torch.testing.assert_close(feature_sums(codes, TABLE, codes.value, other), A.flip(0).T @ TABLE)
    torch.testing.assert_close(per_feature(codes, codes.value), A.sum(0))


def test_of_no_codes_they_are_zeros():
    codes = codes_of(torch.zeros_like(A))
    assert torch.equal(decode(codes, W), torch.zeros(TOKENS, D))
    assert torch.equal(feature_sums(codes, TABLE, codes.value), torch.zeros(FEATURES, D))
    assert torch.equal(per_feature(codes, codes.value), torch.zeros(FEATURES, dtype=torch.float64))
    assert dots(codes, TABLE, W).shape == (0,)


def test_codes_are_chosen_by_mask_and_by_place():
    codes = codes_of(A)
    assert torch.equal(codes.positive().dense(), A.clamp(min=0))
    assert torch.equal(codes.where(codes.feature < 4).dense(), torch.cat([A[:, :4], torch.zeros(TOKENS, 7)], 1))
    assert torch.equal(codes.where(torch.arange(3)).value, codes.value[:3]) and len(codes) == len(codes.value)
    assert torch.equal(codes.with_values(2 * codes.value).dense(), 2 * A)
    order, offsets = codes.by_feature
    assert torch.equal(codes.feature[order], codes.feature.sort().values)
    assert torch.equal(offsets.diff(), (A != 0).sum(0)) and torch.equal(codes.token_offsets.diff(), (A != 0).sum(1))
