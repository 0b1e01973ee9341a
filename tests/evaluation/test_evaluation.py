"""A result is measured before it is published: by perplexity, by tasks, beside its parents; and never lost for it."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import yaml
from calls import Command
from hypothesis import given
from hypothesis import strategies as st
from loopback import LoopbackHub
from places import ZOO
from thorough import thorough_only
from torch import Tensor

from merger.card.facts import score_facts
from merger.card.metadata import front_matter
from merger.cli.commands import main
from merger.errors import BudgetError, RecipeError
from merger.evaluation import evaluate as evaluation
from merger.evaluation import process as evaluate
from merger.evaluation.budget import Score, evaluation_memory, read_scores, scores_text
from merger.evaluation.process import _explain_end
from merger.evaluation.scoring import loss
from merger.run.options import Options, Part, needed_disk
from merger.run.pipeline import merge
from merger.run.prepare import plan, read_recipe

LOOKS = """\
import os, pathlib
seen = pathlib.Path(__file__).with_name(f"{os.getpid()}.environ")
seen.write_bytes(pathlib.Path("/proc/self/environ").read_bytes())
"""
"""Every Python that is started with this on its path notes the environment that it was given."""

LINEAR = "merge_method: linear\nmodels: [{{model: {0}}}, {{model: {1}}}]\nparameters: {{weight: 0.5}}\n"
LINES = "And the LORD said unto Moses, Go in unto Pharaoh.\n" * 8


# ---- perplexity -----------------------------------------------------------------------------------------------------


class Bigram:
    """A model that looks at one token alone: how far its window reaches back makes no difference."""

    device = torch.device("cpu")

    def __init__(self, table: Tensor) -> None:
        self.table, self.longest = table, 0

    def __call__(self, input_ids: Tensor) -> SimpleNamespace:
        self.longest = max(self.longest, input_ids.shape[1])
        return SimpleNamespace(logits=self.table[input_ids])


@given(st.integers(0, 60), st.integers(2, 20), st.data())
def test_each_token_counts_once(count: int, window: int, data: st.DataObject) -> None:
    """Whatever the window and its stride, all tokens but the first are predicted, each once, from the one before it."""
    stride = data.draw(st.integers(1, window - 1))
    draw = torch.Generator().manual_seed(count)
    model = Bigram(torch.randn(7, 7, generator=draw))
    tokens = torch.randint(7, (count,), generator=draw)
    nats, counted = loss(model, tokens, window, stride)
    expected = -torch.log_softmax(model.table, 1).double()[tokens[:-1], tokens[1:]].sum()
    assert counted == max(0, count - 1)
    assert nats == pytest.approx(float(expected), abs=1e-4)
    assert model.longest <= window


def recipe(folder: Path, block: str, parents: tuple[object, object] = (ZOO / "kjv", ZOO / "python")) -> Path:
    """A merge of two models with this `evaluate:` block, and a text to measure it by."""
    (folder / "lines.txt").write_text(LINES)
    (folder / "mine.yaml").write_text(LINEAR.format(*parents) + f"evaluate: {block}\n")
    return folder / "mine.yaml"


def test_perplexity_is_that_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the merge as it lies in its folder afterwards, on the text's beginning, in one window."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    mine = recipe(tmp_path, "{perplexity: {text: lines.txt, limit: 200}}")
    options = Options(to=str(tmp_path / "out"), threads=1)
    merge(*plan(read_recipe(mine), options), options)
    scores = read_scores((tmp_path / "out/merger.evaluation.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")(LINES[:200], return_tensors="pt").input_ids
    with torch.inference_mode():
        nats = float(model(input_ids=tokens, labels=tokens).loss)
    assert [(score.model, score.task, score.metric) for score in scores] == [
        (None, "lines.txt", "perplexity"), (None, "lines.txt", "bits per byte"),
    ]  # fmt: skip
    assert scores[0].value == pytest.approx(math.exp(nats), rel=1e-4)
    assert scores[1].value == pytest.approx(nats * (tokens.shape[1] - 1) / math.log(2) / 200, rel=1e-4)
    card = (tmp_path / "out/README.md").read_text()
    assert f"| lines.txt: perplexity (lower is better) | {scores[0].value:.4g} |" in card
    assert yaml.safe_load(card.split("---\n")[1])["model-index"][0]["results"][0]["metrics"][0] == {
        "type": "perplexity", "value": scores[0].value, "name": "perplexity",
    }  # fmt: skip


@thorough_only
@pytest.mark.parametrize("chat", ["", "chat_template: chatml\n"])
def test_the_example_of_a_card_runs(chat: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Word for word, for a model that goes on from words, and for one with a chat template; it says something."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(LINEAR.format(ZOO / "kjv", ZOO / "python") + chat)
    options = Options(to="./out", threads=1)
    merge(*plan(read_recipe(Path("mine.yaml")), options), options)
    example = (tmp_path / "out/README.md").read_text().split("```python\n")[1].split("```")[0]
    assert ("apply_chat_template" in example) == bool(chat)
    said = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=True).stdout
    assert said.strip()


# ---- over the Hub ---------------------------------------------------------------------------------------------------


@thorough_only
def test_merge_and_parents_on_the_hub(served: LoopbackHub, command: Command, tmp_path: Path) -> None:
    """The merge comes back from the staging branch, the parents from their commits, the text from a data set."""
    for name in ("kjv", "python"):
        served.add_model(f"zoo/{name}", ZOO / name)
    served.add_model("datasets/org/words", {"some/lines.txt": LINES.encode()})
    text = "{text: hf://datasets/org/words/some/lines.txt, limit: 300}"
    mine = recipe(tmp_path, f"{{perplexity: {text}, parents: true}}", ("zoo/kjv", "zoo/python"))
    (tmp_path / "seen").mkdir()
    (tmp_path / "seen" / "sitecustomize.py").write_text(LOOKS)
    line = ("run", mine.name, "--to", "hf://org/tried", "--shard-size", "1MB")
    done = command(*line, cwd=tmp_path, hub=served, env={"PYTHONPATH": str(tmp_path / "seen")})
    assert done.returncode == 0, done.stderr
    children = [path.read_bytes() for path in (tmp_path / "seen").glob("*.environ")]
    assert len(children) == 3
    assert not [one for one in children if b"hf_writer_of_org" in one or b"HF_ENDPOINT" not in one]
    assert "measuring the merge" in done.stderr
    card = served.read("org/tried", "README.md").decode()
    assert "| measured | this model | zoo/kjv | zoo/python |" in card
    scores = read_scores(served.read("org/tried", "merger.evaluation.json").decode())
    values = {score.model: score.value for score in scores if score.metric == "perplexity"}
    assert values["zoo/kjv"] < values[None] < values["zoo/python"]
    assert [score.task for score in scores[:1]] == ["org/words/some/lines.txt"]
    again = command("card", "org/tried", cwd=tmp_path, hub=served)
    assert again.returncode == 0, again.stderr
    assert served.read("org/tried", "README.md").decode() == card
    assert command("verify", "hf://org/tried", cwd=tmp_path, hub=served).returncode == 0


@pytest.mark.parametrize(
    ("tasks", "given"),
    [((), {}), (("arc_easy",), {"HF_TOKEN": "hf_writer"}), (("arc_easy", "mine.yaml"), {}), (("./mine.yml",), {})],
)
def test_a_token_goes_along_for_known_tasks_alone(
    tasks: tuple[str, ...], given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their data may be gated; a task's own file may bring code, and texts need none."""
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    assert evaluate._tokens(tasks) == given


# ---- what goes wrong ------------------------------------------------------------------------------------------------


@thorough_only
def test_what_cannot_be_measured_is_not_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model without a tokenizer: exit code 9, finished files wait, and without evaluate they are published."""
    parents = tiny.model(tmp_path / "one", 1), tiny.model(tmp_path / "two", 2)
    mine = recipe(tmp_path, f"{{perplexity: {{text: {tmp_path}/lines.txt}}}}", parents)
    line = ["run", str(mine), "--to", str(tmp_path / "out"), "--shard-size", "3kB"]
    assert main(line) == 9
    score_facts = capsys.readouterr().err
    assert re.search(r"evaluate: the merge cannot be measured: \w+: ", score_facts)
    assert "the merge is made and waits" in score_facts
    assert not (tmp_path / "out").exists()
    mine.write_text(mine.read_text().split("evaluate")[0])
    assert main(line) == 0
    score_facts = capsys.readouterr().err
    made = len(list((tmp_path / "out").glob("*.safetensors")))
    assert made > 2
    assert f"{made} of {made} files are there from an earlier run" in score_facts


def test_missing_texts_and_tasks_are_told_by_plan(tmp_path: Path) -> None:
    """All of them, at their places."""
    mine = recipe(tmp_path, "\n  perplexity: [{text: none.txt}, {text: lines.txt}]\n  tasks: [mine/none.yaml]")
    with pytest.raises(RecipeError) as refused:
        plan(read_recipe(mine), Options())
    assert [str(problem) for problem in refused.value.problems] == [
        f"{mine}:4:1: evaluate.tasks: 'mine/none.yaml' is not there\n    paths are relative to the working directory",
        f"{mine}:5:23: evaluate.perplexity: 'none.txt' is not there\n    paths are relative to the working directory",
        f"{mine}:5:41: evaluate.perplexity: 'lines.txt' is not there\n    paths are relative to the working directory",
    ]


def test_a_text_that_is_none(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 are refused before a tensor is read."""
    mine = recipe(tmp_path, f"{{perplexity: {{text: {tmp_path}/lines.txt}}}}")
    (tmp_path / "lines.txt").write_bytes(b"\xff\xfe")
    options = Options(to=str(tmp_path / "out"))
    with pytest.raises(RecipeError, match="is not UTF-8 text"):
        merge(*plan(read_recipe(mine), options), options)


def test_a_result_too_large_to_be_measured_is_refused_by_plan(tmp_path: Path) -> None:
    """Its memory is planned: half of a model's for bfloat16, more for tasks; a part measures nothing."""
    block = f"{{perplexity: {{text: {tmp_path}/lines.txt}}, dtype: %s}}"
    mine = recipe(tmp_path, block % "float32")
    planned, _ = plan(read_recipe(mine), Options())
    needed = evaluation_memory(planned)
    with pytest.raises(BudgetError, match="measuring the result needs about") as refused:
        plan(read_recipe(mine), Options(max_memory=needed - 1))
    assert "write dtype: bfloat16" in str(refused.value)
    plan(read_recipe(mine), Options(max_memory=needed))
    smaller, _ = plan(read_recipe(recipe(tmp_path, block % "bfloat16")), Options())
    assert needed - evaluation_memory(smaller) == 2 * planned.entries


def test_copies_take_disk(tmp_path: Path) -> None:
    """On the way to the Hub the merge comes back to be measured: so much disk it takes at once, at least."""
    mine = recipe(tmp_path, f"{{perplexity: {{text: {tmp_path}/lines.txt}}}}")
    planned, _ = plan(read_recipe(mine), Options())
    assert (evaluation.disk(planned, staged=True), evaluation.disk(planned, staged=False)) == (planned.size, 0)
    small = Options(to="hf://org/x", stream=True)
    assert needed_disk(planned, small, planned.shards) == planned.size
    assert needed_disk(planned, replace(small, part=Part(1, 2)), planned.shards) == 0


def test_a_text_that_the_hub_does_not_have(served: LoopbackHub, command: Command, tmp_path: Path) -> None:
    """It is told at its place before a tensor is read."""
    served.add_model("org/text", {"a.txt": b"a"})
    mine = recipe(tmp_path, "{perplexity: {text: hf://org/text/b.txt}}")
    done = command("run", mine.name, "--to", "out", "--quiet", cwd=tmp_path, hub=served)
    assert done.returncode == 3
    assert "mine.yaml:4:31: evaluate.perplexity: org/text has no file b.txt" in done.stderr


def test_a_process_that_the_system_killed() -> None:
    """It is told what is most likely, and what to do."""
    assert "lack of memory" in str(_explain_end(-9, ""))
    assert "(last words)" in str(_explain_end(1, "last words"))


# ---- tasks ----------------------------------------------------------------------------------------------------------


@thorough_only
def test_tasks_of_ones_own_by_the_real_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task's YAML file beside the recipe: accuracy with its error, on as many examples as the recipe allows."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    examples = [{"q": "And the LORD", "a": [" said unto", " import os"], "right": 0}] * 3
    examples.append({"q": "And the LORD", "a": [" said unto", " import os"], "right": 1})
    (tmp_path / "verses.jsonl").write_text("\n".join(map(json.dumps, [*examples, examples[0]])))
    task = {
        "task": "verses", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "verses.jsonl"}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{a}}",
        "doc_to_target": "{{right}}", "metric_list": [{"metric": "acc"}], "metadata": {"version": 2},
    }  # fmt: skip
    (tmp_path / "verses.yaml").write_text(yaml.safe_dump(task))
    options = Options(to=str(tmp_path / "out"), threads=1)
    merge(*plan(read_recipe(recipe(tmp_path, "{tasks: [verses.yaml], limit: 4}")), options), options)
    (score,) = read_scores((tmp_path / "out/merger.evaluation.json").read_text())
    assert (score.task, score.metric, score.value, score.higher) == ("verses", "acc", 0.75, True)
    assert score.error == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert score.detail.startswith("4 examples, 0 shots, version 2")
    assert "| verses: acc (higher is better) | 0.750 ± 0.250 |" in (tmp_path / "out/README.md").read_text()


# ---- the card -------------------------------------------------------------------------------------------------------


def score(model: str | None, task: str, metric: str, value: float, **other: Any) -> Score:
    """A score with what does not matter filled in."""
    return Score(**{"model": model, "task": task, "metric": metric, "value": value, "error": None, "higher": False,
                    "detail": "some", "dataset": "org/set", **other})  # fmt: skip


def test_scores_are_kept_as_they_are() -> None:
    """What lies beside a card gives the very same numbers back."""
    scores = (score(None, "a", "b", 0.1 + 0.2), score("org/x", "a", "b", 1e-30, error=0.5))
    assert read_scores(scores_text(scores)) == scores


def test_a_table_of_scores() -> None:
    """A column for each model, a row for each number; a gap is a word; notes say whose they are where they differ."""
    scores = [
        score(None, "text", "perplexity", 12.3456), score("org/x", "text", "perplexity", 99.0, detail="other"),
        score(None, "task", "acc", 0.5, error=0.01, higher=True),
    ]  # fmt: skip
    found = score_facts(scores, "me/merge")["evaluation"]
    assert found["columns"] == ["measured", "this model", "org/x"]
    assert found["rows"] == [
        ["text: perplexity (lower is better)", "12.35", "99"],
        ["task: acc (higher is better)", "0.500 ± 0.010", "none"],
    ]
    assert found["note"].endswith(": text of this model: some; text of org/x: other; task: some.")
    assert score_facts([], "me/merge") == {}


def test_the_hubs_client_reads_the_model_index() -> None:
    """As results of the merge alone."""
    from huggingface_hub import ModelCard

    scores = [score(None, "text", "perplexity", 12.5), score("org/x", "text", "perplexity", 9.0)]
    card = ModelCard(front_matter(score_facts(scores, "me/merge")["metadata"]))
    (result,) = card.data.eval_results
    assert (card.data.model_name, result.metric_type, result.metric_value) == ("merge", "perplexity", 12.5)
    assert (result.task_type, result.dataset_type, result.dataset_name) == ("text-generation", "org/set", "text")


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (["/home/me/a.txt"], ["a.txt"]),
        (["x/kjv/a.txt", "x/python/a.txt", "b.txt"], ["kjv/a.txt", "python/a.txt", "b.txt"]),
        (["hf://datasets/o/n@v1/d/a.txt", "a.txt"], ["o/n/d/a.txt", "a.txt"]),
        (["a.txt", "a.txt"], ["a.txt", "a.txt"]),
    ],
)
def test_texts_are_named_by_little_of_their_path(texts: list[str], names: list[str]) -> None:
    """As little as tells them apart: no place on a disk."""
    assert evaluation._names(texts) == (names if len(set(texts)) == len(texts) else texts)


def test_of_a_model_with_an_adapter_neither_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter is no parent that computes, and the model's own files are those without it."""
    monkeypatch.chdir(tmp_path)
    tiny.lora(tmp_path / "lora", tiny.model(tmp_path / "base"), rank=2)
    mine = recipe(tmp_path, "{perplexity: {text: lines.txt}, parents: true}", ("./base+./lora", "./base"))
    measured: list[str | None] = []
    monkeypatch.setattr(evaluation, "_score", lambda folder, model, *_: measured.append(model) or ())
    options = Options(to=str(tmp_path / "out"), threads=1)
    merge(*plan(read_recipe(mine), options), options)
    assert measured == [None, "base"]
