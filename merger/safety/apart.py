"""Work on what a stranger wrote that could take forever or all memory, done in a process with limits and no secrets.

`python -m merger.safety.apart MODULE:FUNCTION` is that process. Not here: what is done there (the functions).
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from merger import system
from merger.safety.numbers import size

MEMORY_BYTES = 192 << 20
"""What it may take beyond the interpreter and the imports; where the system cannot limit that, time does."""

_ANSWER_BYTES = 16 << 20
_MUCH_MEMORY = 3
"""The code with which the process ends for lack of memory."""


class BeyondError(Exception):
    """The work took more than it may: a sentence without its subject."""


@dataclass(frozen=True)
class Bounds:
    """What the work may take.

    Args:
        seconds: of computing.
        wait: seconds by the clock, of which a busy machine gives it few.
        memory: in bytes.
    """

    seconds: int = 3
    wait: float = 30
    memory: int = MEMORY_BYTES


def call(function: str, argument: Any, bounds: Bounds = Bounds()) -> Any:
    """What a function makes of an argument, in a process of its own.

    Args:
        function: ``module:name``; it returns what JSON can hold.

    Raises:
        BeyondError: it took more.
    """
    line = [sys.executable, "-P", "-m", __name__, function, str(bounds.seconds), str(bounds.memory)]
    with tempfile.TemporaryFile() as asked:
        pickle.dump(argument, asked)
        asked.seek(0)
        process = subprocess.Popen(
            line, stdin=asked, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=_environment()
        )
    with process:  # waits for its end
        try:
            answer = _read(process, bounds)
        except BaseException:
            process.kill()
            raise
        code = process.wait()
    if code == system.OUT_OF_TIME:
        raise BeyondError(_too_long(bounds))
    if code == _MUCH_MEMORY:
        raise BeyondError(f"needs more than {bounds.memory >> 20} MB of memory")
    if code:
        raise BeyondError(f"ends its process ({code})")
    return json.loads(answer)


def _environment() -> Mapping[str, str]:
    """No variable of ours, which may be a token: only where the code is."""
    kept = {
        name: os.environ[name]
        for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "SYSTEMROOT")
        if name in os.environ
    }
    return {**kept, "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path if path)}


def _read(process: subprocess.Popen[bytes], bounds: Bounds) -> bytes:
    assert process.stdout is not None
    answers, stdout = list[bytes](), process.stdout
    reading = threading.Thread(target=lambda: answers.append(stdout.read(_ANSWER_BYTES + 1)), daemon=True)
    reading.start()
    reading.join(bounds.wait)
    if reading.is_alive():
        raise BeyondError(_too_long(bounds))
    if len(answers[0]) > _ANSWER_BYTES:
        raise BeyondError(f"makes more than {size(_ANSWER_BYTES)}")
    return answers[0]


def _too_long(bounds: Bounds) -> str:
    return f"takes more than {bounds.seconds} s"


# ---- in that process ------------------------------------------------------------------------------------------------


def main(function: str, seconds: str, memory: str) -> int:
    """Do the work, and write what came of it."""
    module, name = function.split(":")
    work = getattr(import_module(module), name)
    system.limit(int(seconds), int(memory))
    try:
        answer = json.dumps(work(pickle.load(sys.stdin.buffer)))
    except MemoryError:
        return _MUCH_MEMORY
    sys.stdout.write(answer)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
