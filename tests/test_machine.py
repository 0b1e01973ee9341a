"""What the machine lets a run use, read from files as Linux writes them."""

from __future__ import annotations

import os
from pathlib import Path

from merger import machine


def written(root: Path, **files: str) -> Path:
    """A root with these files, `__` standing for a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal:       16000000 kB\nMemFree:  100 kB\nMemAvailable:    8000000 kB\n"


def test_without_limits_the_system_decides(tmp_path: Path) -> None:
    """What Linux calls available, in bytes."""
    assert machine.memory(written(tmp_path, proc__meminfo=MEMINFO)) == 8_000_000 * 1024


def test_the_narrowest_control_group_decides(tmp_path: Path) -> None:
    """Of a container within a container the smaller rest counts; cached files can be taken back, so they do not."""
    root = written(
        tmp_path,
        proc__meminfo=MEMINFO,
        proc__self__cgroup="0::/outer/inner\n",
        sys__fs__cgroup__outer__memory_dot_max="3000000000\n",
        sys__fs__cgroup__outer__memory_dot_current="1500000000\n",
        sys__fs__cgroup__outer__memory_dot_stat="anon 500000000\nfile 1000000000\n",
        sys__fs__cgroup__outer__inner__memory_dot_max="max\n",
        sys__fs__cgroup__outer__inner__memory_dot_current="1200000000\n",
    )
    assert machine.memory(root) == 2_500_000_000


def test_control_groups_of_the_first_version_count_too(tmp_path: Path) -> None:
    """Older runners have them."""
    root = written(
        tmp_path,
        proc__meminfo=MEMINFO,
        proc__self__cgroup="4:memory:/job\n1:cpu:/\n",
        sys__fs__cgroup__memory__job__memory_dot_limit_in_bytes="2000000000\n",
        sys__fs__cgroup__memory__job__memory_dot_usage_in_bytes="600000000\n",
        sys__fs__cgroup__memory__job__memory_dot_stat="cache 100000000\nrss 500000000\n",
    )
    assert machine.memory(root) == 1_500_000_000


def test_an_unknown_system_refuses_nothing(tmp_path: Path) -> None:
    """Without these files nothing is known."""
    assert machine.memory(tmp_path) is None


def test_cores_are_those_of_this_process() -> None:
    """Not those of the whole machine."""
    assert machine.cores() == len(os.sched_getaffinity(0))
