"""How much memory this process may take."""

from __future__ import annotations

import os
from pathlib import Path


def available(root: Path = Path("/")) -> int:
    """Bytes that can be had without swapping: what the machine has free, or less where the process is held to less.

    On Linux the kernel's estimate and what the control group leaves; elsewhere half of what is built in.
    `root` is where `proc` and `sys` are.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    estimate = _line(root / "proc/meminfo", "MemAvailable:")
    free = total // 2 if estimate is None else estimate * 1024
    for limit, used, cache in (
        ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current", "inactive_file"),
        (
            "sys/fs/cgroup/memory/memory.limit_in_bytes",
            "sys/fs/cgroup/memory/memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ):
        most, now = _number(root / limit), _number(root / used)
        if most is not None and now is not None:
            given_back = _line((root / used).parent / "memory.stat", cache) or 0
            free = min(free, max(0, most - now + given_back))
    return free


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None


def _line(path: Path, name: str) -> int | None:
    """The number after a name at the start of a line."""
    try:
        return next(
            (int(line.split()[1]) for line in path.read_text().splitlines() if line.split()[:1] == [name]), None
        )
    except (OSError, ValueError, IndexError):
        return None
