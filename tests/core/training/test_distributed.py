"""Two processes with half a batch each are one process with the whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from mmfilter.core.training.buffer import BufferSettings, ShuffleBuffer
from mmfilter.core.training.checkpoint import load_checkpoint, save_checkpoint
from mmfilter.core.training.settings import TrainSettings
from mmfilter.core.training.trainer import Trainer
from tests.core.training.synthetic import Synthetic

ROOT = Path(__file__).parents[3]
D, N, B, STEPS = 16, 96, 64, 12
KINDS = {
    "batchtopk": {"groups": (0.5,), "dead_tokens": 200},
    "topk": {"dead_tokens": 200},
    "jumprelu": {"bandwidth": 0.02},
    "relu": {},
}


def trained(kind: str, rank: int = 0, processes: int = 1, folder: Path | None = None) -> dict[str, torch.Tensor]:
    """Weights, counters and figures after some steps on this process' part of every batch, uneven parts at that."""
    data = Synthetic(48, D, 3)
    settings = TrainSettings(architecture=kind, n_features=N, k=4, batch_size=B, tokens=B * 40, lr=1e-3, **KINDS[kind])
    trainer = Trainer.fitted(settings, data.states(500))
    figures = []
    for step in range(STEPS):
        states, side = data.states(B), torch.arange(B) % 3 % 2
        cut = 20 if processes == 2 else B
        part = slice(0, cut) if rank == 0 else slice(cut, B)
        stats = trainer.step(states[part], side[part])
        figures.append(
            [
                stats.loss,
                stats.fvu,
                stats.l0,
                stats.image.fvu,
                stats.text.l0,
                stats.dead,
                stats.gradient_norm,
                stats.tokens,
            ]
        )
        if folder and step == STEPS // 2:
            trainer = continued(trainer, folder, rank)
    tensors, _ = trainer.state()
    wanted = {name: tensor for name, tensor in tensors.items() if not name.startswith("adam")}
    return wanted | {"figures": torch.tensor(figures), "threshold": torch.tensor(trainer.threshold)}


def continued(trainer: Trainer, folder: Path, rank: int) -> Trainer:
    """Another trainer that goes on from a checkpoint of this one, in which each process has its own buffer."""
    buffers = [ShuffleBuffer(BufferSettings(batch_size=2, capacity=8), D) for _ in range(2)]
    buffers[0].add(torch.full((3, D), rank + 1.0), torch.zeros(3, dtype=torch.long), "a.tar")
    path = save_checkpoint(folder, trainer, buffers[0], source={"rank": rank})
    again = Trainer(trainer.settings, D, torch.zeros(D))
    assert load_checkpoint(path, again, buffers[1]) == {"rank": rank}
    assert (next(buffers[1].batches(last=True))[0] == rank + 1.0).all()
    return again


def as_process(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    for kind in KINDS:
        together = trained(kind, rank, 2, folder / kind)
        save_file(
            {name: tensor.contiguous().clone() for name, tensor in together.items()},
            folder / f"{kind}-{rank}.safetensors",
        )
    dist.barrier()
    dist.destroy_process_group()
    os._exit(
        0
    )  # all is saved; once in a while gloo's threads abort an interpreter that winds down ("terminate called …")


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    processes = [
        subprocess.Popen([sys.executable, "-m", __spec__.name, str(tmp_path), str(rank)], cwd=ROOT) for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    for kind in KINDS:
        alone = trained(kind)
        first, second = (load_file(tmp_path / f"{kind}-{rank}.safetensors") for rank in range(2))
        for name, tensor in alone.items():
            assert torch.equal(first[name], second[name]), (kind, name)
            torch.testing.assert_close(first[name], tensor, rtol=1e-5, atol=1e-5, msg=f"{kind} {name}")


if __name__ == "__main__":
    as_process(Path(sys.argv[1]), int(sys.argv[2]))
