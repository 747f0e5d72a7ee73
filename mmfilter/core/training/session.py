"""One training from its first pair to the folder it leaves."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import save_file

from mmfilter import __version__
from mmfilter.core.files import atomic, write_json
from mmfilter.core.input.decode import DecodeSettings
from mmfilter.core.input.source import Source
from mmfilter.core.model.backbone import Backbone
from mmfilter.core.model.loading import model_hash
from mmfilter.core.pipeline.engine import resolved_device
from mmfilter.core.pipeline.model_pass import ModelPass
from mmfilter.core.pipeline.pass_settings import DeviceSettings
from mmfilter.core.pipeline.reference import fit_weights
from mmfilter.core.sae.autoencoder import SAE
from mmfilter.core.scores.crossmodal import FeatureWeights
from mmfilter.core.sides import IMAGE, TEXT
from mmfilter.core.training import collective
from mmfilter.core.training.buffer import BufferSettings, ShuffleBuffer
from mmfilter.core.training.cache import CachedStates, write_cache
from mmfilter.core.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from mmfilter.core.training.curves import curves_page
from mmfilter.core.training.memory_check import check_memory
from mmfilter.core.training.run_settings import TrainRunSettings
from mmfilter.core.training.settings import TrainSettings
from mmfilter.core.training.shard_states import Position, ShardStates, States, estimated_pairs, pilot, sizes_of
from mmfilter.core.training.statistics import StepStats
from mmfilter.core.training.summary import Trained, TrainProgress, TrainSummary, flat
from mmfilter.core.training.trainer import Trainer
from mmfilter.errors import SAEError

PILOT_TOKENS = 65_536
"""Tokens on which mean and scale of the states are measured"""
MOST_TOKENS, MOST_EPOCHS = 100_000_000, 10
LOG, PAGE, MANIFEST, CHECKPOINTS, STATISTICS, WEIGHTS = (
    "train.jsonl",
    "training.html",
    "manifest.json",
    "checkpoints",
    "statistics.safetensors",
    "weights.safetensors",
)


class TrainRun:
    """One training from its first pair to the folder it leaves."""

    def __init__(
        self,
        sources: Sequence[Source],
        backbone: Backbone,
        settings: TrainRunSettings,
        device: DeviceSettings,
        progress: TrainProgress,
    ) -> None:
        self.sources, self.backbone, self.settings, self.progress = sources, backbone, settings, progress
        self.device = device
        self.rank, self.processes = collective.world()
        self.trainers: dict[str, Trainer] = {}
        self.source: ShardStates | CachedStates | None = None
        self.buffer: ShuffleBuffer | None = None

    @property
    def first(self) -> bool:
        """Whether this process writes what all share."""
        return self.rank == 0

    def folder(self, name: str) -> Path:
        return self.settings.output / name if name else self.settings.output

    # --- getting ready -----------------------------------------------------------------------

    def prepare(self) -> None:
        """Measure the states, make trainers and buffer, go on from the last checkpoint."""
        settings = self.settings
        if settings.cache is not None:
            self._make_cache(settings.cache)
        found, epoch = self._sample()
        tokens = settings.tokens or self._default_tokens(epoch)
        for name, variant in settings.variants().items():
            check_memory(
                variant.resolved(self.backbone.d_model),
                self.backbone.d_model,
                settings.capacity,
                len(settings.variants()),
                resolved_device(self.device),
            )
            self.trainers[name] = self._trainer(replace(variant, tokens=tokens, seed=settings.seed), found)
        any_settings = next(iter(self.trainers.values())).settings
        self.buffer = ShuffleBuffer(
            BufferSettings(
                batch_size=max(1, any_settings.batch_size // self.processes),
                capacity=self._capacity(any_settings.batch_size, epoch),
                image_fraction=settings.image_fraction,
                sink_factor=settings.sink_factor,
                seed=settings.seed + self.rank,
            ),
            self.backbone.d_model,
        )
        self.source = self._source(self._restore())

    def _capacity(self, batch_size: int, epoch: float | None) -> int:
        """Tokens in the buffer: no more than one pass has, or it would hold the same ones twice."""
        wanted = self.settings.capacity if epoch is None else min(self.settings.capacity, int(epoch))
        return max(wanted, 2 * batch_size)

    def _sample(self) -> tuple[torch.Tensor, float | None]:
        """States to measure mean and scale on, and the tokens of one pass over the shards as far as that is known."""
        self.progress.start("measuring the states", None)
        if self.settings.cache is not None:
            cached = self._cached(None)
            return pilot(iter(cached), min(PILOT_TOKENS, cached.tokens), self.progress.advance)[0], cached.tokens
        found, per_pair = pilot(self._live(self.sources, None).once(), PILOT_TOKENS, self.progress.advance)
        pairs = estimated_pairs(self.sources)
        return found, None if pairs is None else pairs * per_pair

    def _live(self, sources: Sequence[Source], position: Position | None) -> ShardStates:
        settings = self.settings
        return ShardStates(
            sources,
            self.backbone,
            DecodeSettings(settings.caption),
            batch_size=settings.pairs,
            workers=settings.workers,
            seed=settings.seed,
            position=position,
        )

    def _cached(self, position: Position | None) -> CachedStates:
        return CachedStates(
            self.settings.cache,
            self.about(),
            seed=self.settings.seed,
            rank=self.rank,
            processes=self.processes,
            position=position,
        )

    def _make_cache(self, folder: Path) -> None:
        if not folder.exists() and self.first:
            self.progress.start("caching states", None)
            write_cache(folder, self.about(), self._live(self.sources, None).once(), self.progress.advance)
        collective.wait()

    def _trainer(self, variant: TrainSettings, found: torch.Tensor) -> Trainer:
        fitted = Trainer.fitted(variant, found, self.backbone.device)
        scale = torch.tensor(fitted.scale, dtype=torch.float64, device=self.backbone.device)
        mean = found.mean(0).to(self.backbone.device)
        collective.broadcast_(scale, mean)  # every process met other pairs first
        return Trainer(variant, self.backbone.d_model, mean.cpu(), self.backbone.device, scale=float(scale))

    def _default_tokens(self, epoch: float | None) -> int:
        """Ten passes over the shards, at most 100 million; what a training began with, when it goes on."""
        saved = self._saved_manifest()
        if saved is not None:
            return saved["tokens"]
        batch = self.settings.train.batch_size
        return (
            MOST_TOKENS
            if epoch is None
            else int(min(MOST_TOKENS, max(batch, -(-MOST_EPOCHS * epoch // batch) * batch)))
        )

    def about(self) -> dict[str, Any]:
        """What the states are of; names and sizes, so that a folder may be moved."""
        return {
            "model_hash": model_hash(self.settings.card.model, self.backbone.model.config),
            "layer": self.backbone.layer,
            "prompt": self.backbone.prompt,
            "text_context": self.backbone.text_context,
            "caption": self.settings.caption,
            "shards": [
                [source.path.rpartition("/")[2], size]
                for source, size in zip(self.sources, sizes_of(self.sources), strict=True)
            ],
        } | ({} if self.settings.images is None else {"images": os.path.basename(self.settings.images.rstrip("/"))})

    def _source(self, position: Position | None) -> ShardStates | CachedStates:
        if self.settings.cache is not None:
            return self._cached(position)
        return self._live(self.sources[self.rank :: self.processes], position)

    # --- checkpoints -------------------------------------------------------------------------

    def _saved_manifest(self) -> dict[str, Any] | None:
        path = self.settings.output / CHECKPOINTS / MANIFEST
        return json.loads(path.read_text("utf-8")) if path.exists() else None

    def _checkpoints(self, name: str) -> Path:
        return self.settings.output / CHECKPOINTS / (name or "sae")

    def _restore(self) -> Position | None:
        """Bring everything to the newest step that every SAE has a checkpoint of."""
        saved = self._saved_manifest()
        if saved is None:
            if self.first:
                finished = [self.folder(name) for name in self.trainers if (self.folder(name) / MANIFEST).exists()]
                if finished:
                    raise SAEError(f"{str(finished[0])!r} holds a finished SAE: use another -o, or delete it")
                (self.settings.output / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
                write_json(self.settings.output / CHECKPOINTS / MANIFEST, self._identity())
            collective.wait()
            return None
        differing = [key for key, value in self._identity().items() if saved.get(key) != value]
        if differing:
            key = differing[0]
            raise SAEError(
                f"{str(self.settings.output)!r} was begun with other settings ({key} was {saved.get(key)!r}, is now "
                f"{self._identity()[key]!r}): use another -o"
            )
        by_name = {name: {path.name: path for path in checkpoints(self._checkpoints(name))} for name in self.trainers}
        common = sorted(set.intersection(*(set(found) for found in by_name.values())))
        if not common:
            return None
        position = None
        for i, (name, trainer) in enumerate(self.trainers.items()):
            source = load_checkpoint(by_name[name][common[-1]], trainer, None if i else self.buffer)
            position = position or Position(**source)
        return position

    def _identity(self) -> dict[str, Any]:
        """What may not change when a training goes on."""
        variants = {name: trainer.settings.to_mapping() for name, trainer in self.trainers.items()}
        any_settings = next(iter(self.trainers.values())).settings
        buffer = {
            name: getattr(self.settings, name)
            for name in ("capacity", "image_fraction", "sink_factor", "pairs", "seed")
        }
        return self.about() | {
            "tokens": any_settings.tokens,
            "variants": variants,
            "buffer": buffer,
            "cached": self.settings.cache is not None,
            "processes": self.processes,
        }

    def _save(self) -> None:
        for i, (name, trainer) in enumerate(self.trainers.items()):
            save_checkpoint(
                self._checkpoints(name),
                trainer,
                None if i else self.buffer,
                source=self.source.position.mapping(),
                keep=2,
            )

    def _fitted_weights(self, sae: SAE) -> FeatureWeights:
        """Cross-modal weights on the heads of the training shards, as `score` fits them."""
        settings = self.settings
        decoding = DecodeSettings(settings.caption)
        with ModelPass(self.backbone, decoding, batch_size=settings.pairs, workers=settings.workers) as model_pass:
            return fit_weights(
                self.sources,
                lambda source, n: itertools.islice(source.samples(), n),
                model_pass,
                sae.to(self.backbone.device),
                self.progress,
            )

    # --- the loop ----------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        return all(trainer.done for trainer in self.trainers.values())

    def train(self) -> TrainSummary:
        """Step until all tokens are used, then write what is asked for."""
        began, saved = time.perf_counter(), time.perf_counter()
        before = max(trainer.tokens for trainer in self.trainers.values())
        last: dict[str, StepStats] = {}
        total = next(iter(self.trainers.values())).settings.tokens
        self.progress.start("training", None)
        logs = {name: self._log(name) for name in self.trainers} if self.first else {}
        try:
            for states, side in self._batches():
                for name, trainer in self.trainers.items():
                    last[name] = trainer.step(states, side)
                    if self.first:
                        logs[name].write(json.dumps(flat(last[name])) + "\n")
                        rate = (last[name].tokens - before) / (time.perf_counter() - began)
                        self.progress.step(name, last[name], total, rate)
                if self.done:
                    break
                if self._time_to_save(saved):
                    self._save()
                    saved = time.perf_counter()
        finally:
            for log in logs.values():
                log.close()
        seconds = time.perf_counter() - began
        trained = [self._finish(name, trainer, last.get(name)) for name, trainer in self.trainers.items()]
        if self.first:
            shutil.rmtree(self.settings.output / CHECKPOINTS)
        tokens = max(trainer.tokens for trainer in self.trainers.values()) - before
        return TrainSummary(
            trained, seconds, tokens, self.source.reasons, self.buffer.counts.sinks, self.source.failures
        )

    def _time_to_save(self, saved: float) -> bool:
        """The first process decides for all."""
        now = torch.tensor(time.perf_counter() - saved >= self.settings.checkpoint_every, device=self.backbone.device)
        collective.broadcast_(now)
        return bool(now)

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if self.done:
            return
        yield from self.buffer.batches()  # what a checkpoint left in it
        for states in self.source:
            self._add(states)
            yield from self.buffer.batches()

    def _add(self, states: States) -> None:
        self.buffer.add(states.states, states.side, states.origin)

    def _log(self, name: str) -> TextIO:
        """The log, cut back to the step that the training goes on from."""
        path = self.folder(name) / LOG
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if path.exists():
            kept = [
                line
                for line in path.read_text("utf-8").splitlines()
                if line and json.loads(line)["step"] <= self.trainers[name].step_count
            ]
        file = path.open("w", encoding="utf-8", buffering=1)
        file.writelines(f"{line}\n" for line in kept)
        return file

    # --- the end -----------------------------------------------------------------------------

    def _finish(self, name: str, trainer: Trainer, last: StepStats | None) -> Trained:
        folder, sae = self.folder(name), trainer.export()
        sae = replace(sae, metadata={**sae.metadata, **self._hook_point()})
        if self.first:
            sae.save(folder)
            statistics = trainer.statistics
            figures = {
                "image_frequency": statistics.frequency[IMAGE].float().cpu(),
                "text_frequency": statistics.frequency[TEXT].float().cpu(),
                "maximum": (statistics.maximum / trainer.scale).cpu(),
                "tokens": statistics.tokens.cpu(),
            }
            with atomic(folder / STATISTICS) as temporary:
                save_file(figures, temporary)
            if self.settings.weights:
                self.progress.start("fitting feature weights", None)
                self._fitted_weights(sae).save(folder / WEIGHTS)
            (folder / PAGE).write_text(curves_page(folder / LOG, trainer.settings), "utf-8")
            about = {
                "kind": "mmfilter sae",
                "version": __version__,
                "trained_on": self.about(),
                "settings": trainer.settings.to_mapping(),
                "hash": sae.hash,
            }
            write_json(folder / MANIFEST, about | {"last_step": flat(last) if last else None})
        return Trained(folder, trainer.settings, last)

    def _hook_point(self) -> dict[str, Any]:
        """Where the states come from, in the words of SAELens and of transformers."""
        model, layer = self.settings.card.model, self.backbone.layer
        said = {"model_name": Path(model).name if Path(model).is_dir() else model, "layer": layer}
        stream = self.backbone.joint_stream
        if stream is None:
            return said | {"hook_name": "shared space of both towers"}
        block = next(name for name, module in self.backbone.model.named_modules() if module is stream.hooked)
        return said | {"hook_name": f"blocks.{layer}.hook_resid_post", "hf_hook_name": block}
