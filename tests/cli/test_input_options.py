"""Every command that takes pairs takes the same inputs, under the same options."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from mmfilter.cli import app, check_command, sae_commands, sae_eval_command, sae_train_command
from mmfilter.cli.app import main
from mmfilter.core.sae.pretrained import load_sae
from tests.inputs import as_llava, as_tar, pairs

TRAIN = ["--tokens", "1024", "--batch-size", "256", "--capacity", "512", "--widths", "64", "--k", "4"]
TAKES_PAIRS = (app.score, check_command.check, sae_train_command.train, sae_eval_command.evaluate, sae_commands.show)


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
    def words(command, name: str) -> tuple:
        import typing

        option = typing.get_args(typing.get_type_hints(command, include_extras=True)[name])[-1]
        return option.param_decls, option.help, option.metavar

    for name in ("images", "allow_pipe"):
        assert len({words(command, name) for command in TAKES_PAIRS}) == 1
        assert all(name in inspect.signature(command).parameters for command in TAKES_PAIRS)


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
        == f"mmfilter: shard {places['tar'][0]!r} is no LLaVA JSON, and --images is the folder of those; leave it out\n"
    )
    assert not (tmp_path / "out").exists()
