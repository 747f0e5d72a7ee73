"""Checkpoints: everything that the next step depends on, so that a training killed and continued goes on bit for bit.

A checkpoint is a folder `step-…` that appears under its name only when it is complete:

    checkpoint.json            kind, version, settings, counters, number of processes
    trainer.safetensors        weights, Adam's moments, feature counters
    process-<rank>.json        what the source of this process' states needs to go on, and its buffer's generators
    process-<rank>.safetensors contents of its buffer
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mmfilter import __version__
from mmfilter.core.training import collective
from mmfilter.core.training.buffer import ShuffleBuffer
from mmfilter.core.training.trainer import Trainer
from mmfilter.errors import SAEError

KIND = "mmfilter sae checkpoint"
FORMAT = 1
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
NAME = re.compile(r"step-(\d+)(?:-(\d+))?")


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    numbered = [(number, path) for path in folder.glob("step-*") if (number := _number(path)) is not None]
    return [path for _, path in sorted(numbered)]


def _number(path: Path) -> tuple[int, int] | None:
    """(step, how many checkpoints of that step were there before); None for what is not a checkpoint."""
    match = NAME.fullmatch(path.name)
    return None if match is None else (int(match[1]), int(match[2] or 0))


def save_checkpoint(
    folder: Path, trainer: Trainer, buffer: ShuffleBuffer | None = None, *, source: Any = None, keep: int = 1
) -> Path:
    """Write a checkpoint into `folder`, then delete all but the `keep` newest; every process calls this.

    `source` is anything that JSON can hold and that tells the caller where to go on reading. Raises `SAEError`
    when it cannot be written; older checkpoints are untouched then.
    """
    rank, _ = collective.world()
    final = folder / _free_name(trainer.step_count, checkpoints(folder))
    temporary = folder / f".{final.name}.tmp"
    try:
        if rank == 0:
            for stale in folder.glob(".step-*.tmp"):
                shutil.rmtree(stale)
            temporary.mkdir(parents=True)
        collective.wait()
        _write(temporary, trainer, buffer, source)
        collective.wait()
        if rank == 0:
            os.rename(temporary, final)
            _sync(folder)
        collective.wait()
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        older = checkpoints(folder)
        kept = f"{older[-1].name!r} is kept" if older else "there is none before it"
        raise SAEError(
            f"checkpoint {str(final)!r} could not be written ({error.strerror or error}); {kept}: free space or use "
            "another folder"
        ) from error
    if rank == 0:
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    return final


def _free_name(step: int, taken: list[Path]) -> str:
    """`step-…`, with a number behind it when that step has been saved before: an old one is never written over."""
    name = f"step-{step:08d}"
    again = [number[1] for path in taken if (number := _number(path)) is not None and number[0] == step]
    return f"{name}-{max(again) + 1}" if again else name


def _write(folder: Path, trainer: Trainer, buffer: ShuffleBuffer | None, source: Any) -> None:
    rank, processes = collective.world()
    if rank == 0:
        tensors, counters = trainer.state()
        about = {
            "kind": KIND,
            "format": FORMAT,
            "version": __version__,
            "processes": processes,
            "settings": trainer.settings.to_mapping(),
            "trainer": counters,
        }
        _write_tensors(folder / "trainer.safetensors", tensors)
        _write_json(folder / "checkpoint.json", about)
    contents, generators = buffer.state() if buffer else ({}, None)
    _write_tensors(folder / f"process-{rank}.safetensors", contents)
    _write_json(folder / f"process-{rank}.json", {"buffer": generators, "source": source})


def load_checkpoint(path: Path, trainer: Trainer, buffer: ShuffleBuffer | None = None) -> Any:
    """Bring a new trainer (and buffer) to where the checkpoint was saved; returns its `source`.

    Raises `SAEError` saying what differs when the settings are others, and when files are missing or damaged.
    """
    rank, processes = collective.world()
    about = _read_json(path, "checkpoint.json")
    if about.get("kind") != KIND or about.get("format") != FORMAT:
        raise SAEError(
            f"{str(path)!r} is not a checkpoint of this version of mmfilter: it says kind {about.get('kind')!r}, "
            f"format {about.get('format')!r}"
        )
    _check_same(path, "settings", about["settings"], trainer.settings.to_mapping())
    _check_same(path, "width", {"d_model": about["trainer"]["d_model"]}, {"d_model": trainer.d_model})
    _check_same(path, "processes", {"processes": about["processes"]}, {"processes": processes})
    mine = _read_json(path, f"process-{rank}.json")
    if (buffer is None) != (mine["buffer"] is None):
        raise SAEError(
            f"checkpoint {str(path)!r} was made {'with' if mine['buffer'] else 'without'} a buffer: continue it the "
            "same way"
        )
    trainer.restore(_read_tensors(path, "trainer.safetensors"), about["trainer"])
    if buffer is not None:
        _, now = buffer.state()
        _check_same(path, "buffer", mine["buffer"]["settings"], now["settings"])
        buffer.restore(_read_tensors(path, f"process-{rank}.safetensors"), mine["buffer"])
    return mine["source"]


def _check_same(path: Path, what: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    differing = [name for name in new if old.get(name) != new[name]]
    if differing:
        changes = "; ".join(f"{name} was {old.get(name)!r}, is now {new[name]!r}" for name in differing[:3])
        raise SAEError(
            f"checkpoint {str(path)!r} was made with other {what} ({changes}): use another folder, or the old {what}"
        )


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A safetensors file (8 bytes of header length, the header as JSON, the data), written without a copy of the data
    in memory."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header, end = {}, 0
    for name, tensor in ready.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ready.values():
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)
        _flush(file)


def _write_json(path: Path, value: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        _flush(file)


def _flush(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make a rename in the folder last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads((folder / name).read_text("utf-8"))
    except FileNotFoundError as error:
        raise SAEError(f"{str(folder)!r} is not a checkpoint: it has no {name}") from error
    except ValueError as error:
        raise SAEError(f"checkpoint {str(folder)!r} is damaged: {name} is not valid JSON ({error})") from error
    return values


def _read_tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = load_file(folder / name)
    except (FileNotFoundError, SafetensorError) as error:
        raise SAEError(f"checkpoint {str(folder)!r} is damaged: {name} cannot be read ({error})") from error
    return tensors
