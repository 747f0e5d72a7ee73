"""The command line's entry: runs the app and turns explained errors into one line and an exit code.

Exit codes: 0 done, 1 told you why, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from mmfilter.cli.commands import app
from mmfilter.errors import MMFilterError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv` (default `sys.argv[1:]`) and return its exit code."""
    try:
        app(args=list(sys.argv[1:] if argv is None else argv), prog_name="mmfilter", standalone_mode=True)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except MMFilterError as error:
        print(f"mmfilter: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mmfilter: interrupted; finished shards are kept, and the same command goes on from there", file=sys.stderr)
        return 130
    except BrokenPipeError:
        silence_stdout()
    return 0


def silence_stdout() -> None:
    """After the consumer has gone: keep Python's flush at exit from complaining."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
