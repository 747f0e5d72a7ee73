"""Every family of the zoo through the real loading code: truncation, roles, patches, batching.

What is found is recorded as properties of the test report, from which the table in docs/models.md is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image, ImageDraw

from mmfilter.core.model.families import FAMILIES, family_name
from mmfilter.core.model.language_backbone import LanguageBackbone
from mmfilter.core.model.loading import load_backbone
from mmfilter.core.model.probe import changed_positions, check_roles
from mmfilter.core.model.stream import is_encoder_decoder
from mmfilter.core.model.towers import TwoTowers
from mmfilter.core.sides import IMAGE, TEXT
from mmfilter.errors import ModelError
from tests.zoo import ZOO, Specimen, build, fit_codebook, picture, save

CAPTIONS = ["a red bus in the rain", "two cats sleeping on an old blue sofa by the window", "café ☕ on a table"]
TOWERS, REFUSED = ("clip", "siglip", "siglip2"), ("mllama",)
STREAMS = [name for name in ZOO if name not in (*TOWERS, *REFUSED)]
LAYER = 1
VISION_MIXERS = (
    "out_proj.weight",
    "o_proj.weight",
    "attn.proj.weight",
    "proj_out.weight",
    "projection_layer.weight",
    "in_proj_weight",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*"),  # of transformers' families there are many kinds
]


@dataclass(frozen=True)
class Case:
    """A family as loaded by the product, and the whole model that it was saved from."""

    name: str
    folder: Path
    specimen: Specimen
    backbone: LanguageBackbone

    def pictures(self) -> list[Image.Image]:
        return [picture(i, self.specimen.sizes[i % 2]) for i in range(len(CAPTIONS))]


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    """Families that were made already."""
    return {}


@pytest.fixture
def case(request, cases, tmp_path_factory) -> Case:
    """One family, made and loaded once."""
    name = request.param
    if name not in cases:
        transformers.logging.set_verbosity_error()
        specimen = build(name)
        folder = save(specimen, tmp_path_factory.mktemp(name))
        cases[name] = Case(name, folder, specimen, load_backbone(str(folder), LAYER, prompt=specimen.prompt))
    return cases[name]


def streams(function: Any) -> Any:
    """Run a test for every family that has a joint stream."""
    return pytest.mark.parametrize("case", STREAMS, indirect=True)(function)


def whole_hidden_states(case: Case, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The untruncated model's own account of the state behind the layer."""
    with torch.inference_mode():
        out = case.specimen.model(**tensors, **case.backbone.decoder_start(tensors), output_hidden_states=True)
    out = getattr(out, "language_model_outputs", None) or out
    name = "encoder_hidden_states" if is_encoder_decoder(case.specimen.model.config) else "hidden_states"
    return out[name][LAYER + 1]


@streams
def test_truncated_states_equal_the_whole_models(case, record_property):
    worst = 0.0
    for image, caption in zip(case.pictures(), CAPTIONS, strict=True):
        tensors = case.backbone.prepare([image], [caption]).tensors
        real = tensors["attention_mask"].bool()
        worst = max(
            worst, float((case.backbone.forward(tensors)[real] - whole_hidden_states(case, tensors)[real]).abs().max())
        )
    record_property("family", family_name(case.specimen.model.config))
    record_property("class", type(case.specimen.model).__name__)
    record_property("truncated - whole", worst)
    assert worst <= 2e-5  # 0 but where a library routine depends on how memory is aligned


@streams
def test_later_layers_are_not_there(case):
    kept = {name for name, _ in case.backbone.model.named_parameters()}
    dropped = [name for name, _ in case.specimen.model.named_parameters() if name not in kept]
    assert case.backbone.n_layers == LAYER + 1
    blocks = {int(next(part for part in name.split(".") if part.isdigit())) for name in dropped}
    assert dropped and blocks == {2, 3}  # of 4 blocks, those behind the layer, and nothing else


@streams
def test_roles(case, record_property):
    """The caption's tokens decode to the caption; the tokens that follow the picture are those labelled image."""
    inputs = case.backbone.prepare(case.pictures(), CAPTIONS)
    tokenizer = case.backbone.processor.tokenizer
    for i, caption in enumerate(CAPTIONS):
        assert tokenizer.decode(inputs.tensors["input_ids"][i][inputs.side[i] == TEXT]) == caption
    changed, labelled = changed_positions(case.backbone)
    assert not (changed & ~labelled).any()
    assert changed.sum() >= 0.5 * labelled.sum() > 0  # codes and squashed borders may stay the same by chance
    check_roles(case.backbone)
    record_property("image tokens", int((inputs.side[0] == IMAGE).sum()))


@streams
def test_a_batch_gives_the_states_of_single_pairs(case, record_property):
    together = case.backbone.activations(case.backbone.prepare(case.pictures(), CAPTIONS))
    worst = 0.0
    for i, (image, caption) in enumerate(zip(case.pictures(), CAPTIONS, strict=True)):
        alone = case.backbone.activations(case.backbone.prepare([image], [caption]))
        worst = max(worst, float((alone.states - together.states[together.sample == i]).abs().max()))
    assert together.states.norm(dim=1).mean() > 1
    record_property("batched - alone", worst)
    assert worst <= 1e-4


SHAPES = [(240, 180), (150, 310), (420, 120)]
PLACED = [
    name
    for name in STREAMS
    if name not in ("blip2_opt", "blip2_t5", "instructblip_llama", "instructblip_t5", "idefics2", "florence2")
]
CELLS_APART = {"chameleon": 1.0, "emu3": 1.0}
"""The painted square is as large as a cell of these, and covers parts of its neighbours"""


@pytest.mark.parametrize("case", PLACED, indirect=True)
def test_boxes_are_where_the_picture_changes_the_tokens(case, record_property):
    """A vision tower without attention: a square painted at a token's place changes that token most."""
    specimen = without_mixing(build(case.name))
    backbone = LanguageBackbone(specimen.model, specimen.processor, 0, prompt=specimen.prompt)
    slack = CELLS_APART.get(case.name, 0.0)
    hits = [hit for shape in SHAPES for hit in painted(backbone, shape, slack)]
    record_property("boxes", f"{sum(hits)} of {len(hits)}" + (" within a cell" if slack else ""))
    assert len(hits) >= 12
    assert all(hits)


class Unchanged(torch.nn.Module):
    """In the place of a norm."""

    def forward(self, states: torch.Tensor, *_others: Any) -> torch.Tensor:
        return states


def without_mixing(specimen: Specimen) -> Specimen:
    """Take out of the vision tower what carries a place's content to another: attention; in VQ encoders norms and wide
    kernels."""
    with torch.no_grad():
        for name, weight in specimen.model.named_parameters():
            if "vqmodel.encoder" in name and weight.dim() >= 4 and weight.shape[-1] == 3:
                local = torch.zeros(3, 3)
                local[slice(0, 2) if "downsample" in name else 1, slice(0, 2) if "downsample" in name else 1] = 1
                weight.mul_(local)
            if name.endswith(VISION_MIXERS) and "language_model" not in name and "text_model" not in name:
                weight.zero_()
    if hasattr(specimen.model.config, "vocabulary_map"):
        for module in list(specimen.model.model.vqmodel.encoder.modules()):
            for name, child in module.named_children():
                if isinstance(child, torch.nn.GroupNorm):
                    setattr(module, name, Unchanged())
        fit_codebook(specimen)
    return specimen


def painted(backbone: LanguageBackbone, shape: tuple[int, int], slack: float) -> list[bool]:
    """For squares painted at some tokens' places: does the token whose box is there change most?"""
    canvas = picture(3, shape)
    boxes = backbone.boxes(backbone.prepare([canvas], ["x"]), 0)
    places = [i for i, box in enumerate(boxes) if box is not None and all(0.02 < edge < 0.98 for edge in _centre(box))]
    hits = []
    for i in places[:: max(1, len(places) // 8)]:
        x, y = (part * length for part, length in zip(_centre(boxes[i]), shape, strict=True))
        other = canvas.copy()
        ImageDraw.Draw(other).rectangle((x - 3, y - 3, x + 3, y + 3), fill=(255, 0, 255))
        inputs = backbone.prepare([canvas, other], ["x", "x"])
        first, second = (
            embedding[side == IMAGE]
            for embedding, side in zip(backbone.embedded(inputs.tensors), inputs.side, strict=True)
        )
        change = (first - second).norm(dim=1)
        if slack:  # how far a code changes says nothing, so all that do must be near
            spots = [boxes[j] for j in change.nonzero()[:, 0].tolist()]
            if spots:  # the code of a place may stay what it was
                hits.append(
                    all(spot is not None and _covers(spot, x / shape[0], y / shape[1], slack) for spot in spots)
                )
        else:
            found = boxes[int(change.argmax())]
            hits.append(found is not None and _covers(found, x / shape[0], y / shape[1]))
    return hits


def _centre(box: tuple[float, ...]) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _covers(box: tuple[float, ...], x: float, y: float, slack: float = 0.0) -> bool:
    wide, high = slack * (box[2] - box[0]), slack * (box[3] - box[1])
    return box[0] - wide <= x <= box[2] + wide and box[1] - high <= y <= box[3] + high


@pytest.mark.parametrize("case", ["llava_next_mistral"], indirect=True)
def test_newline_tokens_are_no_image_tokens(case):
    """The first block's input at a newline is the learned constant itself, and nowhere else."""
    inputs = case.backbone.prepare(case.pictures(), CAPTIONS)
    constant = (case.backbone.embedded(inputs.tensors) == case.backbone.model.model.image_newline).all(-1)
    is_placeholder = inputs.tensors["input_ids"] == case.backbone.image_token_id
    assert torch.equal(inputs.side == IMAGE, is_placeholder & ~constant)
    assert (is_placeholder & constant).sum(1).tolist() == [4, 8, 4]


@pytest.mark.parametrize("case", ["llava_next_mistral", "qwen2_vl", "gemma3", "llava"], indirect=True)
def test_the_predicted_length_is_the_real_one(case):
    for image in case.pictures():
        real = (case.backbone.prepare([image], ["x"]).tensors["input_ids"] == case.backbone.image_token_id).sum()
        assert case.backbone.n_image_tokens(image.width, image.height) == real


@pytest.mark.parametrize("case", ["qwen2_vl"], indirect=True)
def test_a_picture_that_the_processor_refuses_is_no_crash_when_lengths_are_guessed(case):
    assert case.backbone.n_image_tokens(2000, 8) == 0
    with pytest.raises(ValueError, match="aspect ratio"):
        case.backbone.prepare([Image.new("RGB", (2000, 8))], ["x"])


@pytest.mark.parametrize("case", ["blip2_opt"], indirect=True)
def test_latent_tokens_have_no_place(case):
    with pytest.raises(
        ModelError, match="image tokens of 'blip-2' have no place in the picture: a Q-Former or perceiver"
    ):
        case.backbone.boxes(case.backbone.prepare(case.pictures(), CAPTIONS), 0)


@pytest.mark.parametrize("case", ["paligemma"], indirect=True)
def test_a_text_alone_that_a_processor_cannot_take_is_explained(case):
    with pytest.raises(ModelError, match="takes no caption without an image: use --text-context image"):
        load_backbone(str(case.folder), LAYER, prompt=case.specimen.prompt, text_context="none")


def test_cross_attention_is_refused_with_the_reason(tmp_path):
    folder = save(build("mllama"), tmp_path)
    with pytest.raises(
        ModelError, match="'mllama' cannot be scored: it reads the picture through cross-attention layers"
    ):
        load_backbone(str(folder), LAYER)


def test_wrong_image_tokens_of_an_unknown_family_are_refused(tmp_path):
    """The check that an unverified family goes through, on a model whose config names the wrong token."""
    specimen = build("llava")
    backbone = LanguageBackbone(specimen.model, specimen.processor, LAYER, prompt=specimen.prompt)
    backbone.image_token_id = specimen.processor.tokenizer.convert_tokens_to_ids(":")
    with pytest.raises(ModelError, match="its image tokens are not where its config says"):
        check_roles(backbone)


def test_every_family_of_the_table_is_in_the_zoo_or_says_why_not():
    met = {family_name(build(name).model.config) for name in ZOO}
    assert set(FAMILIES) - met == {"gemma3n", "idefics", "git"}  # gemma3n needs timm; the others are refused


@pytest.mark.parametrize("name", TOWERS)
def test_both_towers_end_in_one_space(name, tmp_path, record_property):
    """Embeddings equal the model's own; patches and words are projected; a batch gives the states of single pairs."""
    specimen = build(name)
    backbone = load_backbone(str(save(specimen, tmp_path)), -1)
    pictures = [picture(i, specimen.sizes[i % 2]) for i in range(len(CAPTIONS))]
    inputs = backbone.prepare(pictures, CAPTIONS)
    found = backbone.activations(inputs)
    with torch.inference_mode():
        out = specimen.model(**inputs.tensors)
        wanted_image, wanted_text = (
            specimen.model.get_image_features(
                **{key: inputs.tensors[key] for key in inputs.tensors if key not in ("input_ids", "attention_mask")}
            ),
            specimen.model.get_text_features(
                **{key: inputs.tensors[key] for key in inputs.tensors if key in ("input_ids", "attention_mask")}
            ),
        )
    wanted_image, wanted_text = (getattr(wanted, "pooler_output", wanted) for wanted in (wanted_image, wanted_text))
    worst = 0.0
    for i, (image, caption) in enumerate(zip(pictures, CAPTIONS, strict=True)):
        mine = found.sample == i
        image_states, text_states = (found.states[mine & (found.side == side)] for side in (IMAGE, TEXT))
        assert torch.allclose(image_states[0], wanted_image[i], atol=1e-5) and torch.allclose(
            text_states[-1], wanted_text[i], atol=1e-5
        )
        normal = torch.nn.functional.normalize
        assert torch.allclose(normal(image_states[0], dim=0), out.image_embeds[i], atol=1e-5)
        assert len(text_states) == backbone.n_caption_tokens(caption) + 1  # and the embedding
        alone = backbone.activations(backbone.prepare([image], [caption]))
        worst = max(worst, float((alone.states - found.states[mine]).abs().max()))
        assert len(backbone.boxes(inputs, i)) == len(image_states)
    assert found.states.shape[1] == backbone.d_model == out.image_embeds.shape[1]
    record_property("family", name)
    record_property("class", type(specimen.model).__name__)
    record_property("batched - alone", worst)
    assert worst <= 1e-4


@pytest.mark.parametrize("name", TOWERS)
def test_patches_of_a_tower_are_where_the_picture_changes_them(name, record_property):
    specimen = build(name)
    with torch.no_grad():
        for parameter, weight in specimen.model.named_parameters():
            if parameter.startswith("vision_model.encoder") and parameter.endswith("out_proj.weight"):
                weight.zero_()
    backbone = TwoTowers(specimen.model, specimen.processor)
    hits = []
    for shape in SHAPES:
        canvas = picture(3, shape)
        boxes = backbone.boxes(backbone.prepare([canvas], ["x"]), 0)
        places = [
            i for i, box in enumerate(boxes) if box is not None and all(0.02 < edge < 0.98 for edge in _centre(box))
        ]
        for i in places[:: max(1, len(places) // 8)]:
            x, y = (part * length for part, length in zip(_centre(boxes[i]), shape, strict=True))
            other = canvas.copy()
            ImageDraw.Draw(other).rectangle((x - 3, y - 3, x + 3, y + 3), fill=(255, 0, 255))
            found = backbone.activations(backbone.prepare([canvas, other], ["x", "x"]))
            first, second = (found.states[(found.sample == j) & (found.side == IMAGE)] for j in (0, 1))
            changed = int((first - second)[1:].norm(dim=1).argmax()) + 1  # the embedding is of the whole picture
            hits.append(_covers(boxes[changed], x / shape[0], y / shape[1]))
    record_property("boxes", f"{sum(hits)} of {len(hits)}")
    assert len(hits) >= 12 and all(hits)


def test_captions_of_a_dual_encoder_never_see_an_image():
    specimen = build("clip")
    backbone = TwoTowers(specimen.model, specimen.processor)
    assert backbone.joint_stream is None
    assert backbone.with_text_context("none") is backbone
    with pytest.raises(ModelError, match="'clip' is a dual encoder, whose captions never see an image"):
        backbone.with_text_context("image")


def test_a_dual_encoder_has_no_layer_in_the_middle(tmp_path):
    folder = save(build("clip"), tmp_path)
    with pytest.raises(
        ModelError, match="'clip' has two towers and no layer 3 in common: its SAE sits on the shared space, --layer -1"
    ):
        load_backbone(str(folder), 3)
