"""A tiny random LLaVA-NeXT of the real classes: truncation, sides, newlines, batching."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)

from mmfilter.core.model.backbone import load_backbone
from mmfilter.core.model.codes import IMAGE, TEXT
from tests.conftest import picture

SIZES = [(112, 112), (56, 150), (200, 60), (80, 60)]
CAPTIONS = ["a red apple", "two dogs next to a tree", "cat", "a rocket in the night sky"]


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A saved LLaVA-NeXT of 4 layers with the embedded model's tokenizer; weights large enough to mix tokens."""
    from transformers import LlavaNextImageProcessorPil

    tokenizer = tiny[1].processor.tokenizer
    sides = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**sides, num_hidden_layers=3, image_size=56, patch_size=14, projection_dim=32),
        text_config=LlamaConfig(**sides, num_hidden_layers=4, vocab_size=len(tokenizer), max_position_embeddings=2048),
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
        image_token_index=tiny[1].image_token_id,
    )
    model = LlavaNextForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=config.image_grid_pinpoints)
    processor = LlavaNextProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", image_token="<image>", num_additional_image_tokens=1
    )
    path = tmp_path_factory.mktemp("llava_next")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def images() -> list[Image.Image]:
    return [Image.open(io.BytesIO(picture(i, size=size))).convert("RGB") for i, size in enumerate(SIZES)]


def test_truncated_states_equal_the_whole_models(folder):
    backbone = load_backbone(str(folder), 2)
    inputs = backbone.prepare(images(), CAPTIONS)
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    with torch.inference_mode():
        wanted = whole(**inputs.tensors, output_hidden_states=True).hidden_states[3]
        got = backbone.forward(inputs.tensors)
    real = inputs.tensors["attention_mask"].bool()
    assert torch.equal(got[real], wanted[real])
    assert len(backbone._layers) == 3


def test_newline_tokens_are_no_image_tokens(folder):
    """The first block's input at a newline is the learned constant itself, and nowhere else."""
    backbone = load_backbone(str(folder), 0)
    inputs = backbone.prepare(images(), CAPTIONS)
    caught = []
    handle = backbone._layers[0].register_forward_pre_hook(
        lambda _m, args, kwargs: caught.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.inference_mode():
        backbone.forward(inputs.tensors)
    handle.remove()
    constant = (caught[0] == backbone.model.model.image_newline).all(-1)
    is_placeholder = inputs.tensors["input_ids"] == backbone.image_token_id
    assert torch.equal((inputs.side == IMAGE), is_placeholder & ~constant)
    assert (is_placeholder & constant).sum(1).tolist() == [8, 8, 2, 6]


def test_a_batch_gives_the_states_of_single_pairs(folder):
    backbone = load_backbone(str(folder), 2)
    together = backbone.activations(backbone.prepare(images(), CAPTIONS))
    for i, (image, caption) in enumerate(zip(images(), CAPTIONS, strict=True)):
        alone = backbone.activations(backbone.prepare([image], [caption]))
        assert torch.allclose(alone.states, together.states[together.sample == i], atol=1e-4)
        tokenizer = backbone.processor.tokenizer
        ids = backbone.prepare([image], [caption])
        assert tokenizer.decode(ids.tensors["input_ids"][0][ids.side[0] == TEXT]).strip() == caption


def test_the_predicted_length_is_the_real_one(folder):
    backbone = load_backbone(str(folder), 0)
    for image in images():
        real = (backbone.prepare([image], ["x"]).tensors["input_ids"] == backbone.image_token_id).sum()
        assert backbone.n_image_tokens(image.width, image.height) == real
