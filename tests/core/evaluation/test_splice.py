"""The spliced loss against transformers' own logits and hand-made ablations, family by family."""

from __future__ import annotations

import pytest
import torch
import transformers

from mmfilter.core.evaluation.splice import caption_loss, reconstruction, sees_ahead, why_no_loss, zeros
from mmfilter.core.model.backbone import JointStream
from mmfilter.core.model.loading import LoadSettings, load_backbone
from mmfilter.core.sae.autoencoder import SAE
from mmfilter.core.sides import IMAGE, TEXT
from mmfilter.errors import ModelError
from tests.zoo import ZOO, build, picture, save

CAPTIONS = ["a red bus in the rain", "two cats sleeping on an old blue sofa by the window", "café ☕ on a table"]
LAYER = 1
NO_LOSS = {
    "blip2_t5": "'blip-2' is an encoder-decoder: captions go through its encoder, which predicts no tokens",
    "clip": "'clip' is a dual encoder and predicts no tokens",
    "siglip": "'siglip' is a dual encoder and predicts no tokens",
}
FIRST = ("llava", "qwen2_vl", "emu3", "gemma3")
"""Two plain families, one whose pictures go by size, one that bounds its logits"""
OTHERS = [
    name
    for name in ZOO
    if name not in (*FIRST, *NO_LOSS, "siglip2", "mllama", "florence2", "instructblip_t5", "smolvlm")
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*"),
]  # of the warnings of transformers' families there are many kinds


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    found = {}

    def make(name: str):
        if name not in found:
            transformers.logging.set_verbosity_error()
            specimen = build(name)
            folder = save(specimen, tmp_path_factory.mktemp(name))
            layer = -1 if name in ("clip", "siglip") else LAYER
            settings = LoadSettings(
                dtype=torch.float32 if "moe" in name else torch.float64, whole=True
            )  # torch groups experts in float32 only
            found[name] = specimen, load_backbone(str(folder), layer, prompt=specimen.prompt, settings=settings)
        return found[name]

    return make


def prepared(specimen, backbone):
    inputs = backbone.prepare([picture(i, specimen.sizes[i % 2]) for i in range(3)], CAPTIONS)
    tensors = {
        name: tensor.to(backbone.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in inputs.tensors.items()
    }
    return tensors, inputs.side


def by_hand(model, backbone: JointStream, tensors, side, change=None) -> list[float]:
    """Each caption's cross entropy, token by token, from the whole model's logits; `change` edits a block's states in place."""
    sums = [0.0] * len(side)
    for rows, part in backbone.parts(tensors):

        def edit(_block, _args, output, rows=rows):
            states = output[0] if isinstance(output, tuple) else output
            for i, row in enumerate(rows.tolist()):
                for p in range(side.shape[1]):
                    if side[row, p] in (IMAGE, TEXT):
                        states[i, p] = change(states[i, p].clone())

        handle = backbone.hooked.register_forward_hook(edit) if change else None
        with torch.inference_mode():
            logits = model(**part).logits.float()
        if handle:
            handle.remove()
        for i, row in enumerate(rows.tolist()):
            for p in range(1, side.shape[1]):
                if side[row, p] == TEXT:
                    sums[row] -= logits[i, p - 1].double().log_softmax(0)[part["input_ids"][i, p]].item()
    return sums


def check_family(specimen, backbone: JointStream) -> None:
    tensors, side = prepared(specimen, backbone)
    clean = caption_loss(backbone, tensors, side)
    assert clean.total.tolist() == pytest.approx(
        by_hand(specimen.model.to(backbone.dtype), backbone, tensors, side), rel=1e-5
    )
    assert clean.n_tokens.tolist() == (side == TEXT).sum(1).tolist()
    exact = caption_loss(backbone, tensors, side, lambda states: states)
    assert torch.equal(exact.total, clean.total)
    zeroed = caption_loss(backbone, tensors, side, zeros)
    assert zeroed.total.tolist() == pytest.approx(
        by_hand(backbone.model, backbone, tensors, side, torch.zeros_like), rel=1e-5
    )
    assert not torch.allclose(zeroed.total, clean.total, rtol=1e-3)


@pytest.mark.parametrize("name", FIRST)
def test_losses_equal_those_of_the_models_own_logits(made, name):
    specimen, backbone = made(name)
    check_family(specimen, backbone)
    assert not sees_ahead(backbone, *prepared(specimen, backbone))
    assert why_no_loss(backbone) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_losses_of_all_families(made, name):
    specimen, backbone = made(name)
    check_family(specimen, backbone)
    assert sees_ahead(backbone, *prepared(specimen, backbone)) == (name == "paligemma")


def test_a_model_that_reads_its_prompt_in_both_directions_is_found_out(made):
    specimen, backbone = made("paligemma")
    assert sees_ahead(backbone, *prepared(specimen, backbone))


def test_captions_of_one_token_cannot_tell(made):
    backbone = made("paligemma")[1]
    inputs = backbone.prepare([picture(0, (80, 60))], ["a"])
    assert (
        sees_ahead(
            backbone,
            {name: t.double() if t.is_floating_point() else t for name, t in inputs.tensors.items()},
            inputs.side,
        )
        is None
    )


@pytest.mark.parametrize("name", NO_LOSS)
def test_models_that_predict_no_tokens_say_so(made, name):
    assert why_no_loss(made(name)[1]) == NO_LOSS[name]


def test_a_stream_of_several_versions_says_so(made):
    class Stub:
        joint_stream = True
        model = type(
            "Model",
            (),
            {
                "config": type(
                    "Config", (), {"model_type": "gemma3n", "is_encoder_decoder": False, "altup_num_inputs": 4}
                )
            },
        )

    Stub.model.config.get_text_config = classmethod(lambda cls: cls)
    assert why_no_loss(Stub()) == "'gemma3n' keeps several versions of its stream, of which the SAE reconstructs one"


def test_a_perfect_sae_gives_the_clean_loss_and_chunks_do_not_matter(made, monkeypatch):
    specimen, backbone = made("llava")
    tensors, side = prepared(specimen, backbone)
    eye, none = torch.eye(32, dtype=torch.float64), torch.zeros(32, dtype=torch.float64)
    sae = SAE(torch.cat([eye, -eye], 1), torch.zeros(64, dtype=torch.float64), torch.cat([eye, -eye]), none)
    clean = caption_loss(backbone, tensors, side)
    assert torch.allclose(caption_loss(backbone, tensors, side, reconstruction(sae)).total, clean.total, rtol=1e-12)
    halved = SAE(sae.W_enc, sae.b_enc, sae.W_dec / 2, sae.b_dec)
    wanted = by_hand(backbone.model, backbone, tensors, side, lambda state: state / 2)
    assert caption_loss(backbone, tensors, side, reconstruction(halved)).total.tolist() == pytest.approx(
        wanted, rel=1e-5
    )
    monkeypatch.setattr("mmfilter.core.evaluation.splice.DENSE_CHUNK_ELEMENTS", 64 * 5)
    assert caption_loss(backbone, tensors, side, reconstruction(halved)).total.tolist() == pytest.approx(
        wanted, rel=1e-5
    )


def test_only_caption_tokens_reach_the_head(made):
    specimen, backbone = made("llava")
    tensors, side = prepared(specimen, backbone)
    seen = []
    handle = backbone.model.lm_head.register_forward_hook(
        lambda _head, args, _output: seen.append(tuple(args[0].shape))
    )
    caption_loss(backbone, tensors, side)
    handle.remove()
    assert seen == [(1, int((side == TEXT).sum()), 32)]


def test_a_whole_model_has_the_states_of_the_truncated_one_and_refuses_a_layer_that_is_not_there(made, tmp_path):
    specimen, backbone = made("llava")
    tensors, side = prepared(specimen, backbone)
    folder = save(specimen, tmp_path / "again")
    whole, cut = (
        load_backbone(str(folder), LAYER, prompt=specimen.prompt, settings=LoadSettings(dtype=torch.float64, whole=w))
        for w in (True, False)
    )
    with torch.inference_mode():
        assert torch.equal(cut.forward(tensors)[side >= 0], whole.forward(tensors)[side >= 0])
    assert whole.n_layers == 4 and cut.n_layers == LAYER + 1
    with pytest.raises(ModelError, match="layer 4 is not in the model, which has layers 0 to 3"):
        load_backbone(str(folder), 4, prompt=specimen.prompt, settings=LoadSettings(whole=True))


def test_captions_alone_go_through_the_same_weights(made):
    specimen, backbone = made("llava")
    alone = backbone.with_text_context("none")
    assert alone.model is backbone.model
    inputs = alone.prepare([picture(0, (80, 60))], CAPTIONS[:1])
    tensors, side = inputs.text_only
    loss = caption_loss(alone, tensors, side)
    text = "USER: \n{caption} ASSISTANT:".replace("{caption}", CAPTIONS[0])
    ids = specimen.processor.tokenizer(text, return_tensors="pt")["input_ids"]
    first = len(specimen.processor.tokenizer("USER: \n")["input_ids"])
    with torch.inference_mode():
        logits = backbone.model(input_ids=ids).logits[0].double().log_softmax(-1)
    wanted = -sum(logits[p - 1, ids[0, p]].item() for p in range(first, first + len(CAPTIONS[0].encode())))
    assert loss.total.tolist() == pytest.approx([wanted], rel=1e-5)
