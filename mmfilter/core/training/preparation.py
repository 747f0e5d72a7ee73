"""What comes before the first step: states measured, trainers and buffer made, and brought to the last checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mmfilter.core.files import write_json
from mmfilter.core.pipeline.engine import resolved_device
from mmfilter.core.training import collective
from mmfilter.core.training.buffer import BufferSettings, ShuffleBuffer
from mmfilter.core.training.cache import write_cache
from mmfilter.core.training.checkpoint import checkpoints, load_checkpoint
from mmfilter.core.training.loop import MANIFEST, TrainingLoop
from mmfilter.core.training.memory_check import check_memory
from mmfilter.core.training.session import TrainRun
from mmfilter.core.training.settings import TrainSettings
from mmfilter.core.training.shard_states import Position, estimated_pairs, pilot
from mmfilter.core.training.trainer import Trainer
from mmfilter.errors import SAEError

PILOT_TOKENS = 65_536
"""Tokens on which mean and scale of the states are measured"""
MOST_TOKENS, MOST_EPOCHS = 100_000_000, 10


def prepared(run: TrainRun) -> TrainingLoop:
    """Measure the states, make trainers and buffer, go on from the last checkpoint."""
    settings = run.settings
    if settings.cache is not None:
        _make_cache(run, settings.cache)
    sample, epoch = _sample(run)
    trainers: dict[str, Trainer] = {}
    tokens = settings.tokens or _default_tokens(run, epoch)
    for name, variant in settings.variants().items():
        check_memory(
            variant.resolved(run.backbone.d_model),
            run.backbone.d_model,
            settings.capacity,
            len(settings.variants()),
            resolved_device(run.device),
        )
        trainers[name] = _trainer(run, replace(variant, tokens=tokens, seed=settings.seed), sample)
    any_settings = next(iter(trainers.values())).settings
    buffer = ShuffleBuffer(
        BufferSettings(
            batch_size=max(1, any_settings.batch_size // run.processes),
            capacity=_capacity(run, any_settings.batch_size, epoch),
            image_fraction=settings.image_fraction,
            sink_factor=settings.sink_factor,
            seed=settings.seed + run.rank,
        ),
        run.backbone.d_model,
    )
    return TrainingLoop(run, trainers, buffer, run.source(_restore(run, trainers, buffer)))


def _capacity(run: TrainRun, batch_size: int, epoch: float | None) -> int:
    """Tokens in the buffer: no more than one pass has, or it would hold the same ones twice."""
    wanted = run.settings.capacity if epoch is None else min(run.settings.capacity, int(epoch))
    return max(wanted, 2 * batch_size)


def _sample(run: TrainRun) -> tuple[torch.Tensor, float | None]:
    """States to measure mean and scale on, and the tokens of one pass over the shards as far as that is known."""
    run.progress.start("measuring the states", None)
    if run.settings.cache is not None:
        cached = run.cached(run.settings.cache, None)
        return pilot(iter(cached), min(PILOT_TOKENS, cached.tokens), run.progress.advance)[0], cached.tokens
    sample, per_pair = pilot(run.live(run.sources, None).once(), PILOT_TOKENS, run.progress.advance)
    pairs = estimated_pairs(run.sources)
    return sample, None if pairs is None else pairs * per_pair


def _make_cache(run: TrainRun, folder: Path) -> None:
    if not folder.exists() and run.first:
        run.progress.start("caching states", None)
        write_cache(folder, run.about(), run.live(run.sources, None).once(), run.progress.advance)
    collective.wait()


def _trainer(run: TrainRun, variant: TrainSettings, sample: torch.Tensor) -> Trainer:
    fitted = Trainer.fitted(variant, sample, run.backbone.device)
    scale = torch.tensor(fitted.scale, dtype=torch.float64, device=run.backbone.device)
    mean = sample.mean(0).to(run.backbone.device)
    collective.broadcast_(scale, mean)  # every process met other pairs first
    return Trainer(variant, run.backbone.d_model, mean.cpu(), run.backbone.device, scale=float(scale))


def _default_tokens(run: TrainRun, epoch: float | None) -> int:
    """Ten passes over the shards, at most 100 million; what a training began with, when it goes on."""
    saved = _saved_manifest(run)
    if saved is not None:
        return int(saved["tokens"])
    if epoch is None:
        return MOST_TOKENS
    batch = run.settings.train.batch_size
    return int(min(MOST_TOKENS, max(batch, -(-MOST_EPOCHS * epoch // batch) * batch)))


def _saved_manifest(run: TrainRun) -> dict[str, Any] | None:
    path = run.checkpoints / MANIFEST
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def _restore(run: TrainRun, trainers: dict[str, Trainer], buffer: ShuffleBuffer) -> Position | None:
    """Bring everything to the newest step that every SAE has a checkpoint of."""
    saved = _saved_manifest(run)
    if saved is None:
        if run.first:
            finished = [run.folder(name) for name in trainers if (run.folder(name) / MANIFEST).exists()]
            if finished:
                raise SAEError(f"{str(finished[0])!r} holds a finished SAE: use another -o, or delete it")
            run.checkpoints.mkdir(parents=True, exist_ok=True)
            write_json(run.checkpoints / MANIFEST, _identity(run, trainers))
        collective.wait()
        return None
    identity = _identity(run, trainers)
    differing = [key for key, value in identity.items() if saved.get(key) != value]
    if differing:
        key = differing[0]
        raise SAEError(
            f"{str(run.settings.output)!r} was begun with other settings ({key} was {saved.get(key)!r}, is now "
            f"{identity[key]!r}): use another -o"
        )
    by_name = {name: {path.name: path for path in checkpoints(run.checkpoints_of(name))} for name in trainers}
    common = sorted(set.intersection(*(set(paths) for paths in by_name.values())))
    if not common:
        return None
    position = None
    for i, (name, trainer) in enumerate(trainers.items()):
        source = load_checkpoint(by_name[name][common[-1]], trainer, None if i else buffer)
        position = position or Position(**source)
    return position


def _identity(run: TrainRun, trainers: dict[str, Trainer]) -> dict[str, Any]:
    """What may not change when a training goes on."""
    settings = run.settings
    return run.about() | {
        "tokens": next(iter(trainers.values())).settings.tokens,
        "variants": {name: trainer.settings.to_mapping() for name, trainer in trainers.items()},
        "buffer": {
            "capacity": settings.capacity,
            "image_fraction": settings.image_fraction,
            "sink_factor": settings.sink_factor,
            "pairs": settings.pairs,
            "seed": settings.seed,
        },
        "cached": run.settings.cache is not None,
        "processes": run.processes,
    }
