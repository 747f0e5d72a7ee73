"""Files that appear under their names only when they are finished, and JSON.

Every file is written to a temporary name beside its place and renamed, so that a file that *exists* is a file that is
*finished*."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmfilter.errors import RunError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it into place if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:  # from before it is made: a signal may come at any time
        temporary.touch(exist_ok=False)
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def system_reason(error: OSError) -> str:
    """What the system says, in its words: pyarrow puts its own around them."""
    return os.strerror(error.errno) if error.errno else str(error)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file; raises `RunError` naming the file when it is damaged."""
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise RunError(f"{str(path)!r} is not valid JSON ({error}); delete it and run again") from error
