"""The steps of a training, and the folders that it leaves."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TextIO

import torch
from safetensors.torch import save_file

from mmfilter import __version__
from mmfilter.core.files import atomic, write_json
from mmfilter.core.input.decode import DecodeSettings
from mmfilter.core.pipeline.model_pass import ModelPass
from mmfilter.core.pipeline.reference import fit_weights
from mmfilter.core.sae.autoencoder import SAE
from mmfilter.core.scores.crossmodal import FeatureWeights
from mmfilter.core.sides import IMAGE, TEXT
from mmfilter.core.training import collective
from mmfilter.core.training.buffer import Batch, ShuffleBuffer
from mmfilter.core.training.cache import CachedStates
from mmfilter.core.training.checkpoint import save_checkpoint
from mmfilter.core.training.curves import curves_page
from mmfilter.core.training.session import TrainRun
from mmfilter.core.training.shard_states import ShardStates
from mmfilter.core.training.statistics import StepStats
from mmfilter.core.training.summary import Trained, TrainSummary, flat
from mmfilter.core.training.trainer import Trainer

LOG, PAGE, MANIFEST, STATISTICS, WEIGHTS = (
    "train.jsonl",
    "training.html",
    "manifest.json",
    "statistics.safetensors",
    "weights.safetensors",
)


class TrainingLoop:
    """Trainers that take the same batches, from where they are until all tokens are used."""

    def __init__(
        self, run: TrainRun, trainers: Mapping[str, Trainer], buffer: ShuffleBuffer, source: ShardStates | CachedStates
    ) -> None:
        """`trainers` by the name of their folder; `source` goes on where they and the `buffer` are."""
        self.run, self.trainers, self.buffer, self.source = run, trainers, buffer, source

    @property
    def done(self) -> bool:
        return all(trainer.done for trainer in self.trainers.values())

    def train(self) -> TrainSummary:
        """Step until all tokens are used, then write what is asked for."""
        began, saved = time.perf_counter(), time.perf_counter()
        before = max(trainer.tokens for trainer in self.trainers.values())
        last: dict[str, StepStats] = {}
        total = next(iter(self.trainers.values())).settings.tokens
        self.run.progress.start("training", None)
        logs = {name: self._log(name) for name in self.trainers} if self.run.first else {}
        try:
            for states, side in self._batches():
                for name, trainer in self.trainers.items():
                    last[name] = trainer.step(states, side)
                    if self.run.first:
                        logs[name].write(json.dumps(flat(last[name])) + "\n")
                        rate = (last[name].tokens - before) / (time.perf_counter() - began)
                        self.run.progress.step(name, last[name], total, rate)
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
        if self.run.first:
            shutil.rmtree(self.run.checkpoints)
        tokens = max(trainer.tokens for trainer in self.trainers.values()) - before
        return TrainSummary(
            trained, seconds, tokens, self.source.reasons, self.buffer.counts.sinks, self.source.failures
        )

    def _time_to_save(self, saved: float) -> bool:
        """The first process decides for all."""
        now = torch.tensor(
            time.perf_counter() - saved >= self.run.settings.checkpoint_every, device=self.run.backbone.device
        )
        collective.broadcast_(now)
        return bool(now)

    def _batches(self) -> Iterator[Batch]:
        if self.done:
            return
        yield from self.buffer.batches()  # what a checkpoint left in it
        for states in self.source:
            self.buffer.add(states.states, states.side, states.origin)
            yield from self.buffer.batches()

    def _log(self, name: str) -> TextIO:
        """The log, cut back to the step that the training goes on from."""
        path = self.run.folder(name) / LOG
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

    def _save(self) -> None:
        for i, (name, trainer) in enumerate(self.trainers.items()):
            save_checkpoint(
                self.run.checkpoints_of(name),
                trainer,
                None if i else self.buffer,
                source=self.source.position.mapping(),
                keep=2,
            )

    # --- the end -----------------------------------------------------------------------------

    def _finish(self, name: str, trainer: Trainer, last: StepStats | None) -> Trained:
        folder, sae = self.run.folder(name), trainer.export()
        sae = replace(sae, metadata={**sae.metadata, **self.run.hook_point()})
        if self.run.first:
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
            if self.run.settings.weights:
                self.run.progress.start("fitting feature weights", None)
                self._fitted_weights(sae).save(folder / WEIGHTS)
            (folder / PAGE).write_text(curves_page(folder / LOG, trainer.settings), "utf-8")
            about = {
                "kind": "mmfilter sae",
                "version": __version__,
                "trained_on": self.run.about(),
                "settings": trainer.settings.to_mapping(),
                "hash": sae.hash,
            }
            write_json(folder / MANIFEST, about | {"last_step": flat(last) if last else None})
        return Trained(folder, trainer.settings, last)

    def _fitted_weights(self, sae: SAE) -> FeatureWeights:
        """Cross-modal weights on the heads of the training shards, as `score` fits them."""
        settings = self.run.settings
        decoding = DecodeSettings(settings.caption)
        with ModelPass(self.run.backbone, decoding, batch_size=settings.pairs, workers=settings.workers) as model_pass:
            return fit_weights(
                self.run.sources,
                lambda source, n: itertools.islice(source.samples(), n),
                model_pass,
                sae.to(self.run.backbone.device),
                self.run.progress,
            )
