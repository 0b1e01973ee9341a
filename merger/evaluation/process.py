"""Has a model measured by a process of its own. Not here: what that process does (scoring)."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merger import system
from merger.errors import EvaluationError, Problem
from merger.evaluation.budget import Score
from merger.safety.environment import of_the_client, public

_WORDS_SHOWN = 300


@dataclass(frozen=True)
class Text:
    """A text to be measured on: what it is called, what it says, and by what it is known again."""

    name: str
    text: str
    digest: str
    window: int
    stride: int


@dataclass(frozen=True)
class Wanted:
    """What is measured of a model.

    Args:
        texts: for perplexity.
        tasks: of lm-evaluation-harness.
        limit: examples of each task.
        dtype: in what the model is run.
        device: where: ``cpu`` or ``cuda``.
        threads: how many threads compute.
    """

    texts: tuple[Text, ...]
    tasks: tuple[str, ...]
    limit: int | None
    dtype: str
    device: str
    threads: int


def score_model(folder: Path, model: str | None, wanted: Wanted) -> tuple[Score, ...]:
    """The scores of a model that transformers can load from a folder.

    Args:
        folder: the model's files.
        model: what the scores say whose they are.
        wanted: what is measured.

    Raises:
        EvaluationError: it cannot be measured.
    """
    asked = {**vars(wanted), "texts": [vars(text) for text in wanted.texts], "folder": str(folder)}
    return tuple(Score(model=model, **score) for score in _ask(asked, wanted.threads)["scores"])


def unknown_tasks(tasks: Sequence[str]) -> list[str]:
    """Those that lm-evaluation-harness does not know.

    Raises:
        EvaluationError: it cannot be asked.
    """
    found: list[str] = _ask({"folder": None, "tasks": list(tasks)}, 1)["unknown"]
    return found


def _ask(question: Mapping[str, Any], threads: int) -> Mapping[str, Any]:
    """The process's answer. It is killed with us, should we be interrupted."""
    # Threads that wait actively for each other took three times as long where others use the cores too.
    few = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**public(), **few}
    line = [sys.executable, "-P", "-m", "merger.evaluation.scoring"]  # -P: a folder `merger` here is not the package
    with tempfile.TemporaryFile() as words:
        done = subprocess.run(
            line,
            input=json.dumps({**question, "tokens": _tokens(question["tasks"])}).encode(),
            stdout=subprocess.PIPE,
            stderr=words,
            env=environment,
            check=False,
        )
        if done.returncode:
            raise _explain_end(done.returncode, _last_words(words))
    answer: dict[str, Any] = json.loads(done.stdout)
    if "error" in answer:
        raise EvaluationError(Problem(answer["error"]))
    return answer


def _tokens(tasks: Sequence[str]) -> Mapping[str, str]:
    """What the process may show the Hub: for known tasks, whose data may be gated; not where a file's code is run."""
    needed = bool(tasks) and not any(task.endswith((".yaml", ".yml")) for task in tasks)
    return of_the_client() if needed else {}


def _last_words(words: Any) -> str:
    words.seek(0)
    lines = words.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:_WORDS_SHOWN] if lines else ""


def _explain_end(code: int, words: str) -> EvaluationError:
    if code == system.KILLED:
        hint = "most likely for lack of memory: write dtype: bfloat16 under evaluate:, or take a larger machine"
        return EvaluationError(Problem("the system killed its process", hint=hint))
    return EvaluationError(Problem(f"its process ended with {code} ({words})"))
