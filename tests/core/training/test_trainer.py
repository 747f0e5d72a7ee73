"""The trainer: it finds known features, counts right, and exports what it trained."""

from __future__ import annotations

import copy

import pytest
import torch

from mmfilter.core.sae.autoencoder import SAE
from mmfilter.core.sae.pretrained import load_sae
from mmfilter.core.sides import IMAGE, TEXT
from mmfilter.core.training.code_products import decode
from mmfilter.core.training.optimiser import Optimiser
from mmfilter.core.training.settings import TrainSettings
from mmfilter.core.training.sparse_step import active_codes
from mmfilter.core.training.topk import BatchTopK
from mmfilter.core.training.trainer import Trainer
from mmfilter.core.training.weights import Weights
from mmfilter.errors import SAEError
from tests.core.training.synthetic import Synthetic, mean_max_cosine

D, N, B = 32, 128, 256
ARCHITECTURES = ["batchtopk", "topk", "jumprelu", "relu"]


def trained(architecture: str = "batchtopk", steps: int = 30, **options) -> tuple[Trainer, torch.Tensor]:
    """A trainer after some steps, and states it has not seen."""
    data = Synthetic(64, D, 3)
    settings = TrainSettings(
        architecture=architecture, n_features=N, k=4, batch_size=B, tokens=B * 100, lr=3e-3, **options
    )
    trainer = Trainer.fitted(settings, data.states(1000) * 3)
    for _ in range(steps):
        trainer.step(data.states(B) * 3)
    return trainer, data.states(100) * 3


def dense_inference(trainer: Trainer, states: torch.Tensor) -> torch.Tensor:
    """Codes in raw units, from the trainer's own weights by the rules of inference."""
    w, settings = trainer.weights, trainer.settings
    x = states * trainer.scale
    inputs = x - w.b_dec if settings.subtract_b_dec else x
    pre = inputs @ w.W_enc.T + w.b_enc
    if settings.architecture == "topk":
        codes, _ = active_codes(inputs, w, settings, BatchTopK())
        f = torch.zeros_like(pre)
        f[codes.token, codes.feature] = codes.value
    elif settings.architecture == "batchtopk":
        f = pre * (pre > trainer.threshold)
    elif settings.architecture == "jumprelu":
        f = pre * (pre > w.log_threshold.exp())
    else:
        f = pre.relu() * w.W_dec.norm(dim=1)
    return f / trainer.scale


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_export_gives_the_trainers_codes(tmp_path, architecture, subtract):
    trainer, states = trained(architecture, subtract_b_dec=subtract)
    sae = trainer.export()
    wanted = dense_inference(trainer, states)
    torch.testing.assert_close(sae.encode(states, max_active=N).dense(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N))
    w = trainer.weights
    decoder = w.W_dec / w.W_dec.norm(dim=1, keepdim=True)
    torch.testing.assert_close(
        sae.decode(sae.encode(states, max_active=N), states),
        wanted @ decoder + w.b_dec / trainer.scale,
        rtol=1e-4,
        atol=1e-3,
    )
    sae.save(tmp_path)
    assert load_sae(tmp_path).hash == sae.hash
    assert (
        sae.metadata["training_settings"] == trainer.settings.to_mapping()
        and sae.metadata["architecture_origin"] == architecture
    )


def opened_by_sae_lens(sae: SAE, folder):
    peer = pytest.importorskip("sae_lens")
    sae.save(folder)
    return peer.SAE.load_from_disk(str(folder), device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore")
def test_the_export_opens_in_sae_lens_with_equal_codes(tmp_path, architecture):
    trainer, states = trained(architecture)
    sae = trainer.export()
    other = opened_by_sae_lens(sae, tmp_path)
    codes = sae.encode(states, max_active=N)
    with torch.no_grad():
        torch.testing.assert_close(other.encode(states), codes.dense(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other.decode(codes.dense()), sae.decode(codes, states), rtol=1e-4, atol=1e-3)


def test_an_export_before_any_step():
    trainer, _ = trained(steps=0)
    with pytest.raises(SAEError, match="training has no threshold to export before its first step; train it first"):
        trainer.export()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "options", "least"),
    [
        ("batchtopk", {}, 0.95),
        ("batchtopk", {"dtype": "bfloat16"}, 0.95),
        ("batchtopk", {"groups": (0.5,)}, 0.9),
        ("topk", {}, 0.95),
        ("jumprelu", {"bandwidth": 0.02}, 0.9),
        ("relu", {"l1_coefficient": 1.0}, 0.9),
    ],
    ids=str,
)
def test_known_features_are_found(architecture, options, least):
    data = Synthetic(128, 48, 4)
    settings = TrainSettings(
        architecture=architecture,
        n_features=256,
        k=4,
        batch_size=1024,
        tokens=1024 * 400,
        lr=3e-3,
        dead_tokens=50_000,
        **options,
    )
    trainer = Trainer.fitted(settings, data.states(4000))
    while not trainer.done:
        stats = trainer.step(data.states(1024))
    closeness = mean_max_cosine(data.directions, trainer.weights.W_dec)
    assert closeness > least and stats.fvu < 0.15, (closeness, stats)
    if architecture != "relu":
        assert stats.l0 == pytest.approx(4, rel=0.15)


def test_figures_of_a_step():
    """FVU and L0 of all, image and text tokens from a dense forward pass in float64."""
    trainer, states = trained()
    side = (torch.arange(100) % 3 == 0).long()
    before = copy.deepcopy(trainer.weights)
    codes, threshold = active_codes(states * trainer.scale - before.b_dec, before, trainer.settings, BatchTopK())
    f = torch.zeros(100, N, dtype=torch.float64)
    f[codes.token, codes.feature] = codes.value.double()
    x = states.double() * trainer.scale
    error = f @ before.W_dec.double() + before.b_dec.double() - x
    stats = trainer.step(states, side)
    for quality, mask in ((stats.all, side >= 0), (stats.image, side == IMAGE), (stats.text, side == TEXT)):
        wanted = error[mask].square().sum() / (x[mask] - x[mask].mean(0)).square().sum()
        assert quality.tokens == int(mask.sum())
        assert quality.fvu == pytest.approx(float(wanted), rel=1e-4)
        assert quality.l0 == pytest.approx(float((f[mask] > 0).sum(1).double().mean()))
    assert stats.loss - stats.auxiliary == pytest.approx(float(error.square().mean()), rel=1e-4)
    assert len(codes) == 100 * 4 and threshold == codes.value.min()
    assert trainer.step(states).image is None


def test_counters_and_threshold():
    trainer, states = trained(steps=0, dead_tokens=300)
    w, side = trainer.weights, (torch.arange(100) % 2).long()
    trainer.step(states, side)
    seen, silent, thresholds = trainer.statistics.counts.clone(), trainer.since_fired.clone(), [trainer.threshold]
    for step in range(2, 7):
        codes, threshold = active_codes(states * trainer.scale - w.b_dec, w, trainer.settings, BatchTopK())
        seen += torch.stack(
            [torch.bincount(codes.feature[side[codes.token] == which], minlength=N) for which in range(2)]
        )
        silent += 100
        silent[codes.feature] = 0
        thresholds.append(float(threshold))
        stats = trainer.step(states, side)
        assert stats.step == step and stats.tokens == 100 * step
    assert torch.equal(trainer.statistics.counts, seen) and torch.equal(trainer.since_fired, silent)
    assert torch.equal(trainer.statistics.frequency, seen / 300)
    assert stats.dead == pytest.approx(float((silent >= 300).float().mean())) and stats.dead > 0
    decayed = [0.99 ** (5 - i) for i in range(6)]
    assert trainer.threshold == pytest.approx(
        sum(t * share for t, share in zip(thresholds, decayed, strict=True)) / sum(decayed)
    )
    trainer.statistics.reset()
    assert trainer.statistics.counts.sum() == 0 and trainer.statistics.tokens.sum() == 0


def test_dead_features_come_back():
    """AuxK: features that a bad start has silenced fire again; without it they do not."""
    fired = {}
    for coefficient in (0.0, 1 / 4):
        data = Synthetic(96, D, 3)
        settings = TrainSettings(
            n_features=N,
            k=4,
            batch_size=B,
            tokens=B * 200,
            lr=3e-3,
            decay=0,
            dead_tokens=B,
            aux_k=16,
            aux_coefficient=coefficient,
        )
        trainer = Trainer.fitted(settings, data.states(1000))
        trainer.weights.W_enc[:64] *= 0.05
        for _ in range(150):
            trainer.step(data.states(B))
        trainer.statistics.reset()
        for _ in range(10):
            trainer.step(data.states(B))
        fired[coefficient] = int((trainer.statistics.counts.sum(0)[:64] > 0).sum())
    assert fired[0.0] < 10 and fired[1 / 4] > 40, fired


def test_adam_with_unit_rows_and_clipping():
    """Three updates against the textbook formula in float64."""
    g = torch.Generator().manual_seed(0)
    settings = TrainSettings(n_features=N, k=4, clip=2.0).resolved(D)
    trainer = Trainer(settings, D, torch.zeros(D))
    w = {name: tensor.double().clone() for name, tensor in trainer.weights.named().items()}
    first, second = ({name: torch.zeros_like(tensor) for name, tensor in w.items()} for _ in range(2))
    optimiser = Optimiser(trainer.weights, settings)
    for step in range(1, 4):
        gradients = {
            name: torch.randn(tensor.shape, generator=g) * (0.001 if step == 2 else 0.1) for name, tensor in w.items()
        }
        wanted = {name: tensor.double().clone() for name, tensor in gradients.items()}
        wanted["W_dec"] -= (wanted["W_dec"] * w["W_dec"]).sum(1, keepdim=True) * w["W_dec"]
        norm = torch.cat([tensor.flatten() for tensor in wanted.values()]).norm()
        assert (norm > 2) == (step != 2)
        given = optimiser.update(Weights(**gradients), 0.01)
        assert float(given) == pytest.approx(float(norm), rel=1e-5)
        for name, tensor in w.items():
            grad = wanted[name] * min(1, 2 / norm)
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.999 * second[name] + 0.001 * grad**2
            tensor -= 0.01 * (first[name] / (1 - 0.9**step)) / ((second[name] / (1 - 0.999**step)).sqrt() + 6.25e-10)
        w["W_dec"] /= w["W_dec"].norm(dim=1, keepdim=True)
        for name, tensor in trainer.weights.named().items():
            torch.testing.assert_close(tensor.double(), w[name], rtol=1e-4, atol=1e-6)


def test_bfloat16_only_chooses():
    """With bfloat16 products the gradients are those of the same choice in float32."""
    trainer, states = trained()
    x = states * trainer.scale - trainer.weights.b_dec
    for architecture in ("batchtopk", "topk"):
        exact, rounded = (
            active_codes(
                x,
                trainer.weights,
                TrainSettings(architecture=architecture, n_features=N, k=4, dtype=dtype).resolved(D),
                BatchTopK(),
            )[0]
            for dtype in ("float32", "bfloat16")
        )
        same = set(zip(exact.token.tolist(), exact.feature.tolist(), strict=True)) & set(
            zip(rounded.token.tolist(), rounded.feature.tolist(), strict=True)
        )
        assert len(exact) == len(rounded) and len(same) >= 0.99 * len(exact)
        torch.testing.assert_close(rounded.value.sort().values, exact.value.sort().values, rtol=1e-2, atol=1e-2)
        pre = x @ trainer.weights.W_enc.T + trainer.weights.b_enc
        torch.testing.assert_close(rounded.value, pre[rounded.token, rounded.feature], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("states", "words"),
    [
        (torch.zeros(3, D + 1), r"training takes states of shape \(tokens, 32\); it was given \(3, 33\)"),
        (torch.zeros(0, D), r"it was given \(0, 32\)"),
    ],
)
def test_wrong_states(states, words):
    with pytest.raises(SAEError, match=words):
        trained(steps=0)[0].step(states)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("steps", [0, 3])
def test_a_batch_that_is_not_finite_changes_nothing(architecture, steps):
    trainer, states = trained(architecture, steps)
    before = {name: tensor.clone() for name, tensor in trainer.state()[0].items()}
    states[3, 5] = float("nan")
    with pytest.raises(SAEError) as error:
        trainer.step(states)
    assert str(error.value) == (
        f"training has a loss of nan at step {steps + 1}: the batch holds states that are not finite, or lr is too high"
    )
    after, _ = trainer.state()
    assert before.keys() == after.keys() and all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_encoder_starts_at_the_best_scale():
    """Least squares over the first batch: no other factor on the encoder reconstructs it better."""
    trainer, states = trained(steps=0)
    rows = trainer.weights.W_dec.clone()
    trainer.fit_start(states * trainer.scale)
    ratio = trainer.weights.W_enc / rows
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))
    x = states * trainer.scale - trainer.weights.b_dec

    def error(factor: float) -> float:
        w = copy.deepcopy(trainer.weights)
        w.W_enc *= factor
        codes, _ = active_codes(x, w, trainer.settings, BatchTopK())
        return float((decode(codes, w.W_dec) - x).square().sum())

    assert error(1.0) < min(error(0.97), error(1.03))


def test_a_bad_mean_or_sample():
    with pytest.raises(SAEError, match=r"training needs a mean of 32 finite numbers; it was given \(31,\)"):
        Trainer(TrainSettings(), D, torch.zeros(31))
    with pytest.raises(
        SAEError, match=r"training needs a sample of states that differ; it was given \(5, 32\) without variance"
    ):
        Trainer.fitted(TrainSettings(), torch.ones(5, D))


def test_the_scale_does_not_matter():
    """States in other units give the same SAE in those units."""
    small, states = trained()
    data = Synthetic(64, D, 3)
    large = Trainer.fitted(small.settings, data.states(1000) * 3000)
    for _ in range(30):
        large.step(data.states(B) * 3000)
    torch.testing.assert_close(
        large.export().encode(states * 1000).dense() / 1000, small.export().encode(states).dense(), rtol=1e-2, atol=1e-2
    )
