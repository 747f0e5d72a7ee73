"""WebDataset shards, members byte for byte (`repack` says how)."""

from __future__ import annotations

from pathlib import Path

from mmfilter.core.output.repack import write_shards
from mmfilter.core.output.writers.kept import Kept, Written


def write_shard_folder(folder: Path, kept: Kept) -> Written:
    """Write `00000000.tar` …, their statistics and `sizes.json`."""
    shards = write_shards(folder, kept.places, kept.shard_size)
    warnings: tuple[str, ...] = ()
    if shards.n_early:
        warnings = (
            f"input shards share keys: {shards.n_early:,} output shards end early, so that keys are unique in each",
        )
    return Written(shards.nbytes, shards.number, "%08d.tar", shards.n_shards, warnings)
