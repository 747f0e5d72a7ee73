"""`sae train` end to end: what it leaves, going on after a kill, the cache, several at once, two processes, refusals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmfilter.core.input.decode import DecodeSettings
from mmfilter.core.input.shards import open_sources
from mmfilter.core.model.loading import load_backbone
from mmfilter.core.sae.pretrained import load_sae
from mmfilter.core.scores.crossmodal import load_weights
from mmfilter.core.sides import IMAGE, TEXT
from mmfilter.core.training import memory_check
from mmfilter.core.training.preparation import prepared
from mmfilter.core.training.run_settings import TrainRunSettings
from mmfilter.core.training.session import TrainRun
from mmfilter.core.training.settings import TrainSettings
from mmfilter.core.training.shard_states import ShardStates
from mmfilter.errors import SAEError
from mmfilter.ops.train import train
from tests.conftest import Quiet

SMALL = TrainSettings(n_features=96, k=8, batch_size=256, lr=3e-3)


class Watching(Quiet):
    """Keeps the figures of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = []

    def step(self, name, stats, total_tokens, tokens_per_second) -> None:
        self.steps.append((name, stats))


def settings(tiny, output: Path, **changes) -> TrainRunSettings:
    return replace(
        TrainRunSettings(tiny[0], output=output, train=SMALL, tokens=8_000, capacity=1024, pairs=16), **changes
    )


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """(shard, folder, progress, summary) of a small training."""
    from tests.conftest import good, write_tar

    folder = tmp_path_factory.mktemp("train")
    shard = write_tar(folder / "a.tar", [member for i in range(60) for member in good(f"{i:09d}", i)])
    progress = Watching()
    return shard, folder / "sae", progress, train([str(shard)], settings(tiny, folder / "sae"), progress)


def test_the_sae_reconstructs_states_that_it_never_saw(trained, tiny, make_shard):
    """FVU on other pairs, in float64 from the raw states: far better than before training, and near what the last step says."""
    _, folder, progress, summary = trained
    sae = load_sae(folder)
    states = ShardStates(
        open_sources([make_shard(n=30, seed=500)]), tiny[1], DecodeSettings(), batch_size=8, workers=1, seed=0
    )
    parts = list(states.once())
    x = torch.cat([part.states for part in parts])
    again = sae.decode(sae.encode(x, max_active=96), x).double()
    fvu = float((x.double() - again).square().sum() / (x.double() - x.double().mean(0)).square().sum())
    first, last = progress.steps[0][1].fvu, progress.steps[-1][1].fvu
    assert summary.saes[0].last.tokens >= 8_000 and last < 0.75 * first
    assert fvu < 1.5 * last + 0.1


def test_saelens_opens_it_with_equal_codes(trained, tiny):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae_lens = pytest.importorskip("sae_lens")
        theirs = sae_lens.SAE.load_from_disk(str(trained[1]))
    ours = load_sae(trained[1])
    x = torch.randn(40, ours.d_model, generator=torch.Generator().manual_seed(0)) * 2 + ours.b_dec
    with torch.no_grad():
        np.testing.assert_allclose(ours.encode(x, max_active=96).dense().numpy(), theirs.encode(x).numpy(), atol=1e-5)


def test_statistics_log_and_page_say_what_happened(trained):
    _, folder, progress, _ = trained
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert [row["fvu"] for row in rows] == [stats.fvu for _, stats in progress.steps]
    statistics = load_file(folder / "statistics.safetensors")
    image, text = (sum(row[f"{side}_tokens"] for row in rows) for side in ("image", "text"))
    assert statistics["tokens"].tolist() == [image, text] == [len(rows) * 128] * 2  # half of every batch
    fired = statistics["image_frequency"].sum() * image + statistics["text_frequency"].sum() * text
    assert float(fired) == pytest.approx(sum(row["l0"] * 256 for row in rows), rel=1e-4)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (
        manifest["settings"]["k"] == 8
        and manifest["trained_on"]["layer"] == 1
        and manifest["hash"] == load_sae(folder).hash
    )
    page = (folder / "training.html").read_text()
    assert page.count("<polyline") == 8 and f"{rows[-1]['tokens']:,} tokens" in page and "http" not in page
    assert load_weights(folder / "weights.safetensors").n_samples == 60
    assert not (folder / "checkpoints").exists()


def test_the_same_command_gives_the_same_sae(trained, tiny, tmp_path):
    shard, folder, _, _ = trained
    train([str(shard)], settings(tiny, tmp_path / "again", workers=1, weights=False), Watching())
    assert load_sae(tmp_path / "again").hash == load_sae(folder).hash
    assert not (tmp_path / "again" / "weights.safetensors").exists()


def test_a_finished_one_is_not_written_over(trained, tiny):
    shard, folder, _, _ = trained
    with pytest.raises(SAEError, match="holds a finished SAE: use another -o, or delete it"):
        train([str(shard)], settings(tiny, folder), Watching())


def test_a_training_that_stopped_goes_on_and_other_settings_are_refused(trained, tiny, tmp_path):
    shard, folder, _, _ = trained

    class Stopping(Watching):
        def step(self, name, stats, total_tokens, tokens_per_second) -> None:
            super().step(name, stats, total_tokens, tokens_per_second)
            if stats.step == 13:
                raise KeyboardInterrupt

    often = settings(tiny, tmp_path / "sae", checkpoint_every=0.0)
    with pytest.raises(KeyboardInterrupt):
        train([str(shard)], often, Stopping())
    with pytest.raises(SAEError, match=r"was begun with other settings \(variants was .*\): use another -o"):
        train([str(shard)], replace(often, train=replace(SMALL, k=9)), Watching())
    with pytest.raises(SAEError, match=r"was begun with other settings \(buffer was"):
        train([str(shard)], replace(often, image_fraction=0.25), Watching())
    progress = Watching()
    train([str(shard)], often, progress)
    assert progress.steps[0][1].step == 13  # saved behind step 12
    assert load_sae(tmp_path / "sae").hash == load_sae(folder).hash
    assert (tmp_path / "sae" / "train.jsonl").read_text() == (folder / "train.jsonl").read_text()


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_weights(trained, tmp_path):
    shard, folder, _, _ = trained
    command = [
        sys.executable,
        "-m",
        "mmfilter",
        "sae",
        "train",
        str(shard),
        "-o",
        str(tmp_path / "sae"),
        "--widths",
        "96",
        "--k",
        "8",
        "--batch-size",
        "256",
    ]
    command += [
        "--lr",
        "0.003",
        "--tokens",
        "8000",
        "--capacity",
        "1024",
        "--pairs",
        "16",
        "--checkpoint-every",
        "0",
        "--no-weights",
    ]
    for _ in range(2):
        running = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        log, before = tmp_path / "sae" / "train.jsonl", _lines(tmp_path / "sae" / "train.jsonl")
        deadline = time.monotonic() + 120
        while _lines(log) < before + 5 and time.monotonic() < deadline and running.poll() is None:
            time.sleep(0.02)
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
        assert (tmp_path / "sae" / "checkpoints").exists()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    assert load_sae(tmp_path / "sae").hash == load_sae(folder).hash


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_several_from_one_pass_and_a_cache_that_needs_no_model_again(trained, tiny, tmp_path):
    shard, _, _, _ = trained
    both = settings(tiny, tmp_path / "both", widths=(64, 96), ks=(4, 8), cache=tmp_path / "cache", weights=False)
    summary = train([str(shard)], both, Watching())
    assert [sae.folder.name for sae in summary.saes] == ["width-64-k-4", "width-64-k-8", "width-96-k-4", "width-96-k-8"]
    assert [load_sae(sae.folder).n_features for sae in summary.saes] == [64, 64, 96, 96]
    alone = settings(tiny, tmp_path / "alone", widths=(96,), ks=(8,), cache=tmp_path / "cache", weights=False)
    train([str(shard)], alone, Watching())
    assert load_sae(tmp_path / "alone").hash == load_sae(tmp_path / "both" / "width-96-k-8").hash
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    backbone = load_backbone(tiny[0].model, tiny[0].layer, prompt=tiny[0].prompt)
    parts = list(
        ShardStates(open_sources([shard]), backbone, DecodeSettings(), batch_size=16, workers=1, seed=0).once()
    )
    stored = np.fromfile(tmp_path / "cache" / "states.bin", np.int16).reshape(-1, manifest["d_model"])
    wanted = torch.cat([part.states for part in parts]).to(torch.bfloat16)
    assert torch.equal(torch.from_numpy(stored).view(torch.bfloat16), wanted)
    sides = np.fromfile(tmp_path / "cache" / "sides.bin", np.uint8)
    assert ((sides == IMAGE).sum(), (sides == TEXT).sum()) == tuple(
        (torch.cat([part.side for part in parts]) == side).sum() for side in (IMAGE, TEXT)
    )


def test_a_cache_of_other_states_and_a_damaged_one_are_refused(trained, tiny, tmp_path):
    shard, _, _, _ = trained
    made = settings(tiny, tmp_path / "a", cache=tmp_path / "cache", weights=False, tokens=512)
    train([str(shard)], made, Watching())
    other = replace(made, output=tmp_path / "b", model=replace(tiny[0], layer=0))
    with pytest.raises(SAEError, match=r"is of other states \(layer was 1, is now 0\): use another --cache"):
        train([str(shard)], other, Watching())
    with (tmp_path / "cache" / "states.bin").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(SAEError, match=r"is damaged: states.bin should have .* bytes; delete the folder and run again"):
        train([str(shard)], replace(made, output=tmp_path / "c"), Watching())


@pytest.mark.slow
def test_two_processes_train_one_sae(tiny, tmp_path, make_shard):
    shards = [str(make_shard(f"{i}.tar", n=40, seed=100 * i)) for i in range(2)]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29655",
        "-m",
        "mmfilter",
        "sae",
        "train",
        *shards,
    ]
    command += [
        "-o",
        str(tmp_path / "sae"),
        "--widths",
        "64",
        "--k",
        "4",
        "--batch-size",
        "256",
        "--tokens",
        "2048",
        "--capacity",
        "512",
        "--pairs",
        "8",
        "--no-weights",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "sae" / "train.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in rows] == list(range(256, 2049, 256))
    assert load_sae(tmp_path / "sae").n_features == 64


def test_states_that_are_not_finite_name_the_sample_and_keep_the_checkpoint(trained, tiny, tmp_path, make_shard):
    shard, _, _, _ = trained

    class Breaking(Watching):
        def step(self, name, stats, total_tokens, tokens_per_second) -> None:
            super().step(name, stats, total_tokens, tokens_per_second)
            if stats.step == 6:
                with torch.no_grad():
                    tiny[1].model.get_input_embeddings().weight[5:].fill_(float("inf"))

    progress = Breaking()
    run = TrainRun(
        open_sources([shard]),
        tiny[1],
        settings(tiny, tmp_path / "sae", checkpoint_every=0.0),
        settings(tiny, tmp_path),
        progress,
    )
    loop = prepared(run)
    kept = tiny[1].model.get_input_embeddings().weight.detach().clone()
    try:
        with pytest.raises(
            SAEError,
            match=r"shard '.*a.tar', sample '0000000\d\d' gives states that are not finite: use --dtype float32",
        ):
            loop.train()
    finally:
        with torch.no_grad():
            tiny[1].model.get_input_embeddings().weight.copy_(kept)
    assert list((tmp_path / "sae" / "checkpoints" / "sae").glob("step-*"))


@pytest.mark.slow
def test_a_disk_that_is_full_is_one_line_and_the_checkpoint_stays(trained, tmp_path):
    """A limit on the size of files makes the same writes fail."""
    import resource

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    command = [
        sys.executable,
        "-m",
        "mmfilter",
        "sae",
        "train",
        str(trained[0]),
        "-o",
        str(tmp_path / "sae"),
        "--widths",
        "96",
        "--k",
        "8",
    ]
    command += ["--batch-size", "256", "--tokens", "1024", "--capacity", "512", "--no-weights"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited)
    assert done.returncode == 1 and re.search(
        r"could not be written \(.*File too large.*\); checkpoints are kept", done.stderr.splitlines()[-1]
    )
    assert not (tmp_path / "sae" / "sae_weights.safetensors").exists()


def test_shards_without_a_usable_pair(tiny, tmp_path):
    from tests.conftest import write_tar

    shard = write_tar(tmp_path / "bad.tar", [("a.jpg", b"no image"), ("a.txt", b"words")])
    with pytest.raises(SAEError, match="the shards hold no usable pair to train on"):
        train([str(shard)], settings(tiny, tmp_path / "sae"), Watching())


def test_memory_is_estimated_before_anything_starts(trained, tiny, tmp_path):
    shard, _, _, _ = trained
    with pytest.raises(
        SAEError,
        match=r"training 4,000,000,000 features on states of width 192 needs about [\d.]+ GiB of memory, [\d.]+ GiB are free: use fewer or smaller --widths",
    ):
        train([str(shard)], settings(tiny, tmp_path / "sae", widths=(4_000_000_000,)), Watching())
    need = memory_check.training_bytes(SMALL.resolved(192), 192)
    assert need == pytest.approx(4 * 4 * (96 * 386 + 192) + 256 * 8 * 32 + 256 * 192 * 24)
