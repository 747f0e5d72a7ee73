"""Samples a second of `score` against doing less: how much SAE, scores and tables cost.

Three arms, interleaved in one process on the same samples and in the same batches:

    score     everything that `mmfilter score` does behind loading: read, decode, pre-process, model, SAE, tables
    bare      the same feed and the truncated forward pass, nothing behind it
    forward   the truncated forward pass alone, on batches that lie ready in memory

    python benchmarks/score_speed.py --samples 2000 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from machine import machine

from mmfilter.core.input.decode import DecodeSettings, Pair
from mmfilter.core.input.shards import open_source
from mmfilter.core.model.backbone import Backbone
from mmfilter.core.pipeline.engine import load
from mmfilter.core.pipeline.feed import Batch
from mmfilter.core.pipeline.intake import Intake
from mmfilter.core.pipeline.model_pass import ModelPass
from mmfilter.core.pipeline.scorer import Scorer
from mmfilter.core.pipeline.shard_pass import ShardReading, read_ahead, shard_pass
from mmfilter.core.progress import Silence
from mmfilter.core.run.directory import RunDirectory, Shard
from mmfilter.core.run.shard_tables import ShardTables
from mmfilter.core.scores.crossmodal import load_weights
from mmfilter.core.scores.registry import SCORES
from mmfilter.ops.score_settings import ScoreSettings

SHARDS = sorted((Path(__file__).parents[1] / "examples" / "shards").glob("*.tar"))


class Arms:
    """The three ways through the same samples."""

    def __init__(self, settings: ScoreSettings, samples: int, folder: Path) -> None:
        self.settings, self.samples, self.folder = settings, samples, folder
        self.backbone, self.sae = load(settings.card, settings)
        self.scorer = Scorer(
            self.backbone, self.sae, load_weights(Path(settings.card.weights)), settings.card.threshold
        )
        repeats = -(-samples // 1000)
        paths = [str(path) for path in SHARDS]
        self.shards = [Shard(open_source(path), f"{i}-{Path(path).stem}") for i in range(repeats) for path in paths]
        with self._pass() as model_pass:
            self.ready = [part.inputs for part in self._parts(model_pass) if isinstance(part, Batch)]

    def _pass(self) -> ModelPass:
        settings = self.settings
        return ModelPass(self.backbone, DecodeSettings(), batch_size=settings.batch_size, workers=settings.workers)

    def _readings(self, model_pass: ModelPass) -> Iterator[ShardReading]:
        intake = Intake(self.samples)
        return read_ahead((shard.source for shard in self.shards), intake.samples, model_pass)

    def _parts(self, model_pass: ModelPass) -> Iterator[Batch | list[Pair]]:
        for reading in self._readings(model_pass):
            yield from reading

    def score(self) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder) as run, self._pass() as model_pass:
            for shard, reading in zip(self.shards, self._readings(model_pass), strict=True):
                tables = ShardTables(RunDirectory(Path(run)), shard, tuple(SCORES))
                shard_pass(reading, model_pass, self.scorer, tables, seed=0, progress=Silence())

    @torch.inference_mode()
    def bare(self) -> None:
        with self._pass() as model_pass:
            for part in self._parts(model_pass):
                if isinstance(part, Batch):
                    wait_for(self.backbone, self.backbone.forward(part.inputs.tensors))

    @torch.inference_mode()
    def forward(self) -> None:
        for inputs in self.ready:
            wait_for(self.backbone, self.backbone.forward(inputs.tensors))

    @torch.inference_mode()
    def parts(self) -> dict[str, float]:
        """Milliseconds a batch, median over the batches, of what happens to one that lies ready."""
        scorer, backbone = self.scorer, self.backbone
        seen: dict[str, list[float]] = {
            "forward pass": [],
            "of the SAE, the matrix product": [],
            "SAE": [],
            "all of it, with pooling, scores and codes": [],
        }
        for inputs in self.ready:
            states = backbone.activations(inputs).states
            steps = (
                lambda inputs=inputs: backbone.activations(inputs),
                lambda states=states: self.sae.preactivations(states),
                lambda states=states: self.sae.encode(states),
                lambda inputs=inputs: scorer.score(backbone.activations(inputs)),
            )
            for times, step in zip(seen.values(), steps, strict=True):
                started = time.perf_counter()
                step()
                wait_for(backbone, states)
                times.append(1000 * (time.perf_counter() - started))
        return {name: statistics.median(times) for name, times in seen.items()}


def wait_for(backbone: Backbone, _states: torch.Tensor) -> None:
    """A GPU works behind the caller's back."""
    if backbone.device.type == "cuda":
        torch.cuda.synchronize()


def measure(arms: Arms, rounds: int) -> dict[str, list[float]]:
    """Samples a second of each arm in each round, after one round to warm up."""
    work = {"score": arms.score, "bare": arms.bare, "forward": arms.forward}
    rates: dict[str, list[float]] = {name: [] for name in work}
    for i in range(rounds + 1):
        for name, arm in work.items():
            started = time.perf_counter()
            arm()
            if i:
                rates[name].append(arms.samples / (time.perf_counter() - started))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = ScoreSettings(
            device=options.device,
            batch_size=options.batch_size,
            workers=options.workers,
        )
        about = machine()
        arms = Arms(settings, options.samples, Path(folder))
        rates, parts = measure(arms, options.rounds), arms.parts()
    medians = {name: statistics.median(seen) for name, seen in rates.items()}
    ratios = {
        other: statistics.median(a / b for a, b in zip(rates["score"], rates[other], strict=True))
        for other in ("bare", "forward")
    }
    if options.json:
        print(json.dumps({"machine": about, "rates": rates, "ratios": ratios, "milliseconds a batch": parts}, indent=2))
        return
    print(f"{about}\n\n| arm | samples/s (median of {options.rounds}) | score is |\n|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {median:,.0f} | {f'{ratios[name]:.2f} of it' if name in ratios else ''} |")
    print(f"\n| of a batch of {options.batch_size} | ms (median) |\n|---|---|")
    for name, median in parts.items():
        print(f"| {name} | {median:.1f} |")


if __name__ == "__main__":
    main()
