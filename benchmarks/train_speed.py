"""Tokens a second of a training step against the peers', and what is reconstructed after equal tokens.

All arms get the same batches and the same learning rate, in turns, in one process; a step is all that happens between a
batch of states and new weights:

    mmfilter     Trainer.step: batchtopk (the default), topk, and batchtopk with bfloat16 products
    SAELens      SAETrainer.step on a TopKTrainingSAE
    sparsify     as its Trainer does it: forward, backward, gradient parallel to the decoder removed, optimiser, rows
                 to norm 1; with its default optimiser (signum, schedule-free, at its own rate) and with Adam

States are sparse positive combinations of 2,048 directions around a mean, with noise, scaled to mean square 1 a
dimension. The second table is a longer training of a smaller SAE; its FVU is of states not trained on, with k features
a token, for batchtopk in the mean.

    pip install sae-lens eai-sparsify
    python benchmarks/train_speed.py --rounds 4 --learn-steps 300
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

import torch
import torch.nn.functional as F
from machine import machine

from mmfilter.core.training.settings import TrainSettings
from mmfilter.core.training.trainer import Trainer

DIRECTIONS, ACTIVE, HELD_OUT = 2048, 24, 4096


class Arm(Protocol):
    """One way of training."""

    def step(self, states: torch.Tensor) -> None:
        """Train on a batch (tokens, d_model)."""

    def reconstruct(self, states: torch.Tensor) -> torch.Tensor:
        """What the SAE makes of states, by its rule of inference."""


@dataclass(frozen=True)
class Shape:
    d_model: int
    n_features: int
    k: int
    batch: int

    @property
    def rate(self) -> float:
        return 2e-4 / (self.n_features / 2**14) ** 0.5


class Ours:
    def __init__(self, shape: Shape, sample: torch.Tensor, **options) -> None:
        settings = TrainSettings(
            n_features=shape.n_features, k=shape.k, batch_size=shape.batch, warm_up=0, decay=0, lr=shape.rate, **options
        )
        self.trainer = Trainer(settings, shape.d_model, sample.mean(0))

    def step(self, states: torch.Tensor) -> None:
        self.trainer.step(states)

    def reconstruct(self, states: torch.Tensor) -> torch.Tensor:
        sae = self.trainer.export()
        return sae.decode(sae.encode(states, max_active=sae.n_features), states)


class SAELens:
    def __init__(self, shape: Shape, sample: torch.Tensor) -> None:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        self.sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=shape.d_model, d_sae=shape.n_features, k=shape.k))
        self.sae.b_dec.data = sample.mean(0)
        config = SAETrainerConfig(
            total_training_samples=10**9, train_batch_size_samples=shape.batch, lr=shape.rate, lr_end=shape.rate
        )
        self.trainer = SAETrainer(config, self.sae, iter([]))

    def step(self, states: torch.Tensor) -> None:
        self.trainer.step(states)
        self.trainer.n_training_steps += 1

    @torch.no_grad()
    def reconstruct(self, states: torch.Tensor) -> torch.Tensor:
        return self.sae.decode(self.sae.encode(states))


class Sparsify:
    def __init__(self, shape: Shape, sample: torch.Tensor, optimiser: str) -> None:
        from sparsify import SparseCoder, SparseCoderConfig

        self.sae = SparseCoder(shape.d_model, SparseCoderConfig(num_latents=shape.n_features, k=shape.k))
        self.sae.b_dec.data = sample.mean(0)
        self.fired = torch.zeros(shape.n_features, dtype=torch.bool)
        if optimiser == "adam":
            self.optimiser = torch.optim.Adam(self.sae.parameters(), lr=shape.rate)
        else:
            from schedulefree import ScheduleFreeWrapper
            from sparsify.sign_sgd import SignSGD

            rate = 5e-3 / (shape.n_features / 2**14) ** 0.5
            self.optimiser = ScheduleFreeWrapper(SignSGD(self.sae.parameters(), lr=rate), momentum=0.95)
            self.optimiser.train()

    def step(self, states: torch.Tensor) -> None:
        self.sae.set_decoder_norm_to_unit_norm()
        out = self.sae(x=states, y=states, dead_mask=None, total_variance=(states - states.mean(0)).pow(2).sum())
        self.fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimiser.step()
        self.optimiser.zero_grad()

    @torch.no_grad()
    def reconstruct(self, states: torch.Tensor) -> torch.Tensor:
        if hasattr(self.optimiser, "eval"):
            self.optimiser.eval()
        out = self.sae(x=states, y=states, dead_mask=None).sae_out
        if hasattr(self.optimiser, "train"):
            self.optimiser.train()
        return out


MAKE: dict[str, Callable[[Shape, torch.Tensor], Arm]] = {
    "mmfilter batchtopk": Ours,
    "mmfilter topk": lambda shape, sample: Ours(shape, sample, architecture="topk"),
    "mmfilter batchtopk, bfloat16 products": lambda shape, sample: Ours(shape, sample, dtype="bfloat16"),
    "SAELens topk": SAELens,
    "sparsify topk, signum": lambda shape, sample: Sparsify(shape, sample, "signum"),
    "sparsify topk, Adam": lambda shape, sample: Sparsify(shape, sample, "adam"),
}


class States:
    """Batches of synthetic states."""

    def __init__(self, d_model: int, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._directions = F.normalize(torch.randn(DIRECTIONS, d_model, generator=self._generator), dim=1)
        self._mean = torch.randn(d_model, generator=self._generator)
        self._scale = 1.0
        self._scale = float(1 / (self(HELD_OUT) - self._mean).std())

    def __call__(self, tokens: int) -> torch.Tensor:
        which = torch.randint(DIRECTIONS, (tokens, ACTIVE), generator=self._generator)
        size = torch.empty(tokens, ACTIVE).exponential_(generator=self._generator)
        noise = 0.01 * torch.randn(tokens, len(self._mean), generator=self._generator)
        return (
            F.embedding_bag(which, self._directions, per_sample_weights=size, mode="sum") + noise
        ) * self._scale + self._mean


def fvu(arm: Arm, states: torch.Tensor) -> float:
    """Fraction of variance unexplained."""
    return float((arm.reconstruct(states) - states).square().sum() / (states - states.mean(0)).square().sum())


def made(names: list[str], shape: Shape, states: States) -> dict[str, Arm]:
    torch.manual_seed(0)
    sample = states(HELD_OUT)
    return {name: MAKE[name](shape, sample) for name in names}


def measure(
    arms: dict[str, Arm], shape: Shape, states: States, rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Tokens a second of each arm in each round, after one to warm up, and the median CPU seconds of a step."""
    rates: dict[str, list[float]] = {name: [] for name in arms}
    cpu: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(rounds + 1):
        batch = states(shape.batch)
        for name, arm in arms.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            arm.step(batch)
            if i:
                cpu[name].append(time.process_time() - cpu_started)
                rates[name].append(shape.batch / (time.perf_counter() - started))
    return rates, {name: statistics.median(seen) for name, seen in cpu.items()}


def learn(arms: dict[str, Arm], shape: Shape, states: States, steps: int) -> dict[str, float]:
    """FVU of each arm on states not seen, after as many tokens."""
    for _ in range(steps):
        batch = states(shape.batch)
        for arm in arms.values():
            arm.step(batch)
    held_out = states(HELD_OUT)
    return {name: fvu(arm, held_out) for name, arm in arms.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--shape", type=int, nargs=4, default=[1024, 16384, 32, 4096], metavar=("D", "N", "K", "BATCH"))
    parser.add_argument("--learn-steps", type=int, default=300)
    parser.add_argument(
        "--learn-shape", type=int, nargs=4, default=[256, 4096, 32, 1024], metavar=("D", "N", "K", "BATCH")
    )
    parser.add_argument("--arms", nargs="+", choices=list(MAKE), default=list(MAKE))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    about = machine()
    shape, small = Shape(*options.shape), Shape(*options.learn_shape)
    states = States(shape.d_model)
    rates, cpu = measure(made(options.arms, shape, states), shape, states, options.rounds)
    small_states = States(small.d_model)
    quality = learn(made(options.arms, small, small_states), small, small_states, options.learn_steps)
    if options.json:
        print(
            json.dumps(
                {
                    "machine": about,
                    "shape": options.shape,
                    "rates": rates,
                    "cpu seconds": cpu,
                    "learn shape": options.learn_shape,
                    "fvu": quality,
                },
                indent=2,
            )
        )
        return
    peers = [name for name in options.arms if not name.startswith("mmfilter")]
    print(f"{about}, {torch.get_num_threads()} threads\n\nd_model, features, k, batch: {options.shape}\n")
    print(f"| arm | tokens/s (median of {options.rounds}) | CPU s a step |{''.join(f' × {name} |' for name in peers)}")
    print(f"|---|---|---|{'---|' * len(peers)}")
    for name, seen in rates.items():
        ratios = (statistics.median(a / b for a, b in zip(seen, rates[peer], strict=True)) for peer in peers)
        against = "".join(f" {ratio:.2f} |" for ratio in ratios)
        print(f"| {name} | {statistics.median(seen):,.0f} | {cpu[name]:.2f} |{against}")
    print(f"\nd_model, features, k, batch: {options.learn_shape}, {options.learn_steps * small.batch:,} tokens\n")
    print("| arm | FVU |\n|---|---|")
    for name, value in quality.items():
        print(f"| {name} | {value:.4f} |")


if __name__ == "__main__":
    main()
