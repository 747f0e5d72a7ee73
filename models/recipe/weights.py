"""Fit the feature weights (cross-modal weight and rarity) of the tiny model's SAE on a sample of training pairs."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path

from export import PROMPT
from icons import TRAIN_SETS
from model import HOOK_LAYER
from pairs import REFERENCE_PAIRS, REFERENCE_SEED, reference_pairs, write_tar
from scenes import Icons

from mmfilter.core.input.decode import DecodeSettings
from mmfilter.core.input.shards import open_source
from mmfilter.core.input.source import Source
from mmfilter.core.model.backbone import Backbone
from mmfilter.core.model.loading import load_backbone
from mmfilter.core.pipeline.model_pass import ModelPass
from mmfilter.core.pipeline.reference import fit_weights
from mmfilter.core.progress import Silence
from mmfilter.core.sae.autoencoder import SAE
from mmfilter.core.sae.pretrained import load_sae
from mmfilter.core.scores.crossmodal import PER_SIDE, STRONGEST, FeatureWeights

ROOT = Path(__file__).parents[2]
ABOUT = {
    "pairs": REFERENCE_PAIRS,
    "seed": REFERENCE_SEED,
    "sets": list(TRAIN_SETS),
    "what": "training pairs without disguise",
    "strongest": STRONGEST,
    "per_side": PER_SIDE,
}


def reference_tar(build: Path) -> Path:
    """The shard of the reference sample, made if it is not there."""
    path = build / "eval" / "reference.tar"
    if not path.exists():
        write_tar(path, reference_pairs(Icons(build / "icons.npz")))
    return path


def fit(shard: Path, backbone: Backbone, sae: SAE) -> FeatureWeights:
    """The weights on the shard's pairs, as mmfilter itself fits them."""
    with ModelPass(backbone, DecodeSettings(), batch_size=32, workers=2) as model_pass:

        def head(source: Source, n: int):
            return itertools.islice(source.samples(), n)

        weights = fit_weights([open_source(str(shard))], head, model_pass, sae, Silence())
    return replace(weights, metadata=ABOUT)


def main() -> None:
    """Command line of the weights step."""
    parser = argparse.ArgumentParser(description="Fit the feature weights of the tiny model's SAE.")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "recipe")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "tiny")
    options = parser.parse_args()
    backbone = load_backbone(str(options.model), HOOK_LAYER, prompt=PROMPT)
    weights = fit(reference_tar(options.build), backbone, load_sae(options.model / "sae"))
    weights.save(options.model / "sae" / "weights.safetensors")
    print(f"{weights.n_weighted:,} of {len(weights.omega):,} features have a cross-modal weight")


if __name__ == "__main__":
    main()
