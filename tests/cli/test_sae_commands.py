"""`mmfilter sae`: list, show, convert, fetch, and SAEs with options in `score`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants

from mmfilter.cli.app import main
from mmfilter.core.cards.cards import card_names, cards_folder
from mmfilter.core.cards.sae_options import make_options
from mmfilter.core.sae.layouts import NAMED
from mmfilter.core.sae.pretrained import load_sae, parse_hub

D, N = 6, 24


def weights() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(*shape, generator=g)
        for name, shape in (("W_enc", (D, N)), ("b_enc", (N,)), ("W_dec", (N, D)), ("b_dec", (D,)))
    }


@pytest.fixture
def mmdiff(tmp_path) -> Path:
    """A published file that leaves its k open."""
    torch.save(weights(), tmp_path / "text-only_layer_3.pt")
    return tmp_path / "text-only_layer_3.pt"


@pytest.fixture
def batchtopk(tmp_path) -> Path:
    """A training checkpoint of SAELens, whose threshold and norms are to be folded."""
    from safetensors.torch import save_file

    folder = tmp_path / "1000"
    folder.mkdir()
    save_file(weights() | {"topk_threshold": torch.tensor(1.5)}, folder / "sae_weights.safetensors")
    config = {"architecture": "batchtopk", "d_in": D, "d_sae": N, "k": 4, "rescale_acts_by_decoder_norm": True, "normalize_activations": "none",
              "metadata": {"sae_lens_version": "6.54.0", "model_name": "llava", "hook_name": "blocks.7.hook_resid_post", "l0": 4.2}}  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


# --- list --------------------------------------------------------------------------------------


def test_the_list_has_cards_and_published_saes(capsys):
    assert main(["sae", "list", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert {entry["name"] for entry in entries if entry["layout"] == "card"} == set(card_names())
    lmms = next(entry for entry in entries if entry["name"].startswith("lmms-lab"))
    assert (
        lmms["layout"] == "sparsify"
        and lmms["licence"] == "MIT"
        and lmms["layers"] == "24"
        and lmms["width"] == "131072, k 256"
    )
    assert lmms["open"] == "hf:lmms-lab/llama3-llava-next-8b-hf-sae-131k/model.layers.24"


def test_a_word_narrows_the_list(capsys):
    assert main(["sae", "list", "GEMMA"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("\t") == ["SAE", "base model", "layers", "trained on"]
    assert [line.split("\t")[0] for line in lines[1:5]] == ["gemma-3-12b", "gemma-3-27b", "gemma-3-4b", "paligemma2-3b"]
    assert {line.count("\t") for line in lines} == {3}
    assert any("gemma-scope-2-" in line for line in lines) and not any(
        "Goodfire" in line or "tiny" in line for line in lines
    )
    assert main(["sae", "list", "nothing-like-it"]) == 1
    assert (
        capsys.readouterr().err
        == "mmfilter: no SAE in the list has 'nothing-like-it' in any column; mmfilter sae list shows all\n"
    )


def test_the_registry_is_in_order():
    entries = yaml.safe_load((cards_folder() / "saes.yaml").read_text("utf-8"))["saes"]
    known = {"name", "base", "layers", "width", "layout", "trained_on", "licence", "open", "sae_options", "note"}
    for entry in entries:
        assert set(entry) <= known and {"name", "base", "layout", "open", "trained_on"} <= set(entry)
        assert entry["layout"] in NAMED, entry["name"]
        make_options(entry.get("sae_options") or {})
        if entry["open"].startswith("hf:"):
            parse_hub(entry["open"])
    assert len({entry["name"] for entry in entries}) == len(entries)


# --- show --------------------------------------------------------------------------------------


def test_show_says_what_it_is(batchtopk, capsys):
    assert main(["sae", "show", str(batchtopk), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    sae = load_sae(batchtopk)
    assert (said["d_model"], said["n_features"], said["activation"], said["k"]) == (D, N, "jumprelu", None)
    assert said["threshold"] == {"min": 1.5, "median": 1.5, "max": 1.5} and said["hash"] == sae.hash
    assert said["decoder_norms"]["max"] == pytest.approx(1, abs=1e-6) and said["dead_rows"] == 0
    assert said["metadata"]["stated_l0"] == 4.2 and said["metadata"]["layout"] == "saelens"
    assert said["metadata"]["folded"] == [
        "batchtopk as its frozen threshold 1.5",
        "decoder norms, so that every decoder row has norm 1",
    ]


def test_show_is_readable(batchtopk, capsys):
    assert main(["sae", "show", str(batchtopk)]) == 0
    out = capsys.readouterr().out
    for line in ("shape          6 -> 24 features", "activation     jumprelu", "model          llava", "hook point     blocks.7.hook_resid_post",
                 "stated L0      4.2", "thresholds     1.5 to 1.5, median 1.5", "folded         batchtopk as its frozen threshold 1.5"):  # fmt: skip
        assert f"\n{line}\n" in f"\n{out}"


def test_show_asks_for_what_is_open(mmdiff, capsys):
    assert main(["sae", "show", str(mmdiff)]) == 1
    said = capsys.readouterr().err
    assert (
        said
        == f"mmfilter: SAE '{mmdiff}' does not hold the k of its topk (MMDiff's README states 50); settle it with --sae-option k=NUMBER\n"
    )
    assert main(["sae", "show", str(mmdiff), "--sae-option", "k=5"]) == 0
    assert "activation     topk, k=5" in capsys.readouterr().out


# --- convert -----------------------------------------------------------------------------------


def test_convert_writes_what_opens_without_options(mmdiff, tmp_path, capsys):
    assert main(["sae", "convert", str(mmdiff), str(tmp_path / "new"), "--sae-option", "k=5"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'new'}\n"
    again = load_sae(tmp_path / "new")
    assert again.hash == load_sae(mmdiff, make_options({"k": 5})).hash
    assert again.metadata["converted_from"] == {
        "layout": "mmdiff",
        "source": "/".join(mmdiff.parts[-4:]),
        "options": {"k": 5},
    }
    assert {file.name for file in tmp_path.iterdir()} == {mmdiff.name, "new"}, "nothing is left behind"


def test_convert_says_what_it_folds(batchtopk, tmp_path, capsys):
    assert main(["sae", "convert", str(batchtopk), str(tmp_path / "new")]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "mmfilter: folded: batchtopk as its frozen threshold 1.5",
        "mmfilter: folded: decoder norms, so that every decoder row has norm 1",
    ]


def test_convert_replaces_only_an_sae_and_only_by_force(batchtopk, tmp_path, capsys):
    new = tmp_path / "new"
    assert main(["sae", "convert", "tiny", str(new)]) == 0
    before = load_sae(new).hash
    capsys.readouterr()
    assert main(["sae", "convert", str(batchtopk), str(new)]) == 1
    assert capsys.readouterr().err == f"mmfilter: '{new}' exists: name another destination, or --force to replace it\n"
    assert load_sae(new).hash == before
    assert main(["sae", "convert", str(batchtopk), str(new), "--force"]) == 0
    assert load_sae(new).hash == load_sae(batchtopk).hash != before
    (new / "thesis.tex").touch()
    assert main(["sae", "convert", "tiny", str(new), "--force"]) == 1
    assert "exists and is not an SAE's folder: name another destination" in capsys.readouterr().err
    assert (new / "thesis.tex").exists()


def test_a_failed_conversion_leaves_nothing(mmdiff, tmp_path):
    assert main(["sae", "convert", str(mmdiff), str(tmp_path / "new")]) == 1
    assert [file.name for file in tmp_path.iterdir()] == [mmdiff.name]


# --- fetch -------------------------------------------------------------------------------------


def test_fetch_prints_where_it_lies(batchtopk, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    base = tmp_path / "hub" / "models--me--sae"
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text("c" * 40)
    (base / "snapshots" / ("c" * 40)).mkdir(parents=True)
    batchtopk.rename(base / "snapshots" / ("c" * 40) / "1000")
    assert main(["sae", "fetch", "hf:me/sae/1000"]) == 0
    assert capsys.readouterr().out == f"{base / 'snapshots' / ('c' * 40) / '1000'}\n"
    assert main(["sae", "fetch", "hf:me/sae/2000"]) == 1
    assert "SAE 'hf:me/sae/2000' is not in the hub's cache" in capsys.readouterr().err


def test_fetch_is_for_the_hub(capsys):
    assert main(["sae", "fetch", "some/folder"]) == 1
    assert (
        capsys.readouterr().err
        == "mmfilter: SAE 'some/folder' cannot be fetched; expected hf:OWNER/REPO[@REVISION]/folder-or-file\n"
    )


# --- elsewhere ---------------------------------------------------------------------------------


def test_score_takes_an_sae_with_options(make_shard, tmp_path, capsys):
    """A file that leaves its k open, made of the embedded SAE, scores with k said; the run records it."""
    tiny = load_sae("tiny")
    torch.save(
        {name: getattr(tiny, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}, tmp_path / "text-only_layer_1.pt"
    )
    shard, run = make_shard(n=4), tmp_path / "run"
    arguments = ["score", str(shard), "--run", str(run), "--sae", str(tmp_path / "text-only_layer_1.pt")]
    assert main(arguments) == 1
    assert "settle it with --sae-option k=NUMBER" in capsys.readouterr().err
    assert main([*arguments, "--sae-option", "k=8"]) == 0
    settings = json.loads((run / "manifest.json").read_text())["settings"]
    assert settings["sae_options"] == {"k": 8} and settings["sae"].endswith("text-only_layer_1.pt")
    capsys.readouterr()
    assert main([*arguments, "--sae-option", "k=9"]) == 1
    assert "was made with other settings" in capsys.readouterr().err
    assert main([*arguments, "--sae-option", "kk=9"]) == 1
    assert "no SAE option 'kk'; did you mean 'k'?" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["list", "show", "eval", "convert", "fetch"])
def test_help_imports_nothing_heavy(command):
    script = f"import sys; from mmfilter.cli.app import main; main(['sae', {command!r}, '--help']); print([m for m in ('torch', 'transformers', 'huggingface_hub', 'yaml') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"
    assert f"Example: mmfilter sae {command} " in done.stdout
