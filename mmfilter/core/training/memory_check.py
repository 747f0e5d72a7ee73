"""Does a training fit? Estimated before it starts."""

from __future__ import annotations

import torch

from mmfilter.core.memory import available
from mmfilter.core.training.settings import ResolvedTrainSettings
from mmfilter.errors import SAEError

COPIES = 4
"""Of the weights: themselves, their gradients, and Adam's two moments"""
CHUNK_BYTES = 64 << 20
"""Of dense activations at once, about"""


def training_bytes(settings: ResolvedTrainSettings, d_model: int) -> int:
    """Memory that one trainer takes, in bytes (float32)."""
    weights = settings.n_features * (2 * d_model + 2) + d_model
    entries = settings.batch_size * settings.k * 4 * 8 if settings.sparse else 0
    dense = 0 if settings.sparse else 3 * CHUNK_BYTES
    return 4 * weights * COPIES + entries + dense + settings.batch_size * d_model * 4 * 6


def check_memory(settings: ResolvedTrainSettings, d_model: int, capacity: int, trainers: int, device: str) -> None:
    """Raise `SAEError` when `trainers` of this shape and a buffer of `capacity` states do not fit what is free."""
    needed = trainers * training_bytes(settings, d_model)
    buffer = capacity * d_model * 4
    if device.startswith("cuda"):
        free, where = torch.cuda.mem_get_info(torch.device(device))[0], f"memory of {device}"
    else:
        needed, free, where = needed + buffer, available(), "memory"
    if needed > free:
        raise SAEError(
            f"training {settings.n_features:,} features on states of width {d_model:,} needs about "
            f"{needed / 2**30:.1f} GiB of {where}, {free / 2**30:.1f} GiB are free: use fewer or smaller --widths, "
            "or a smaller --capacity"
        )
