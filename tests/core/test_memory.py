"""What is free, as the kernel and the process's control groups tell it."""

from __future__ import annotations

import os

import pytest

from mmfilter.core.memory import available

GIB = 1 << 30


def tell(root, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def root(tmp_path):
    tell(tmp_path, {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable:   {8 << 20} kB\n"})
    return tmp_path


def test_without_anything_told_half_of_what_is_built_in(tmp_path):
    assert available(tmp_path) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def test_the_kernels_estimate(root):
    assert available(root) == 8 * GIB


def test_the_smallest_of_what_is_told(root):
    group = root / "sys/fs/cgroup"
    tell(group, {"memory.max": "max\n", "memory.current": "1000\n"})
    assert available(root) == 8 * GIB
    tell(group, {"memory.max": f"{4 * GIB}\n", "memory.current": f"{3 * GIB}\n"})
    assert available(root) == GIB
    tell(group, {"memory.stat": f"anon 5\ninactive_file {GIB}\n"})  # what is read from files is given back
    assert available(root) == 2 * GIB
    tell(group, {"memory.current": f"{6 * GIB}\n"})
    assert available(root) == 0


@pytest.mark.parametrize("tight", ["system.slice/job.scope", "system.slice"])
def test_the_processs_own_group_and_those_above_it(root, tight):
    """A batch system holds a job to less than the machine has, in a group of its own or in one above."""
    tell(root, {"proc/self/cgroup": "0::/system.slice/job.scope\n"})
    base = root / "sys/fs/cgroup"
    for group in ("system.slice", "system.slice/job.scope"):
        tell(base / group, {"memory.max": "max\n", "memory.current": f"{GIB}\n"})
    assert available(root) == 8 * GIB
    tell(base / tight, {"memory.max": f"{3 * GIB}\n"})
    assert available(root) == 2 * GIB


def test_the_first_version_of_control_groups(root):
    tell(root, {"proc/self/cgroup": "12:cpu,cpuacct:/x\n4:memory:/jobs/7\n0::/elsewhere\n"})
    tell(
        root / "sys/fs/cgroup/memory/jobs/7",
        {
            "memory.limit_in_bytes": f"{2 * GIB}\n",
            "memory.usage_in_bytes": f"{GIB}\n",
            "memory.stat": "inactive_file 7\n",
        },
    )
    assert available(root) == GIB
    tell(root / "sys/fs/cgroup/memory/jobs/7", {"memory.stat": f"total_inactive_file {GIB // 2}\n"})
    assert available(root) == GIB + GIB // 2


def test_a_container_that_has_its_group_mounted_at_the_root(root):
    tell(root, {"proc/self/cgroup": "0::/../../docker/abc\n"})
    tell(root / "sys/fs/cgroup", {"memory.max": f"{2 * GIB}\n", "memory.current": f"{GIB}\n"})
    assert available(root) == GIB


def test_this_machine_has_some():
    assert 0 < available() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
