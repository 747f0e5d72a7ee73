"""`select`: parse, choose and copy, print."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated

import typer

from mmfilter.cli.options import RunArgument
from mmfilter.core.selection.select_settings import SelectSettings
from mmfilter.ops.score_settings import DEFAULT_RUN


def select(
    settings: SelectSettings,
    run: RunArgument = DEFAULT_RUN,
    as_json: Annotated[bool, typer.Option("--json", help="Print the funnel as JSON on stderr.")] = False,
) -> None:
    """Copy the best pairs of a run, byte for byte.

    Needs no model: it reads the score tables and copies byte ranges.

    Example: mmfilter select runs/icons --top 20% -o best/
    """
    from mmfilter.cli import display
    from mmfilter.ops import select as operation

    if settings.misdirected:
        raise typer.BadParameter(settings.misdirected, param_hint="--format")
    check_terminal(settings, is_terminal=sys.stdout.isatty())
    with display.TerminalProgress() as progress:
        selection = operation.select(run, settings, progress=progress)
    if selection.reader_closed:
        _silence_stdout()
    for warning in selection.warnings:
        display.note(warning)
    if as_json:
        print(json.dumps(display.selection_report(selection), indent=2), file=sys.stderr)
    else:
        display.show_funnel(selection.funnel)


def check_terminal(settings: SelectSettings, *, is_terminal: bool) -> None:
    """Refuse to pour something binary into a terminal (exit 2)."""
    if settings.output is not None or settings.dry_run or not is_terminal:
        return
    if settings.form == "tar":
        raise typer.BadParameter(
            "say where to: -o DIR for shards, or pipe the tar stream into a consumer", param_hint="-o"
        )
    if settings.form == "datacomp":
        raise typer.BadParameter(
            "say where to: -o subset.npy, or -o DIR for the subset file with a table of all decisions", param_hint="-o"
        )


def _silence_stdout() -> None:
    """After the consumer has gone: keep Python's flush at exit from complaining."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
