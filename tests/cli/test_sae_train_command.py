"""`mmfilter sae train`: options and YAML are one thing, errors are one line, live figures go to stderr."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
import yaml

from mmfilter.cli.app import main
from mmfilter.cli.settings_options import options_of
from mmfilter.core.sae.pretrained import load_sae
from mmfilter.core.training.run_settings import TrainRunSettings
from mmfilter.core.training.settings import TrainSettings

pytestmark = pytest.mark.slow


@pytest.fixture
def shard(make_shard):
    return make_shard(n=40)


SHORT = ["--tokens", "2048", "--batch-size", "256", "--capacity", "512", "--no-weights"]


def test_every_field_of_a_training_is_an_option():
    keys = {option.key for option in options_of(TrainRunSettings)}
    not_options = {"n_features", "k", "tokens", "seed", "dtype"}  # said by --widths, --k, --tokens, --seed, --precision
    assert {item.name for item in fields(TrainSettings)} - not_options < keys
    assert {"widths", "k", "tokens", "seed", "precision", "dtype", "pairs", "model", "images", "attn"} < keys
    assert not keys & {"sae", "sae_option", "threshold", "n_features"}


def test_yaml_and_options_give_the_same_sae_and_options_go_first(shard, tmp_path, capsys):
    config = {
        "tokens": 2048,
        "batch_size": 256,
        "capacity": 512,
        "weights": False,
        "widths": 64,
        "k": 4,
        "architecture": "topk",
        "image_fraction": None,
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    assert (
        main(["sae", "train", str(shard), "-o", f"{tmp_path}/a", "--config", f"{tmp_path}/train.yaml", "--k", "6"]) == 0
    )
    out, err = capsys.readouterr()
    assert out.split() == [f"{tmp_path}/a"]
    assert "10%" not in err.split("FVU")[0] and "64 features, FVU" in err and "tokens/s" in err
    command = ["--widths", "64", "--k", "6", "--architecture", "topk", "--image-fraction", "none", *SHORT]
    assert main(["sae", "train", str(shard), "-o", f"{tmp_path}/b", *command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["saes"][0]["last_step"]["tokens"] == 2048 == report["tokens"]
    a, b = load_sae(tmp_path / "a"), load_sae(tmp_path / "b")
    assert a.hash == b.hash and (a.activation, a.k, a.n_features) == ("topk", 6, 64)


@pytest.mark.parametrize(
    "options",
    [["--architecture", "jumprelu"], ["--architecture", "relu"], ["--groups", "0.25,32"], ["--precision", "bfloat16"]],
)
def test_every_architecture_trains_from_the_command_line(shard, tmp_path, capsys, options):
    assert (
        main(["sae", "train", str(shard), "-o", f"{tmp_path}/sae", "--widths", "64", "--k", "4", *SHORT, *options]) == 0
    )
    rows = [json.loads(line) for line in (tmp_path / "sae" / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and rows[-1]["fvu"] < rows[0]["fvu"]
    assert load_sae(tmp_path / "sae").activation == {"jumprelu": "jumprelu", "relu": "relu"}.get(options[1], "jumprelu")


def test_no_setting_is_needed(tmp_path):
    made = TrainRunSettings(output=tmp_path)
    assert made.train == TrainSettings() and made.tokens is None and made.image_fraction == 0.5
    assert made.card.name == "tiny"


WRONG = {
    "unknown key": ({"learning_rat": 1}, "has the unknown key 'learning_rat'; the nearest is"),
    "no mapping": (["k"], "holds no settings; expected lines like 'batch_size: 32'"),
    "kind": ({"k": "many"}, "has k 'many'; expected whole numbers with commas"),
    "flag": ({"weights": "perhaps"}, "has weights 'perhaps'; expected true or false"),
    "range": ({"warm_up": 1.5}, "training has warm_up 1.5; expected a fraction from 0 to below 1"),
    "choice": (
        {"architecture": "gated"},
        "has architecture 'gated'; expected one of batchtopk, topk, jumprelu, relu",
    ),
    "model": ({"model": "nowhere"}, "for a folder or hub id give --layer as well"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_in_the_yaml_is_one_line(shard, tmp_path, capsys, case):
    config, words = WRONG[case]
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    assert main(["sae", "train", str(shard), "-o", f"{tmp_path}/sae", "--config", f"{tmp_path}/train.yaml"]) == 1
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not (tmp_path / "sae").exists()


def test_a_yaml_that_is_not_there_or_none(shard, tmp_path, capsys):
    assert main(["sae", "train", str(shard), "-o", f"{tmp_path}/sae", "--config", "nowhere.yaml"]) == 1
    assert "--config 'nowhere.yaml' cannot be read" in capsys.readouterr().err
    (tmp_path / "bad.yaml").write_text("k: [1,")
    assert main(["sae", "train", str(shard), "-o", f"{tmp_path}/sae", "--config", f"{tmp_path}/bad.yaml"]) == 1
    assert "is not YAML" in capsys.readouterr().err


def test_tensorboard_gets_every_step(shard, tmp_path):
    pytest.importorskip("tensorboard")
    command = [
        "sae",
        "train",
        str(shard),
        "-o",
        f"{tmp_path}/sae",
        "--widths",
        "64",
        "--k",
        "4",
        *SHORT,
        "--tensorboard",
        f"{tmp_path}/board",
    ]
    assert main(command) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    rows = [json.loads(line) for line in (tmp_path / "sae" / "train.jsonl").read_text().splitlines()]
    assert [point.value for point in board.Scalars("fvu")] == pytest.approx([row["fvu"] for row in rows], rel=1e-5)
    assert [point.step for point in board.Scalars("fvu")] == [row["tokens"] for row in rows]
