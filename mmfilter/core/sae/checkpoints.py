"""Opening the files of an SAE: tensors and plain values, never code.

safetensors, npz without objects, and PyTorch files under `weights_only`. What is half downloaded,
damaged, or a pickle that wants more than tensors is refused in one line with the next step.
"""

from __future__ import annotations

import io
import json
import pickle
import types
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mmfilter.core.cards.sae_options import SAEOptions
from mmfilter.errors import SAEError

SUFFIXES = (".safetensors", ".npz", ".pt", ".pth", ".pkl")
TORCH_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
"""Marks PyTorch's files from before they were zips."""
LFS = b"version https://git-lfs"
FETCH = "download it again (mmfilter sae fetch hf:OWNER/REPO/FOLDER resumes and checks)"


@dataclass(frozen=True)
class Checkpoint:
    """What the files of one SAE hold, nothing of it interpreted."""

    path: Path
    """File with the weights"""
    where: str
    """What errors call it"""
    trail: str
    """Repository, folders and file name, off which some publishers' facts are read"""
    tensors: dict[str, torch.Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    """What stands beside the weights: a JSON file, or what the weights' file holds itself"""
    config_name: str | None = None
    """Name of the JSON file that `config` comes from"""
    values: dict[str, Any] = field(default_factory=dict)
    """Plain values among the tensors"""

    @property
    def folder(self) -> Path:
        return self.path.parent

    def json(self, *names: str) -> dict[str, Any]:
        """The first of these JSON files beside or above the weights, {} when there is none."""
        for name in names:
            if (self.folder / name).is_file():
                return read_json(self.folder / name)
        return {}


CONFIGS = ("cfg.json", "config.json", "../hyperparams.json", "hyperparams.json")
HEADER = "\0header"
"""Key under which a reader hands over the JSON line before the weights."""


def open_checkpoint(path: Path, where: str, trail: str, options: SAEOptions) -> Checkpoint:
    """Read a file of weights and the configuration beside it; raises `SAEError`."""
    check_whole(path)
    content = _read(path, allow_pickle=options.allow_pickle)
    for wrapper in ("state_dict", "sae"):
        if isinstance(content.get(wrapper), Mapping):
            content |= content.pop(wrapper)
    config, config_name = content.pop(HEADER, None) or plain(content.pop("cfg", None)), None
    for name in () if config else CONFIGS:
        if (path.parent / name).is_file():
            config, config_name = read_json(path.parent / name), Path(name).name
            break
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    values = {name: value for name, value in content.items() if name not in tensors}
    return Checkpoint(path, where, trail, tensors, config or {}, config_name, values)


def check_whole(path: Path) -> None:
    """Refuse what a broken download leaves behind."""
    name = str(path)
    if not path.exists():
        partial = sorted(path.parent.glob("*.incomplete")) if path.parent.is_dir() else []
        more = f"; {partial[0].name!r} beside it is a download that stopped" if partial else ""
        raise SAEError(f"SAE file {name!r} is not there{more}: {FETCH}")
    if path.stat().st_size == 0:
        raise SAEError(f"SAE file {name!r} is empty, a download that stopped: {FETCH}")
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(LFS):
        raise SAEError(
            f"SAE file {name!r} is a git-lfs pointer, not the weights: run `git lfs pull` in that repository"
        )
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise SAEError(f"SAE file {name!r} is a web page, not weights: {FETCH}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises `SAEError` when it is damaged."""
    check_whole(path)
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise SAEError(f"SAE file {str(path)!r} is damaged: {error}; {FETCH}") from error
    if not isinstance(value, dict):
        raise SAEError(f"SAE file {str(path)!r} holds {type(value).__name__}, expected a JSON object")
    return value


def _read(path: Path, *, allow_pickle: bool) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        if path.suffix == ".npz":
            return _read_npz(path)
        return _read_torch(path, allow_pickle=allow_pickle)
    except (SafetensorError, zipfile.BadZipFile, EOFError, OSError, RuntimeError) as error:
        raise SAEError(f"SAE file {str(path)!r} is damaged or cut short ({_line(error)}): {FETCH}") from error


def _read_npz(path: Path) -> dict[str, Any]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        try:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        except ValueError as error:
            raise SAEError(
                f"SAE file {str(path)!r} holds Python objects, which an npz of weights does not need: refused "
                f"({_line(error)})"
            ) from error


def _read_torch(path: Path, *, allow_pickle: bool) -> dict[str, Any]:
    content: dict[str, Any] = {}
    with path.open("rb") as file:
        head = file.read(32)
        if head.startswith(b"\x80") and TORCH_MAGIC not in head:
            raise SAEError(
                f"SAE file {str(path)!r} is a pickle but not a PyTorch file: save its tensors with torch.save or "
                "safetensors"
            )
        weights: BinaryIO = file
        if head.startswith(b"{"):  # a line of JSON, then the weights
            file.seek(0)
            content[HEADER] = json.loads(file.readline())
            weights = io.BytesIO(file.read())
        weights.seek(0)
        try:
            loaded = torch.load(weights, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if not allow_pickle:
                raise SAEError(_wants_code(path, error)) from error
            weights.seek(0)
            loaded = torch.load(weights, map_location="cpu", weights_only=False, pickle_module=INERT)
    if not isinstance(loaded, Mapping):
        raise SAEError(
            f"SAE file {str(path)!r} holds {_kind(loaded)}, expected a dictionary of tensors: save its state_dict() "
            "instead"
        )
    return {**content, **{str(name): value for name, value in loaded.items()}}


def _wants_code(path: Path, error: Exception) -> str:
    return (
        f"SAE file {str(path)!r} is a pickle that holds more than tensors ({_line(error)}) and could run code: "
        f"mmfilter sae convert {path} DST --sae-option allow_pickle=true makes a safe folder of it"
    )


def _line(error: Exception) -> str:
    """The telling sentence of an exception, on one line."""
    text = str(error)
    for marker in ("Unsupported global: ", "Unsupported class "):
        if marker in text:
            return marker.lower() + text.split(marker, 1)[1].split(" was ")[0].split(" whose ")[0].replace(
                "GLOBAL ", ""
            )
    return " ".join(text.split())[:160]


# --- pickles whose classes stay names ---------------------------------------------------------


class Record:
    """What a pickle's object becomes: its class's name and its attributes; nothing of it runs."""

    def __init__(self, *_arguments: Any, **_keywords: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 2:
            state = {**(state[0] or {}), **(state[1] or {})}
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


SAFE = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),
    ("torch", "device"),
}


class _InertUnpickler(pickle.Unpickler):
    """Knows tensors; every other class becomes a `Record` of that name, whose calls do nothing."""

    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and (
            name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype)
        )
        if (module, name) in SAFE or is_type:
            return super().find_class(module, name)
        return type(name, (Record,), {"__module__": module})


INERT = types.SimpleNamespace(
    Unpickler=_InertUnpickler, load=lambda file, **_: _InertUnpickler(file).load(), __name__="inert"
)


def _kind(value: Any) -> str:
    return f"an object of class {type(value).__name__}" if isinstance(value, Record) else type(value).__name__


def plain(value: Any) -> dict[str, Any]:
    """A configuration as a dictionary, whether it is one or a `Record` that a pickle held; else {}."""
    return dict(value.__dict__) if isinstance(value, Record) else value if isinstance(value, dict) else {}
