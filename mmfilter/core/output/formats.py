"""What a selection can be written as."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Format = Literal["shards", "tar", "keys", "datacomp", "parquet", "llava-json", "hf"]


def to_folder(form: Format, output: str | Path | None) -> bool:
    """Whether a folder is written, with a table of all decisions, rather than one file."""
    if form == "datacomp":
        return output is not None and Path(output).suffix != ".npy"
    return form not in ("tar", "keys")
