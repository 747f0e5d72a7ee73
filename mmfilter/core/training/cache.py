"""States on disk: one pass over the model for as many trainings as one likes.

A folder that explains itself:

    manifest.json   kind, what the states are of, number of tokens and pairs
    states.bin      (tokens, d_model) bfloat16, row after row
    sides.bin       (tokens,) uint8, IMAGE or TEXT

Pairs have as many rows as they have tokens, without padding between them.
It is written under a temporary name and renamed, so a cache that is there is complete. Reading maps it into memory
and goes through it in blocks in random order; the shuffle buffer behind mixes tokens.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmfilter import __version__
from mmfilter.core.training.shard_states import Position, States
from mmfilter.errors import SAEError

KIND = "mmfilter state cache"
BLOCK = 512
"""Tokens that are read together: long enough for a disk, short enough for the buffer to mix"""


def write_cache(
    folder: Path, about: dict[str, Any], batches: Iterator[States], advance: Callable[[int, int], None]
) -> None:
    """Write the states of all batches; `about` says what they are of. Raises `SAEError` when the disk is full.

    `advance` is told how many pairs and bytes of each batch are written."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    tokens, d_model = 0, 0
    try:
        temporary.mkdir(parents=True)
        with (temporary / "states.bin").open("wb") as states_file, (temporary / "sides.bin").open("wb") as sides_file:
            for batch in batches:
                rows = batch.states.to("cpu", torch.bfloat16).contiguous()
                states_file.write(rows.view(torch.int16).numpy().data)
                sides_file.write(batch.side.to("cpu", torch.uint8).numpy().data)
                tokens, d_model = tokens + len(rows), rows.shape[1]
                advance(batch.n_pairs, 0)
        manifest = {"kind": KIND, "version": __version__, "about": about, "tokens": tokens, "d_model": d_model}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
        os.rename(temporary, folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise SAEError(
            f"cache {str(folder)!r} could not be written ({error.strerror or error}): free space, or train without "
            "--cache"
        ) from error


class CachedStates:
    """Blocks of a cache, without end: every epoch in another random order. Takes the place of `ShardStates`."""

    def __init__(
        self,
        folder: Path,
        about: dict[str, Any],
        *,
        seed: int,
        rank: int = 0,
        processes: int = 1,
        position: Position | None = None,
    ) -> None:
        manifest = _manifest(folder)
        differing = [name for name in about if manifest["about"].get(name) != about[name]]
        if differing:
            name = differing[0]
            raise SAEError(
                f"cache {str(folder)!r} is of other states ({name} was {manifest['about'].get(name)!r}, is now "
                f"{about[name]!r}): use another --cache"
            )
        self.tokens, self.d_model = manifest["tokens"], manifest["d_model"]
        if not self.tokens:
            raise SAEError(f"cache {str(folder)!r} holds no states: its shards had no usable pair")
        self._states = np.memmap(folder / "states.bin", np.int16, "r", shape=(self.tokens, self.d_model))
        self._sides = np.memmap(folder / "sides.bin", np.uint8, "r", shape=(self.tokens,))
        self._seed, self._name = seed, folder.name
        self._blocks = np.arange(rank, -(-self.tokens // BLOCK), processes)
        if not len(self._blocks):
            raise SAEError(f"cache {str(folder)!r} has fewer blocks than there are processes: start fewer processes")
        self.position = position or Position()
        self.reasons: dict[str, int] = {}
        self.failures: list[Any] = []

    def __iter__(self) -> Iterator[States]:
        while True:
            yield from self._epoch()
            self.position = Position(self.position.epoch + 1)

    def _epoch(self) -> Iterator[States]:
        order = np.random.default_rng([self._seed, self.position.epoch]).permutation(self._blocks)
        while self.position.batches < len(order):
            first = int(order[self.position.batches]) * BLOCK
            rows = torch.from_numpy(self._states[first : first + BLOCK].copy()).view(torch.bfloat16)
            side = torch.from_numpy(self._sides[first : first + BLOCK].copy())
            self.position.batches += 1
            yield States(rows, side, f"cache {self._name!r}, tokens {first:,} to {first + len(rows):,}", 0)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SAEError(f"{str(folder)!r} is not a state cache: {error}") from error
    sizes = {"states.bin": manifest["tokens"] * manifest["d_model"] * 2, "sides.bin": manifest["tokens"]}
    for name, size in sizes.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise SAEError(
                f"cache {str(folder)!r} is damaged: {name} should have {size:,} bytes; delete the folder and run again"
            )
    return manifest
