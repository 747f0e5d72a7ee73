"""A small training in a process of its own, to be killed: FOLDER, STEPS_A_CHECKPOINT, ARCHITECTURE."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from mmfilter.core.training.buffer import BufferSettings, ShuffleBuffer
from mmfilter.core.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from mmfilter.core.training.settings import TrainSettings
from mmfilter.core.training.trainer import Trainer

D, B, STEPS = 16, 64, 60


def sample(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The states of the i-th sample and their sides: what a model would give again."""
    g = torch.Generator().manual_seed(i)
    n = 20 + i % 13
    return torch.randn(n, D, generator=g) ** 3 + 1, (torch.rand(n, generator=g) < 0.3).long()


def settings(architecture: str) -> TrainSettings:
    groups = (0.5,) if architecture == "batchtopk" else ()
    return TrainSettings(
        architecture=architecture,
        n_features=96,
        k=4,
        groups=groups,
        batch_size=B,
        tokens=B * STEPS,
        lr=1e-3,
        dead_tokens=B * 5,
    )


def train(folder: Path, every: int, architecture: str) -> Trainer:
    trainer = Trainer(settings(architecture), D, torch.ones(D), scale=0.5)
    buffer = ShuffleBuffer(BufferSettings(batch_size=B, capacity=10 * B, image_fraction=0.5), D)
    saved = checkpoints(folder)
    position = load_checkpoint(saved[-1], trainer, buffer)["next"] if saved else 0
    while not trainer.done:
        for states, side in buffer.batches():
            trainer.step(states, side)
            print(trainer.step_count, flush=True)
            if trainer.step_count % every == 0:
                save_checkpoint(folder, trainer, buffer, source={"next": position})
            if trainer.done:
                break
        else:
            states, side = (
                torch.cat(column) for column in zip(*[sample(position + i) for i in range(12)], strict=True)
            )
            buffer.add(states, side, f"sample {position}")
            position += 12
    return trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, every, architecture = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    tensors, _ = train(where, every, architecture).state()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, where / "end.safetensors")
