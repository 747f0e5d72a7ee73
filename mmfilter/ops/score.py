"""Score every pair of the given shards: one pass over the model, resumable shard by shard."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from mmfilter.core.input.decode import DecodeSettings
from mmfilter.core.input.shards import open_sources, stamps
from mmfilter.core.input.source import Source
from mmfilter.core.model.backbone import Backbone
from mmfilter.core.model.loading import model_hash
from mmfilter.core.pipeline.engine import load, resolved_dtype
from mmfilter.core.pipeline.intake import Intake
from mmfilter.core.pipeline.model_pass import ModelPass
from mmfilter.core.pipeline.run_weights import record_weights, run_weights
from mmfilter.core.pipeline.scorer import Scorer
from mmfilter.core.pipeline.shard_pass import ShardResult, read_ahead, shard_pass
from mmfilter.core.progress import Progress
from mmfilter.core.run.directory import RunDirectory, Shard, name_shards, open_run, unfinished
from mmfilter.core.run.shard_tables import ShardTables
from mmfilter.core.run.tables import read_table_metadata
from mmfilter.core.sae.autoencoder import SAE
from mmfilter.core.scores.registry import SCORES
from mmfilter.errors import ShardError
from mmfilter.ops.score_settings import ScoreSettings


@dataclass
class ScoreSummary:
    """What came of it."""

    run: Path
    n_samples: int = 0
    """Samples of all finished shards that the command names"""
    n_scored: int = 0
    """… that have scores"""
    n_new: int = 0
    """… that this command went through"""
    n_shards: int = 0
    """Shards finished by this command"""
    n_skipped: int = 0
    """Shards that were finished before"""
    seconds: float = 0.0
    """Time of the scoring pass alone, without loading and fitting"""
    reasons: Counter[str] = field(default_factory=Counter)
    """Kind of problem -> samples without a score"""
    failures: list[ShardError] = field(default_factory=list)
    """Shards that could not be read to their end; nothing is kept of them"""

    def add(self, shard: ShardResult) -> None:
        """Count a finished shard."""
        self.n_samples += shard.rows
        self.n_scored += shard.ok
        self.reasons.update(shard.reasons)

    @property
    def failed(self) -> str | None:
        """What could not be read, in a sentence; None where all was."""
        if not self.failures:
            return None
        shards = len(self.failures) + self.n_shards + self.n_skipped
        return (
            f"{len(self.failures)} of {shards} shards could not be read to their end, first: {self.failures[0]}. "
            "The others are finished; repair and run again"
        )

    @property
    def fraction_bad(self) -> float:
        return 1 - self.n_scored / self.n_samples if self.n_samples else 0.0

    @property
    def samples_per_second(self) -> float:
        return self.n_new / self.seconds if self.seconds else 0.0


def score(patterns: Sequence[str], settings: ScoreSettings, progress: Progress) -> ScoreSummary:
    """Score the shards that `patterns` name into the run directory.

    A finished shard whose input has not changed is skipped. A shard that cannot be read to its end is
    listed in the summary's `failures`, and the others are scored all the same. Raises `ShardError` for
    a pattern that names nothing, `RunError` when the run was made with other settings, `ModelError` and
    `SAEError` for what cannot be loaded.
    """
    run = RunDirectory(Path(settings.run))
    shards = name_shards(open_sources(patterns, settings.inputs), run)
    backbone, sae = load(settings.card, settings)
    manifest = open_run(run, manifest_settings(settings, backbone, sae), versions(), shards)
    todo = set(unfinished(run, shards))
    summary = ScoreSummary(run.path, n_skipped=len(shards) - len(todo))
    for shard in shards:
        if shard not in todo:
            summary.add(_stored(run, shard))
    if not todo:
        return summary
    decoding = DecodeSettings(settings.caption)
    with ModelPass(backbone, decoding, batch_size=settings.batch_size, workers=settings.workers) as model_pass:
        intake = Intake(settings.limit)
        sources = [shard.source for shard in shards]
        weights = run_weights(run, settings.card, sources, intake, model_pass, sae, progress)
        record_weights(run, manifest, weights)
        scorer = Scorer(backbone, sae, weights, settings.card.threshold)
        progress.start("scoring", total_bytes([shard for shard in shards if shard in todo], settings.limit))
        started = time.perf_counter()
        by_source = {shard.source: shard for shard in shards}
        for reading in read_ahead(due(shards, todo, run, intake), intake.samples, model_pass):
            tables = ShardTables(run, by_source[reading.source], tuple(SCORES))
            result = shard_pass(reading, model_pass, scorer, tables, seed=settings.seed, progress=progress)
            count(result, summary, progress)
        summary.seconds = time.perf_counter() - started
    return summary


def due(shards: Sequence[Shard], todo: set[Shard], run: RunDirectory, intake: Intake) -> Iterator[Source]:
    """The shards to score, as far as the limit goes; finished ones count."""
    for shard in shards:
        if shard not in todo:
            intake.use_up(_stored(run, shard).rows)
        elif intake.exhausted:
            return
        else:
            yield shard.source


def _stored(run: RunDirectory, shard: Shard) -> ShardResult:
    """What came of a shard that was finished before."""
    about = read_table_metadata(run.scores(shard.name))
    return ShardResult(about["rows"], about["ok"], Counter(about["reasons"]))


def count(result: ShardResult, summary: ScoreSummary, progress: Progress) -> None:
    """Add a shard to the summary."""
    if result.error is not None:
        summary.failures.append(result.error)
        progress.note(str(result.error))
        return
    summary.n_shards += 1
    summary.n_new += result.rows
    summary.add(result)


def manifest_settings(settings: ScoreSettings, backbone: Backbone, sae: SAE) -> dict[str, Any]:
    """Everything that changes a score."""
    card = settings.card
    return {
        "model": card.model,
        "model_hash": model_hash(card.model, backbone.model.config),
        "revision": card.revision,
        "layer": card.layer,
        "prompt": backbone.prompt,
        "text_context": card.text_context,
        "sae": card.sae,
        "sae_options": card.sae_options.stated(),
        "sae_hash": sae.hash,
        "threshold": card.threshold,
        "dtype": str(resolved_dtype(settings)).removeprefix("torch."),
        "caption": settings.caption,
        "images": settings.inputs.images,
        "limit": settings.limit,
        "seed": settings.seed,
    }


def versions() -> dict[str, str]:
    """Versions of what computes the scores."""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}


def total_bytes(shards: Sequence[Shard], limit: int | None) -> int | None:
    """Size of the input, None where a part of it is unknown or its samples have no size in it."""
    if limit is not None or not all(shard.source.is_tar for shard in shards):
        return None
    sizes = [
        0 if isinstance(stamp, ShardError) else stamp.size  # the pass reports what is gone
        for stamp in stamps([shard.source for shard in shards])
    ]
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None
