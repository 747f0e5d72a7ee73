"""What counts as a duplicate, and how it is searched for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mmfilter.core.sides import SIDES
from mmfilter.core.typed import check_fields, setting
from mmfilter.errors import SelectionError

On = Literal["both", "image", "text"]
"""Sides of a pair that count"""

SAME = {"both": "same image and text", "image": "same image", "text": "same text"}
"""What the hashes of exact duplicates say"""


def sides_of(on: On) -> tuple[str, ...]:
    """The sides by name."""
    return SIDES if on == "both" else (on,)


@dataclass(frozen=True)
class DuplicateSettings:
    """What counts as a duplicate, and how to search."""

    GROUP: ClassVar[str] = "Duplicates"

    threshold: float = 0.95
    """Cosine of codes from which two samples are near-duplicates"""
    on: On = "both"
    """Which sides have to be that close"""
    gpu: bool = False
    """Search with faiss-gpu"""
    workers: int | None = setting(None, least=1)
    """Threads (default: all cores); they change no result"""
    memory: float | None = setting(None, metavar="GIB")
    """GiB that the index may take in memory (default: half of what is free); it changes no result"""

    def __post_init__(self) -> None:
        check_fields(self, SelectionError)
        if not 0 < self.threshold <= 1:
            raise SelectionError(
                f"the similarity threshold is {self.threshold}; give one above 0 and up to 1, such as 0.95"
            )
        if self.memory is not None and not self.memory > 0:
            raise SelectionError(
                f"--memory is {self.memory:g}; give GiB above 0, or leave it out to use half of what is free"
            )

    @property
    def at_most(self) -> int | None:
        """Bytes that the sketches may take."""
        return None if self.memory is None else int(self.memory * 2**30)

    @property
    def hashes(self) -> tuple[str, ...]:
        """Columns of the score table that exact duplicates share."""
        return tuple(f"{side}_hash" for side in sides_of(self.on))
