"""Score every pair of the given shards: one pass over the model, resumable shard by shard."""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError

from mmfilter.core.cards.cards import Card
from mmfilter.core.files import write_json
from mmfilter.core.input.decode import DecodeSettings, Pair
from mmfilter.core.input.shards import (
    InputOptions,
    RawSample,
    Stamp,
    expand,
    is_tar,
    is_url,
    read_once,
    read_samples,
    stamp,
    stamps,
)
from mmfilter.core.model.backbone import Backbone
from mmfilter.core.model.loading import model_hash
from mmfilter.core.pipeline.engine import DeviceSettings, check_weights, load
from mmfilter.core.pipeline.feed import Batch, Feed, Prefetched
from mmfilter.core.pipeline.reference import fit_weights
from mmfilter.core.pipeline.scorer import Scored, Scorer
from mmfilter.core.progress import Progress
from mmfilter.core.run.directory import RunDirectory, Shard, name_shards, open_run, unfinished
from mmfilter.core.run.shard_tables import ShardTables
from mmfilter.core.run.tables import read_table_metadata
from mmfilter.core.sae.autoencoder import SAE
from mmfilter.core.scores.crossmodal import FeatureWeights, load_weights
from mmfilter.core.scores.random import random_score
from mmfilter.core.scores.registry import SCORES
from mmfilter.errors import MMFilterError, RunError, ShardError


@dataclass(frozen=True)
class ScoreSettings:
    """How to score. What changes a score is stored in the run and may not differ when it goes on."""

    card: Card
    """Model, layer, SAE and how to prompt"""
    run: Path = Path("mmfilter-run")
    """Where everything is written"""
    device: DeviceSettings = field(default_factory=DeviceSettings)
    """Where and how the model runs"""
    batch_size: int = 32
    workers: int = 4
    """Threads that decode and pre-process"""
    limit: int | None = None
    """Score only the first so many samples of the input"""
    caption: str = "auto"
    """Where the caption is (see `DecodeSettings`)"""
    images: str | None = None
    """Folder that the images of LLaVA JSON are in (see `InputOptions`)"""
    allow_pipe: bool = False
    """Run `pipe:` inputs in a shell"""
    seed: int = 0
    """Seed of the `random` score"""

    def __post_init__(self) -> None:
        for name in ("batch_size", "workers", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MMFilterError(f"--{name.replace('_', '-')} is {value}; at least 1 is needed")

    @property
    def inputs(self) -> InputOptions:
        images = self.images if self.images is None or is_url(self.images) else os.path.abspath(self.images)
        return InputOptions(self.caption, images, self.allow_pipe)


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

    def add(self, rows: int, ok: int, reasons: Mapping[str, int]) -> None:
        """Count a finished shard."""
        self.n_samples += rows
        self.n_scored += ok
        self.reasons.update(reasons)

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
    run = RunDirectory(settings.run)
    shards = name_shards(expand(patterns, settings.inputs), run)
    backbone, sae = load(settings.card, settings.device)
    manifest = open_run(run, manifest_settings(settings, backbone, sae), versions(), shards)
    todo = unfinished(run, shards)
    summary = ScoreSummary(settings.run, n_skipped=len(shards) - len(todo))
    for shard in shards:
        if shard not in todo:
            stored = read_table_metadata(run.scores(shard.name))
            summary.add(stored["rows"], stored["ok"], stored["reasons"])
    if not todo:
        return summary
    with closing(
        Feed(backbone, DecodeSettings(settings.caption), batch_size=settings.batch_size, workers=settings.workers)
    ) as feed:
        source = Source(settings.limit, settings.inputs)
        weights = feature_weights(run, settings.card, shards, source, feed, backbone, sae, progress)
        record_weights(run, manifest, weights)
        scorer = Scorer(backbone, sae, weights, settings.card.threshold)
        progress.start("scoring", total_bytes(todo) if settings.limit is None else None)
        started = time.perf_counter()
        with closing(Prefetched(events(shards, {shard.name for shard in todo}, run, source, feed), 3)) as feed_events:
            write_tables(feed_events, run, scorer, settings.seed, summary, progress)
        summary.seconds = time.perf_counter() - started
    return summary


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
        "dtype": str(settings.device.resolved_dtype).removeprefix("torch."),
        "caption": settings.caption,
        "images": settings.inputs.images,
        "limit": settings.limit,
        "seed": settings.seed,
    }


def versions() -> dict[str, str]:
    """Versions of what computes the scores."""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}


def feature_weights(
    run: RunDirectory,
    card: Card,
    shards: list[Shard],
    source: Source,
    feed: Feed,
    backbone: Backbone,
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
        weights = fit_weights(
            [shard.path for shard in shards], source.head, feed, backbone, sae, lambda n: progress.advance(n, 0)
        )
        _save(weights, run)
        if weights.n_samples < 100:
            progress.note(f"the feature weights come from only {weights.n_samples} pairs; about 1,000 make them steady")
    check_weights(weights, sae)
    return weights


def _save(weights: FeatureWeights, run: RunDirectory) -> None:
    try:
        weights.save(run.weights)
    except (OSError, SafetensorError) as error:  # the latter is how safetensors says it
        raise RunError(
            f"{str(run.weights)!r} cannot be written ({getattr(error, 'strerror', None) or error}); make room and run the same command again"
        ) from error


def record_weights(run: RunDirectory, manifest: dict[str, Any], weights: FeatureWeights) -> None:
    """Say in the manifest which weights the scores are made with; refuse when they changed meanwhile."""
    if manifest["weights"] is not None and manifest["weights"]["hash"] != weights.hash:
        raise RunError(f"{str(run.weights)!r} is not what this run was scored with: restore it, or use another --run")
    manifest["weights"] = {
        "hash": weights.hash,
        "n_samples": weights.n_samples,
        "n_weighted": weights.n_weighted,
        "reference": weights.metadata,
    }
    write_json(run.manifest, manifest)


class Source:
    """The input's samples within `limit`; a stream can be read once, so its head is kept for the pass."""

    def __init__(self, limit: int | None, options: InputOptions) -> None:
        self._limit = self._left = limit
        self._options = options
        self._streams: dict[str, tuple[list[RawSample], Iterator[RawSample]]] = {}

    def head(self, shard: str, n: int) -> Iterable[RawSample]:
        """The first `n` samples of a shard, any number of times, without using them up."""
        n = n if self._limit is None else min(n, self._limit)
        if not read_once(shard):
            return itertools.islice(read_samples(shard, options=self._options), n)
        if shard not in self._streams:
            rest = read_samples(shard, options=self._options)
            self._streams[shard] = list(itertools.islice(rest, n)), rest
        return self._streams[shard][0]

    def samples(self, shard: str) -> Iterator[RawSample]:
        """The samples of a shard that the limit leaves."""
        samples = (
            itertools.chain(*self._streams.pop(shard, ()))
            if shard in self._streams
            else read_samples(shard, options=self._options)
        )
        for raw in itertools.islice(samples, self._left):
            self.use_up(1)
            yield raw

    def use_up(self, n: int) -> None:
        """Count samples as scored."""
        if self._left is not None:
            self._left = max(0, self._left - n)

    @property
    def exhausted(self) -> bool:
        return self._left == 0


def total_bytes(shards: Sequence[Shard]) -> int | None:
    """Size of the input, None where a part of it is unknown or its samples have no size in it."""
    if not all(is_tar(shard.path) for shard in shards):
        return None
    found = stamps([shard.path for shard in shards])
    sizes = [0 if isinstance(stamp, ShardError) else stamp.size for stamp in found]  # the pass reports what is gone
    return None if None in sizes else sum(sizes)


# --- the pass --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardStart:
    shard: Shard


@dataclass(frozen=True)
class ShardEnd:
    stamp: Stamp | None
    """The shard's stamp from before it was read; None when it could not be read to its end"""
    error: ShardError | None = None


Event = ShardStart | Batch | list[Pair] | ShardEnd


def events(shards: list[Shard], todo: set[str], run: RunDirectory, source: Source, feed: Feed) -> Iterator[Event]:
    """The input as a stream: a shard's start, its batches, after those of a window its pairs, its end."""
    for shard in shards:
        if shard.name not in todo:
            source.use_up(read_table_metadata(run.scores(shard.name))["rows"])
            continue
        if source.exhausted:
            return
        yield ShardStart(shard)
        try:
            before = stamp(shard.path)
            for window in feed.windows(source.samples(shard.path), shard.path):
                yield from window.batches
                yield window.pairs
            yield ShardEnd(before)
        except ShardError as error:
            yield ShardEnd(None, error)


def write_tables(
    stream: Iterable[Event], run: RunDirectory, scorer: Scorer, seed: int, summary: ScoreSummary, progress: Progress
) -> None:
    """Score the batches of the stream and write each shard's tables."""
    tables: ShardTables | None = None
    codes: dict[int, dict[str, np.ndarray]] = {}
    try:
        for event in stream:
            if isinstance(event, ShardStart):
                tables = ShardTables(run, event.shard, tuple(SCORES))
            elif isinstance(event, Batch):
                take(event.pairs, scorer.score(event.inputs), codes)
            elif isinstance(event, list):
                tables.write(*table_rows(event, codes, seed))
                progress.advance(len(event), sum(pair.columns["nbytes"] or 0 for pair in event))
            else:
                close(tables, event, summary, progress)
                tables = None
    finally:
        if tables is not None:
            tables.abandon()


def take(pairs: list[Pair], scored: Scored, codes: dict[int, dict[str, np.ndarray]]) -> None:
    """Put a batch's scores into its pairs' columns and its codes into `codes`, by row."""
    finite = np.isfinite(np.stack(list(scored.scores.values()))).all(0)
    for i, pair in enumerate(pairs):
        pair.columns["n_image_tokens"] = int(scored.n_image_tokens[i])
        pair.columns["n_text_tokens"] = int(scored.n_text_tokens[i])
        if finite[i]:
            pair.columns.update({name: float(column[i]) for name, column in scored.scores.items()})
            codes[pair.row] = scored.codes[i]
        else:
            pair.reason = "the model's states are not finite"


def table_rows(pairs: list[Pair], codes: dict[int, dict[str, np.ndarray]], seed: int) -> tuple[list[dict], list[dict]]:
    """Rows of the score table and of the code table for a window."""
    score_rows, code_rows = [], []
    for pair in pairs:
        key, ok = pair.columns["key"], pair.reason is None
        control = {"random": random_score(seed, key, pair.row)} if ok else {}
        score_rows.append(pair.columns | control | {"ok": ok, "reason": pair.reason})
        if ok:
            code_rows.append({"key": key, "row": pair.row} | codes.pop(pair.row))
    return score_rows, code_rows


def close(tables: ShardTables, end: ShardEnd, summary: ScoreSummary, progress: Progress) -> None:
    """Finish or drop a shard's tables, and count."""
    if end.error is not None:
        tables.abandon()
        summary.failures.append(end.error)
        progress.note(str(end.error))
        return
    tables.finish(end.stamp)
    summary.n_shards += 1
    summary.n_new += tables.rows
    summary.add(tables.rows, tables.ok, tables.reasons)
