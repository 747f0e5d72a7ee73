"""The feature weights of a run: fitted or taken over once, kept in it, and named in its manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mmfilter.core.cards.cards import Card
from mmfilter.core.files import write_json
from mmfilter.core.input.source import Source
from mmfilter.core.pipeline.engine import check_weights
from mmfilter.core.pipeline.intake import Intake
from mmfilter.core.pipeline.model_pass import ModelPass
from mmfilter.core.pipeline.reference import fit_weights
from mmfilter.core.progress import Progress
from mmfilter.core.run.directory import RunDirectory
from mmfilter.core.sae.autoencoder import SAE
from mmfilter.core.scores.crossmodal import FeatureWeights, load_weights
from mmfilter.errors import RunError

STEADY_PAIRS = 100
"""Weights from fewer pairs are reported"""


def run_weights(
    run: RunDirectory,
    card: Card,
    sources: Sequence[Source],
    intake: Intake,
    model_pass: ModelPass,
    sae: SAE,
    progress: Progress,
) -> FeatureWeights:
    """The run's weights if it has them, else the card's, else fitted on a reference sample of the input."""
    if run.weights.exists():
        weights = load_weights(run.weights)
    elif card.weights:
        weights = load_weights(Path(card.weights))
        _save(weights, run)
    else:
        progress.start("fitting feature weights", None)
        weights = fit_weights(sources, intake.head, model_pass, sae, progress)
        _save(weights, run)
        if weights.n_samples < STEADY_PAIRS:
            progress.note(f"the feature weights come from only {weights.n_samples} pairs; about 1,000 make them steady")
    check_weights(weights, sae)
    return weights


def _save(weights: FeatureWeights, run: RunDirectory) -> None:
    try:
        weights.save(run.weights)
    except (OSError, SafetensorError) as error:  # the latter is how safetensors says it
        problem = getattr(error, "strerror", None) or error
        raise RunError(
            f"{str(run.weights)!r} cannot be written ({problem}); make room and run the same command again"
        ) from error


def record_weights(run: RunDirectory, manifest: dict[str, Any], weights: FeatureWeights) -> None:
    """Name in the manifest the weights that the scores are made with; refuse when they changed meanwhile."""
    if manifest["weights"] is not None and manifest["weights"]["hash"] != weights.hash:
        raise RunError(f"{str(run.weights)!r} is not what this run was scored with: restore it, or use another --run")
    manifest["weights"] = {
        "hash": weights.hash,
        "n_samples": weights.n_samples,
        "n_weighted": weights.n_weighted,
        "reference": weights.metadata,
    }
    write_json(run.manifest, manifest)
