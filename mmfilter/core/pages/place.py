"""Where a page may be written."""

from __future__ import annotations

from pathlib import Path

from mmfilter.errors import SelectionError


def check_page(path: Path) -> None:
    """Raise `SelectionError` unless a page can get this name: a slip must not replace a file of another kind."""
    if path.suffix != ".html":
        raise SelectionError(f"--page {str(path)!r} is the page to write: give a name that ends in .html")
    if not path.parent.is_dir():
        raise SelectionError(f"--page {str(path)!r} cannot be written: there is no folder {str(path.parent)!r}")
