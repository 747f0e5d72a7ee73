"""Checkpoints: a killed training goes on bit for bit; what does not fit is refused; a full disk leaves the old one."""

from __future__ import annotations

import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmfilter.core.training.buffer import BufferSettings, ShuffleBuffer
from mmfilter.core.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from mmfilter.core.training.settings import TrainSettings
from mmfilter.core.training.trainer import Trainer
from mmfilter.errors import SAEError

ROOT = Path(__file__).parents[3]
D = 8


def command(folder: Path, architecture: str) -> list[str]:
    return [sys.executable, "-m", "tests.core.training.run_training", str(folder), "7", architecture]


@pytest.mark.slow
def test_killed_and_continued_is_bit_for_bit_the_same(tmp_path):
    architecture = random.choice(["batchtopk", "topk", "jumprelu", "relu"])
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(command(whole, architecture), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    stops = sorted(random.sample(range(9, 58), 2))
    for stop in stops:
        with subprocess.Popen(command(cut, architecture), cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if int(line) >= stop:
                    process.kill()
        assert process.returncode == -9 and not (cut / "end.safetensors").exists()
    subprocess.run(command(cut, architecture), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    wanted, resumed = load_file(whole / "end.safetensors"), load_file(cut / "end.safetensors")
    assert (
        wanted.keys() == resumed.keys() and {"weights.W_enc", "adam.exp_avg_sq.W_dec", "since_fired"} <= wanted.keys()
    )
    for name, tensor in wanted.items():
        assert torch.equal(resumed[name], tensor), (name, architecture, stops)
    assert not list(cut.glob(".*"))


def make(**options) -> Trainer:
    return Trainer(
        TrainSettings(**{"n_features": 32, "k": 3, "batch_size": 16, "tokens": 1600, **options}), D, torch.zeros(D)
    )


def stepped(trainer: Trainer, steps: int) -> Trainer:
    g = torch.Generator().manual_seed(trainer.step_count)
    for _ in range(steps):
        trainer.step(torch.randn(16, D, generator=g))
    return trainer


def same(a: Trainer, b: Trainer) -> bool:
    (tensors, values), (others, other_values) = a.state(), b.state()
    return (
        tensors.keys() == others.keys()
        and values == other_values
        and all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    )


@pytest.mark.parametrize("architecture", ["batchtopk", "topk", "jumprelu", "relu"])
def test_a_checkpoint_comes_back(tmp_path, architecture):
    trainer = stepped(make(architecture=architecture), 5)
    path = save_checkpoint(tmp_path, trainer, source={"shard": 3})
    again = make(architecture=architecture)
    assert load_checkpoint(path, again) == {"shard": 3} and same(trainer, again)
    assert same(stepped(trainer, 3), stepped(again, 3))


def test_before_the_first_step(tmp_path):
    trainer, again = make(), make(seed=0)
    load_checkpoint(save_checkpoint(tmp_path, trainer), again)
    assert same(stepped(trainer, 2), stepped(again, 2))


def test_the_newest_are_kept(tmp_path):
    trainer = make()
    for _ in range(4):
        save_checkpoint(tmp_path, stepped(trainer, 3), keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000009", "step-00000012"]
    for name in ("step-00000012-1", "step-00000012-2", "step-00000012-3"):
        assert save_checkpoint(tmp_path, trainer).name == name
        assert [path.name for path in checkpoints(tmp_path)] == [name]


def test_an_unfinished_one_is_not_seen_and_cleaned_up(tmp_path):
    left = tmp_path / ".step-00000003.tmp"
    left.mkdir()
    (left / "trainer.safetensors").write_bytes(b"half")
    assert checkpoints(tmp_path) == []
    save_checkpoint(tmp_path, make())
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000000"]


def test_other_settings_are_named(tmp_path):
    path = save_checkpoint(tmp_path, make())
    with pytest.raises(SAEError) as error:
        load_checkpoint(path, make(k=5, lr=0.5))
    assert str(error.value).endswith(
        "step-00000000' was made with other settings (k was 3, is now 5; "
        "lr was 0.004525483399593904, is now 0.5; target_l0 was 3.0, is now 5.0): "
        "use another folder, or the old settings"
    )


def test_another_width_or_buffer_is_named(tmp_path):
    trainer = make(aux_k=4)
    buffer = ShuffleBuffer(BufferSettings(batch_size=4, capacity=16), D)
    path = save_checkpoint(tmp_path, trainer, buffer)
    wider = Trainer(trainer.settings, D + 1, torch.zeros(D + 1))
    with pytest.raises(
        SAEError, match=r"was made with other width \(d_model was 8, is now 9\): use another folder, or the old width"
    ):
        load_checkpoint(path, wider, buffer)
    with pytest.raises(SAEError, match="was made with a buffer: continue it the same way"):
        load_checkpoint(path, make(aux_k=4))
    other = ShuffleBuffer(BufferSettings(batch_size=4, capacity=16, image_fraction=0.5), D)
    with pytest.raises(SAEError, match=r"was made with other buffer \(image_fraction was None, is now 0.5\)"):
        load_checkpoint(path, make(aux_k=4), other)


def test_what_is_no_checkpoint_or_damaged(tmp_path):
    with pytest.raises(SAEError, match=r"is not a checkpoint: it has no checkpoint\.json"):
        load_checkpoint(tmp_path, make())
    path = save_checkpoint(tmp_path, make())
    weights = path / "trainer.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SAEError, match=r"is damaged: trainer.safetensors cannot be read"):
        load_checkpoint(path, make())
    (path / "checkpoint.json").write_text("{")
    with pytest.raises(SAEError, match=r"is damaged: checkpoint.json is not valid JSON"):
        load_checkpoint(path, make())


def test_no_room_leaves_the_old_one(tmp_path):
    """A limit on the size of files stands in for a full disk: the same call fails, with an error of its own number."""
    trainer = stepped(make(), 2)
    old = save_checkpoint(tmp_path, trainer)
    before = trainer.state()[0]["weights.W_dec"].clone()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    stepped(trainer, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(SAEError) as error:
            save_checkpoint(tmp_path, trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value) == (
        f"checkpoint {str(tmp_path / 'step-00000003')!r} could not be written (File too large); "
        "'step-00000002' is kept: free space or use another folder"
    )
    assert list(tmp_path.iterdir()) == [old]
    again = make()
    load_checkpoint(old, again)
    assert torch.equal(again.weights.W_dec, before)
