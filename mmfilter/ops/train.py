"""Train sparse autoencoders on the image and text states of the user's own pairs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from safetensors import SafetensorError

from mmfilter.core.input.shards import open_sources
from mmfilter.core.pipeline.engine import load_model, resolved_device
from mmfilter.core.pipeline.pass_settings import DeviceSettings
from mmfilter.core.training.preparation import prepared
from mmfilter.core.training.run_settings import TrainRunSettings
from mmfilter.core.training.session import TrainRun
from mmfilter.core.training.summary import TrainProgress, TrainSummary
from mmfilter.errors import SAEError


def train(patterns: Sequence[str], settings: TrainRunSettings, progress: TrainProgress) -> TrainSummary:
    """Train, and write each SAE with its statistics, weights, log and curves; goes on where a killed run stopped.

    Raises `ShardError` for a pattern that names nothing, `ModelError` for a model that cannot be loaded, and
    `SAEError` for states that are not finite, too little memory or disk, and checkpoints of other settings.
    """
    sources = open_sources(patterns, settings.inputs)
    with together(settings) as device:
        backbone = load_model(settings.card, device)
        run = TrainRun(sources, backbone, settings, device, progress)
        try:
            return prepared(run).train()
        except (OSError, SafetensorError) as error:  # the latter is how safetensors says it
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise SAEError(
                f"{str(settings.output)!r} could not be written ({reason}); checkpoints are kept: free space, and give "
                "the same command again"
            ) from error


@contextmanager
def together(device: DeviceSettings) -> Iterator[DeviceSettings]:
    """Join the other processes under torchrun for the length of the block, each on its own device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    cuda = resolved_device(device).startswith("cuda")
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        if cuda:
            device = replace(device, device=f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
            torch.cuda.set_device(device.device)
        yield device
    finally:
        torch.distributed.destroy_process_group()
