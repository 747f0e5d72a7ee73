"""Train the tiny model in two stages, by steps and from seeds, resuming from the last checkpoint.

Stage 1 runs to the hook only: InfoNCE between the pooled image states and the pooled states of the caption alone.
Stage 2 adds what scoring in context needs, at the hook: captions that see the image must resemble it when they match
and must not when they do not (a yes-no loss and a choice among four captions), and a caption cross-entropy.
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
from evaluate_raw import raw_aucs
from model import MAX_TOKENS, PREFIX, TinyLlava, is_word, normalised
from scenes import Icons, draw, train_scenes
from tokenizer import PAD, encode, load_tokenizer


@dataclass(frozen=True)
class Settings:
    """How long and how hard to train."""

    stage_1_steps: int = 1000
    stage_1_batch: int = 256
    stage_2_steps: int = 1000
    stage_2_batch: int = 192
    learning_rate: float = 2e-3
    """Of Muon, for the matrices; AdamW has 0.7 of it for the rest."""
    wrong_captions: int = 3
    """Captions of other pairs that each image is shown with in stage 2."""
    gap_weight: float = 0.3
    """Of the squared distance between the centroids of the two modalities."""
    caption_weight: float = 0.7
    match_weight: float = 0.5
    choice_weight: float = 0.5
    ema_decay: float = 0.99
    seed: int = 0
    log_every: int = 20
    evaluate_every: int = 100
    save_every: int = 50


class Run:
    """Everything that a resumed training needs: model, average, optimisers, random streams, step."""

    def __init__(self, settings: Settings) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.model = TinyLlava()
        self.average = [p.detach().clone() for p in self.model.parameters()]
        self.optimisers = optimisers(self.model, settings.learning_rate)
        self.rng = random.Random(settings.seed)
        self.numbers = np.random.default_rng(settings.seed)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.step = 0

    def save(self, path: Path) -> None:
        """Write a checkpoint under a temporary name, then rename it."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "step": self.step,
            "settings": vars(self.settings),
            "optimisers": [o.state_dict() for o in self.optimisers],
            "rng": self.rng.getstate(),
            "numbers": self.numbers.bit_generator.state,
            "generator": self.generator.get_state(),
        }
        torch.save(state, path.with_suffix(".partial"))
        path.with_suffix(".partial").rename(path)

    def load(self, path: Path) -> None:
        """Continue exactly where the checkpoint was written."""
        state = torch.load(path, weights_only=False)
        self.model.load_state_dict(state["model"])
        self.average, self.step = state["average"], state["step"]
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.rng.setstate(state["rng"])
        self.numbers.bit_generator.state = state["numbers"]
        self.generator.set_state(state["generator"])

    def averaged(self) -> TinyLlava:
        """A copy of the model with the averaged weights."""
        model = TinyLlava()
        with torch.no_grad():
            for parameter, mean in zip(model.parameters(), self.average, strict=True):
                parameter.copy_(mean)
        return model.eval()


def optimisers(model: TinyLlava, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside layers and projector, AdamW for embeddings, biases and scales."""
    named = list(model.llava.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and ("layers" in n or "projector" in n)]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.02},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    muon = torch.optim.Muon(
        matrices, lr=rate, weight_decay=0.05, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    both = [muon, torch.optim.AdamW(groups, lr=0.7 * rate, betas=(0.9, 0.98))]
    for optimiser in both:
        for group in optimiser.param_groups:
            group["full_rate"] = group["lr"]
    return both


def rate_factor(step: int, settings: Settings) -> float:
    """Stage 1: warm up, then 1 to 0.7. Stage 2: warm up again, then 0.7 to 0.014, both linear."""
    if step < settings.stage_1_steps:
        return min(1.0, (step + 1) / 100) * (1 - 0.3 * step / settings.stage_1_steps)
    done = step - settings.stage_1_steps
    return min(1.0, (done + 1) / 50) * 0.7 * max(0.02, 1 - done / settings.stage_2_steps)


def pool(states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of (b, t, d) over the masked tokens, of unit length."""
    states = states.float()
    if mask is None:
        return F.normalize(states.mean(1), dim=-1)
    weight = mask.float()[..., None]
    return F.normalize((states * weight).sum(1), dim=-1)


def contrast(image: torch.Tensor, text: torch.Tensor, same: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Symmetric InfoNCE; pairs with ``same`` concept are no negatives of each other."""
    logits = (image @ text.T * scale.exp().clamp(max=60)).masked_fill(same, -1e4)
    target = torch.arange(len(image))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def matching(run: Run, image: torch.Tensor, texts: list[torch.Tensor], wrong: list[torch.Tensor]) -> torch.Tensor:
    """Yes-no and which-one losses on the cosines of image and captions in context; the first caption is the right one.

    ``wrong[i]`` (b,) says whether caption i + 1 is of another concept; where it is not, it counts for nothing.
    """
    model, settings = run.model, run.settings
    cosines = torch.stack([(image * text).sum(1) for text in texts], 1)
    logits = cosines * model.match_scale.exp() + model.match_bias
    valid = torch.stack(wrong, 1)
    no = (F.softplus(logits[:, 1:]) * valid).sum() / valid.sum().clamp(min=1)
    yes_no = F.softplus(-logits[:, 0]).mean() + no
    choice = (cosines * model.choice_scale.exp().clamp(max=60)).clone()
    choice[:, 1:] = choice[:, 1:].masked_fill(~valid, -1e4)
    which = F.cross_entropy(choice, torch.zeros(len(image), dtype=torch.long))
    return settings.match_weight * yes_no + settings.choice_weight * which


def losses(run: Run, batch: tuple[torch.Tensor, torch.Tensor, np.ndarray]) -> dict[str, torch.Tensor]:
    """The weighted losses of a batch (pixels, caption ids, concepts) in the stage that the step is in."""
    pixels, ids, concepts = batch
    settings, model, first_stage = run.settings, run.model, run.step < run.settings.stage_1_steps
    count = 0 if first_stage else settings.wrong_captions
    shifts = [int(s) for s in run.numbers.choice(len(ids) - 1, count, replace=False) + 1]
    captions = [] if first_stage else [ids, *(ids.roll(s, 0) for s in shifts)]
    with torch.autocast("cpu", torch.bfloat16):
        hook = model.hook_states(pixels, captions, ids)
        # Half of the batch is enough to keep the upper layers a language model, and saves a tenth of the step.
        logits = None if first_stage else model.caption_logits(hook[: len(ids) // 2])
    image, alone = pool(hook[:, 1:PREFIX]), pool(hook[:, -MAX_TOKENS:], is_word(ids))
    same = torch.from_numpy(concepts[:, None] == concepts[None]) & ~torch.eye(len(ids), dtype=torch.bool)
    parts = {
        "contrast": contrast(image, alone, same, model.contrast_scale),
        "gap": settings.gap_weight * (image.mean(0) - alone.mean(0)).pow(2).sum(),
    }
    if not first_stage:
        blocks = hook[:, PREFIX:-MAX_TOKENS].split(MAX_TOKENS, 1)
        texts = [pool(states, is_word(c)) for states, c in zip(blocks, captions, strict=True)]
        wrong = [torch.from_numpy(concepts != np.roll(concepts, s)) for s in shifts]
        parts["match"] = matching(run, image, texts, wrong)
        target = ids[: len(logits)].flatten()
        parts["caption"] = settings.caption_weight * F.cross_entropy(
            logits.float().flatten(0, 1), target, ignore_index=PAD
        )
    return parts


def make_batch(run: Run, icons: Icons, tokenizer) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Pixels, caption ids and concepts of fresh training pairs."""
    first_stage = run.step < run.settings.stage_1_steps
    size = run.settings.stage_1_batch if first_stage else run.settings.stage_2_batch
    scenes = train_scenes(icons, size, run.numbers, run.rng)
    pixels = normalised(draw(icons, scenes, run.generator, disguise=True))
    return pixels, encode(tokenizer, [s.caption for s in scenes]), np.array([s.concept for s in scenes])


def train_step(run: Run, icons: Icons, tokenizer) -> dict[str, float]:
    """One update of the weights and of their average; the losses as numbers."""
    factor = rate_factor(run.step, run.settings)
    for optimiser in run.optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["full_rate"] * factor
        optimiser.zero_grad(set_to_none=True)
    parts = losses(run, make_batch(run, icons, tokenizer))
    sum(parts.values()).backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 2.0)
    for optimiser in run.optimisers:
        optimiser.step()
    with torch.no_grad():
        # The average follows closely at first, so that it never drags the random start along.
        decay = min(run.settings.ema_decay, (1 + run.step) / (10 + run.step))
        torch._foreach_lerp_(run.average, [p.detach() for p in run.model.parameters()], 1 - decay)
    run.step += 1
    return {name: loss.item() for name, loss in parts.items()}


def train(icons: Icons, folder: Path, settings: Settings) -> None:
    """Train to the end, logging JSON lines to ``folder/log.jsonl``, and write the averaged model to ``model.pt``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, run, checkpoint = load_tokenizer(folder.parent / "tokenizer"), Run(settings), folder / "checkpoint.pt"
    if checkpoint.exists():
        run.load(checkpoint)
    total, recent, started = settings.stage_1_steps + settings.stage_2_steps, [], time.time()
    with (folder / "log.jsonl").open("a") as log:
        while run.step < total:
            recent.append(train_step(run, icons, tokenizer))
            if run.step % settings.log_every == 0 or run.step == total:
                row = {name: round(float(np.mean([r[name] for r in recent if name in r])), 4) for name in recent[-1]}
                row = {"step": run.step, "seconds": round(time.time() - started, 1), **row}
                if run.step % settings.evaluate_every == 0 or run.step == total:
                    row |= raw_aucs(run.averaged(), icons, tokenizer)
                log.write(json.dumps(row) + "\n")
                log.flush()
                recent = []
            if run.step % settings.save_every == 0:
                run.save(checkpoint)
    run.save(checkpoint)
    torch.save(run.averaged().state_dict(), folder / "model.pt")


def main() -> None:
    """Command line of the long step, so that it can run in the background."""
    parser = argparse.ArgumentParser(description="Train the tiny model; resumes from its checkpoint.")
    parser.add_argument("--build", type=Path, default=Path(__file__).parents[2] / "build" / "recipe")
    parser.add_argument("--run", default="run")
    parser.add_argument("--stage-1-steps", type=int, default=Settings.stage_1_steps)
    parser.add_argument("--stage-2-steps", type=int, default=Settings.stage_2_steps)
    options = parser.parse_args()
    settings = Settings(stage_1_steps=options.stage_1_steps, stage_2_steps=options.stage_2_steps)
    train(Icons(options.build / "icons.npz"), options.build / options.run, settings)


if __name__ == "__main__":
    main()
