"""Measure how faithfully an SAE reconstructs the states of the user's own pairs, for image and caption tokens apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmfilter.core.evaluation.fidelity import Fidelity, FidelityMeter
from mmfilter.core.input.decode import DecodeSettings
from mmfilter.core.input.shards import open_sources
from mmfilter.core.model.backbone import Activations
from mmfilter.core.pipeline.engine import load
from mmfilter.core.pipeline.feed import Batch
from mmfilter.core.pipeline.model_pass import ModelPass
from mmfilter.core.pipeline.pair_sample import CAPTION, PairSample
from mmfilter.core.progress import Progress
from mmfilter.core.sae.autoencoder import SAE
from mmfilter.errors import MMFilterError
from mmfilter.ops.measure_settings import MeasureSettings

STEADY_PAIRS = 50
HOW_OPENED = ("layout", "source")
"""Metadata that says how the SAE was opened, and nothing of what its publisher states."""


@dataclass(frozen=True)
class Measurement:
    """How the SAE does on the pairs, beside what its publisher says of it."""

    fidelity: Fidelity
    published: dict[str, str | int | float | bool]
    """The SAE's metadata, nested names joined by dots: what was stated, on other data"""
    n_pairs: int
    shards: list[str]
    """Where the pairs are from"""
    reasons: Counter[str]
    """Kind of problem -> samples that could not be used"""
    notes: list[str]

    @property
    def verdict(self) -> str:
        """Whether the SAE fits the model's states on these pairs, in one sentence."""
        sides = self.fidelity.hardly_reconstructed
        if sides:
            levels = ", ".join(f"{self.fidelity.sides[side].fvu:.2f}" for side in sides)
            return (
                f"The SAE hardly reconstructs {' and '.join(sides)} tokens (FVU {levels}; 1 is no better than their "
                "mean): scores through it mean little."
            )
        image, text = (f"{100 * (1 - side.fvu):.0f} %" for side in (self.fidelity.image, self.fidelity.text))
        return f"The SAE explains {image} of the variance of image tokens and {text} of that of text tokens."


def measure(patterns: Sequence[str], settings: MeasureSettings, progress: Progress) -> Measurement:
    """Reconstruct the states of a sample of pairs, in one pass over the model.

    Raises `ShardError` for a pattern that names nothing, `ModelError` and `SAEError` for what cannot be
    loaded or does not fit, `MMFilterError` when no pair is usable.
    """
    sources = open_sources(patterns, settings.inputs)
    backbone, sae = load(settings.card, settings)
    meter = FidelityMeter(sae)
    n_pairs = 0

    def add(_: Batch, activations: Activations) -> None:
        nonlocal n_pairs
        meter.add(activations.states, activations.side)
        n_pairs += activations.n_samples

    with PairSample() as sample:
        sample.gather(
            sources,
            settings.sample,
            DecodeSettings(settings.caption),
            workers=settings.workers,
            progress=progress,
        )
        with ModelPass(
            backbone, DecodeSettings(CAPTION), batch_size=settings.batch_size, workers=settings.workers
        ) as model_pass:
            numbers = range(len(sample))
            progress.start("measuring", sample.nbytes(numbers))
            reasons = sample.reasons + model_pass.over(sample.read(numbers), "sample", add, progress)
    if not n_pairs:
        said = ", ".join(f"{count:,}: {reason}" for reason, count in reasons.most_common(3)) or "they are empty"
        raise MMFilterError(f"the shards hold no usable pair to measure the SAE on ({said})")
    return Measurement(meter.fidelity, published(sae), n_pairs, sample.shards, reasons, notes(sample, n_pairs))


def notes(sample: PairSample, n_pairs: int) -> list[str]:
    """What limits the measurement."""
    found = [f"{error}; the pairs before that are used" for error in sample.failures]
    if n_pairs < STEADY_PAIRS:
        found.append(f"measured on only {n_pairs:,} pairs; {STEADY_PAIRS} or more make the figures steady")
    return found


def published(sae: SAE) -> dict[str, str | int | float | bool]:
    """What the SAE's publisher states."""
    return flat({name: value for name, value in sae.metadata.items() if name not in HOW_OPENED})


def flat(metadata: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """The scalars of nested metadata, under names joined by dots."""
    found: dict[str, str | int | float | bool] = {}
    for name, value in metadata.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, (str, int, float, bool)):
            found[f"{prefix}{name}"] = value
    return found
