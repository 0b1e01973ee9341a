"""What the machine lets a run use, read from files as Linux writes them; and what a run says at its limits."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import tiny

from merger import runtime, system
from merger.cli import commands as cli


def written(root: Path, **files: str) -> Path:
    """A root with these files, `__` standing for a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal:       16000000 kB\nMemFree:  100 kB\nMemAvailable:    8000000 kB\n"


@pytest.mark.parametrize(
    ("flags", "able"),
    [
        ("flags : fpu avx2 avx512f avx512_bf16 amx_fp16", {"bfloat16", "float16", "float32"}),
        ("Features : fp asimd asimdhp bf16", {"bfloat16", "float16", "float32"}),
        ("flags : fpu avx2 avx512f avx512_bf16", {"bfloat16", "float32"}),
        ("flags : fpu sse2 avx2 f16c", {"float32"}),
        ("", {"bfloat16", "float16", "float32"}),
    ],
)
def test_a_processor_tells_what_it_computes_in(tmp_path: Path, flags: str, able: set[str]) -> None:
    """By the flags of x86 or ARM; one of which nothing is known computes in all."""
    root = written(tmp_path, proc__cpuinfo=flags)
    assert {each for each in ("bfloat16", "float16", "float32") if system.computes_in(each, root)} == able


def test_without_limits_the_system_decides(tmp_path: Path) -> None:
    """What Linux calls available, in bytes."""
    assert system.free_memory(written(tmp_path, proc__meminfo=MEMINFO)) == 8_000_000 * 1024


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
    assert system.free_memory(root) == 2_500_000_000


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
    assert system.free_memory(root) == 1_500_000_000


def test_an_unknown_system_refuses_nothing(tmp_path: Path) -> None:
    """Without these files nothing is known."""
    assert system.free_memory(tmp_path) is None


def test_cores_are_those_of_this_process() -> None:
    """Not those of the whole machine."""
    assert system.cores() == len(os.sched_getaffinity(0))


# ---- what it refuses ------------------------------------------------------------------------------------------------


def chained(*errors: BaseException) -> BaseException:
    """Each raised from the one after it, as clients do that wrap what they meet."""
    for above, below in pairwise(errors):
        above.__cause__ = below
    return errors[0]


WORDS = "can't start new thread"


@pytest.mark.parametrize(("error", "said"), [
    (OSError(errno.EMFILE, "Too many open files"), "(Too many open files)\n    let this process open more files"),
    (OSError(errno.ENOSPC, "No space left", "/tmp/x"), "at /tmp/x (No space left)\n    free some disk"),
    (RuntimeError(WORDS), f"({WORDS})\n    write a smaller --threads"),
    (MemoryError(), "(no memory is left)\n    end other programs"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "you)\n    end other programs"),
    (chained(ValueError("x"), ConnectionError("y"), OSError(errno.ENFILE, "Too many")), "(Too many)\n    all programs"),
    (chained(RuntimeError("Error while uploading"), RuntimeError(WORDS)), f"({WORDS})\n    write a smaller"),
    (OSError(errno.EACCES, "Permission denied"), None),
    (OSError(errno.ENOENT, "No such file"), None),
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), None),
    (RuntimeError("a fault of ours"), None),
    (chained(ValueError("x"), KeyError("y")), None),
])  # fmt: skip
def test_what_the_machine_has_no_more_of_is_found_at_the_bottom(error: BaseException, said: str | None) -> None:
    """Whoever wrapped it; a fault of ours stays one."""
    found = runtime.lacking(error)
    assert (found is None) == (said is None)
    if found is not None and said is not None:
        assert said in str(found)
        assert found.exit_code == 5


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A merge of two small folders."""
    tiny.model(tmp_path / "a", seed=1)
    tiny.model(tmp_path / "b", seed=2)
    path = tmp_path / "mine.yaml"
    path.write_text(f"merge_method: linear\nmodels: [{{model: {tmp_path}/a}}, {{model: {tmp_path}/b}}]\n")
    return path


@contextmanager
def no_threads() -> Iterator[None]:
    """Each would get a stack that does not fit into the address space, so the system refuses to start it."""
    before = threading.stack_size(1 << 47)
    try:
        yield
    finally:
        threading.stack_size(before)


@contextmanager
def one_file() -> Iterator[None]:
    """One file at a time may be opened: a recipe, or this package's version, but no result beside its parents."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    top = max(map(int, os.listdir("/proc/self/fd")))
    held = [os.open(os.devnull, os.O_RDONLY)]
    while held[-1] < top:  # until no number below is free
        held.append(os.open(os.devnull, os.O_RDONLY))
    last = held.pop()
    os.close(last)
    resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for number in held:
            os.close(number)


LINES = {"plan": "plan {0}", "run": "run {0} --to {1}/out", "diff": "diff {1}/a {1}/b"}
CASES = [*((line, "threads") for line in LINES), ("run", "files")]


@pytest.mark.parametrize(("line", "lack"), CASES)
def test_a_machine_at_its_limits_is_told_and_not_hung(
    line: str, lack: str, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exit code 5 and a sentence with the next step, no traceback; and the same command goes on afterwards."""
    words = LINES[line].format(recipe, tmp_path).split()
    assert cli.main(words) in (0, 7)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    said = WORDS if lack == "threads" else "Too many open files"
    with no_threads() if lack == "threads" else one_file():
        code = cli.main(words)
    err = capfd.readouterr().err
    assert (code, said in err, "\n    " in err, "Traceback" in err) == (5, True, True, False), err
    assert cli.main(words) in (0, 7)
