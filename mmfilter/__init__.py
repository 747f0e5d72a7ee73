"""Curate image-text data with the features inside a multimodal model.

The functions are the commands of the same names: their keywords are the fields of the operation's settings, and what
they return answers questions. Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmfilter.errors import MMFilterError
    from mmfilter.menu import check, dedup, score, search, select
    from mmfilter.notebook import Run
    from mmfilter.streaming import stream

__version__ = "0.1.0.dev0"
__all__ = ["MMFilterError", "Run", "check", "dedup", "score", "search", "select", "stream"]

_PLACES = {"MMFilterError": "errors", "Run": "notebook", "stream": "streaming"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_PLACES.get(name, 'menu')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
