"""Selection against sorting everything."""

from __future__ import annotations

import pytest
import torch

from mmfilter.core.training.topk import BatchTopK, kth_largest, strongest_of_each

TOKENS = 50


def dense(n: int, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(TOKENS, n, generator=torch.Generator().manual_seed(seed)) + shift


def in_chunks(pre: torch.Tensor, size: int = 16):
    return lambda: ((start, pre[start : start + size]) for start in range(0, len(pre), size))


@pytest.mark.parametrize("n", [96, 97, 1024])
@pytest.mark.parametrize("k", [1, 7, 96])
def test_each_token_keeps_its_strongest(n, k):
    pre = dense(n)
    codes = strongest_of_each(in_chunks(pre), k, TOKENS, n)
    wanted = pre.topk(k, dim=1)
    assert torch.equal(codes.token, torch.arange(TOKENS).repeat_interleave(k))
    assert torch.equal(codes.value.view(TOKENS, k).sort(1).values, wanted.values.sort(1).values)
    assert torch.equal(codes.feature.view(TOKENS, k).sort(1).values, wanted.indices.sort(1).values)


@pytest.mark.parametrize("n", [97, 1024])
@pytest.mark.parametrize("k", [1, 7, 90])
@pytest.mark.parametrize("shifts", [(0, 0, 0), (0, -0.5, -3), (-3, 3, 0)], ids=str)
def test_a_batch_keeps_its_strongest_whatever_came_before(n, k, shifts):
    """Batches that move up and down make the bound too low and too high."""
    batch_topk = BatchTopK()
    for seed, shift in enumerate(shifts):
        pre = dense(n, seed, shift)
        codes, threshold = batch_topk.choose(in_chunks(pre), k, TOKENS, n, device=pre.device)
        values = pre.flatten().sort(descending=True).values
        positive = values[: k * TOKENS][values[: k * TOKENS] > 0]
        wanted = torch.zeros_like(pre)
        wanted[pre >= positive[-1]] = pre[pre >= positive[-1]]
        got = torch.zeros_like(pre)
        got[codes.token, codes.feature] = codes.value
        assert len(codes) == len(positive) and torch.equal(got, wanted)
        assert (codes.token.diff() >= 0).all()
        assert threshold == (positive[-1] if len(positive) == k * TOKENS else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 2, 500, 999, 1000])
def test_the_kth_largest(dtype, k):
    values = torch.rand(1000, generator=torch.Generator().manual_seed(1), dtype=dtype).pow(9)
    values[::7] = values[3]
    assert kth_largest(values, k) == values.sort(descending=True).values[k - 1]
    assert kth_largest(values, 1001) == 0
