"""`mmfilter models`: every card can be listed and shown, and says what a user needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmfilter.cli.app import main
from mmfilter.core.cards.cards import load_card
from mmfilter.core.model.prompts import CAPTION

ROOT = Path(__file__).parents[2]
PROMISED = {
    "tiny", "llava-next-mistral-7b", "llama3-llava-next-8b", "chameleon-7b", "anole-7b", "gemma-3-4b", "gemma-3-12b", "gemma-3-27b",
    "qwen3.5-2b", "qwen3.5-9b", "qwen3.5-27b", "paligemma2-3b", "clip-vit-b-32",
}  # fmt: skip


@pytest.mark.parametrize("argv", [["models"], ["models", "list"]])
def test_the_list_has_every_card(argv, capsys):
    assert main(argv) == 0
    said = capsys.readouterr()
    lines = [line.split("\t") for line in said.out.splitlines()]
    assert said.err == ""
    assert lines[0] == ["card", "model", "layer", "SAE"]
    assert {line[0] for line in lines} >= PROMISED
    assert {len(line) for line in lines} == {4}, "one line a row, for grep and cut"
    assert len(lines) == 1 + len({line[0] for line in lines[1:]})


def test_the_list_as_json(capsys):
    assert main(["models", "list", "--json"]) == 0
    cards = {card["name"]: card for card in json.loads(capsys.readouterr().out)}
    assert cards["llama3-llava-next-8b"]["sae"] == "hf:lmms-lab/llama3-llava-next-8b-hf-sae-131k/model.layers.24"
    assert cards["llama3-llava-next-8b"]["layer"] == 24


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_a_card_is_shown_with_what_was_verified(name, capsys):
    card = load_card(name)
    assert main(["models", "show", name]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert card.verified and " ".join(card.verified.split())[:40] in said
    assert set(card.licence) >= {"model"} and (card.prompt is None or CAPTION in card.prompt)


def test_an_unknown_card_names_those_there_are(capsys):
    assert main(["models", "show", "nothing"]) == 1
    assert "no card 'nothing'; there is anole-7b, chameleon-7b" in capsys.readouterr().err


def test_a_card_that_sees_one_side_only_is_not_scored_with(make_shard, capsys, tmp_path):
    assert main(["score", str(make_shard()), "--model", "clip-vit-b-32", "--run", f"{tmp_path}/run"]) == 1
    assert "card 'clip-vit-b-32' cannot score pairs: this SAE reads the image tower's states" in capsys.readouterr().err
