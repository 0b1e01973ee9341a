"""Work with limits in a process of its own: what it may take, what it knows, and where it may be started from."""

from __future__ import annotations

import os
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from waiting import HANGS_SECONDS

from merger.errors import ModelError
from merger.models.checkpoint import TensorInfo
from merger.models.lora.adapter import CONFIG, read_adapter
from merger.safety import expressions
from merger.safety.apart import BeyondError, Bounds, call
from merger.safety.expressions import compiles, first

SHORT, LONG = Bounds(seconds=1, wait=2), Bounds(seconds=60, wait=HANGS_SECONDS)
HERE = __name__


def endless(argument: Any) -> None:
    while True:
        pass


def asleep(argument: Any) -> None:
    time.sleep(1_000_000)


def large(size: int) -> int:
    return len(b"x" * size)


def wordy(size: int) -> str:
    return "x" * size


def killed(argument: Any) -> None:
    os.kill(os.getpid(), 9)


def known(argument: Any) -> list[str]:
    with open(f"/proc/{os.getpid()}/environ") as file:
        return [file.read(), *os.environ.values(), *map(str, vars(os).get("argv", []))]


def made(path: str) -> None:
    with open(path, "w") as file:
        file.write("x")


def doubled(argument: int) -> int:
    return 2 * argument


@pytest.mark.parametrize(
    ("work", "argument", "said"),
    [
        (large, 10**9, "needs more than 192 MB of memory"),
        (large, 10**12, "needs more than 192 MB of memory"),
        (wordy, 17 << 20, r"makes more than 16.8 MB"),
        (killed, None, r"ends its process \(-9\)"),
        (made, "/tmp/not-made-by-merger", r"ends its process"),
    ],
)
def test_work_that_takes_more_than_it_may_is_ended(work: Any, argument: Any, said: str) -> None:
    """By memory, by what it says; and it writes no file."""
    with pytest.raises(BeyondError, match=said):
        call(f"{HERE}:{work.__name__}", argument, LONG)


@pytest.mark.parametrize("work", [endless, asleep])
def test_work_that_takes_too_long_is_ended(work: Any) -> None:
    """By computing, or by waiting."""
    with pytest.raises(BeyondError, match="takes more than 1 s"):
        call(f"{HERE}:{work.__name__}", None, SHORT)


def test_the_process_knows_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of our variables is one of its own."""
    for name in ("HF_TOKEN", "GITHUB_TOKEN", "INPUT_HF_TOKEN", "ANYTHING"):
        monkeypatch.setenv(name, "hf_a_secret_of_ours")
    assert "hf_a_secret_of_ours" not in " ".join(call(f"{HERE}:known", None, Bounds(seconds=20)))


def test_it_is_started_from_threads_and_from_a_forks_thread() -> None:
    """As the Space does both."""
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda number: call(f"{HERE}:doubled", number, Bounds(20)), range(3))) == [0, 2, 4]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of forks beside threads
        child = os.fork()
    if child == 0:
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(call(f"{HERE}:doubled", 4, Bounds(20))), daemon=True)
        thread.start()
        thread.join()
        os._exit(found != [8])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- regular expressions --------------------------------------------------------------------------------------------

NAMES = ["model.layers.0.q_proj", "model.layers.1.q_proj", "lm_head"]


@pytest.mark.parametrize(
    ("written", "at_end", "found"),
    [
        (["layers"], False, [0, 0, None]),
        ([r"layers\.[01]\.", "head"], False, [0, 0, 1]),
        (["layers", "q_proj"], True, [1, 1, None]),
        (["q_proj", r".*1\.q_proj"], True, [0, 0, None]),
        ([r".*1\.q_proj", "q_proj"], True, [1, 0, None]),
        (["head", "lm_head"], True, [None, None, 1]),
        ([r"(model|lm).*"], False, [0, 0, 0]),
        ([], True, [None, None, None]),
    ],
)
def test_the_first_expression_that_is_found_counts(written: list[str], at_end: bool, found: list[int | None]) -> None:
    """Whether it is tried here, or in a process of its own since it repeats something."""
    assert first(written, NAMES, at_end) == found


BACKTRACKING = ["(a+)+$", "(a|a)*$", "(.*a){30}$", "(a|a)" * 40 + "$", r"(?:\w+\w+)+\Z"]


@pytest.mark.parametrize("expression", BACKTRACKING)
def test_an_expression_that_would_take_forever_is_ended(expression: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a stranger's adapter: with the file's name, and 3 as for any damaged model."""
    monkeypatch.setattr(expressions, "_BOUNDS", SHORT)
    module = f"base_model.model.{'a' * 60}!"
    tensors = {f"{module}.lora_{part}.weight": TensorInfo(module, "F32", (8, 8), "f", 0, 256) for part in "AB"}
    with pytest.raises(ModelError, match=rf"{CONFIG}: to try its regular expressions takes more than 1 s"):
        read_adapter({"peft_type": "LORA", "rank_pattern": {expression: 8}}, tensors)


@pytest.mark.parametrize("expression", ["a" * 1_001, "(", "a{99999999999999999999}", "(" * 500])
def test_what_is_no_expression_or_too_long_a_one(expression: str) -> None:
    """It is not even compiled."""
    assert compiles(expression)
