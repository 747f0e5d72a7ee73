"""The door to SAE files: what people call an SAE, what a broken download leaves, and pickles that would run code."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from mmfilter.core.cards.cards import load_card
from mmfilter.core.cards.sae_options import SAEOptions, make_options, parse_options
from mmfilter.core.sae import pretrained
from mmfilter.core.sae.autoencoder import SAE
from mmfilter.core.sae.pretrained import HubPlace, load_sae, parse_hub
from mmfilter.errors import MissingExtra, SAEError

D, N = 6, 24


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(**options) -> SAE:
    return SAE(normal(D, N), normal(N, seed=1), normal(N, D, seed=2), normal(D, seed=3), **options)


def states() -> torch.Tensor:
    return normal(17, D, seed=4)


def same(ours: SAE, wanted: SAE) -> None:
    assert torch.equal(ours.encode(states()).dense(), wanted.encode(states()).dense())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub("owner/repo") -> folder: the top of a repository in a cache of our own, without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def repository(name: str, commit: str = "c" * 40) -> Path:
        base = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (base / "refs").mkdir(parents=True, exist_ok=True)
        (base / "refs" / "main").write_text(commit)
        (base / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
        return base / "snapshots" / commit

    return repository


# --- names -------------------------------------------------------------------------------------


def test_a_folder_a_file_and_a_path_are_the_same_sae(tmp_path):
    make().save(tmp_path / "sae")
    for source in (tmp_path / "sae", str(tmp_path / "sae"), tmp_path / "sae" / "sae_weights.safetensors"):
        same(load_sae(source), make())


def test_a_card_names_its_sae(tiny):
    card, _, sae = tiny
    assert load_sae("tiny").hash == sae.hash == load_sae(card.sae).hash


def test_a_card_carries_options(tmp_path, monkeypatch):
    torch.save(
        {"W_enc": normal(D, N), "b_enc": normal(N), "W_dec": normal(N, D), "b_dec": normal(D)},
        tmp_path / "text-only_layer_3.pt",
    )
    (tmp_path / "mine.yaml").write_text("model: m\nlayer: 3\nsae: text-only_layer_3.pt\nsae_options: {k: 4}\n")
    monkeypatch.setattr("mmfilter.core.cards.cards.cards_folder", lambda: tmp_path)
    assert load_card("mine").sae_options == SAEOptions(k=4)
    assert load_sae("mine").k == 4 and load_sae("mine", SAEOptions(k=7)).k == 7


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("hf:a/b", HubPlace("a/b", None, "")),
        ("hf:a/b/c/d.pt", HubPlace("a/b", None, "c/d.pt")),
        ("hf:a-1/b.2_x@main/layer_1/width_16k/", HubPlace("a-1/b.2_x", "main", "layer_1/width_16k")),
    ],
)
def test_hub_names(source, place):
    assert parse_hub(source) == place
    assert str(place) == source.rstrip("/")


@pytest.mark.parametrize("source", ["hf:a", "hf:a/b@x y/c", "hf:a/b/../../c"])
def test_what_is_no_hub_name(source):
    with pytest.raises(SAEError, match=r"is not hf:OWNER/REPO\[@REVISION\]/folder-or-file"):
        parse_hub(source)


def test_the_hub_cache_without_a_network(hub):
    make(activation="topk", k=3).save(hub("me/sae") / "layers" / "3")
    sae = load_sae("hf:me/sae/layers/3")
    same(sae, make(activation="topk", k=3))
    assert sae.metadata["source"] == f"hf:me/sae@{'c' * 40}/layers/3"
    same(load_sae(f"hf:me/sae@{'c' * 40}/layers/3/sae_weights.safetensors"), make(activation="topk", k=3))


def test_what_the_cache_lacks_says_how_to_get_it(hub):
    with pytest.raises(
        SAEError,
        match=r"^SAE 'hf:a/b/c' is not in the hub's cache and cannot be downloaded now: mmfilter sae fetch "
        r"hf:a/b/c where",
    ):
        load_sae("hf:a/b/c")
    hub("me/sae")
    with pytest.raises(
        SAEError,
        match=r"^SAE 'hf:me/sae/c' is not in the hub's cache, which has other parts of me/sae: mmfilter sae "
        r"fetch hf:me/sae/c$",
    ):
        load_sae("hf:me/sae/c")


@pytest.mark.parametrize(
    ("path", "wanted", "not_wanted"),
    [
        (
            "layers.24",
            {"layers.24/cfg.json", "layers.24/sae.safetensors", "config.json"},
            {"layers.2/cfg.json", "layers.240/sae.safetensors"},
        ),
        (
            "a/L15R",
            {"a/L15R/hyperparams.json", "a/L15R/checkpoints/final.safetensors", "a/config.json"},
            {"a/L16R/hyperparams.json", "config.json"},
        ),
        ("layer3.sae.pt", {"layer3.sae.pt", "config.json"}, {"layer4.sae.pt", "x/cfg.json"}),
        ("t/ae.pt", {"t/ae.pt", "t/config.json", "config.json"}, {"t/other.pt", "u/config.json"}),
        ("", {"sae.pt", "config.json"}, {"layer_1/params.npz", "a/b/c"}),
    ],
)
def test_only_what_belongs_to_the_sae_is_downloaded(path, wanted, not_wanted):
    from huggingface_hub.utils import filter_repo_objects

    allowed, ignored = pretrained.hub_patterns(path)
    assert set(filter_repo_objects(wanted | not_wanted, allow_patterns=allowed, ignore_patterns=ignored)) == wanted


def test_which_of_several(tmp_path):
    for layer in (1, 12):
        make(activation="topk", k=layer).save(tmp_path / f"blocks.{layer}.hook_resid_post")
    with pytest.raises(
        SAEError,
        match=r"is not an SAE itself but holds some below: blocks.1.hook_resid_post/sae_weights.safetensors, "
        r"blocks.12.*--sae-option layer=N",
    ):
        load_sae(tmp_path)
    assert load_sae(tmp_path, SAEOptions(layer=12)).k == 12
    with pytest.raises(
        SAEError, match=r"has no file of layer 2; it has blocks.1.hook_resid_post/sae_weights.safetensors"
    ):
        load_sae(tmp_path, SAEOptions(layer=2))


def test_several_files_in_one_folder(tmp_path):
    for layer in (3, 13):
        torch.save(
            {"W_enc": normal(N, D), "b_enc": normal(N), "W_dec": normal(D, N), "b_dec": normal(D)},
            tmp_path / f"layer{layer}.sae.pt",
        )
    with pytest.raises(
        SAEError,
        match=r"holds several SAEs: layer13.sae.pt, layer3.sae.pt; name one, or its layer with --sae-option layer=N",
    ):
        load_sae(tmp_path, SAEOptions(k=2))
    assert load_sae(tmp_path, SAEOptions(k=2, layer=3)).metadata["layer"] == 3


# --- SAELens' registry -------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_saelens_opens_what_its_registry_knows(hub):
    """A Llama Scope SAE by SAELens' loader, with its scale folded; and the same files by ours, in the model's units."""
    package = peer()
    folder = hub("fnlp/Llama3_1-8B-Base-LXR-8x") / "Llama3_1-8B-Base-L15R-8x"
    scale = package.loading.pretrained_saes_directory.get_norm_scaling_factor("llama_scope_lxr_8x", "l15r_8x")
    decoder = normal(D, N, seed=2)
    weights = {
        "encoder.weight": normal(N, D),
        "encoder.bias": normal(N, seed=1),
        "decoder.weight": decoder / decoder.norm(dim=0),
        "decoder.bias": normal(D, seed=3),
    }
    (folder / "checkpoints").mkdir(parents=True)
    save_file(weights, folder / "checkpoints" / "final.safetensors")
    config = {
        "d_model": D,
        "d_sae": N,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.3,
        "norm_activation": "dataset-wise",
        "hook_point_in": "blocks.15.hook_resid_post",
        "dataset_average_activation_norm": {"in": D**0.5 / scale, "out": D**0.5 / scale},
        "apply_decoder_bias_to_pre_encoder": False,
    }
    (folder / "hyperparams.json").write_text(json.dumps(config))
    theirs, ours = (
        load_sae("saelens:llama_scope_lxr_8x/l15r_8x"),
        load_sae("hf:fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L15R-8x"),
    )
    with torch.no_grad():
        peers = package.SAE.from_pretrained("llama_scope_lxr_8x", "l15r_8x")
        codes = peers.encode(states())
        torch.testing.assert_close(theirs.encode(states()).dense(), codes, atol=1e-5, rtol=1e-5)
        found = theirs.decode(theirs.encode(states()), states())
        torch.testing.assert_close(found, peers.decode(codes), atol=1e-5, rtol=1e-5)
    assert (
        theirs.metadata["hook_name"] == "blocks.15.hook_resid_post"
        and theirs.metadata["source"] == "saelens:llama_scope_lxr_8x/l15r_8x"
    )
    assert int((codes > 0).sum()) > 17
    # SAELens' activations are larger by the scale; the reconstructions are the same
    torch.testing.assert_close(ours.encode(states()).dense() * scale, codes, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(ours.decode(ours.encode(states()), states()), found, atol=1e-5, rtol=1e-5)


def peer():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = pytest.importorskip("sae_lens")
    return package


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        ("GatedSAE", {}),
        ("TopKSAE", {"k": 4, "rescale_acts_by_decoder_norm": True}),
        ("StandardSAE", {"normalize_activations": "layer_norm"}),
    ],
)
def test_a_saelens_object_becomes_ours(cls, options):
    package = peer()
    from mmfilter.core.sae.saelens_registry import convert

    theirs = getattr(package, cls)(getattr(package, f"{cls}Config")(d_in=D, d_sae=N, **options))
    with torch.no_grad():
        for i, parameter in enumerate(theirs.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=i))
        codes = theirs.encode(states())
        torch.testing.assert_close(
            convert(theirs, "x").encode(states(), max_active=N).dense(), codes, atol=1e-5, rtol=1e-5
        )
    assert int((codes > 0).sum()) > 17


@pytest.mark.filterwarnings("ignore")
def test_what_saelens_cannot_open_is_one_line(hub):
    peer()
    with pytest.raises(SAEError, match=r"^SAELens cannot open 'saelens:llama_scope_lxr_8x/l15r_8x': "):
        load_sae("saelens:llama_scope_lxr_8x/l15r_8x")
    with pytest.raises(SAEError, match="is not saelens:RELEASE/ID"):
        load_sae("saelens:release")


def test_without_saelens_the_line_to_type_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(
        MissingExtra, match=r"SAE 'saelens:a/b' needs an optional package: pip install 'mmfilter\[sae-lens\]'"
    ):
        load_sae("saelens:a/b")


# --- broken files ------------------------------------------------------------------------------


def saved(folder: Path) -> Path:
    make().save(folder)
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


BROKEN = {
    "weights missing": (
        lambda p: (p / "sae_weights.safetensors").unlink(),
        "has a configuration but no weights, a download that stopped: download it again",
    ),
    "stopped": (
        lambda p: (p / "sae_weights.safetensors").rename(p / "sae.incomplete"),
        "has no weights, but 'sae.incomplete', a download that stopped",
    ),
    "weights empty": (
        lambda p: (p / "sae_weights.safetensors").write_bytes(b""),
        "sae_weights.safetensors' is empty, a download that stopped: download it again",
    ),
    "weights cut": (lambda p: cut(p / "sae_weights.safetensors"), "sae_weights.safetensors' is damaged or cut short"),
    "lfs": (
        lambda p: (p / "sae_weights.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        ),
        "is a git-lfs pointer, not the weights: run `git lfs pull` in that repository",
    ),
    "web page": (
        lambda p: (p / "sae_weights.safetensors").write_text("<!DOCTYPE html><title>404</title>"),
        "is a web page, not weights",
    ),
    "config empty": (lambda p: (p / "cfg.json").write_text(""), "cfg.json' is empty, a download that stopped"),
    "config cut": (lambda p: cut(p / "cfg.json"), "cfg.json' is damaged: "),
    "config a list": (lambda p: (p / "cfg.json").write_text("[]"), "holds list, expected a JSON object"),
    "config missing": (
        lambda p: (p / "cfg.json").unlink(),
        "is in no layout known here: sae_weights.safetensors holds W_dec, W_enc, b_dec, b_enc; ",
    ),
    "nothing": (
        lambda p: [file.unlink() for file in p.iterdir()],
        "has no weights: a folder of an SAE holds one of sae_weights.safetensors, sae.safetensors",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_download_is_one_line_with_the_next_step(name, tmp_path):
    damage, words = BROKEN[name]
    damage(saved(tmp_path / "sae"))
    with pytest.raises(SAEError) as error:
        load_sae(tmp_path / "sae")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    (tmp_path / "x.pt.incomplete").touch()
    with pytest.raises(
        SAEError, match=r"x.pt' is not there; 'x.pt.incomplete' beside it is a download that stopped: download it again"
    ):
        load_sae(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["x.pt", "x.npz"])
def test_a_cut_file_is_told(name, tmp_path):
    if name == "x.pt":
        torch.save({"a": torch.zeros(1000)}, tmp_path / name)
    else:
        np.savez(tmp_path / name, a=np.zeros(1000))
    cut(tmp_path / name)
    with pytest.raises(SAEError, match="is damaged or cut short") as error:
        load_sae(tmp_path / name)
    assert "\n" not in str(error.value)


# --- pickles -----------------------------------------------------------------------------------


class Danger:
    """Unpickled by Python it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class VisionModelSAERunnerConfig:
    """Like ViT-Prisma's, whose legacy files hold the object."""

    def __init__(self) -> None:
        self.__dict__.update(
            architecture="standard",
            activation_fn_str="relu",
            activation_fn_kwargs={},
            normalize_activations="none",
            d_in=D,
            expansion_factor=N // D,
            hook_point_layer=9,
            layer_subtype="hook_resid_post",
            model_name="clip",
            is_transcoder=False,
        )


def legacy(path: Path, *, danger: Path | None = None) -> Path:
    weights = {
        "W_enc": normal(D, N),
        "b_enc": normal(N, seed=1),
        "W_dec": normal(N, D, seed=2),
        "b_dec": normal(D, seed=3),
    }
    torch.save(
        {"cfg": VisionModelSAERunnerConfig(), "state_dict": weights} | ({"extra": Danger(danger)} if danger else {}),
        path,
    )
    return path


def test_a_pickle_with_more_than_tensors_is_refused_with_the_way_to_convert_it(tmp_path):
    path = legacy(tmp_path / "sae.pt")
    with pytest.raises(SAEError) as error:
        load_sae(path)
    said = (
        f"SAE file '{path}' is a pickle that holds more than tensors (unsupported global: "
        f"tests.core.sae.test_pretrained.VisionModelSAERunnerConfig)"
    )
    assert (
        str(error.value)
        == f"{said} and could run code: mmfilter sae convert {path} DST --sae-option allow_pickle=true "
        f"makes a safe folder of it"
    )


def test_a_pickle_opens_for_conversion_and_even_then_runs_nothing(tmp_path):
    path = legacy(tmp_path / "sae.pt", danger=tmp_path / "made")
    sae = load_sae(path, SAEOptions(allow_pickle=True), convert=True)
    assert not (tmp_path / "made").exists()
    same(sae, make())
    assert sae.metadata["layout"] == "vit_prisma" and sae.metadata["hook_name"] == "blocks.9.hook_resid_post"
    pickle.loads(pickle.dumps(Danger(tmp_path / "made")))
    assert (tmp_path / "made").exists(), "the danger was none"


def test_a_pickle_is_for_conversion_only(tmp_path):
    with pytest.raises(
        SAEError,
        match=r"^SAE option allow_pickle is for conversion only: mmfilter sae convert SRC DST --sae-option "
        r"allow_pickle=true, then use DST$",
    ):
        load_sae(legacy(tmp_path / "sae.pt"), SAEOptions(allow_pickle=True))


@pytest.mark.parametrize("zipped", [True, False])
def test_both_formats_of_pytorch(zipped, tmp_path):
    weights = {
        "W_enc": normal(D, N),
        "b_enc": normal(N, seed=1),
        "W_dec": normal(N, D, seed=2),
        "b_dec": normal(D, seed=3),
    }
    torch.save(weights, tmp_path / "sae.pt", _use_new_zipfile_serialization=zipped)
    same(load_sae(tmp_path, SAEOptions(layout="plain", activation="relu", subtract_b_dec=True)), make())


def test_a_whole_module_is_told(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "sae.pt")
    with pytest.raises(
        SAEError,
        match=r"is a pickle that holds more than tensors \(unsupported global: torch.nn.modules.linear.Linear\)",
    ):
        load_sae(tmp_path / "sae.pt")
    with pytest.raises(
        SAEError,
        match=r"holds an object of class Linear, expected a dictionary of tensors: save its state_dict\(\) instead",
    ):
        load_sae(tmp_path / "sae.pt", SAEOptions(allow_pickle=True), convert=True)


@pytest.mark.parametrize("options", [SAEOptions(), SAEOptions(allow_pickle=True)])
def test_a_pickle_that_is_no_pytorch_file(options, tmp_path):
    (tmp_path / "sae.pkl").write_bytes(pickle.dumps({"a": Danger(tmp_path / "made")}))
    with pytest.raises(
        SAEError, match=r"sae.pkl' is a pickle but not a PyTorch file: save its tensors with torch.save or safetensors"
    ) as error:
        load_sae(tmp_path / "sae.pkl", options, convert=True)
    assert not (tmp_path / "made").exists() and "\n" not in str(error.value)


def test_an_npz_with_objects_is_refused(tmp_path):
    np.savez(tmp_path / "params.npz", W_enc=np.array([Danger(tmp_path / "made")], dtype=object))
    with pytest.raises(SAEError, match="holds Python objects, which an npz of weights does not need: refused"):
        load_sae(tmp_path / "params.npz", SAEOptions(allow_pickle=True), convert=True)
    assert not (tmp_path / "made").exists()


# --- options -----------------------------------------------------------------------------------


def test_options_are_parsed_by_kind():
    parsed = parse_options(["k=5", "scale=1.5", "subtract_b_dec=false", "layout=plain", "normalisation=layer_norm"])
    assert parsed == SAEOptions(k=5, scale=1.5, subtract_b_dec=False, layout="plain", normalisation="layer_norm")
    assert parsed.stated() == {
        "k": 5,
        "scale": 1.5,
        "subtract_b_dec": False,
        "layout": "plain",
        "normalisation": "layer_norm",
    }
    assert make_options({"k": 5, "allow_pickle": True}) == SAEOptions(k=5, allow_pickle=True)


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("k", "SAE option 'k' is not KEY=VALUE; the keys are layout, activation, k, threshold, scale"),
        ("tresh=1", "no SAE option 'tresh'; did you mean 'threshold'? There is layout, activation"),
        ("zzz=1", "no SAE option 'zzz'; There is layout"),
        ("k=many", "SAE option k='many': expected a whole number"),
        ("k=0", "SAE option k=0 must be above 0"),
        ("scale=-1", "SAE option scale=-1.0 must be above 0"),
        ("scale=big", "SAE option scale='big': expected a number"),
        ("subtract_b_dec=maybe", "SAE option subtract_b_dec='maybe': expected true or false"),
        ("activation=gelu", "SAE option activation='gelu': expected one of relu, topk, batchtopk, jumprelu"),
    ],
)
def test_a_wrong_option_is_one_line(statement, words):
    with pytest.raises(SAEError) as error:
        parse_options([statement])
    assert words in str(error.value)
