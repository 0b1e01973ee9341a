"""Candidates are scored as the libraries of the field score them, item by item; and a gain is told from noise."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from places import ZOO
from thorough import thorough_only
from transformers import AutoModelForCausalLM, AutoTokenizer

from merger.errors import EvaluationError, MergerError, Span
from merger.evaluation.scoring import loss
from merger.recipe.searched import Objective
from merger.searching.objectives import WINDOW, Scored, gain, mixed, scorers

TEXT = "In the beginning God created the heaven and the earth.\n" * 80
QUESTIONS = [
    {"prompt": "And God said, Let there be", "choices": [" light", " def __init__"], "answer": 0},
    {"prompt": "import", "choices": [" the LORD", " os"], "answer": " os"},
    {"prompt": "And it came to", "choices": [" pass", " self", " return"], "answer": 1},
]
ANSWERS = [{"prompt": "And it came to", "answer": "pass"}, {"prompt": "import", "answer": "heaven"}]
OWN = "def size(model, tokenizer):\n    return model.config.hidden_size\ndef bad(model, tokenizer):\n    return 1 / 0\n"


@pytest.fixture(autouse=True)
def in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Items are scored in the files' order here, so that each can be named."""
    monkeypatch.setattr("merger.searching.objectives.mixed", list)


def test_items_are_mixed_the_same_way_each_time() -> None:
    """All of them once, in another order than the file's."""
    assert sorted(mixed(range(20))) == list(range(20)) != mixed(range(20))
    assert mixed(range(20)) == mixed(range(20))


@pytest.fixture(scope="module")
def zoo() -> tuple[Any, Any]:
    """A trained model and its tokenizer."""
    folder = ZOO / "kjv"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What objectives name, in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"body": TEXT[:400]}) + "\n\n" for _ in range(5)))
    for name, items in (("questions", QUESTIONS), ("answers", ANSWERS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "own_scores.py").write_text(OWN)
    return tmp_path


def scored(files: Path, zoo: tuple[Any, Any], kind: str, source: str, **more: Any) -> tuple[Scored, list[Any]]:
    """The score by one objective, and what was told on the way."""
    told = list[tuple[int, Scored]]()
    (scorer,) = scorers([Objective(kind, source, **more)], files)
    return scorer.score(*zoo, lambda *step: told.append(step)), told


def test_the_loss_is_that_of_windows_one_by_one(
    files: Path, zoo: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches as alone; items average to it, and what is told last is it."""
    model, tokenizer = zoo
    tokens = tokenizer(TEXT, return_tensors="pt", add_special_tokens=False).input_ids[0]
    windows = [
        loss(model, tokens[start : start + WINDOW], WINDOW, WINDOW - 1) for start in range(0, len(tokens), WINDOW)
    ]
    wanted = sum(nats for nats, _ in windows) / sum(count for _, count in windows)
    for most in (4096, 600, 1):
        monkeypatch.setattr("merger.searching.objectives._BATCH_TOKENS", most)
        found, told = scored(files, zoo, "loss", "text.txt")
        assert found.value == pytest.approx(wanted, abs=1e-5)
        assert float(found.items.mean()) == pytest.approx(found.value, abs=1e-9)
        assert len(found.items) == len(windows)
        assert told[-1] == (len(told), found)
        assert len(told) == {4096: 1, 600: -(-len(windows) // 2), 1: len(windows)}[most]


def greedy(zoo: tuple[Any, Any], prompt: str, most: int) -> list[int]:
    """The tokens that transformers goes on with after one prompt."""
    model, tokenizer = zoo
    asked = tokenizer(prompt, return_tensors="pt").input_ids
    made = model.generate(input_ids=asked, do_sample=False, max_new_tokens=most, pad_token_id=1)[0]
    found: list[int] = made[asked.shape[1] :].tolist()
    return found


def likeliest(zoo: tuple[Any, Any], item: Mapping[str, Any]) -> int:
    """The choice with the least nats a byte, each by itself."""
    model, tokenizer = zoo
    before, rates = len(tokenizer(item["prompt"]).input_ids), []
    for choice in item["choices"]:
        ids = tokenizer(item["prompt"] + choice, return_tensors="pt").input_ids
        odds = torch.log_softmax(model(ids).logits[0, :-1].double(), -1).gather(1, ids[0, 1:, None])[before - 1 :]
        rates.append(-float(odds.sum()) / len(choice.encode()))
    return rates.index(min(rates))


@pytest.mark.parametrize("limit", [None, 2])
@torch.inference_mode()
def test_choices_are_judged_as_each_by_itself(limit: int | None, files: Path, zoo: tuple[Any, Any]) -> None:
    """By likelihood a byte; an answer is a choice's number or its text."""
    right = [item["choices"].index(of) if (of := item["answer"]) in item["choices"] else of for item in QUESTIONS]
    wanted = [float(likeliest(zoo, item) == of) for item, of in zip(QUESTIONS, right, strict=True)][:limit]
    found, told = scored(files, zoo, "accuracy", "questions.jsonl", limit=limit)
    assert (found.items.tolist(), found.value) == (wanted, pytest.approx(sum(wanted) / len(wanted)))
    assert told[-1][1].value == found.value


def test_answers_are_those_of_generation_one_by_one(
    files: Path, zoo: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filled up at their beginning in a batch, prompts go on as they do alone; their length ends at the end's token."""
    monkeypatch.setattr("merger.searching.objectives.ANSWER_TOKENS", 12)
    lengths, _ = scored(files, zoo, "length", "answers.jsonl")
    assert lengths.items.tolist() == [len(greedy(zoo, item["prompt"], 12)) for item in ANSWERS]
    said = zoo[1].decode(greedy(zoo, ANSWERS[0]["prompt"], 10)).strip().partition("\n")[0]
    (files / "said.jsonl").write_text(
        json.dumps({**ANSWERS[0], "answer": said}) + "\n" + json.dumps({**ANSWERS[1], "answer": "no such answer"})
    )
    monkeypatch.setattr("merger.searching.objectives._most", lambda *_: 10)
    assert scored(files, zoo, "exact_match", "said.jsonl")[0].items.tolist() == [1.0, 0.0]


def test_lines_have_a_column_and_functions_no_items(files: Path, zoo: tuple[Any, Any]) -> None:
    """Each line is a text of its own."""
    assert len(scored(files, zoo, "loss", "texts.jsonl", column="body", limit=3)[0].items) == 3
    found, _ = scored(files, zoo, "function", "own_scores:size")
    assert (found.value, len(found.items)) == (128.0, 0)


@thorough_only
def test_a_task_of_ones_own_by_the_real_harness(
    files: Path, zoo: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its first metric, example by example, on as many as the limit says; one that is not there is refused."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(files / "home"))
    example = {"q": "And the LORD", "a": [" said unto", " import os"]}
    lines = [json.dumps({**example, "right": right}) for right in (0, 1, 0, 0, 1)]
    (files / "verses.jsonl").write_text("\n".join(lines))
    task = {
        "task": "verses", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "verses.jsonl"}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{a}}",
        "doc_to_target": "{{right}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (files / "verses.yaml").write_text(yaml.safe_dump(task))
    found, _ = scored(files, zoo, "task", "verses.yaml", limit=4)
    assert (found.value, found.items.tolist()) == (0.75, [1, 0, 1, 1])
    with pytest.raises(MergerError, match="has no such task"):
        scorers([Objective("task", "no_such_task")], files)


class Enough(Exception):
    """What prunes."""


def test_what_a_step_raises_ends_the_scoring(
    files: Path, zoo: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A candidate that falls behind is left."""
    monkeypatch.setattr("merger.searching.objectives._BATCH_TOKENS", 1)
    (scorer,) = scorers([Objective("loss", "text.txt")], files)

    def stop(number: int, so_far: Scored) -> None:
        raise Enough

    with pytest.raises(Enough):
        scorer.score(*zoo, stop)


REFUSED: Mapping[str, tuple[str, str, str]] = {
    "no file": ("loss", "none.txt", "none.txt"),
    "parquet": ("loss", "a.parquet", "parquet is not read"),
    "an empty text": ("loss", "empty.txt", "there is nothing in it"),
    "no JSON": ("accuracy", "text.txt", "line 1 is no JSON"),
    "a column that is not there": ("loss", "answers.jsonl", "line 1 has no 'text'"),
    "no choices": ("accuracy", "answers.jsonl", "line 1 has no 'choices'"),
    "an answer that is no choice": ("accuracy", "wrong.jsonl", "the answer of item 1 is none of its choices"),
    "no module": ("function", "no_such_module:f", "cannot be imported"),
    "no function": ("function", "own_scores:none", "cannot be imported"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_scored_by_is_refused_where_it_stands(case: str, files: Path) -> None:
    """Before anything is merged."""
    kind, source, what = REFUSED[case]
    (files / "empty.txt").write_text(" \n")
    (files / "wrong.jsonl").write_text(json.dumps({"prompt": "a", "choices": ["b", "c"], "answer": "d"}))
    at = Span("r.yaml", 7, 3)
    with pytest.raises(MergerError, match=what) as caught:
        scorers([Objective(kind, source, at=at)], files)
    assert [problem.at for problem in caught.value.problems] == [at]


def test_a_function_is_run_for_nobody_else_and_its_errors_are_told(files: Path, zoo: tuple[Any, Any]) -> None:
    """Where files have to lie inside of a root, the recipe may be a stranger's."""
    with pytest.raises(MergerError, match="one's own recipes alone"):
        scorers([Objective("function", "own_scores:size")], files, root=files)
    with pytest.raises(EvaluationError, match="ZeroDivisionError"):
        scored(files, zoo, "function", "own_scores:bad")


def test_a_gain_is_told_from_noise() -> None:
    """Pairs that all gain are no noise, pairs that gain and lose alike are; more or less is better as it is said."""
    draw = np.random.default_rng(1)
    before = draw.normal(size=200)
    better, same = before - 0.2 + draw.normal(size=200) * 0.1, before + draw.normal(size=200) * 0.1
    of = [Scored(float(items.mean()), items) for items in (before, better, same)]
    sure, unsure, worse = gain(of[1], of[0], False), gain(of[2], of[0], False), gain(of[1], of[0], True)
    assert sure.value == pytest.approx(0.2, abs=0.03)
    assert 0.1 < sure.low < sure.value < sure.high < 0.3
    assert not sure.within_noise
    assert unsure.within_noise
    assert (worse.value, worse.low, worse.high) == pytest.approx((-sure.value, -sure.high, -sure.low), abs=0.01)
    assert gain(Scored(1.0), Scored(0.5), True).within_noise
