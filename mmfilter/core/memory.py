"""How much memory this process may take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class _Version:
    """Where a version of control groups says what it allows and what is used."""

    base: str
    limit: str
    used: str
    cache: str
    """Of `memory.stat`: pages of files, which are given back when memory is wanted"""


_V2 = _Version("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")
_V1 = _Version("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available(root: Path = Path("/")) -> int:
    """Bytes that can be had without swapping: what the machine has free, or less where the process is held to less.

    On Linux the kernel's estimate, and what the process's own control group and those above it leave; elsewhere half
    of what is built in. `root` is where `proc` and `sys` are.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    estimate = _number_after(root / "proc/meminfo", "MemAvailable:")
    free = total // 2 if estimate is None else estimate * 1024
    for version, folder in _groups(root):
        most, now = _number(folder / version.limit), _number(folder / version.used)
        if most is not None and now is not None:
            given_back = _number_after(folder / "memory.stat", version.cache) or 0
            free = min(free, max(0, most - now + given_back))
    return free


def _groups(root: Path) -> Iterator[tuple[_Version, Path]]:
    """The process's control groups that count memory, each with those above it.

    In a container the files of the process's own group are often mounted at the root, where its path does not lead:
    a folder that is not there is passed over.
    """
    for line in _lines(root / "proc/self/cgroup") or ["0::/", "1:memory:/"]:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        version = _V2 if not controllers else _V1 if "memory" in controllers.split(",") else None
        if version is None:
            continue
        own = PurePosixPath(path.strip("/"))
        for group in (own, *own.parents):
            yield version, root / version.base / group


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None


def _number_after(path: Path, name: str) -> int | None:
    """The number after a name at the start of a line."""
    try:
        return next((int(line.split()[1]) for line in _lines(path) if line.split()[:1] == [name]), None)
    except (ValueError, IndexError):
        return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
