"""Measures one model, in a process of its own: `python -m merger.evaluation.scoring`, asked by JSON, answering by JSON.

A model of several gigabytes, and whatever a task brings along, end with this process; should the system kill it, the
merge lives. transformers and lm-evaluation-harness are imported here and nowhere else. Not here: what is measured
(recipe), and where the model's files come from (evaluation).
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_BOOTSTRAPS = 1000
_MESSAGE_LETTERS = 400


def main() -> int:
    """Answer one question; what libraries print goes to stderr."""
    answer_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        asked = json.load(sys.stdin)
        os.environ.update(asked["tokens"])  # a task's data may be gated
        answer = _answer(asked)
    except Exception as error:  # whatever goes wrong in a stranger's model or task is told, not thrown
        answer = {"error": shorten_error(error)}
    json.dump(answer, answer_to)
    answer_to.close()
    return 0


def shorten_error(error: Exception) -> str:
    """Its kind and the beginning of its words, without the signatures of addresses."""
    words = re.sub(r"\?\S+", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {words[:_MESSAGE_LETTERS]}"


def _answer(asked: Mapping[str, Any]) -> dict[str, Any]:
    if asked["folder"] is None:
        return {"unknown": _unknown_of(asked["tasks"])}
    torch.set_num_threads(asked["threads"])
    model, tokenizer = _load(asked["folder"], asked["dtype"], asked["device"])
    scores = [score for text in asked["texts"] for score in _of_text(model, tokenizer, text)]
    if asked["tasks"]:
        scores += _of_tasks(model, tokenizer, asked["tasks"], asked["limit"])
    return {"scores": scores}


def _load(folder: str, dtype: str, device: str) -> tuple[Any, Any]:
    transformers: Any = import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), local_files_only=True
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval().to(device), tokenizer


# ---- perplexity -----------------------------------------------------------------------------------------------------


def _of_text(model: Any, tokenizer: Any, asked: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Perplexity by token, and bits by byte, by which models with other tokens can be compared."""
    text = asked["text"]
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
    most = getattr(model.config, "max_position_embeddings", None) or asked["window"]
    window = min(asked["window"], most)
    stride = min(asked["stride"], window - 1)
    total, count = loss(model, tokens, window, stride)
    if count == 0:
        raise ValueError(f"{asked['name']} has fewer than two tokens")
    detail = f"{len(text):,} characters, {len(tokens):,} tokens, window {window}, stride {stride}, {asked['digest']}"
    common = {"task": asked["name"], "error": None, "higher": False, "detail": detail, "dataset": asked["name"]}
    yield {"metric": "perplexity", "value": _finite(math.exp(min(total / count, 700.0))), **common}
    yield {"metric": "bits per byte", "value": _finite(total / math.log(2) / len(text.encode())), **common}


def loss(model: Any, tokens: Tensor, window: int, stride: int) -> tuple[float, int]:
    """The sum of the negative log-likelihoods, in nats, of all tokens but the first, and how many these are.

    The window moves by `stride`, which is less than it holds. Each token counts once: in the first window with it,
    where it has at least ``window - stride`` tokens before it, but for those of the first window.
    """
    total, count, done = 0.0, 0, 1
    for start in range(0, max(1, len(tokens) - 1), stride):
        stop = min(start + window, len(tokens))
        if stop > done:
            found = nats(model, tokens[None, start:stop], done - start)[0]
            total, count, done = total + float(found.sum()), count + len(found), stop
    return total, count


def nats(model: Any, tokens: Tensor, first: int = 1) -> Tensor:
    """The negative log-likelihoods, in float64, of the tokens from `first` on by those before them, row by row."""
    with torch.inference_mode():
        logits = model(input_ids=tokens.to(model.device)).logits[:, first - 1 : -1].float()
    wanted = tokens[:, first:].to(logits.device)
    found = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
    return found.view(wanted.shape).double()


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"a score of {value}: the model's numbers are damaged")
    return value


# ---- tasks ----------------------------------------------------------------------------------------------------------


def task_manager(tasks: list[str]) -> tuple[Any, list[str]]:
    """What knows the tasks, and their names; of a task's file its folder is looked through, and itself read."""
    yaml: Any = import_module("yaml")
    files = {task: Path(task) for task in tasks if task.endswith((".yaml", ".yml"))}
    lines = {
        task: re.search(r"^task:\s*(\S.*)$", file.read_text("utf-8"), re.MULTILINE) for task, file in files.items()
    }
    names = {task: yaml.safe_load(line[1]) for task, line in lines.items() if line}
    manager: Any = import_module("lm_eval.tasks").TaskManager(
        include_path=sorted({str(file.resolve().parent) for file in files.values()}),
        include_defaults=len(files) < len(tasks),
    )
    return manager, [str(names.get(task, task)) for task in tasks]


def _unknown_of(tasks: list[str]) -> list[str]:
    """Those of which lm-evaluation-harness knows nothing."""
    manager, names = task_manager(tasks)
    return [task for task, name in zip(tasks, names, strict=True) if name not in manager.all_tasks]


def _of_tasks(model: Any, tokenizer: Any, tasks: list[str], limit: int | None) -> list[dict[str, Any]]:
    found = run_tasks(model, tokenizer, tasks, limit)
    results = {**found["results"], **found.get("groups", {})}
    told = [name for name in task_manager(tasks)[1] if name in results] or list(results)
    return [score for name in told for score in scores_of_task(name, results[name], found)]


def run_tasks(
    model: Any, tokenizer: Any, tasks: list[str], limit: int | None, samples: bool = False
) -> Mapping[str, Any]:
    """What lm-evaluation-harness finds; with what it says of each example, if that is asked for."""
    harness: Any = import_module("lm_eval")
    manager, names = task_manager(tasks)
    wrapped = import_module("lm_eval.models.huggingface").HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    found: Mapping[str, Any] = harness.simple_evaluate(
        model=wrapped,
        tasks=names,
        task_manager=manager,
        limit=limit,
        log_samples=samples,
        bootstrap_iters=_BOOTSTRAPS,
    )
    return found


def scores_of_task(name: str, result: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The metrics of a task, which lm-evaluation-harness calls ``acc,none`` and their errors ``acc_stderr,none``."""
    config = found["configs"].get(name, {})
    count = found.get("n-samples", {}).get(name, {}).get("effective")
    version, shots = found["versions"].get(name), found["n-shot"].get(name)
    told = [f"{count:,} examples" if count else "", f"{shots} shots" if shots is not None else ""]
    told += [f"version {version}" if version else "", f"lm-evaluation-harness {found['lm_eval_version']}"]
    for key, value in result.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = result.get(f"{metric}_stderr,{filtered}")
        yield {
            "task": name,
            "metric": metric if filtered == "none" else f"{metric} ({filtered})",
            "value": _finite(float(value)),
            "error": float(error) if isinstance(error, int | float) and math.isfinite(error) else None,
            "higher": bool(found["higher_is_better"].get(name, {}).get(metric, True)),
            "detail": ", ".join(part for part in told if part),
            "dataset": _dataset(config, name),
        }


def _dataset(config: Mapping[str, Any], name: str) -> str:
    """Its name on the Hub; of files of one's own the task's."""
    path = str(config.get("dataset_path") or "")
    return path if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).exists() else name


if __name__ == "__main__":
    sys.exit(main())
