"""What is free, as the kernel and a control group tell it."""

from __future__ import annotations

import os

from mmfilter.core.memory import available

GIB = 1 << 30


def tell(root, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_smallest_of_what_is_told(tmp_path):
    assert available(tmp_path) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    tell(tmp_path, proc__meminfo=f"MemTotal: 1 kB\nMemAvailable:   {8 << 20} kB\n")
    assert available(tmp_path) == 8 * GIB
    group = tmp_path / "sys/fs/cgroup"
    tell(group, **{"memory.max": "max\n", "memory.current": "1000\n"})
    assert available(tmp_path) == 8 * GIB
    tell(group, **{"memory.max": f"{4 * GIB}\n", "memory.current": f"{3 * GIB}\n"})
    assert available(tmp_path) == GIB
    tell(group, **{"memory.stat": f"anon 5\ninactive_file {GIB}\n"})  # what is read from files is given back
    assert available(tmp_path) == 2 * GIB
    tell(group, **{"memory.current": f"{6 * GIB}\n"})
    assert available(tmp_path) == 0


def test_this_machine_has_some():
    assert 0 < available() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
