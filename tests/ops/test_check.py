"""`check` on models of which the truth is known, and on the embedded one against a float64 computation."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import mannwhitneyu

from mmfilter.core.cards.cards import Card
from mmfilter.core.input.decode import DecodeSettings
from mmfilter.core.input.shards import open_source, open_sources
from mmfilter.core.model.backbone import Activations, ModelInputs
from mmfilter.core.pipeline.pair_sample import PairSample
from mmfilter.core.sae.autoencoder import SAE
from mmfilter.core.scores.crossmodal import load_weights
from mmfilter.core.scores.registry import formulas
from mmfilter.core.sides import IMAGE, TEXT
from mmfilter.errors import MMFilterError, SAEError
from mmfilter.ops.check import check, compare, deal
from mmfilter.ops.check_settings import CheckSettings
from tests import reference
from tests.conftest import Member, write_tar

ROOT = Path(__file__).parents[2]
CONCEPTS = 16
CARD = Card(name="made up", model="", layer=0, sae="", threshold=0.1)


class MadeUpBackbone:
    """A model whose image tokens point to the concept that is painted, and whose text tokens point to `says(caption)`."""

    device, d_model, max_tokens = torch.device("cpu"), CONCEPTS, 1000

    def __init__(self, says) -> None:
        self._says = says

    def n_caption_tokens(self, caption: str) -> int:
        return len(caption.split())

    def n_image_tokens(self, width: int, height: int) -> int:
        return 4

    def prepare(self, images, captions) -> ModelInputs:
        lengths = [self.n_caption_tokens(caption) for caption in captions]
        side = torch.full((len(images), 4 + max(lengths)), -1, dtype=torch.int8)
        states = torch.zeros(*side.shape, CONCEPTS)
        for i, (image, caption, length) in enumerate(zip(images, captions, lengths, strict=True)):
            side[i, :4], side[i, 4 : 4 + length] = IMAGE, TEXT
            states[i, :4, image.getpixel((0, 0))[0] // 10] = 1
            states[i, 4:] = self._says(caption)
        if any("broken" in caption for caption in captions):
            states[["broken" in caption for caption in captions]] = torch.nan
        return ModelInputs({"states": states, "input_ids": side, "attention_mask": (side >= 0).long()}, side)

    def activations(self, inputs: ModelInputs) -> Activations:
        sample, position = (inputs.side >= 0).nonzero(as_tuple=True)
        return Activations(
            inputs.tensors["states"][sample, position],
            sample,
            inputs.side[sample, position].long(),
            position,
            len(inputs.side),
        )


def understands(caption: str) -> torch.Tensor:
    return torch.eye(CONCEPTS)[int(caption.split()[1])]


def guesses(caption: str) -> torch.Tensor:
    return torch.eye(CONCEPTS)[hashlib.sha256(caption.encode()).digest()[0] % CONCEPTS]


def eye_sae(d: int = CONCEPTS) -> SAE:
    return SAE(torch.eye(d), torch.zeros(d), torch.eye(d), torch.zeros(d))


def painted(
    path: Path, n: int, *, words: str = "concept {concept} as number {i}", extra: tuple[Member, ...] = ()
) -> Path:
    """n pictures of one grey each, every one with its own second pixel, captioned."""
    members = []
    for i in range(n):
        image = Image.new("RGB", (8, 8), (10 * (i % CONCEPTS),) * 3)
        image.putpixel((7, 7), (i % 256, i // 256, 0))
        out = io.BytesIO()
        image.save(out, "PNG")
        members += [
            (f"{i:05d}.png", out.getvalue()),
            (f"{i:05d}.txt", words.format(concept=i % CONCEPTS, i=i).encode()),
        ]
    return write_tar(path, [*members, *extra])


def made_up(shard: Path, backbone: MadeUpBackbone, progress, *, sae: SAE | None = None, **options):
    return compare(
        open_sources([shard]), backbone, sae or eye_sae(), CheckSettings(CARD, workers=2, **options), progress
    )


def test_a_model_that_understands_is_told_from_chance(tmp_path, quiet):
    report = made_up(painted(tmp_path / "a.tar", 400), MadeUpBackbone(understands), quiet, sample=200)
    assert (report.n_pairs, report.n_fitted, report.n_left_out, report.card_weights) == (200, 200, 0, False)
    # a shuffled caption may be of the same concept: then it is a true one, and ties
    same = 1 - report.scores["raw"].auc
    assert 0 <= 2 * same < 0.15
    for name in ("similarity", "support", "cooccurrence"):
        assert report.scores[name].auc == report.scores["raw"].auc
    assert report.scores["saev"].auc > 0.9
    assert report.recommended == "similarity" and report.scores["l0"].auc == 0.5
    assert (report.fidelity.image.fvu, report.fidelity.text.fvu, report.fidelity.image.l0) == (0, 0, 1)
    assert report.notes == []


def test_a_model_that_guesses_is_chance(tmp_path, quiet):
    report = made_up(painted(tmp_path / "a.tar", 600), MadeUpBackbone(guesses), quiet, sample=300)
    assert report.recommended is None and report.verdict.startswith(
        "No score tells true captions from shuffled ones here"
    )
    for name in ("similarity", "support", "cooccurrence", "raw", "random"):
        low, high = report.scores[name].interval
        assert low < 0.5 < high and 0.45 < report.scores[name].auc < 0.55


def test_true_and_shuffled_pairs_hold_the_same_captions(tmp_path, quiet):
    report = made_up(painted(tmp_path / "a.tar", 100), MadeUpBackbone(guesses), quiet, sample=50)
    assert (
        report.scores["caption_chars"].auc
        == report.scores["caption_tokens"].auc
        == report.scores["l0_image"].auc
        == 0.5
    )
    assert (
        report.scores["caption_tokens"].length_correlation != report.scores["caption_tokens"].length_correlation
    )  # all are as long
    assert report.notes == ["only 50 pairs are compared, so the intervals are wide; 200 or more make them useful",
                            "the feature weights come from only 50 pairs; about 1,000 make them steady"]  # fmt: skip


def test_an_sae_of_another_layer_hardly_reconstructs(tmp_path, quiet):
    silent = SAE(torch.eye(CONCEPTS), torch.full((CONCEPTS,), -5.0), torch.eye(CONCEPTS), torch.ones(CONCEPTS))
    report = made_up(painted(tmp_path / "a.tar", 100), MadeUpBackbone(understands), quiet, sae=silent, sample=50)
    assert report.recommended == "raw" and report.fidelity.hardly_reconstructed == ["image", "text"]
    assert (
        "the SAE hardly reconstructs image and text tokens (FVU" in report.verdict
        and "while no score through the SAE does" in report.verdict
    )
    assert "16 of the SAE's 16 features fire on no token of these pairs" in report.notes


def test_what_cannot_be_used_is_left_out_and_counted(tmp_path, quiet):
    extra = (
        ("x.png", b"no image"),
        ("x.txt", b"concept 1 x"),
        *((f"y{i}.png", _grey(i)) if j else (f"y{i}.txt", b"broken 1 state") for i in range(4) for j in (0, 1)),
    )
    shard = painted(tmp_path / "a.tar", 120, extra=extra)
    report = made_up(shard, MadeUpBackbone(understands), quiet, sample=100)
    assert report.reasons["image cannot be decoded"] == 1
    # of the four broken captions those that are scored spoil their own pair and the one that they are handed to
    assert report.n_pairs + report.n_fitted + report.reasons["the model's states are not finite"] <= 124
    assert 0 < report.reasons["the model's states are not finite"] <= 8
    assert all(np.isfinite(score.auc) for score in report.scores.values())


def _grey(i: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8 + i, 8), (10, 10, 10)).save(out, "PNG")
    return out.getvalue()


def test_captions_that_most_pairs_share_are_left_out(tmp_path, quiet):
    same = painted(tmp_path / "a.tar", 60, words="concept 3")
    with pytest.raises(
        MMFilterError,
        match="60 samples hold 60 usable pairs, and 30 of those to compare share their caption or image with most others; a check needs",
    ):
        made_up(same, MadeUpBackbone(understands), quiet)
    extra = [
        member
        for i in range(100, 160)
        for member in ((f"z{i}.png", _grey(i)), (f"z{i}.txt", b"concept 1 and the same"))
    ]
    report = made_up(painted(tmp_path / "b.tar", 60, extra=tuple(extra[:80])), MadeUpBackbone(understands), quiet)
    assert report.n_left_out == 0 and report.n_pairs == 50


def test_too_few_pairs_are_explained(tmp_path, quiet):
    shard = painted(tmp_path / "a.tar", 30, extra=(("x.png", b"no image"), ("x.txt", b"words")))
    with pytest.raises(MMFilterError) as caught:
        made_up(shard, MadeUpBackbone(understands), quiet)
    assert str(caught.value) == (
        "31 samples hold 30 usable pairs (1: image cannot be decoded); a check needs at least 40, half of them to fit feature weights on: name more shards"
    )


def test_a_shard_that_breaks_is_a_note(tmp_path, quiet):
    shard = painted(tmp_path / "a.tar", 200)
    shard.write_bytes(shard.read_bytes()[:200_000])
    report = made_up(shard, MadeUpBackbone(understands), quiet)
    assert report.notes[0].startswith(f"shard {str(shard)!r} is truncated") and report.notes[0].endswith(
        "; the pairs before that are used"
    )


@pytest.mark.parametrize(("option", "least"), [("sample", 20), ("bootstrap", 100), ("batch_size", 1), ("workers", 1)])
def test_settings_are_checked(option, least):
    with pytest.raises(MMFilterError, match=f"--{option.replace('_', '-')} is {least - 1}; at least {least} is needed"):
        CheckSettings(CARD, **{option: least - 1})


def test_fitting_and_scored_pairs_have_no_image_in_common(tmp_path, quiet):
    shown_again = tuple(
        member
        for i in range(40)
        for member in ((f"z{i}.png", _grey(i % 8)), (f"z{i}.txt", f"concept 1 seen {i}".encode()))
    )
    with PairSample() as sample:
        sample.gather(
            open_sources([painted(tmp_path / "a.tar", 101, extra=shown_again)]),
            141,
            DecodeSettings(),
            workers=1,
            progress=quiet,
        )
        fitting, scored, source = deal(sample, CheckSettings(CARD))
        assert len(deal(sample, CheckSettings(CARD, sample=30))[1]) == 30
        images = [{sample.pairs[number].image_hash for number in part} for part in (fitting, scored)]
    assert sorted([*fitting, *scored]) == list(range(141)) and 66 <= len(fitting) <= 70 and len(source) == len(scored)
    assert images[0].isdisjoint(images[1])


def test_the_seed_decides_and_nothing_else(tmp_path, quiet):
    shard = painted(tmp_path / "a.tar", 120)
    once, again, other = (
        made_up(shard, MadeUpBackbone(guesses), quiet, seed=seed, batch_size=size)
        for seed, size in ((0, 32), (0, 5), (1, 32))
    )
    aucs = [[score.auc for score in report.scores.values()] for report in (once, again, other)]
    assert aucs[0] == aucs[1] != aucs[2]
    np.testing.assert_array_equal(once.scores["support"].draws, again.scores["support"].draws)


def test_an_sae_of_another_width_is_an_error(tiny, make_shard, quiet, tmp_path):
    eye_sae(8).save(tmp_path / "sae")
    with pytest.raises(SAEError, match="SAE takes states of width 8, the model gives 192: it belongs to another model"):
        check([str(make_shard(n=4))], CheckSettings(replace(tiny[0], sae=str(tmp_path / "sae"))), quiet)


def clean(path: Path) -> Path:
    """The pairs of the example shards that are not mismatched."""
    members = []
    for shard in sorted((ROOT / "examples" / "shards").glob("*.tar")):
        for raw in open_source(str(shard)).samples():
            if not json.loads(raw.members["json"])["mismatched"]:
                members += [(f"{raw.key}.{extension}", content) for extension, content in raw.members.items()]
    return write_tar(path, members)


@pytest.mark.slow
@pytest.mark.parametrize("text_context", ["image", "none"])
def test_aucs_of_the_embedded_model_equal_a_float64_computation(tiny, tmp_path, quiet, text_context):
    from mmfilter.core.model.loading import load_backbone

    card, sae = replace(tiny[0], text_context=text_context), tiny[2]
    backbone = load_backbone(card.model, card.layer, prompt=card.prompt, text_context=text_context)
    settings, shard = CheckSettings(card, sample=80), clean(tmp_path / "clean.tar")
    report = check([str(shard)], settings, quiet)

    tensors = {name: getattr(sae, name).double().numpy() for name in ("W_enc", "b_enc", "b_dec", "threshold")}
    weights = load_weights(Path(card.weights))
    wanted, states = {}, ([], [])
    with PairSample() as sample:
        sample.gather(open_sources([shard]), 160, DecodeSettings(), workers=1, progress=quiet)
        _, scored, source = deal(sample, settings)
        for raw, place in zip(sample.read(scored), range(80), strict=True):
            image = Image.open(io.BytesIO(raw.members["jpg"])).convert("RGB")
            for other, owner in enumerate((place, source[place])):
                got = backbone.activations(backbone.prepare([image], [sample.pairs[scored[owner]].caption]))
                sides = [got.states[got.side == side].double().numpy() for side in (IMAGE, TEXT)]
                codes = [reference.dense_codes(side, tensors, k=None, subtract=True) for side in sides]
                found = reference.pair_scores(
                    *sides, *codes, weights.omega.numpy(), weights.idf.double().numpy(), card.threshold
                )
                for name, value in found.items():
                    wanted.setdefault(name, ([], []))[other].append(np.float32(value))
                if not other:
                    states[0].append(sides[0])
                    states[1].append(sides[1])
    for name in formulas():
        expected = mannwhitneyu(*wanted[name]).statistic / 80**2
        assert report.scores[name].auc == pytest.approx(expected, abs=2e-3), name
    assert (
        report.scores["raw"].auc > 0.85
        and report.scores["similarity"].auc > 0.8
        and report.scores["support"].auc > 0.75
    )
    assert 0.4 < report.scores["l0"].auc < 0.6 < report.scores["saev"].auc < report.scores["similarity"].auc
    for side, parts in zip(("image", "text"), states, strict=True):
        assert report.fidelity.sides[side].fvu == pytest.approx(fvu(np.concatenate(parts), sae), rel=1e-4)


def fvu(x: np.ndarray, sae: SAE) -> float:
    """Every active feature takes part."""
    W, b, back, centre, threshold = (
        getattr(sae, name).double().numpy() for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    )
    pre = (x - centre) @ W + b
    again = np.where(pre > threshold, pre, 0) @ back + centre
    return ((x - again) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()


@pytest.mark.slow
def test_weights_are_fitted_where_the_card_has_none(tiny, tmp_path, quiet):
    shard = clean(tmp_path / "clean.tar")
    fitted, given = (
        check([str(shard)], CheckSettings(card, sample=150), quiet)
        for card in (replace(tiny[0], weights=None), tiny[0])
    )
    assert (fitted.card_weights, given.card_weights, fitted.n_fitted) == (False, True, 150)
    assert (
        fitted.scores["raw"].auc == given.scores["raw"].auc
        and fitted.scores["support"].auc == given.scores["support"].auc
    )
    assert fitted.scores["similarity"].auc != given.scores["similarity"].auc
    assert fitted.scores["similarity"].auc == pytest.approx(given.scores["similarity"].auc, abs=0.05)
    assert fitted.scores["similarity"].random.auc == given.scores["similarity"].random.auc
