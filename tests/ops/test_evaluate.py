"""`evaluate` with the embedded model: known answers, transfer, what is left out, and the words of its errors."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText

from mmfilter.core.cards.cards import Card
from mmfilter.core.sae.autoencoder import SAE
from mmfilter.errors import MMFilterError, ModelError, SAEError
from mmfilter.ops.evaluate import RANDOM, TRAINED, evaluate
from mmfilter.ops.evaluate_settings import EvaluateSettings
from mmfilter.ops.measure import measure
from mmfilter.ops.measure_settings import MeasureSettings
from tests.conftest import write_tar
from tests.zoo import build, save


def run(card, shard, progress, **options):
    return evaluate([str(shard)], EvaluateSettings(card, workers=2, **options), progress)


def perfect(d: int, folder) -> str:
    eye = torch.eye(d)
    SAE(torch.cat([eye, -eye], 1), torch.zeros(2 * d), torch.cat([eye, -eye]), torch.zeros(d)).save(folder)
    return str(folder)


def zoo_card(name: str, folder, *, width: int = 32) -> Card:
    transformers.logging.set_verbosity_error()
    specimen = build(name)
    save(specimen, folder)
    return Card(name, str(folder), 1, perfect(width, folder / "sae"), prompt=specimen.prompt)


@pytest.fixture(scope="module")
def other(tiny, tmp_path_factory):
    """Another checkpoint of the embedded model's architecture: its first text block noisy."""
    folder = tmp_path_factory.mktemp("other")
    shutil.copytree(tiny[0].model, folder, dirs_exist_ok=True)
    model = AutoModelForImageTextToText.from_pretrained(tiny[0].model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.model.language_model.layers[0].parameters():
            weight += 0.2 * weight.std().nan_to_num(0) * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    return str(folder)


def test_a_perfect_sae(tiny, make_shard, quiet, tmp_path):
    card = replace(tiny[0], sae=perfect(192, tmp_path / "sae"), weights=None)
    found = run(card, make_shard(n=12), quiet, text_only=True)
    assert [trial.text_only for trial in found.trials] == [False, True] and found.n_features == 384
    for trial in found.trials:
        for side in [trial.fidelity[TRAINED].text] if trial.text_only else trial.fidelity[TRAINED].sides.values():
            assert (side.fvu, side.cosine, side.explained_by_dimension) == pytest.approx((0, 1, 1), abs=1e-6)
            assert side.l0 == 192
        assert trial.loss.spliced[TRAINED] == pytest.approx(trial.loss.clean, abs=1e-5)
        assert trial.loss.recovered[TRAINED] == pytest.approx(1, abs=1e-5)
        assert trial.loss.recovered[RANDOM] < 1
        assert trial.fidelity[RANDOM].text.fvu > 0.01


def test_the_figures_are_those_of_measure_and_the_random_sae_is_as_sparse(tiny, make_shard, quiet):
    card, shard = tiny[0], make_shard(n=30)
    found = run(card, shard, quiet, sample=25)
    wanted = measure([str(shard)], MeasureSettings(card, sample=25, workers=2), quiet).fidelity
    assert found.trials[0].fidelity[TRAINED] == wanted
    assert (found.n_pairs, found.layer, found.n_features) == (25, 1, 2048)

    def active(fidelity):
        return sum(side.l0 * side.n_tokens for side in fidelity.sides.values())

    assert active(found.trials[0].fidelity[RANDOM]) == pytest.approx(active(wanted), rel=1e-3)
    assert found.notes == [
        "evaluated on only 25 pairs; 50 or more make the figures steady, and about 1,000 the cross-modal weights"
    ]
    spread = found.weights[TRAINED]
    assert spread.n_weighted + spread.n_one_sided + spread.n_text_only + spread.n_image_only + spread.n_never == 2048
    assert (
        spread.n_pairs == 25
        and -1 <= spread.quantiles["min"] <= spread.quantiles["median"] <= spread.quantiles["max"] <= 1
    )


def test_captions_alone_are_those_of_text_context_none(tiny, make_shard, quiet):
    shard = make_shard(n=10)
    alone = run(tiny[0], shard, quiet, text_only=True).trials[1]
    wanted = measure([str(shard)], MeasureSettings(replace(tiny[0], text_context="none"), workers=2), quiet).fidelity
    assert alone.fidelity[TRAINED].text == wanted.text
    assert alone.fidelity[TRAINED].image.n_tokens == 0 and math.isnan(alone.fidelity[TRAINED].image.fvu)
    none = run(replace(tiny[0], text_context="none"), shard, quiet)
    assert none.trials[0].loss.clean == pytest.approx(alone.loss.clean, rel=1e-6)
    assert (
        "with text context 'none' captions do not see the image, so the caption loss says nothing of image tokens"
        in none.notes
    )


def test_another_checkpoint(tiny, make_shard, quiet, other):
    card, shard = tiny[0], make_shard(n=10)
    found = run(card, shard, quiet, also=(replace(card, name="other", model=other), card), text_only=True)
    assert [(trial.model, trial.text_only) for trial in found.trials] == [
        (name, alone) for name in ("tiny", "other", "tiny") for alone in (False, True)
    ]
    own, own_alone, moved, _, again, again_alone = found.trials
    assert again == own and again_alone.loss == own_alone.loss
    wanted = measure([str(shard)], MeasureSettings(replace(card, model=other), workers=2), quiet).fidelity
    assert moved.fidelity[TRAINED] == wanted and moved.loss.clean != own.loss.clean


@pytest.mark.filterwarnings("ignore:.*")
def test_models_without_such_a_loss_say_why(make_shard, quiet, tmp_path):
    shard = make_shard(n=4)
    tried = run(zoo_card("paligemma", tmp_path / "p"), shard, quiet).trials[0]
    assert (tried.loss, tried.no_loss) == (
        None,
        "the model reads captions in both directions and sees the token that it should predict",
    )
    assert tried.fidelity[TRAINED].text.fvu == pytest.approx(0, abs=1e-9)
    tried = run(zoo_card("blip2_t5", tmp_path / "b"), shard, quiet).trials[0]
    assert (tried.loss, tried.no_loss) == (
        None,
        "'blip-2' is an encoder-decoder: captions go through its encoder, which predicts no tokens",
    )
    card = replace(zoo_card("clip", tmp_path / "c", width=24), layer=-1)
    tried = run(card, shard, quiet, also=(card,)).trials[1]
    assert (tried.loss, tried.no_loss) == (None, "'clip' is a dual encoder and predicts no tokens")
    with pytest.raises(
        ModelError, match="'clip' is a dual encoder, whose captions never see an image: leave out --text-only"
    ):
        run(card, shard, quiet, text_only=True)


@pytest.mark.filterwarnings("ignore:.*")
def test_an_untrained_model_is_no_language_model(make_shard, quiet, tmp_path):
    tried = run(zoo_card("llava", tmp_path / "l"), make_shard(n=4), quiet).trials[0]
    assert tried.loss.meaningless.endswith(
        "is no better than guessing evenly among 600 tokens (6.40): it is not a language model of them"
    )


@pytest.mark.filterwarnings("ignore:.*")
def test_what_does_not_fit_is_an_error_before_anything_is_computed(tiny, make_shard, quiet, tmp_path):
    card, shard = tiny[0], make_shard(n=4)
    llava, qwen = zoo_card("llava", tmp_path / "l"), zoo_card("qwen2_vl", tmp_path / "q")

    def error(*also: str) -> str:
        with pytest.raises(MMFilterError) as caught:
            run(card, shard, quiet, also=tuple(replace(card, name="X", model=model) for model in also))
        return str(caught.value)

    assert (
        error(llava.model)
        == "SAE takes states of width 192, --also 'X' gives 32: it is larger or smaller than the SAE's own model"
    )
    assert error(qwen.model) == (
        "--also 'X' is qwen2_vl with qwen2_vl_text, and 'tiny' is llava with llama: an SAE is carried over between checkpoints of one architecture"
    )
    assert error(str(tmp_path)).endswith("it must hold config.json, *.safetensors, tokenizer and processor files")
    SAE(torch.eye(8), torch.zeros(8), torch.eye(8), torch.zeros(8)).save(tmp_path / "sae")
    with pytest.raises(SAEError, match="SAE takes states of width 8, the model gives 192"):
        run(replace(card, sae=str(tmp_path / "sae")), shard, quiet)
    with pytest.raises(MMFilterError, match="--batch-size is 0; at least 1 is needed"):
        EvaluateSettings(card, batch_size=0)


def test_bad_samples_are_counted_and_nothing_usable_is_an_error(tiny, make_shard, quiet, tmp_path):
    bad = [("x.jpg", b"no image"), ("x.txt", b"words")]
    assert run(tiny[0], make_shard(n=2, extra=bad), quiet).reasons == {"image cannot be decoded": 1}
    with pytest.raises(MMFilterError) as caught:
        run(tiny[0], write_tar(tmp_path / "b.tar", bad), quiet)
    assert str(caught.value) == "the shards hold no usable pair to evaluate the SAE on (1: image cannot be decoded)"
