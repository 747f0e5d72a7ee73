"""The backbone against the whole model: truncated states, token sides, batching, hostile captions."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from mmfilter.core.model.language_backbone import LanguageBackbone
from mmfilter.core.model.loading import load_backbone, model_hash
from mmfilter.core.sides import IMAGE, TEXT
from mmfilter.errors import ModelError
from tests.conftest import picture

CAPTIONS = [
    "a red apple",
    "face with tears of joy on a blue background",
    "tree",
    "\U0001f600 café, naïve",
    "house next to a dog",
]


def images(n: int = 5) -> list[Image.Image]:
    return [Image.open(io.BytesIO(picture(i, size=(40 + 9 * i, 60)))).convert("RGB") for i in range(n)]


def test_truncated_states_equal_the_whole_models(tiny):
    card, backbone, _ = tiny
    whole = AutoModelForImageTextToText.from_pretrained(card.model, dtype=torch.float32, local_files_only=True).eval()
    inputs = backbone.prepare(images(), CAPTIONS)
    with torch.inference_mode():
        wanted = whole(**inputs.tensors, output_hidden_states=True).hidden_states[card.layer + 1]
        got = backbone.forward(inputs.tensors)
    real = inputs.tensors["attention_mask"].bool()
    assert torch.equal(got[real], wanted[real])
    assert backbone.n_layers == card.layer + 1 < whole.config.text_config.num_hidden_layers


def test_every_token_is_on_its_side(tiny):
    _, backbone, _ = tiny
    tokenizer = backbone.processor.tokenizer
    inputs = backbone.prepare(images(), CAPTIONS)
    for ids, side, caption in zip(inputs.tensors["input_ids"], inputs.side, CAPTIONS, strict=True):
        assert tokenizer.decode(ids[side == TEXT]).strip() == caption.lower()
        assert set(ids[side == IMAGE].tolist()) == {backbone.image_token_id}
        assert tokenizer.bos_token_id in ids[side == -1]
    assert (inputs.tokens[:, 0] == 25).all()


def test_a_batch_gives_the_states_of_single_pairs(tiny):
    _, backbone, _ = tiny
    together = backbone.activations(backbone.prepare(images(), CAPTIONS))
    for i, (image, caption) in enumerate(zip(images(), CAPTIONS, strict=True)):
        alone = backbone.activations(backbone.prepare([image], [caption]))
        assert torch.allclose(alone.states, together.states[together.sample == i], atol=1e-5)


@pytest.mark.parametrize("caption", ["<image> of a <s>dog</s>", "<pad><pad> cat", "an <unk> thing"])
def test_control_tokens_in_captions_are_broken_up(tiny, caption):
    _, backbone, _ = tiny
    inputs = backbone.prepare(images(1), [caption])
    special = set(backbone.processor.tokenizer.all_special_ids) | {backbone.image_token_id}
    assert not special & set(inputs.tensors["input_ids"][0][inputs.side[0] == TEXT].tolist())
    assert inputs.tokens[0, 0] == 25


@pytest.mark.parametrize(
    ("prompt", "around"), [("<s>USER: <image>\n{caption}\nASSISTANT:", True), ("<s>{caption} <image>", True)]
)
def test_the_template_is_on_no_side(tiny, prompt, around):
    card, _, _ = tiny
    backbone = load_backbone(card.model, card.layer, prompt=prompt)
    inputs = backbone.prepare(images(), CAPTIONS)
    for ids, side, caption in zip(inputs.tensors["input_ids"], inputs.side, CAPTIONS, strict=True):
        assert backbone.processor.tokenizer.decode(ids[side == TEXT]).strip() == caption.lower()


def test_text_context_none_equals_the_caption_alone(tiny):
    card, _, _ = tiny
    backbone = load_backbone(card.model, card.layer, prompt=card.prompt, text_context="none")
    inputs = backbone.prepare(images(), CAPTIONS)
    got = backbone.activations(inputs)
    tokenizer = backbone.processor.tokenizer
    for i, caption in enumerate(CAPTIONS):
        ids = tokenizer("<s>" + caption, return_tensors="pt")
        with torch.inference_mode():
            wanted = backbone.forward({"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"]})[0, 1:]
        assert torch.allclose(got.states[(got.sample == i) & (got.side == TEXT)], wanted, atol=1e-5)


def test_a_model_without_card_uses_its_chat_template(tiny, tmp_path):
    card, _, _ = tiny
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(card.model, local_files_only=True)
    assert load_backbone(card.model, card.layer).prompt == "<image>\n{caption}"
    template = (
        "{% for m in messages %}{{ m.role }}:{% for c in m.content %}{% if c.type == 'image' %}<image>{% "
        "else %}{{ c.text }}{% endif %}{% endfor %}!{% endfor %}"
    )
    processor.chat_template = template
    model = AutoModelForImageTextToText.from_pretrained(card.model, local_files_only=True)
    assert LanguageBackbone(model, processor, 1).prompt == "user:<image>{caption}!"


ERRORS = {
    "no such layer": ({"layer": 9}, "layer 9 is not in the model, which has layers 0 to 3"),
    "no caption in the prompt": ({"prompt": "<image> hello"}, "prompt '<image> hello' has no {caption}"),
    "no such folder": ({"source": "/no/such/model"}, "model '/no/such/model' cannot be loaded"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_loaded_is_explained(tiny, case):
    changes, words = ERRORS[case]
    card = replace(tiny[0], **{k: v for k, v in changes.items() if k != "source"})
    with pytest.raises(ModelError) as error:
        load_backbone(changes.get("source", card.model), card.layer, prompt=card.prompt)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_missing_weights_are_an_error(tiny, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny[0].model, folder, ignore=shutil.ignore_patterns("sae"))
    tensors = load_file(folder / "model.safetensors")
    dropped = next(name for name in tensors if "layers.0" in name and "language_model" in name)
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != dropped},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ModelError, match="lacks 1 weights, first"):
        load_backbone(str(folder), 1)


def test_the_hash_of_a_model_sees_every_byte_and_every_commit(tmp_path):
    from types import SimpleNamespace

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    seen = {model_hash(str(tmp_path), None)}
    (tmp_path / "README.md").write_text("not part of the model")
    assert model_hash(str(tmp_path), None) in seen
    (tmp_path / "model.safetensors").write_bytes(b"weightz")
    seen |= {model_hash(str(tmp_path), None)}
    seen |= {model_hash("some/model", SimpleNamespace(_commit_hash=commit)) for commit in ("one", "two")}
    assert len(seen) == 4
