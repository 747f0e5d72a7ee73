"""A list on stdout: columns for eyes on a terminal, tabs for programs in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text


def show_columns(headings: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Print the rows under their headings; `right` are the headings of columns that are aligned on the right.

    A terminal gets columns folded to its width. A pipe has no width: it gets one line a row, its cells separated by
    tabs, for `grep` and `cut`.
    """
    if not sys.stdout.isatty():
        for row in (headings, *rows):
            print("\t".join(" ".join(cell.split()) for cell in row))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(highlight=False).print(table)
