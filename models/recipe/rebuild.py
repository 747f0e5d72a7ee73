"""Rebuild the embedded model from nothing: fetch, render, tokenizer, training, export, SAE, weights, evaluation.

    python models/recipe/rebuild.py [--install]

Every step is skipped when its output lies in build/recipe, so a second call goes on where the first one stopped (the
training within its steps, from a checkpoint). The finished model lands in build/recipe/tiny; ``--install`` puts it in
the place of models/tiny. Seeds and step counts are fixed: the same machine and versions give the same model, others one
of the same quality.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from evaluate import check, load_backbone, report
from export import PROMPT, export, verify
from icons import render_all
from model import HOOK_LAYER
from sae import train_sae
from scenes import Icons
from tokenizer import train_tokenizer
from train import Settings, train
from weights import fit, reference_tar

from mmfilter.core.sae.pretrained import load_sae

ROOT = Path(__file__).parents[2]
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
SAE_FILES = ("cfg.json", "sae_weights.safetensors", "weights.safetensors")


def step(name: str, output: Path, make: Callable[[], None]) -> None:
    """Run a step unless its output exists, and say how long it took."""
    shown = output.relative_to(ROOT) if output.is_relative_to(ROOT) else output
    if output.exists():
        print(f"{name}: {shown} is there")
        return
    print(f"{name} …", flush=True)
    started = time.time()
    output.parent.mkdir(parents=True, exist_ok=True)
    make()
    print(f"{name}: {time.time() - started:.0f} s, {shown}", flush=True)


def make_export(build: Path, trained: Path, folder: Path) -> None:
    """Export the trained model and compare its states."""
    export(trained, build / "tokenizer", folder)
    print(f"hook states agree to {verify(trained, folder):.2e}")


def make_weights(build: Path, model: Path) -> None:
    """Fit the feature weights on the reference sample."""
    backbone = load_backbone(str(model), HOOK_LAYER, prompt=PROMPT)
    fit(reference_tar(build), backbone, load_sae(model / "sae")).save(model / "sae" / "weights.safetensors")


def make_report(build: Path, model: Path, path: Path) -> None:
    """AUCs on both splits and the cross-check, as JSON and as a table."""
    threshold = yaml.safe_load((ROOT / "models" / "tiny.yaml").read_text())["threshold"]
    result = {"threshold": threshold, "auc": report(build, model, threshold), "check": check(build, model, threshold)}
    path.write_text(json.dumps(result, indent=1) + "\n")


def print_report(path: Path) -> None:
    """The AUCs of both splits as a Markdown table."""
    splits = json.loads(path.read_text())["auc"]
    print("| score | choice | report |\n|---|---|---|")
    for name in splits["report"]:
        cells = (
            f"{value:.3f} ({low:.3f}–{high:.3f})"
            for value, low, high in (splits[split][name] for split in ("choice", "report"))
        )
        print(f"| {name} | {' | '.join(cells)} |")


def install(model: Path) -> None:
    """Copy the finished model into the place of the embedded one."""
    target = ROOT / "models" / "tiny"
    for source, names, folder in ((model, MODEL_FILES, target), (model / "sae", SAE_FILES, target / "sae")):
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            (folder / name).unlink(missing_ok=True)
            shutil.copyfile(source / name, folder / name)
    print(f"installed in {target.relative_to(ROOT)}; its card is models/tiny.yaml")


def main() -> None:
    """All steps."""
    parser = argparse.ArgumentParser(description="Rebuild the embedded model.")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "recipe")
    parser.add_argument("--install", action="store_true", help="put the result in the place of models/tiny")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, to see that it runs")
    options = parser.parse_args()
    build, settings = options.build.resolve(), Settings()
    if options.smoke:
        settings = replace(settings, stage_1_steps=2, stage_2_steps=2, stage_1_batch=32, stage_2_batch=16)
    icons, run, model = build / "icons.npz", build / "run", build / "tiny"
    step("icons", icons, lambda: render_all(icons))
    step(
        "tokenizer", build / "tokenizer" / "tokenizer.json", lambda: train_tokenizer(Icons(icons), build / "tokenizer")
    )
    step("training", run / "model.pt", lambda: train(Icons(icons), run, settings))
    step("export", model / "config.json", lambda: make_export(build, run / "model.pt", model))
    step("SAE", model / "sae" / "sae_weights.safetensors", lambda: train_sae(build, model, model / "sae"))
    step("weights", model / "sae" / "weights.safetensors", lambda: make_weights(build, model))
    step("evaluation", build / "report.json", lambda: make_report(build, model, build / "report.json"))
    print_report(build / "report.json")
    if options.install:
        install(model)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
