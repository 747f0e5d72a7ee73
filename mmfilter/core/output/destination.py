"""Where a selection goes: what may be written to, and streams that end quietly when their reader does."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mmfilter.core.files import atomic, system_reason
from mmfilter.core.input.source import Source
from mmfilter.errors import SelectionError


def check_output(output: Path, run: Path, sources: Iterable[Source], *, folder: bool) -> None:
    """Raise `SelectionError` for an output that is in the way, in the run directory, among the input's shards, or where
    nothing can be written."""
    with output_errors(output):
        _check(output, run, sources, folder=folder)


def _check(output: Path, run: Path, sources: Iterable[Source], *, folder: bool) -> None:
    real, inside = output.resolve(), run.resolve()
    if real == inside or inside in real.parents:
        raise SelectionError(f"output {str(output)!r} is in the run directory {str(run)!r}; write beside it")
    if output.exists() and not output.is_file() and not output.is_dir():
        raise SelectionError(
            f"output {str(output)!r} is a device or a pipe; name a new "
            f"{'folder' if folder else 'file, or - for stdout'}"
        )
    above = next((parent for parent in real.parents if parent.exists()), real)
    if not above.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(above, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    if folder:
        if any(source.holds(real) for source in sources):
            raise SelectionError(f"output {str(output)!r} holds shards of the input; name a new folder")
        if real.exists() and (not real.is_dir() or any(real.iterdir())):
            what = "is not empty" if real.is_dir() else "is a file"
            raise SelectionError(f"output {str(output)!r} {what}; name a new folder, or delete it first")
    elif real.exists():
        raise SelectionError(f"output {str(output)!r} exists already; name a new file, or delete it first")


@contextmanager
def stream(output: str | Path | None, stdout: BinaryIO | None) -> Iterator[int]:
    """The file descriptor to write to. A reader of stdout that goes away ends the block, quietly."""
    if output is not None:
        with output_errors(output), atomic(Path(output)) as temporary, open(temporary, "wb") as file:
            yield file.fileno()
        return
    out = sys.stdout.buffer if stdout is None else stdout
    with output_errors("stdout"), suppress(BrokenPipeError):
        out.flush()
        yield out.fileno()


@contextmanager
def output_errors(output: Path | str) -> Iterator[None]:
    """What the system says against writing, as a `SelectionError`."""
    try:
        yield
    except OSError as error:
        raise SelectionError(f"output {str(output)!r} cannot be written: {system_reason(error)}") from error
