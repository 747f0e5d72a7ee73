"""The SAE step: mmfilter's own command on the recipe's training pairs."""

from __future__ import annotations

from pathlib import Path

from export import PROMPT
from model import HOOK_LAYER
from pairs import training_tar

from mmfilter.cli.app import main

CONFIG = Path(__file__).with_name("sae.yaml")


def train_sae(build: Path, model: Path, folder: Path, *options: str) -> None:
    """Train with the settings of sae.yaml, `options` going first; the model runs once, its states are kept in the build
    folder."""
    command = [
        "sae",
        "train",
        str(training_tar(build)),
        "-o",
        str(folder),
        "--model",
        str(model),
        "--layer",
        str(HOOK_LAYER),
        "--prompt",
        PROMPT,
    ]
    if main([*command, "--config", str(CONFIG), "--cache", str(build / "states"), *options]):
        raise SystemExit(1)
