"""TensorBoard, where it is asked for and installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmfilter.errors import MissingExtra


class Board:
    """Writes the figures of steps as scalars, one run a SAE."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtra("--tensorboard", "tensorboard") from error
        self._make, self._folder = SummaryWriter, folder
        self._writers: dict[str, Any] = {}

    def add(self, name: str, row: dict[str, float | int]) -> None:
        """The figures of one step; tokens are the x axis."""
        if name not in self._writers:
            self._writers[name] = self._make(str(self._folder / name if name else self._folder))
        for figure, value in row.items():
            if figure not in ("step", "tokens"):
                self._writers[name].add_scalar(figure, value, row["tokens"])

    def close(self) -> None:
        """Write what is still held back."""
        for writer in self._writers.values():
            writer.close()
