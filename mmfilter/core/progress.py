"""What an operation tells while it runs; the command line shows it, tests keep it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Phases, samples done in them, and notes."""

    def start(self, phase: str, total_bytes: int | None) -> None: ...

    def advance(self, samples: int, nbytes: int) -> None: ...

    def note(self, text: str) -> None: ...
