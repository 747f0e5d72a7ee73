"""Every command that takes pairs takes the same inputs, under the same options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmfilter.cli.app import main
from mmfilter.cli.settings_options import options_of
from mmfilter.core.input.source import InputOptions
from mmfilter.core.sae.pretrained import load_sae
from mmfilter.core.training.run_settings import TrainRunSettings
from mmfilter.ops.check_settings import CheckSettings
from mmfilter.ops.evaluate_settings import EvaluateSettings
from mmfilter.ops.measure_settings import MeasureSettings
from mmfilter.ops.score_settings import ScoreSettings
from tests.inputs import as_llava, as_tar, pairs

TRAIN = ["--tokens", "1024", "--batch-size", "256", "--capacity", "512", "--widths", "64", "--k", "4"]
TAKES_PAIRS = (ScoreSettings, CheckSettings, TrainRunSettings, EvaluateSettings, MeasureSettings, InputOptions)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, list[str]]:
    """The same pairs as a tar, as LLaVA JSON whose images are elsewhere, and as what a command prints: arguments for each."""
    folder: Path = tmp_path_factory.mktemp("places")
    found = pairs(24)
    tar, llava = as_tar(folder / "a.tar", found), as_llava(folder / "llava/data.json", found)
    (folder / "llava/images").rename(folder / "pictures")
    return {
        "tar": [str(tar)],
        "llava": [str(llava), "--images", str(folder / "pictures")],
        "pipe": [f"pipe:cat {tar}", "--allow-pipe"],
        "no images": [str(llava)],
        "not allowed": [f"pipe:cat {tar}"],
    }


def test_the_options_have_the_same_words_everywhere():
    for key in ("images", "allow_pipe", "caption"):
        words = [
            (option.item.metadata, option.help, option.group)
            for settings in TAKES_PAIRS
            for option in options_of(settings)
            if option.key == key
        ]
        assert len(words) == len(TAKES_PAIRS) and all(one == words[0] for one in words)


@pytest.mark.slow
def test_sae_train_takes_them_all(places, tmp_path, capsys):
    hashes = set()
    for kind in ("tar", "llava", "pipe"):
        assert main(["sae", "train", *places[kind], "-o", str(tmp_path / kind), *TRAIN]) == 0
        hashes.add(load_sae(tmp_path / kind).hash)
    assert len(hashes) == 1, "the same pairs give the same SAE"
    about = [
        json.loads((tmp_path / kind / "manifest.json").read_text())["trained_on"].get("images")
        for kind in ("tar", "llava", "pipe")
    ]
    assert about == [None, "pictures", None]
    capsys.readouterr()
    (tmp_path / "config.yaml").write_text("allow_pipe: true\n")
    assert (
        main(
            [
                "sae",
                "train",
                *places["not allowed"],
                "-o",
                str(tmp_path / "by-config"),
                "--config",
                str(tmp_path / "config.yaml"),
                *TRAIN,
            ]
        )
        == 0
    )
    assert load_sae(tmp_path / "by-config").hash in hashes


@pytest.mark.slow
@pytest.mark.parametrize("command", [["sae", "eval", "tiny"], ["sae", "show", "tiny"]])
def test_measuring_takes_them_all(places, capsys, command):
    reports = []
    for kind in ("tar", "llava", "pipe"):
        shards = places[kind] if command[1] == "eval" else ["--on", *places[kind]]
        assert main([*command, *shards, "--sample", "24", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        reports.append(
            report["sides"]
            if "sides" in report
            else {name: value for name, value in report.get("measured", report).items() if name != "shards"}
        )
    assert reports[0] == reports[1] == reports[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [["sae", "train", "-o", "OUT"], ["sae", "eval", "tiny"], ["sae", "show", "tiny", "--on"]]
)
def test_what_is_not_allowed_says_so(places, tmp_path, capsys, command):
    given = [str(tmp_path / "out") if word == "OUT" else word for word in command]
    assert main([*given, *places["not allowed"]]) == 1
    said = "is a command and would run a shell; run it yourself and pipe its output in: COMMAND | mmfilter score -, or allow it with --allow-pipe"
    assert capsys.readouterr().err == f"mmfilter: shard {places['not allowed'][0]!r} {said}\n"
    assert main([*given, places["tar"][0], "--images", str(tmp_path)]) == 1
    assert (
        capsys.readouterr().err
        == f"mmfilter: shard {places['tar'][0]!r} is not LLaVA JSON, and --images is the folder of its images; leave it out\n"
    )
    assert not (tmp_path / "out").exists()
