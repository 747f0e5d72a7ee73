"""Train the BatchTopK SAE on the hook states of training pairs, and save it with its frozen threshold.

BatchTopK (Bussmann et al. 2024, arXiv 2412.06410) keeps the k·n largest activations of a batch of n tokens, so a token
may have more features than another. For inference the smallest kept activation, averaged over batches, becomes one
threshold for all features; so the SAE is saved as a JumpReLU in the SAELens layout. Dead features are revived by
having them reconstruct the residual (AuxK, Gao et al. 2024, arXiv 2406.04093, appendix A.2).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from export import load_trained
from model import HOOK_LAYER, MAX_TOKENS, PREFIX, WIDTH, TinyLlava, is_word, normalised
from scenes import Icons, draw, train_scenes
from tokenizer import encode, load_tokenizer

from mmfilter.core.model.sae import SAE

ROOT = Path(__file__).parents[2]
SAE_LENS_VERSION = "6.54.12"
"""The release of SAELens whose layout is written."""


@dataclass(frozen=True)
class SAESettings:
    """Shape and training of the SAE."""

    n_features: int = 2048
    k: int = 24
    """Mean number of active features a token"""
    pairs: int = 10_000
    """Training pairs whose states are collected"""
    steps: int = 250
    batch: int = 2048
    """Tokens a step: half of images, a quarter of captions in context, a quarter of captions alone"""
    learning_rate: float = 1.5e-3
    warm_up: int = 50
    most_per_token: int = 50
    """Features that one token may have; scoring keeps no more either"""
    dead_after: int = 60
    """Steps without firing that make a feature dead"""
    aux_k: int = 64
    aux_weight: float = 1 / 16
    seed: int = 7


@dataclass(frozen=True)
class States:
    """Hook states (n, 192) of training pairs, float16."""

    image: torch.Tensor
    context: torch.Tensor
    """Caption tokens that see the image"""
    alone: torch.Tensor

    def batch(self, tokens: int, generator: torch.Generator) -> torch.Tensor:
        """``tokens`` random states in the shares of the settings, float32."""
        shares = ((self.image, tokens // 2), (self.context, tokens // 4), (self.alone, tokens // 4))
        return torch.cat([s[torch.randint(len(s), (n,), generator=generator)] for s, n in shares]).float()


@torch.no_grad()
def collect(model: TinyLlava, icons: Icons, tokenizer, settings: SAESettings) -> States:
    """States of freshly drawn training pairs, half of them in disguise; ``<s>``, ``</s>`` and padding are left out."""
    rng, numbers = random.Random(settings.seed), np.random.default_rng(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    image, context, alone = [], [], []
    for start in range(0, settings.pairs, 250):
        scenes = train_scenes(icons, 250, numbers, rng)
        pixels = normalised(draw(icons, scenes, generator, disguise=start % 500 == 0))
        ids = encode(tokenizer, [s.caption for s in scenes])
        hook, words = model.hook_states(pixels, [ids], ids), is_word(ids)
        image.append(hook[:, 1:PREFIX].flatten(0, 1).half())
        context.append(hook[:, PREFIX:-MAX_TOKENS][words].half())
        alone.append(hook[:, -MAX_TOKENS:][words].half())
    return States(torch.cat(image), torch.cat(context), torch.cat(alone))


class Trainee:
    """The SAE while it trains, on states centred nowhere but scaled to a mean norm of √192 around their mean."""

    def __init__(self, states: States, settings: SAESettings) -> None:
        self.settings = settings
        self.generator = torch.Generator().manual_seed(settings.seed)
        sample = states.batch(20_000, self.generator)
        mean = sample.mean(0)
        self.scale = (WIDTH**0.5 / (sample - mean).norm(dim=1).mean()).item()
        directions = F.normalize(torch.randn(settings.n_features, WIDTH, generator=self.generator), dim=1)
        self.W_dec = directions.clone().requires_grad_()
        self.W_enc = directions.T.clone().requires_grad_()
        self.b_enc = torch.zeros(settings.n_features, requires_grad=True)
        self.b_dec = (mean * self.scale).requires_grad_()
        self.silent_for = torch.zeros(settings.n_features)

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [self.W_enc, self.b_enc, self.W_dec, self.b_dec]

    def preactivations(self, x: torch.Tensor) -> torch.Tensor:
        """(n, features) of scaled states (n, 192)."""
        with torch.autocast("cpu", torch.bfloat16):
            return ((x - self.b_dec) @ self.W_enc + self.b_enc).float()

    def strongest(self, pre: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values (n, m) and features (n, m) of each token, all but the k·n largest positive values set to 0."""
        value, feature = pre.relu().topk(self.settings.most_per_token, dim=1)
        least = value.detach().flatten().topk(self.settings.k * len(pre)).values[-1]
        return value * (value >= least), feature

    def reconstruct(self, value: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        """The decoder's part of the states, without ``b_dec``."""
        dense = torch.zeros(len(value), len(self.W_dec)).scatter(1, feature, value)
        with torch.autocast("cpu", torch.bfloat16):
            return (dense @ self.W_dec).float()

    def loss(self, states: torch.Tensor) -> tuple[torch.Tensor, float, int]:
        """Squared error with the AuxK part; also the fraction of variance unexplained and the number of dead features."""
        x = states * self.scale
        pre = self.preactivations(x)
        value, feature = self.strongest(pre)
        error = x - self.b_dec - self.reconstruct(value, feature)
        loss = error.pow(2).mean()
        self.silent_for += 1
        self.silent_for[feature[value > 0].unique()] = 0
        dead = self.silent_for > self.settings.dead_after
        unexplained = loss.item() / (x - x.mean(0)).pow(2).mean().item()
        if dead.any():
            masked = pre.masked_fill(~dead, 0.0).relu()
            revived = masked.topk(min(self.settings.aux_k, int(dead.sum())), dim=1)
            loss = loss + self.settings.aux_weight * (error.detach() - self.reconstruct(*revived)).pow(2).mean()
        return loss, unexplained, int(dead.sum())

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)

    @torch.no_grad()
    def threshold(self, states: States, batches: int = 40) -> float:
        """Mean over batches of the smallest activation that BatchTopK keeps, in scaled units."""
        least = []
        for _ in range(batches):
            value, _ = self.strongest(self.preactivations(states.batch(self.settings.batch, self.generator) * self.scale))
            least.append(value[value > 0].min())
        return float(torch.stack(least).mean())

    def frozen(self, threshold: float) -> SAE:
        """The SAE on raw states: with the scale folded in and decoder rows of norm 1, activations are in raw units."""
        s, n = self.settings, self.settings.n_features
        metadata = {
            "sae_lens_version": SAE_LENS_VERSION, "model_name": "mmfilter/tiny",
            "hook_name": f"blocks.{HOOK_LAYER}.hook_resid_post", "hf_hook_name": f"model.language_model.layers.{HOOK_LAYER}",
            "architecture_origin": "batchtopk", "k": s.k, "training_tokens": s.steps * s.batch, "seed": s.seed,
        }  # fmt: skip
        weights = [t.detach().float().contiguous() for t in (self.W_enc, self.b_enc / self.scale, self.W_dec, self.b_dec / self.scale)]
        return SAE(*weights, activation="jumprelu", threshold=torch.full((n,), threshold / self.scale), metadata=metadata)


def rate_factor(step: int, settings: SAESettings) -> float:
    """Linear warm-up, level, and a linear fall to 2 % over the second half."""
    return min(1.0, (step + 1) / settings.warm_up) * min(1.0, max(0.02, 2 * (1 - step / settings.steps)))


def train_sae(states: States, settings: SAESettings, log: Path | None = None) -> SAE:
    """The trained SAE with its threshold; a JSON line every 100 steps to ``log``."""
    trainee = Trainee(states, settings)
    optimiser = torch.optim.Adam(trainee.parameters, betas=(0.9, 0.99), fused=True)
    started = time.time()
    for step in range(settings.steps):
        optimiser.param_groups[0]["lr"] = settings.learning_rate * rate_factor(step, settings)
        loss, unexplained, dead = trainee.loss(states.batch(settings.batch, trainee.generator))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        trainee.normalise_decoder()
        if log and (step + 1) % 100 == 0:
            row = {"step": step + 1, "seconds": round(time.time() - started, 1), "fvu": round(unexplained, 4), "dead": dead}
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
    return trainee.frozen(trainee.threshold(states))


@torch.no_grad()
def quality(sae: SAE, states: States, *, tokens: int = 10_000) -> dict[str, float]:
    """Fraction of variance unexplained and mean L0 of each kind of token, and how many features fire on both sides."""
    generator = torch.Generator().manual_seed(1)
    result, fires = {}, {}
    for name in ("image", "context", "alone"):
        rows = getattr(states, name)
        x = rows[torch.randint(len(rows), (tokens,), generator=generator)].float()
        codes = sae.encode(x)
        error = (x - sae.decode(codes, x)).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
        result |= {f"fvu_{name}": round(error.item(), 4), f"l0_{name}": round(len(codes.feature) / tokens, 2)}
        fires[name] = torch.bincount(codes.feature, minlength=sae.n_features) > tokens * 2e-4
    return result | {"on_both": int((fires["image"] & fires["context"]).sum()), "alive": int((fires["image"] | fires["context"]).sum())}


def load_states(build: Path, trained: Path, settings: SAESettings) -> States:
    """The collected states, from ``states.pt`` beside the model when they lie there."""
    path = trained.with_name(f"states-{trained.stem}.pt")
    if not path.exists():
        states = collect(load_trained(trained), Icons(build / "icons.npz"), load_tokenizer(build / "tokenizer"), settings)
        torch.save(vars(states), path.with_suffix(".partial"))
        path.with_suffix(".partial").rename(path)
    return States(**torch.load(path, weights_only=True))


def main() -> None:
    """Command line of the SAE step."""
    parser = argparse.ArgumentParser(description="Train the SAE of the tiny model.")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "recipe")
    parser.add_argument("--trained", type=Path, help="model.pt or a checkpoint.pt; default: BUILD/run/model.pt")
    parser.add_argument("--out", type=Path, default=ROOT / "models" / "tiny" / "sae")
    parser.add_argument("--n-features", type=int, default=SAESettings.n_features)
    parser.add_argument("--k", type=int, default=SAESettings.k)
    parser.add_argument("--steps", type=int, default=SAESettings.steps)
    options = parser.parse_args()
    settings = SAESettings(n_features=options.n_features, k=options.k, steps=options.steps)
    states = load_states(options.build, options.trained or options.build / "run" / "model.pt", settings)
    log = options.build / f"sae-{settings.n_features}-{settings.k}.jsonl"
    sae = train_sae(states, settings, log)
    sae.save(options.out)
    print(json.dumps(quality(sae, states)))


if __name__ == "__main__":
    main()
