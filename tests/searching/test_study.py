"""What a study tries, what it counts and when it ends; a function of the numbers stands in for merging and scoring."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial
from thorough import THOROUGH

from merger.errors import EvaluationError, Problem
from merger.methods.registry import methods
from merger.recipe.parse import parse
from merger.recipe.searched import Searched, Values
from merger.searching.objectives import Scored, Step
from merger.searching.study import Worker, open_storage
from merger.searching.trials import Aims, Pruned, Trial

RECIPE = """
merge_method: {search: [linear, task_arithmetic]}
base_model: ./base
models:
  - {model: ./a, parameters: {weight: {search: [0, 1], start: 0.1}}}
  - {model: ./b, parameters: {weight: {search: [0.01, 1], log: true}}}
search:
  objectives: [{loss: ./search.txt}]
  report: [{loss: ./report.txt}]
"""
A, B = "models[a].weight", "models[b].weight"


def searched(objectives: str = "{loss: ./search.txt}", **changes: object) -> Searched:
    """The search of a method and two numbers."""
    found = parse(RECIPE.replace("{loss: ./search.txt}", objectives, 1), "r.yaml", methods()).search
    assert found is not None
    return replace(found, **{"trials": 12, "prune": None, **changes})


def hill(values: Values, step: Step | None = None) -> list[float]:
    """The lowest loss is at 0.7 and 0.2, by task_arithmetic."""
    worse = 0.1 if values["merge_method"] == "linear" else 0.0
    return [(float(values[A]) - 0.7) ** 2 + (float(values[B]) - 0.2) ** 2 + worse]


def run(
    wanted: Searched,
    judge: Callable[[Values, Step | None], Sequence[float]] = hill,
    higher: Sequence[bool] = (False,),
    storage: Path | str | None = None,
    minutes: float | None = None,
    base: Sequence[float] = (),
) -> tuple[Worker, str]:
    """A study that one worker brings to its end, and why it ended."""
    work = Worker(Aims(wanted, higher, base), "study", None if storage is None else str(storage))
    return work, work.run(judge, lambda trial: None, minutes)


def numbers(work: Worker) -> list[tuple[object, ...]]:
    """What was drawn, and what came of it."""
    return [(trial.state, *trial.drawn.values(), *trial.scores) for trial in work.trials()]


SAMPLERS = ("tpe", "cmaes", "nsga2", "random", "grid")


@pytest.mark.parametrize("sampler", SAMPLERS if THOROUGH else ("tpe", "grid"))
def test_numbers_get_better(sampler: str) -> None:
    """Each sampler begins with what the recipe starts with, keeps to the ranges, and finds something better."""
    work, why = run(searched(sampler=sampler, trials=33))
    trials = work.trials()
    assert (len(trials), why) == (33, "33 trials are done")
    assert trials[0].drawn == {"merge_method": "linear", A: 0.1, B: 0.1}
    assert work.best()[0].scores < trials[0].scores
    assert all(0 <= float(trial.drawn[A]) <= 1 and 0.01 <= float(trial.drawn[B]) <= 1 for trial in trials)
    assert [trial.number for trial in trials] == list(range(33))


def test_a_grid_ends() -> None:
    """All of it is tried once, beside the start."""
    work, why = run(searched(sampler="grid", trials=10))
    assert why == "all of the grid is tried"
    assert len({tuple(trial.drawn.values()) for trial in work.trials()}) == 9


@pytest.mark.parametrize("sampler", SAMPLERS if THOROUGH else ("tpe",))
@pytest.mark.parametrize("killed", (2, 5, 14, 23, 31, 37, 48, 53, 61, 66) if THOROUGH else (48,))
def test_a_killed_search_goes_on_as_if_it_had_not_been(tmp_path: Path, sampler: str, killed: int) -> None:
    """Killed in any of its writes, half of which is there, it goes on with trials that are the same."""
    wanted, kept = searched(sampler=sampler), tmp_path / "study.log"
    process = multiprocessing.get_context("fork").Process(target=_run_and_die, args=(wanted, kept, killed))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not kept.read_bytes().endswith(b"\n")
    again, _ = run(wanted, storage=kept)
    assert numbers(again) == numbers(run(wanted)[0])


def _run_and_die(wanted: Searched, kept: Path, killed: int) -> None:
    """A worker that is killed in the middle of a write, the so manieth one."""
    count, write = itertools.count(1), JournalFileBackend.append_logs

    def append(backend: JournalFileBackend, logs: list[dict[str, Any]]) -> None:
        if next(count) == killed:
            line = json.dumps(logs[0]).encode()
            with kept.open("ab") as file:
                file.write(line[: len(line) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(backend, logs)

    with patch.object(JournalFileBackend, "append_logs", append):
        run(wanted, storage=kept)


def test_several_workers_share_a_study(tmp_path: Path) -> None:
    """Each tries a part of it, and no candidate is tried twice; one that dies loses none."""
    wanted, kept = searched(trials=16), tmp_path / "study.log"
    context = multiprocessing.get_context("fork")
    dying = context.Process(target=_run_and_die, args=(wanted, kept, 25))
    other = context.Process(target=run, args=(wanted, hill, (False,), kept))
    dying.start()
    dying.join()
    other.start()
    work, _ = run(wanted, storage=kept)
    other.join()
    trials = work.trials()
    assert [trial.state for trial in trials] == ["complete"] * len(trials)
    assert 16 <= len(trials) <= 17, "of two workers that see the last place at once both may take it"
    assert len({tuple(trial.drawn.values()) for trial in trials}) == len(trials)


@pytest.mark.parametrize("killed", range(1, 8) if THOROUGH else (4,))
def test_a_search_that_is_killed_as_it_buries_goes_on_the_same(tmp_path: Path, killed: int) -> None:
    """Killed again before it has told that what the first one had begun is to be tried, or after."""
    wanted, kept = searched(), tmp_path / "study.log"
    for writes in (31, killed):
        process = multiprocessing.get_context("fork").Process(target=_run_and_die, args=(wanted, kept, writes))
        process.start()
        process.join()
    assert numbers(run(wanted, storage=kept)[0]) == numbers(run(wanted)[0])


def test_no_two_workers_draw_the_same(tmp_path: Path) -> None:
    """One that asks while another is about to bury, and two that both find an empty study."""
    wanted, kept = searched(sampler="random", trials=6), tmp_path / "study.log"
    workers = [Worker(Aims(wanted, (False,)), "study", str(kept)) for _ in range(3)]
    asked = [worker._study.ask(worker._spaces) for worker in workers]
    assert asked[0].params == wanted.start
    lost = workers[0]._study.ask(workers[0]._spaces)
    lost.set_user_attr("worker", "a:1:dead")
    add = workers[1]._study.add_trial

    def add_late(trial: FrozenTrial) -> None:
        asked.append(workers[2]._study.ask(workers[2]._spaces))
        add(trial)

    with patch.object(workers[1]._study, "add_trial", add_late), patch.object(Worker, "_alive", lambda worker: alive):
        alive = {worker._me for worker in workers}
        workers[1]._bury()
    asked += [worker._study.ask(worker._spaces) for worker in workers]
    drawn = [tuple(trial.params.values()) for trial in asked]
    assert tuple(lost.params.values()) in drawn
    assert len(set(drawn)) == len(drawn)


def test_a_lost_candidate_is_not_tried_beyond_the_end(tmp_path: Path) -> None:
    """A worker that has begun to bury it does so when another one has brought the study to its end."""
    wanted, kept = searched(trials=16), tmp_path / "study.log"
    dying = multiprocessing.get_context("fork").Process(target=_run_and_die, args=(wanted, kept, 25))
    dying.start()
    dying.join()
    late = Worker(Aims(wanted, (False,)), "study", str(kept))
    add = late._study.add_trial

    def add_late(trial: FrozenTrial) -> None:
        run(wanted, storage=kept)
        add(trial)

    with patch.object(late._study, "add_trial", add_late):
        assert late.run(hill, lambda trial: None, None) == "16 trials are done"
    assert [trial.state for trial in late.trials()] == ["complete"] * 16


def test_a_line_that_was_not_written_to_its_end_is_cut(tmp_path: Path) -> None:
    """A study whose last line is torn is read as it was before."""
    kept = tmp_path / "study.log"
    before = numbers(run(searched(trials=3), storage=kept)[0])
    whole = kept.read_bytes()
    kept.write_bytes(whole + whole[-40:-20])
    after, _ = run(searched(trials=5), storage=kept)
    assert numbers(after)[:3] == before
    assert numbers(after) == numbers(run(searched(trials=5))[0])


@pytest.mark.parametrize("score", [float("nan"), float("inf"), EvaluationError(Problem("no memory"))])
def test_what_cannot_be_scored_is_a_failed_trial(score: float | EvaluationError) -> None:
    """It counts as one, with its reason, and is never the best."""

    def judge(values: Values, step: Step | None) -> list[float]:
        if values["merge_method"] == "linear":
            if isinstance(score, EvaluationError):
                raise score
            return [score]
        return hill(values)

    work, _ = run(searched(), judge)
    failed = [trial for trial in work.trials() if trial.state == "failed"]
    assert {trial.drawn["merge_method"] for trial in failed} == {"linear"}
    assert failed[0].why == ("no memory" if isinstance(score, EvaluationError) else f"the scores are {score}")
    assert len(work.trials()) == 12
    assert work.best()[0].drawn["merge_method"] == "task_arithmetic"


@pytest.mark.parametrize("prune", ["median", "halving", None])
def test_a_candidate_that_falls_behind_is_left(prune: str | None) -> None:
    """Once some others are known; nothing is left where the recipe says so."""

    def judge(values: Values, step: Step | None) -> list[float]:
        (score,) = hill(values)
        for batch in range(1, 17):
            if step is not None:
                step(batch, Scored(score))
        return [score]

    work, _ = run(searched(prune=prune, trials=30), judge)
    left = [trial for trial in work.trials() if trial.state == "pruned"]
    assert bool(left) == (prune is not None)
    assert all(trial.scores == () for trial in left)


def items_of(values: Values, step: Step | None) -> list[float]:
    """The hill's height at each of 128 items, whose own chance is a tenth; a batch has 16."""
    (height,) = hill(values)
    items = height + np.random.default_rng(int(1e9 * height)).normal(0, 0.1, 128)
    for batch in range(1, 9):
        assert step is not None
        step(batch, Scored(float(items[: 16 * batch].mean()), items[: 16 * batch]))
    return [float(items.mean())]


def test_of_items_only_so_many_are_scored_as_tell_the_candidate_from_the_best(tmp_path: Path) -> None:
    """After 16 of them, 32, 64 or all, the worse the earlier; the best has all, and a study goes on."""
    wanted, kept = searched(prune=None, subset="adaptive", sampler="random", trials=40), tmp_path / "study.log"
    work, _ = run(wanted, items_of)
    left = [(max(trial.intermediate_values), hill(trial.params)[0]) for trial in work._kept()
            if trial.state.name == "PRUNED"]  # fmt: skip
    heights = {when: np.mean([height for batch, height in left if batch == when]) for when, _ in left}
    assert heights.keys() == {1, 2, 4}
    assert heights[1] > heights[2] > heights[4] > hill(work.best()[0].drawn)[0]
    for trials in (2, 5):
        again, _ = run(replace(wanted, trials=trials), items_of, storage=kept)
    assert numbers(again) == numbers(work)[:5]


def test_it_ends_without_a_better_one() -> None:
    """After as many trials as the recipe's patience, and at the end of its minutes."""
    work, why = run(searched(patience=5, trials=100), lambda values, step: [1.0])
    assert (len(work.trials()), why) == (6, "none of the last 5 trials was better")
    work, why = run(searched(), minutes=0)
    assert (work.trials(), why) == ([], "the minutes are over")


def two(values: Values, step: Step | None) -> list[float]:
    """Two aims that cannot be had together: a loss that falls with the weight, an accuracy that falls, too."""
    weight = float(values[A])
    return [1 - weight, 1 - weight**2]


TWO = "{loss: ./search.txt}, {accuracy: ./q.jsonl}"


def test_of_two_aims_a_front_is_kept() -> None:
    """Nothing of it is worse than another in both; the best is one of the middle."""
    work, _ = run(searched(TWO, sampler="nsga2", trials=30), two, (False, True))
    assert work.searched.is_front
    (best,) = work.best()
    scores = [trial.scores for trial in work.trials()]
    assert min(scores)[0] < best.scores[0] < max(scores)[0]


def test_aims_with_weights_are_one_sum() -> None:
    """The weight decides which of two that cannot be had together counts."""
    for weights, expected in ((("9", "1"), (0.8, 1)), (("1", "9"), (0, 0.2))):
        aims = "{{loss: ./search.txt, weight: {}}}, {{accuracy: ./q.jsonl, weight: {}}}".format(*weights)
        (best,) = run(searched(aims, trials=30), two, (False, True))[0].best()
        assert expected[0] <= float(best.drawn[A]) <= expected[1]


def test_a_guard_refuses_what_is_worse_than_the_base() -> None:
    """The best loss that keeps the accuracy within what the guard allows."""
    guarded = "{loss: ./search.txt}, {accuracy: ./q.jsonl, guard: 0.25}"
    work, _ = run(searched(guarded, trials=40), two, (False, True), base=(1.0, 1.0))
    (best,) = work.best()
    assert 0.3 <= float(best.drawn[A]) <= 0.5
    assert any(not trial.keeps and trial.scores < best.scores for trial in work.trials())


@pytest.mark.parametrize("storage", ["nowhere/study.log", "nosuch://x/y"])
def test_a_storage_that_cannot_be_opened_is_refused(storage: str) -> None:
    """With its name and what could be written."""
    with pytest.raises(EvaluationError, match="cannot be opened"):
        open_storage(storage)


def test_pruned_and_trials_are_told(tmp_path: Path) -> None:
    """Who watches is told of each trial of its worker once, in order."""
    told: list[Trial] = []

    def judge(values: Values, step: Step | None) -> list[float]:
        if values["merge_method"] == "linear":
            raise Pruned
        return hill(values)

    work = Worker(Aims(searched(trials=6), (False,)), "study")
    work.run(judge, told.append, None)
    assert told == work.trials()
    assert {trial.state for trial in told} == {"complete", "pruned"}
