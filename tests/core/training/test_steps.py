"""Loss and gradients of every architecture against autograd on dense arrays in float64."""

from __future__ import annotations

import pytest
import torch

from mmfilter.core.sae import product
from mmfilter.core.training import auxiliary
from mmfilter.core.training.dense_step import dense_step
from mmfilter.core.training.outcome import Outcome
from mmfilter.core.training.settings import ResolvedTrainSettings, TrainSettings
from mmfilter.core.training.sparse_step import sparse_step
from mmfilter.core.training.topk import BatchTopK
from mmfilter.core.training.weights import Weights
from tests.core.training import reference

D, N, TOKENS = 12, 64, 41


def weights(jumprelu: bool = False) -> Weights:
    g = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    extra = {"log_threshold": normal(N) * 0.3} if jumprelu else {}
    return Weights(normal(N, D) * 0.4, normal(N) * 0.1, normal(N, D) * 0.4, normal(D), **extra)


def states() -> torch.Tensor:
    return torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 2 + 1


SIDE = torch.arange(TOKENS) % 3 % 2


def outcome(settings: ResolvedTrainSettings, w: Weights, dead: torch.Tensor, sparsity: float = 0.7) -> Outcome:
    if settings.sparse:
        return sparse_step(states(), SIDE, w, settings, dead=dead, batch_tokens=TOKENS, batch_topk=BatchTopK())
    return dense_step(states(), SIDE, w, settings, sparsity=sparsity, batch_tokens=TOKENS)


CASES = {
    "batchtopk": {},
    "batchtopk, x as it is": {"subtract_b_dec": False},
    "batchtopk, more places than positive values": {"k": 60, "aux_coefficient": 0.0},
    "batchtopk, matryoshka": {"groups": (8, 0.25, 40)},
    "batchtopk, matryoshka and AuxK": {"groups": (0.5,), "dead": 20, "aux_k": 6},
    "topk": {"architecture": "topk"},
    "topk, k of all": {"architecture": "topk", "k": N},
    "topk, matryoshka": {"architecture": "topk", "groups": (8, 16)},
    "topk, AuxK": {"architecture": "topk", "dead": 20, "aux_k": 6},
    "topk, AuxK with fewer dead than places": {"architecture": "topk", "dead": 4, "aux_k": 6},
    "topk, AuxK sparse": {"architecture": "topk", "dead": 20, "aux_k": 6, "gather": True},
    "relu": {"architecture": "relu"},
    "relu, x as it is": {"architecture": "relu", "subtract_b_dec": False},
    "jumprelu": {"architecture": "jumprelu", "bandwidth": 0.2},
    "jumprelu, linear": {"architecture": "jumprelu", "bandwidth": 0.2, "l0_penalty": "linear", "l0_coefficient": 3.0},
}


@pytest.mark.parametrize("chunk", [1 << 22, 5 * N], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_autograd(monkeypatch, case, chunk):
    options = dict(CASES[case])
    dead = torch.zeros(N, dtype=torch.bool)
    dead[torch.randperm(N, generator=torch.Generator().manual_seed(5))[: options.pop("dead", 0)]] = True
    monkeypatch.setitem(product.CHUNK_ELEMENTS, "cpu", chunk)
    if options.pop("gather", False):
        monkeypatch.setattr(auxiliary, "DENSE_UP_TO", 1)
    settings = TrainSettings(**{"n_features": N, "k": 5, **options}).resolved(D)
    w = weights(settings.architecture == "jumprelu")
    result = outcome(settings, w, dead)

    leaves = Weights(**{name: tensor.clone().requires_grad_() for name, tensor in w.named().items()})
    wanted = reference.loss(states(), leaves, settings, dead, 0.7)
    wanted.backward()
    torch.testing.assert_close(result.loss, wanted.detach(), rtol=1e-10, atol=0)
    for name, leaf in leaves.named().items():
        assert leaf.grad.abs().max() > 1e-6
        torch.testing.assert_close(result.gradients.named()[name], leaf.grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("architecture", ["batchtopk", "topk", "relu", "jumprelu"])
def test_firing_is_counted_by_side(architecture):
    settings = TrainSettings(architecture=architecture, n_features=N, k=5).resolved(D)
    w = weights(architecture == "jumprelu")
    result = outcome(settings, w, torch.zeros(N, dtype=torch.bool))
    pre = (states() - w.b_dec) @ w.W_enc.T + w.b_enc
    if settings.sparse:
        f = pre * reference.keep(pre, settings)
    else:
        f = pre.relu() if architecture == "relu" else pre * (pre > w.log_threshold.exp())
    assert torch.equal(result.firing.counts, torch.stack([(f[which == SIDE] > 0).sum(0) for which in range(2)]))
    torch.testing.assert_close(result.firing.maximum, f.amax(0))
    torch.testing.assert_close(result.error, f @ w.W_dec + w.b_dec - states())
