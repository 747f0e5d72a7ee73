"""The command line's entry: runs the app and turns explained errors into one line and an exit code.

Exit codes: 0 done, 1 told you why, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer

from mmfilter.cli.commands import app
from mmfilter.errors import MMFilterError


class _Interrupted(BaseException):
    """Ctrl-C. Not a KeyboardInterrupt, which typer would swallow with a message of its own."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv` (default `sys.argv[1:]`) and return its exit code."""
    try:
        with _interrupts():
            app(args=list(sys.argv[1:] if argv is None else argv), prog_name="mmfilter", standalone_mode=True)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except MMFilterError as error:
        print(f"mmfilter: {error}", file=sys.stderr)
        return 1
    except _Interrupted:
        print("mmfilter: interrupted; what is finished is kept, and the same command goes on from there", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _interrupts() -> Iterator[None]:
    """Ctrl-C raises `_Interrupted` inside the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_signal: int, _frame: object) -> None:
        raise _Interrupted

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def command_paths(group: typer.Typer = app, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command, those of groups too: ("score",), ("sae", "show"), …"""
    for command in group.registered_commands:
        yield (*prefix, command.name or command.callback.__name__.replace("_", "-"))
    for inner in group.registered_groups:
        yield from command_paths(inner.typer_instance, (*prefix, inner.name))


def silence_stdout() -> None:
    """After the consumer has gone: keep Python's flush at exit from complaining."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
