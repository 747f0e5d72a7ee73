"""`mmfilter sae eval`: what it prints, as text and as JSON, and what it refuses."""

from __future__ import annotations

import contextlib
import io
import json

import pytest

from mmfilter.cli.app import main
from mmfilter.core.cards.cards import load_card
from mmfilter.core.sae.autoencoder import SAE
from mmfilter.core.sae.pretrained import load_sae

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outputs():
    """The command's words and JSON on the example shards, with all that can be asked for."""
    arguments = [
        "sae",
        "eval",
        "tiny",
        "examples/shards/*.tar",
        "--sample",
        "20",
        "--text-only",
        "--also",
        load_card("tiny").model,
    ]
    words, notes, values, ignored = (io.StringIO() for _ in range(4))
    with contextlib.redirect_stdout(words), contextlib.redirect_stderr(notes):
        assert main(arguments) == 0
    with contextlib.redirect_stdout(values), contextlib.redirect_stderr(ignored):
        assert main([*arguments, "--json"]) == 0
    return words.getvalue(), notes.getvalue(), json.loads(values.getvalue())


def test_the_report_holds_every_figure_of_the_json(outputs):
    words, notes, found = outputs
    assert words.startswith(
        "SAE tiny, 2,048 features at layer 1, on 20 pairs of 2 shards; beside it random directions, as many and as sparse.\n"
    )
    assert words.count(": images and captions") == words.count(": captions alone, no image") == 2
    own, alone, _, _ = found["trials"]
    image, text = (own["fidelity"]["trained"][side] for side in ("image", "text"))
    for side, name in ((image, "image"), (text, "caption")):
        row = next(line.split() for line in words.splitlines() if line.startswith(name))
        silent = f"{100 * side['silent_features']:.1f}"
        assert row == [
            name, f"{side['tokens']:,}", "trained", f"{side['fvu']:.3f}", f"{side['explained_by_dimension']:.3f}", f"{side['cosine']:.3f}",
            f"{side['l0']:.1f}", silent, "%", str(side["dense_features"]),
        ]  # fmt: skip
        assert side["explained_variance"] == 1 - side["fvu"]
    share = found["trials"][0]["fidelity"]["trained"]["fraction_shared"]
    assert (
        f"trained: {own['fidelity']['trained']['dead_features']} features dead; {100 * share:.1f} % of the others fire on both sides"
        in words
    )
    loss = own["loss"]
    assert (
        f"{loss['clean']:.3f} as it is, {loss['spliced']['trained']:.3f} trained, {loss['spliced']['random']:.3f} random, {loss['zero']:.3f} zeroed"
        in words
    )
    assert loss["ce_recovered"]["trained"] == pytest.approx(
        (loss["zero"] - loss["spliced"]["trained"]) / (loss["zero"] - loss["clean"])
    )
    assert (
        f"CE recovered: {100 * loss['ce_recovered']['trained']:.1f} % trained, {100 * loss['ce_recovered']['random']:.1f} % random"
        in words
    )
    assert loss["caution"] in words and loss["meaningless"] is None
    assert alone["fidelity"]["trained"]["image"]["fvu"] is None and alone["text_only"]
    assert found["trials"][2]["fidelity"] == own["fidelity"] and found["trials"][2]["model"] == load_card("tiny").model
    spread = found["weights"]["random"]
    row = words.splitlines()[-1].split()
    counts = [spread[f"n_{group}"] for group in ("weighted", "one_sided", "text_only", "image_only", "never")]
    assert row[:6] == ["random", *(f"{count:,}" for count in counts)] and sum(counts) == spread["n_features"] == 2048
    assert row[6:] == [f"{spread['quantiles'][name]:.3f}".replace("-", "−") for name in ("p10", "median", "p90")]
    assert (
        notes
        == "mmfilter: evaluated on only 20 pairs; 50 or more make the figures steady, and about 1,000 the cross-modal weights\n"
    )
    assert found["notes"] == [notes.removeprefix("mmfilter: ").strip()]


def test_tables_fit_80_columns(outputs):
    rows = [
        line
        for line in outputs[0].splitlines()
        if line.startswith(("tokens  ", "image  ", "caption  ", "SAE  ", "trained  ", "random  "))
    ]
    assert len(rows) == 2 * (5 + 3) + 3 and max(map(len, rows)) <= 80


def test_the_model_of_an_sae_that_is_no_card(tmp_path, make_shard, capsys):
    tiny = load_sae("tiny")
    SAE(tiny.W_enc, tiny.b_enc, tiny.W_dec, tiny.b_dec, "topk", k=8, metadata={"layer": 1}).save(tmp_path / "mine")
    arguments = ["sae", "eval", str(tmp_path / "mine"), str(make_shard(n=3))]
    assert main(arguments) == 1
    needs = f"mmfilter: measuring SAE '{tmp_path / 'mine'}' needs the model that it belongs to: --model CARD-OR-FOLDER, and --layer where the SAE does not state it\n"
    assert capsys.readouterr().err == needs
    assert main([*arguments, "--model", load_card("tiny").model, "--prompt", "<s><image>{caption}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layer"] == 1 and found["trials"][0]["fidelity"]["trained"]["text"]["l0"] <= 8
    assert main([*arguments, "--model", "tiny", "--layer", "7"]) == 1
    assert "layer 7 is not in the model, which has layers 0 to 3" in capsys.readouterr().err


def test_usage(make_shard, capsys):
    assert main(["sae", "eval", "tiny", str(make_shard(n=2)), "--text-context", "all"]) == 2
    assert main(["sae", "eval", "tiny", str(make_shard(n=2)), "--sample", "0"]) == 1
    assert "--sample is 0; at least 1 is needed" in capsys.readouterr().err
    assert main(["sae", "eval", "tiny", "nowhere.tar"]) == 1
