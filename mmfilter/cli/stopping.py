"""Signals that end a command: it tidies up, says so in one line, and ends with 128 + the signal's number."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from signal import Signals

_WORDS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}
_ONE_WISH = 1.0
"""Seconds within which several signals are one wish: a terminal, and what started the command, may both send it"""


class Stopped(BaseException):
    """Raised where the command is. Not a KeyboardInterrupt, which typer would swallow with a message of its own."""


@dataclass
class Stop:
    """The signal that came, if one did.

    To be asked after any exception: a library that is called may turn `Stopped` into an error of its own.
    """

    signal: Signals | None = None
    _at: float = 0.0

    @property
    def _came(self) -> Signals:
        if self.signal is None:
            raise AssertionError("no signal came")
        return self.signal

    @property
    def word(self) -> str:
        return _WORDS[self._came.name]

    @property
    def exit_code(self) -> int:
        return 128 + self._came

    def take(self, number: int, _frame: object) -> None:
        """Raise `Stopped`; once more where the command still tidies up and is asked again."""
        now = time.monotonic()
        if self.signal is not None and now - self._at < _ONE_WISH:
            return
        self.signal, self._at = Signals(number), now
        raise Stopped


@contextmanager
def stopping() -> Iterator[Stop]:
    """Ctrl-C, a polite kill and a closed terminal raise `Stopped` inside the block.

    A signal that whoever started the command has it ignore, as `nohup` does, stays ignored.
    """
    stop = Stop()
    before = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in _WORDS if hasattr(signal, name)]
        before = {
            number: signal.getsignal(number) for number in numbers if signal.getsignal(number) is not signal.SIG_IGN
        }
    for number in before:
        signal.signal(number, stop.take)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
