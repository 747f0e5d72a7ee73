"""`check` through `main`, and what its report and that of `measure` look like."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmfilter.cli import check_display
from mmfilter.cli.app import main
from mmfilter.core.scores.registry import shown
from mmfilter.ops.measure import measure
from mmfilter.ops.measure_settings import MeasureSettings
from tests.conftest import good, write_tar

pytestmark = pytest.mark.slow  # whole runs of the command

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    bad = [("zz.jpg", b"no image"), ("zz.txt", b"x")]
    return write_tar(
        tmp_path_factory.mktemp("check") / "a.tar",
        [*bad, *(member for i in range(60) for member in good(f"{i:09d}", i))],
    )


def test_the_report_is_a_table_on_stdout(shard, capsys):
    assert main(["check", str(shard), "--sample", "30", "--bootstrap", "200"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "pairs of 1 shard, each with its own caption and with another pair's" in out
    header = next(line for line in lines if line.startswith("score"))
    assert header.split() == [
        "score",
        "AUC",
        "95",
        "%",
        "interval",
        "random",
        "SAE",
        "difference",
        "to",
        "it",
        "with",
        "length",
    ]
    assert [line.split()[0] for line in lines[lines.index(header) + 1 :][:9]] == [*shown(), check_display.CONTROL]
    assert next(line for line in lines if line.startswith("caption  ")).rstrip().endswith(" %")
    assert "30 pairs are compared, so the intervals are wide" in err and err.count("mmfilter: ") == 2


def test_json_has_every_score_and_nothing_else_is_on_stdout(shard, capsys):
    assert main(["check", str(shard), "--sample", "25", "--bootstrap", "200", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["pairs"] == 25 and report["weights"] == "card" and report["shards"] == [str(shard)]
    assert len(report["scores"]) == 14 and set(report["scores"]["support"]) == {
        "auc", "low", "high", "above_chance", "length_correlation", "random_sae", "raw",
    }  # fmt: skip
    assert "random_sae" not in report["scores"]["raw"] and report["scores"]["caption_chars"]["auc"] == 0.5
    similarity = report["scores"]["similarity"]
    assert similarity["low"] <= similarity["auc"] <= similarity["high"]
    for other in (similarity["random_sae"], similarity["raw"]):
        assert other["low"] <= similarity["auc"] - other["auc"] <= other["high"]
        assert other["this_is"] == ("better" if other["low"] > 0 else "worse" if other["high"] < 0 else "level")
    assert report["fidelity"]["image"]["tokens"] == 25 * 25 and 0 < report["fidelity"]["text"]["fvu"] < 2
    assert report["verdict"].endswith(".") and (
        report["recommended"] is None or f"--by {report['recommended']}" in report["verdict"]
    )


EXPLAINED = {
    "missing": (["nowhere.tar"], "nowhere.tar"),
    "too few": (
        ["{few}"],
        "5 samples hold 5 usable pairs; a check needs at least 40, half of them to fit feature weights on: name more shards",
    ),
    "sample": (["{shard}", "--sample", "3"], "--sample is 3; at least 20 is needed"),
    "card": (["{shard}", "--model", "huge"], "no card 'huge'"),
}


@pytest.mark.parametrize("case", EXPLAINED)
def test_what_cannot_be_checked_is_one_line_and_exit_1(shard, tmp_path, capsys, case):
    few = write_tar(tmp_path / "few.tar", [member for i in range(5) for member in good(f"{i}", i)])
    arguments, words = EXPLAINED[case]
    assert main(["check", *(part.format(shard=shard, few=few) for part in arguments)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("mmfilter: ") and words in err and err.count("\n") == 1


def test_a_wrong_choice_is_usage(shard, capsys):
    assert main(["check", str(shard), "--text-context", "both"]) == 2
    assert "Usage: mmfilter check" in capsys.readouterr().err


def test_a_measurement_is_printed_beside_what_is_stated(shard, tiny, quiet, capsys):
    measurement = measure([str(shard)], MeasureSettings(tiny[0], sample=12), quiet)
    assert main(["sae", "show", "tiny", "--on", str(shard), "--sample", "12"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "On 11 of your pairs:" in out and "training_tokens: 161792" in out
    assert " ".join(out.split()).endswith(measurement.verdict)
    values = check_display.measurement_json(measurement)
    assert json.loads(json.dumps(values))["bad"] == {"image cannot be decoded": 1}
    assert (
        values["fidelity"]["image"]["fvu"] == measurement.fidelity.image.fvu
        and values["published"]["training_settings.k"] == 32
    )


def test_a_measurement_as_json_is_the_operations(shard, tiny, quiet, capsys):
    measurement = measure([str(shard)], MeasureSettings(tiny[0], sample=12), quiet)
    command = ["sae", "show", tiny[0].sae, "--model", "tiny", "--on", str(shard), "--sample", "12", "--json"]
    assert main(command) == 0
    measured = json.loads(capsys.readouterr().out)["measured"]
    assert measured["fidelity"]["text"]["fvu"] == pytest.approx(measurement.fidelity.text.fvu)


def test_measuring_an_sae_without_a_model_names_the_option(shard, tiny, capsys):
    assert main(["sae", "show", tiny[0].sae, "--on", str(shard)]) == 1
    assert "needs the model that it belongs to: --model CARD-OR-FOLDER" in capsys.readouterr().err


@pytest.mark.slow
def test_the_example_in_the_help_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["check", "examples/shards/*.tar", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["pairs"] == 500 and report["recommended"] == "raw"
    # 15 % of the pairs are mismatched to begin with, so a perfect score has 0.85 + 0.15 / 2
    assert 0.8 < report["scores"]["raw"]["auc"] < 0.925
    assert report["scores"]["similarity"]["auc"] > 0.75
