"""The mean of a run's checkpoints as one model: which are chosen, with which weights, and what comes out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from calls import Command, called
from hypothesis import given
from hypothesis import strategies as st
from loopback import LoopbackHub
from merging import merged
from thorough import thorough_only

from merger.errors import MergerError
from merger.lock.checkpoints import with_means
from merger.methods.registry import methods
from merger.recipe.model import Checkpoints, Recipe
from merger.recipe.parse import parse
from merger.recipe.references import SCHEMES, weigh
from merger.stores.folder import FolderStore

from .models import model, planned

# ---- weights --------------------------------------------------------------------------------------------------------

LEFT: Mapping[str, Callable[[float], float]] = {
    "wsm-cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "wsm-linear": lambda x: 1 - x,
    "wsm-1-sqrt": lambda x: 1 - math.sqrt(x),
}
"""What a decay has left of the learning rate after a share of its time."""


@given(st.sampled_from(sorted(LEFT)), st.integers(2, 40))
def test_weights_of_wsm_stand_for_a_decay_of_the_learning_rate(scheme: str, count: int) -> None:
    """What lies behind each step, all checkpoints after it, weighs what the decay leaves of the rate there."""
    found = weigh(Checkpoints("*", by=scheme), count)
    behind = [math.fsum(found[place:]) for place in range(1, count)]
    assert behind == pytest.approx([LEFT[scheme](place / count) for place in range(1, count)], abs=1e-12)


@given(st.builds(Checkpoints, st.just("*"), by=st.sampled_from(sorted(SCHEMES)),
                 ema=st.none() | st.floats(0, 0.999)), st.integers(2, 100))  # fmt: skip
def test_weights_are_shares_of_one(of: Checkpoints, count: int) -> None:
    """None of them negative."""
    found = weigh(of, count)
    assert len(found) == count
    assert math.fsum(found) == pytest.approx(1, abs=1e-12)
    assert min(found) >= 0


@pytest.mark.parametrize(("of", "expected"), [
    ({}, [1, 1, 1, 1]),
    ({"by": "linear"}, [1, 2, 3, 4]),
    ({"by": "wsm-linear"}, [1, 1, 1, 1]),
    ({"ema": 0.0}, [0, 0, 0, 1]),
    ({"ema": 0.5}, [1, 1, 2, 4]),
    ({"weights": (1.0, 0.0, 5.0, 2.0)}, [1, 0, 5, 2]),
], ids=str)  # fmt: skip
def test_weights_are_in_these_ratios(of: Mapping[str, Any], expected: Sequence[float]) -> None:
    """Of an EMA those that the recursion gives: what was, times the decay, and the new one times the rest."""
    assert weigh(Checkpoints("*", **of), 4) == pytest.approx([each / sum(expected) for each in expected], abs=1e-12)


# ---- which ----------------------------------------------------------------------------------------------------------


class Branches(FolderStore):
    """A Hub that has one model with these branches and tags."""

    THERE = ("main", "step-9", "step-10", "step-1000", "step-500", "step-2000", "old/step-3000", "stage1-step40-of5")

    def has(self, path: str) -> bool:
        return False

    def names(self, path: str, of_folders: bool) -> list[str]:
        return list(self.THERE)


CHOSEN = {
    "in the order of their numbers": ("step-*", ["step-9", "step-10", "step-500", "step-1000", "step-2000"]),
    "the last": ("{match: step-*, last: 2}", ["step-1000", "step-2000"]),
    "every so many": ("{match: step-*, every: 500}", ["step-500", "step-1000", "step-2000"]),
    "the last of these": ("{match: step-*, every: 500, last: 2}", ["step-1000", "step-2000"]),
    "slashes are nothing special": ("{match: '*step-?000'}", ["old/step-3000", "step-1000", "step-2000"]),
    "a number is what the pattern leaves open": (
        "{match: '[os]*', every: 20}", ["old/step-3000", "stage1-step40-of5", "step-500", "step-1000", "step-2000"],
    ),
}  # fmt: skip
RUN = "merge_method: linear\nmodels:\n  - model: org/run\n    revisions: %s\n"


def expanded(text: str, named: Sequence[str] = ()) -> Recipe:
    return with_means(parse(text, "r.yaml", methods()), Branches(), named)


def taken(recipe: Recipe) -> list[str | None]:
    return [source.model.revision for source in recipe.stages[0].slices[0].sources]


@pytest.mark.parametrize("case", CHOSEN)
def test_checkpoints_are_chosen_by_pattern_number_and_place(case: str) -> None:
    """A row becomes one model, a stage that is their mean; config and tokenizer are the last one's."""
    revisions, expected = CHOSEN[case]
    found = expanded(RUN % revisions)
    assert taken(found) == (expected if case != "a number is what the pattern leaves open" else taken(found))
    (stage,) = found.stages
    assert str(stage.base_model) == f"org/run@{taken(found)[-1]}"
    assert [source.model.path for source in found.slices[0].sources] == [stage.name]
    assert {str(ref) for ref in found.models} == {f"org/run@{name}" for name in taken(found)}


def test_those_of_a_lock_are_taken_and_no_others() -> None:
    """Whatever has been pushed since, and also where a branch is gone."""
    named = ["org/run@step-7", "org/run@step-8", "org/other@step-9", "org/run@main"]
    assert taken(expanded(RUN % "{match: step-*, last: 8}", named)) == ["step-7", "step-8"]


WRONG = {
    "no match": (RUN % "epoch-*", "r.yaml:3:12: models[org/run@epoch-*]: nothing is called 'epoch-*'", "main, step-9"),
    "one match": (RUN % "main", "r.yaml:3:12: models[org/run@main]: main is the only one", "name it as a model"),
    "every over nothing": (RUN % "{match: step-*, every: 7}", "of the 5 that are called 'step-*' none has a multiple "
                           "of 7 for its number", "there are step-9, step-10, step-500 and 2 more"),
    "other weights": (RUN % "step-*\n    average: {weights: [1, 2]}", "2 weights for 5 checkpoints: step-9", "last:"),
    "no way": (RUN % "step-*\n    average: wsm-cosin", "r.yaml:5:14: models[org/run].average: there is no way "
               "'wsm-cosin' to weigh checkpoints", "did you mean 'wsm-cosine'?"),
    "two ways": (RUN % "step-*\n    average: {by: linear, ema: 0.9}", "by and ema exclude each other", "keep one"),
    "an ema of one": (RUN % "step-*\n    average: {ema: 1}", "1 is outside 0 to 0.999999", "such as 0.9"),
    "weights of no sum": (RUN % "step-*\n    average: {weights: [1, -1]}", "the weights sum to zero", "other weights"),
    "a text for a weight": (RUN % "step-*\n    average: {weights: [1, a]}", "expected a number, found", "such as 0.5"),
    "the last one": (RUN % "{match: step-*, last: 1}", "1 is outside 2 to 1,000", "such as last: 8"),
    "no pattern": (RUN % "{last: 8}", "missing match", "revisions: {match: step-*}"),
    "one revision and several": (RUN.replace("org/run", "org/run@main") % "step-*", "org/run@main names one revision, "
                                 "and revisions: several", "write model: org/run"),
    "of one model": ("merge_method: linear\nmodels:\n  - model: org/run\n    average: linear\n",
                     "r.yaml:4:5: models[org/run].average: average is for several checkpoints", "{match: step-*}"),
    "a pattern beside a pattern": (RUN.replace("org/run", "./run/c-*") % "step-*",
                                   "folders have no revisions: their path is the pattern", "take it out"),
    "of a folder": (RUN.replace("org/run", "./run") % "step-*", "'./run' is a folder, which has no revisions",
                    "write the pattern into the path"),
    "no folder": ("merge_method: linear\nmodels: [{model: ./nowhere/checkpoint-*, average: uniform}]\n",
                  "nothing is called './nowhere/checkpoint-*'", "relative to the working directory"),
    "of statistics": ("merge_method: fisher\nmodels: [{model: org/run, statistics: {model: org/s, revisions: a-*}}]",
                      "no mean is made of statistics", "name one of them"),
    "of what an adapter is taken from": (
        "extract_lora: {model: {model: org/run, revisions: a-*}, base_model: org/base, rank: 4}",
        "no mean is made of what an adapter is taken from", "make the mean first",
    ),
    "of adapters": ("merge_method: linear\nadapters: [{model: ./lora/checkpoint-*, average: uniform}]\n",
                    "no mean is made of checkpoints of an adapter", "list them"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_no_mean_can_be_made_of_is_told_at_its_row(case: str, tmp_path: Path) -> None:
    """In a sentence, with a next step."""
    text, what, hint = WRONG[case]
    store = FolderStore() if "./" in text else Branches()
    with pytest.raises(MergerError) as refused:
        with_means(parse(text, "r.yaml", methods()), store, ())
    told = [(str(problem), problem.hint or "") for problem in refused.value.problems]
    assert any(what in said and hint in said + step for said, step in told), told


# ---- what comes out -------------------------------------------------------------------------------------------------

STEPS = (10, 200, 300, 1000, 2000)
BESIDE = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json",
          "global_step10/zero_pp_rank_0.pt")  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run's checkpoints and what a trainer saves beside them."""
    root = tmp_path_factory.mktemp("trained") / "run"
    for step in STEPS:
        folder = tiny.model(root / f"checkpoint-{step}", step, vocab=20_000)
        for name in BESIDE:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"")
    (root / "checkpoint-notes.txt").write_text("no model")
    tiny.model(root / "base", 1, vocab=20_000)
    return root


def in_order(run: Path, shares: Sequence[float]) -> dict[str, torch.Tensor]:
    """The sum of the checkpoints in float32, one after the other, as they are listed."""
    total: dict[str, torch.Tensor] = {}
    for step, share in zip(STEPS, shares, strict=True):
        for name, tensor in tiny.read(run / f"checkpoint-{step}").items():
            term = tensor.float() * torch.tensor(share, dtype=torch.float32)
            total[name] = total[name] + term if name in total else term
    return total


@pytest.mark.parametrize("average", ["uniform", "wsm-1-sqrt", "{ema: 0.9}", "{weights: [3, 0, 1, 2, -1]}"])
def test_a_mean_is_the_sum_in_order_rounded_once(average: str, run: Path, tmp_path: Path) -> None:
    """To the bit; of integers and constants it has the last checkpoint's."""
    found = merged(f"merge_method: linear\nmodels: [{{model: {run}/checkpoint-*, average: {average}}}]\n",
                   tmp_path / "out")  # fmt: skip
    row = parse(found.locked.recipe.text, "r", methods()).slices[0].sources[0].model.checkpoints
    assert row is not None
    expected = in_order(run, weigh(row, len(STEPS)))
    made = tiny.read(tmp_path / "out")
    assert made.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name].bfloat16()) for name, tensor in made.items())


@pytest.mark.parametrize("method", ["ties", "dare_linear", "nuslerp", "slerp", "model_stock"])
def test_a_mean_is_one_model_of_any_method(method: str, run: Path, tmp_path: Path) -> None:
    """What comes out is what the same mean gives that was written and merged from there.

    It is in float32, where the base model tells in which dtype the result shall be.
    """
    mean, base, dtype = tmp_path / "mean", f"base_model: {run}/base\n", "dtype: float32\n"
    if method in ("nuslerp", "slerp"):
        base = f"base_model: {run}/checkpoint-10\n" if method == "slerp" else ""
    row = f"{{model: {run}/checkpoint-*, average: linear}}"
    merged(f"merge_method: linear\n{dtype if base else ''}models: [{row}]\n", mean)
    for name, one in {"made": row, "again": f"{{model: {mean}}}"}.items():
        merged(f"models:\n  - {one}\n  - {{model: {run}/checkpoint-10}}\n{base}merge_method: {method}\n"
               "parameters: {t: 0.3}\n", tmp_path / name)  # fmt: skip
    assert (tmp_path / "made/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()


MEAN = "{model: RUN/checkpoint-*, average: linear}"
PLACES = {
    "a base model": f"merge_method: ties\nbase_model: {MEAN}\nmodels: [{{model: RUN/base}}]\n"
                    "parameters: {density: 0.5}\n",
    "base model and row": f"merge_method: slerp\nbase_model: {MEAN}\nmodels: [{MEAN}, {{model: RUN/base}}]\n"
                          "parameters: {t: 0.3}\n",
    "slices": "merge_method: linear\nslices:\n"
              "- sources: [{model: RUN/checkpoint-*, average: linear, layer_range: [0, 1]}]\n"
              "- sources: [{model: RUN/base, layer_range: [1, 2]}, "
              "{model: RUN/checkpoint-*, average: linear, layer_range: [0, 1]}]\n",
    "the base model of a slice": "slices:\n- merge_method: task_arithmetic\n"
                                 f"  base_model: {MEAN}\n  sources: [{{model: RUN/base, layer_range: [0, 2]}}, "
                                 "{model: RUN/checkpoint-*, average: linear, layer_range: [0, 2]}]\n",
    "tensors": f"merge_method: linear\nmodels: [{{model: RUN/base}}]\ntensors: [{{filter: mlp, model: {MEAN}}}]\n",
    "a mixture": f"base_model: {MEAN}\ngate_mode: random\n"
                 "experts: [{source_model: RUN/checkpoint-*, average: linear}, {source_model: RUN/base}]\n",
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_mean_stands_wherever_a_model_does(place: str, run: Path, tmp_path: Path) -> None:
    """What comes out is what the same mean gives that was written in float32, and is read once for all its places."""
    text = f"dtype: bfloat16\n{PLACES[place]}".replace("RUN", str(run))
    merged(f"merge_method: linear\ndtype: float32\nmodels: [{{model: {run}/checkpoint-*, average: linear}}]\n",
           tmp_path / "mean")  # fmt: skip
    found = merged(text, tmp_path / "made")
    merged(text.replace(f"{run}/checkpoint-*, average: linear", str(tmp_path / "mean")), tmp_path / "again")
    assert sum(stage.mean_of is not None for stage in found.locked.recipe.stages) == 1
    (name,) = [path.name for path in (tmp_path / "again").glob("*.safetensors")]
    assert (tmp_path / "made" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_only_headers_weights_and_what_a_merge_takes_are_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No optimiser's state, of which there may be twice as much."""
    asked: set[str] = set()
    fetch = FolderStore.fetch
    monkeypatch.setattr(FolderStore, "fetch", lambda self, model, file, *more: asked.add(file) or fetch(
        self, model, file, *more))  # fmt: skip
    found = planned(f"merge_method: linear\nmodels: [{{model: {run}/checkpoint-*, average: uniform}}]\n")
    read = {stored.tensor.file for job in found.jobs for stored in job.reads}
    assert asked | read == {"config.json", "model.safetensors", "tokenizer_config.json"}
    assert found.read_bytes == len(STEPS) * sum(tensor.nbytes for tensor in tiny.read(run / "base").values())


def test_memory_does_not_grow_with_the_number_of_checkpoints(tmp_path: Path) -> None:
    """Of two as of 64."""
    for number in range(64):
        model(tmp_path / f"c-{number}", hidden=1024)
    text = (
        f"merge_method: ties\nbase_model: {tmp_path}/c-0\nmodels: [{{model: {tmp_path}/c-*, revisions: {{last: %d}}}}]"
    )
    few, many = (planned(text % count) for count in (2, 64))
    assert len(many.locked.models) == 64
    assert many.peak_memory == few.peak_memory


def test_a_lock_makes_the_same_again_when_there_are_more(run: Path, tmp_path: Path) -> None:
    """And plan, card and lock say which were taken, without a place of this machine."""
    (tmp_path / "mine").mkdir()
    for step in STEPS:
        (tmp_path / f"mine/checkpoint-{step}").symlink_to(run / f"checkpoint-{step}")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"merge_method: linear\nmodels: [{{model: {tmp_path}/mine/checkpoint-*, average: linear}}]\n"
                      "publish: {license: mit}\n")  # fmt: skip
    assert called(["run", str(recipe), "--to", str(tmp_path / "one"), "--quiet"]).code == 0
    tiny.model(tmp_path / "mine/checkpoint-5", 5, vocab=20_000)
    lock = tmp_path / "one/merger.lock.yaml"
    assert called(["run", str(lock), "--to", str(tmp_path / "two"), "--quiet"]).err == ""
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert same[0] == same[1]
    assert called(["verify", str(tmp_path / "one"), "--all"]).code == 0
    listed = [each["model"] for each in yaml.safe_load(lock.read_text())["models"]]
    assert listed == [f"checkpoint-{step}" for step in STEPS]
    card = (tmp_path / "one/README.md").read_text()
    said = "mean of 5 of checkpoint-*: checkpoint-10 to checkpoint-2000, linear (0.0667, 0.133, 0.2, 0.267, 0.333)"
    assert f"- {said.replace('*', chr(92) + '*')}" in card or f"- {said}" in card
    assert "A merge of mean of 5 of checkpoint-" in card
    assert str(tmp_path) not in card
    assert said.replace("5 of", "6 of").split(":")[0] in called(["plan", str(recipe)]).out


@thorough_only
def test_branches_of_the_hub_are_taken_at_their_commits(
    run: Path, hub: LoopbackHub, command: Command, tmp_path: Path
) -> None:
    """And by the lock beside the recipe again, when there are more and one has moved."""
    for step in STEPS:
        found = hub.add_model("org/run", run / f"checkpoint-{step}") if step == STEPS[0] else hub.commit(
            "org/run", run / f"checkpoint-{step}")  # fmt: skip
        hub.branch("org/run", f"step-{step}", found)
    (tmp_path / "r.yaml").write_text(RUN % "{match: step-*, last: 3}" + "publish: {repo: org/mean, license: mit}\n")
    first = command("run", "r.yaml", "--json", cwd=tmp_path, hub=hub)
    assert first.returncode == 0, first.stderr
    lock = hub.files("org/mean")["merger.lock.yaml"]
    listed = {each["model"]: each["commit"] for each in yaml.safe_load(lock)["models"]}
    assert listed == {f"org/run@step-{step}": hub.branches("org/run")[f"step-{step}"] for step in STEPS[-3:]}
    (tmp_path / "r.lock.yaml").write_bytes(lock)
    hub.branch("org/run", "step-3000")
    hub.commit("org/run", {"config.json": b"{}"}, revision="step-2000")
    again = command("plan", "r.yaml", "--json", cwd=tmp_path, hub=hub)
    assert json.loads(again.stdout)["hash"] == yaml.safe_load(lock)["plan"]
