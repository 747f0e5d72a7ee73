"""The command line's entry: runs the app and turns explained errors into one line and an exit code.

Exit codes: 0 done, 1 told you why, 2 wrong usage, 130 interrupted (Ctrl-C), 143 terminated, 129 terminal closed.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Annotated

import typer

from mmfilter import __version__
from mmfilter.cli.check_command import check
from mmfilter.cli.dedup_command import dedup
from mmfilter.cli.init_command import init
from mmfilter.cli.models_commands import models_app
from mmfilter.cli.run_command import run_recipe
from mmfilter.cli.sae_commands import sae_app
from mmfilter.cli.score_command import score
from mmfilter.cli.search_command import search
from mmfilter.cli.select_command import select
from mmfilter.cli.settings_options import command
from mmfilter.cli.stopping import stopping
from mmfilter.errors import MMFilterError

app = typer.Typer(
    help="Curate image-text data with the features inside a multimodal model.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(models_app, name="models")
app.add_typer(sae_app, name="sae")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mmfilter {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


for _function, _word in (
    (score, None),
    (select, None),
    (check, None),
    (dedup, None),
    (search, None),
    (run_recipe, "run"),
    (init, None),
):
    command(app, _word)(_function)


_OF_THE_SYSTEM = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EIO,
}
"""Errors of files that the user can do something about, wherever they come from"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv` (default `sys.argv[1:]`) and return its exit code."""
    with stopping() as stop:
        try:
            app(args=list(sys.argv[1:] if argv is None else argv), prog_name="mmfilter", standalone_mode=True)
        except BaseException as error:
            if stop.signal is None or (isinstance(error, SystemExit) and not error.code):
                return _exit_code(error)
            with suppress(OSError):  # the terminal may be what has gone
                print(
                    f"mmfilter: {stop.word}; what is finished is kept and nothing is half written: the same command "
                    "goes on from there",
                    file=sys.stderr,
                )
            return stop.exit_code
    return 0


def _exit_code(error: BaseException) -> int:
    """The exit code of what ended a command, after saying what there is to say; raises what nobody expected."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(bool(error.code))
    if isinstance(error, MMFilterError):
        print(f"mmfilter: {error}", file=sys.stderr)
        return 1
    if isinstance(error, OSError) and error.errno in _OF_THE_SYSTEM:
        named = f"{str(error.filename)!r}: " if error.filename else ""
        print(
            f"mmfilter: {named}{os.strerror(error.errno)}; nothing is half written: make room or name another place, "
            "and run the same command again",
            file=sys.stderr,
        )
        return 1
    raise error


def command_paths(group: typer.Typer = app, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command, those of groups too: ("score",), ("sae", "show"), …"""
    for registered in group.registered_commands:
        yield (*prefix, registered.name or getattr(registered.callback, "__name__", "").replace("_", "-"))
    for inner in group.registered_groups:
        if inner.typer_instance is not None:
            yield from command_paths(inner.typer_instance, (*prefix, str(inner.name)))
