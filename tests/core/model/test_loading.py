"""How a model is loaded: attention, spreading, compiling, what is refused and in which words."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mmfilter.core.model.loading import LoadSettings, load_backbone
from mmfilter.errors import MissingExtra, ModelError
from tests.zoo import build, picture, save

pytestmark = pytest.mark.slow

PROMPT = "USER: <image>\n{caption} ASSISTANT:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(build("llava"), tmp_path_factory.mktemp("llava"))


def states(folder, **settings) -> torch.Tensor:
    backbone = load_backbone(str(folder), 1, prompt=PROMPT, settings=LoadSettings(**settings))
    pictures: list[Image.Image] = [picture(i, (80, 60)) for i in range(2)]
    return backbone.activations(backbone.prepare(pictures, ["a red bus", "two cats on a sofa"])).states


def test_attention_implementations_agree(folder):
    assert torch.allclose(states(folder), states(folder, attention="eager"), atol=1e-4)


def test_a_spread_model_gives_the_same_states(folder):
    pytest.importorskip("accelerate")
    assert torch.equal(states(folder), states(folder, device_map="auto").cpu())


def test_bfloat16_is_close(folder):
    exact, rough = states(folder), states(folder, dtype=torch.bfloat16)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*")
def test_compiled_blocks_give_the_same_states(folder):
    assert torch.allclose(states(folder), states(folder, compile=True), atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_compiled_towers_give_the_same_embeddings(name, tmp_path, monkeypatch):
    specimen = build(name)
    folder = save(specimen, tmp_path)
    compiled: list[torch.nn.Module] = []
    compile_block = torch.nn.Module.compile

    def recorded(block, **options):
        compiled.append(block)
        compile_block(block, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", recorded)
    plain, fast = (load_backbone(str(folder), -1, settings=LoadSettings(compile=way)) for way in (False, True))
    towers = (fast.model.text_model.encoder.layers, fast.model.vision_model.encoder.layers)
    assert compiled == [block for tower in towers for block in tower]
    pictures = [picture(i, size) for i, size in enumerate(specimen.sizes)]
    captions = ["a red bus", "two cats on a sofa"][: len(pictures)]
    ours, theirs = (each.activations(each.prepare(pictures, captions)).states for each in (fast, plain))
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_flash_attention_that_is_not_there_names_the_option(folder):
    with pytest.raises(ModelError, match=r"--attn flash_attention_2 is not available here .*; use --attn sdpa"):
        states(folder, attention="flash_attention_2")


def test_spreading_without_accelerate_names_the_extra(folder, monkeypatch):
    monkeypatch.setattr("transformers.integrations.accelerate.is_accelerate_available", lambda *_: False)
    monkeypatch.setattr("transformers.modeling_utils.is_accelerate_available", lambda *_: False)
    with pytest.raises(
        MissingExtra, match=r"--device-map needs an optional package: pip install 'mmfilter\[device-map\]'"
    ):
        states(folder, device_map="auto")


@pytest.mark.parametrize("layer", [4, -1])
def test_a_layer_that_is_not_there(folder, layer):
    with pytest.raises(ModelError, match=f"layer {layer} is not in the model, which has layers 0 to 3"):
        load_backbone(str(folder), layer)


def test_a_hub_id_that_is_not_in_the_cache(monkeypatch):
    with pytest.raises(
        ModelError, match=r"model 'nobody/nothing' cannot be loaded \(.*\); fetch it with: hf download nobody/nothing"
    ):
        load_backbone("nobody/nothing", 1)


@pytest.mark.parametrize(
    ("missing", "said"), [("model.safetensors", "safetensors"), ("config.json", "config.json"), ("tokenizer.json", "")]
)
def test_a_half_downloaded_folder(folder, tmp_path, missing, said):
    shutil.copytree(folder, tmp_path / "half")
    (tmp_path / "half" / missing).unlink()
    with pytest.raises(
        ModelError,
        match=rf"cannot be loaded \(.*{said}.*\); it must hold config.json, \*.safetensors, tokenizer and "
        rf"processor files",
    ):
        load_backbone(str(tmp_path / "half"), 1)


def test_damaged_weights(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_backbone(str(tmp_path / "cut"), 1)


def test_pickled_weights_are_not_opened(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"cannot be loaded \(.*safetensors"):
        load_backbone(str(tmp_path / "pickled"), 1)


def test_foreign_code_runs_on_request_only(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "foreign")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "theirs",
        "auto_map": {"AutoConfig": "theirs.Config", "AutoModelForImageTextToText": "theirs.Model"},
    }
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(config))
    code = (
        "from transformers import LlavaConfig, LlavaForConditionalGeneration\n\n\nclass "
        "Config(LlavaConfig):\n    model_type = 'theirs'\n\n\n"
    )
    code += "class Model(LlavaForConditionalGeneration):\n    config_class = Config\n"
    (tmp_path / "foreign" / "theirs.py").write_text(code)
    weights = {name: tensor.contiguous() for name, tensor in build("llava").model.state_dict().items()}
    save_file(weights, tmp_path / "foreign" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="give --trust-remote-code if you trust its authors"):
        states(tmp_path / "foreign")
    assert torch.equal(states(tmp_path / "foreign", trust_remote_code=True), states(folder))


def test_a_model_without_pictures_is_refused(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match="model type 'llama' cannot be scored: transformers has no image-text model of this type"
    ):
        load_backbone(str(tmp_path), 0)
