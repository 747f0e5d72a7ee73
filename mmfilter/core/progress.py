"""What a long operation tells while it runs."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told by an operation; shown by whoever called it."""

    def start(self, phase: str, total_bytes: int | None) -> None: ...

    def advance(self, samples: int, nbytes: int) -> None: ...

    def note(self, text: str) -> None: ...


class Silence:
    """A progress that nobody looks at."""

    def start(self, phase: str, total_bytes: int | None) -> None:
        pass

    def advance(self, samples: int, nbytes: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass
