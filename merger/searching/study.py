"""A study: which numbers are tried next, what came of those that were, and where that is kept, by Optuna.

With one worker and one seed the trials are the same whenever it was killed and went on. Not here: how a candidate is
made (candidates) and scored (objectives), and what comes out of a study (outcome).
"""

from __future__ import annotations

import math
import os
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import optuna
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DBAPIError

from merger.errors import EvaluationError, MergerError, Problem
from merger.searching.draws import Reseeded, grid_of, make_pruner, make_sampler, spaces_of
from merger.searching.objectives import Scored, Step
from merger.searching.trials import Aims, Judge, Pruned, Race, Trial, best_of, front_of
from merger.system import LINKS, is_running

_BEAT_SECONDS, _STALE_SECONDS, _WAIT_SECONDS = 15.0, 90.0, 0.2
OUT_OF_TIME = "the minutes are over"
"""Why a study ended that another run goes on with."""

_LOST, _PLACE, _WORKER, _WHY = "lost", "place", "worker", "why"
_SCORES, _ITEMS, _SECONDS = "scores", "items", "seconds"
_GRACE_SECONDS = 5
"""After so long a lock on the file is one that a killed worker left."""
_MADE_SECONDS = 3
"""In so long another worker has made a database's tables, which nobody else can do meanwhile."""
_LINE_BYTES, _LETTERS, _FEW = 1 << 20, 200, 10


class Worker:
    """One worker's part of a study.

    Args:
        aims: what is searched for.
        name: of the study: another recipe's has another.
        storage: a file, a database's address, or None: nowhere.
    """

    def __init__(self, aims: Aims, name: str, storage: str | None = None) -> None:
        self.aims, self.searched = aims, aims.searched
        self._me = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._spaces = spaces_of(self.searched)
        self._storage = open_storage(storage)
        sampler: Any = Reseeded(partial(make_sampler, self.searched), self._place)
        self._study = optuna.create_study(
            storage=self._storage,
            sampler=sampler,
            pruner=make_pruner(self.searched),
            study_name=name,
            directions=aims.directions,
            load_if_exists=True,
        )

    def agree(self, what: str, mine: str) -> str:
        """What holds for all of the study, whichever machine it goes on: as its first worker said it."""
        if what not in self._study.user_attrs:
            self._study.set_user_attr(what, mine)
        return str(self._study.user_attrs[what])

    # ---- what there is ----

    def trials(self) -> list[Trial]:
        """Every candidate once that was tried, and those that are being tried."""
        kept = enumerate(self._kept())
        return [_trial(number, trial) for number, trial in kept if trial.state is not TrialState.WAITING]

    def best(self, count: int = 1) -> list[Trial]:
        """The best so far, the best one first; those of a front come first, from its middle on."""
        return best_of(self.trials(), self.aims, count)

    def importance(self) -> dict[str, float]:
        """How much each variable matters among the best trials, by PED-ANOVA; none of too few trials."""
        done = [trial for trial in self._kept() if trial.state is TrialState.COMPLETE]
        if len(done) < _FEW:
            return {}
        return dict(optuna.importance.get_param_importances(self._study))

    # ---- going on ----

    def run(self, judge: Judge, on_trial: Callable[[Trial], object], minutes: float | None, wait: bool = True) -> str:
        """Try candidates until the study is at its end.

        Args:
            judge: scores one.
            on_trial: is told of each that this worker has tried.
            minutes: how long, at most.
            wait: whether to wait for the others, and try what those lose.

        Returns:
            Why it ended.
        """
        until = math.inf if minutes is None else time.monotonic() + 60 * minutes
        with self._beating():
            while True:
                self._bury()
                why, busy = self._over(until)
                if not why:
                    on_trial(self._try(judge))
                elif wait and busy and time.monotonic() < until:
                    time.sleep(_WAIT_SECONDS)
                else:
                    return why

    def _over(self, until: float) -> tuple[str, bool]:
        """Why nothing more is to be tried, and whether others are still at it."""
        states = [trial.state for trial in self._kept()]
        busy, searched = TrialState.RUNNING in states, self.searched
        begun = len(states) - states.count(TrialState.WAITING)
        if time.monotonic() >= until:
            return OUT_OF_TIME, busy
        if begun >= searched.trials:  # a lost one that another has taken the place of meanwhile is left
            return f"{searched.trials} trials are done", busy
        if searched.sampler == "grid" and begun > len(grid_of(searched)):
            return "all of the grid is tried", busy
        if TrialState.WAITING in states:
            return "", busy
        if searched.patience is not None:
            done = [trial for trial in self.trials() if trial.state != "running"]
            last = max((trial.number for trial in front_of(done, self.aims)), default=0)
            if done and done[-1].number - last >= searched.patience:
                return f"none of the last {searched.patience} trials was better", busy
        return "", busy

    def _kept(self) -> list[FrozenTrial]:
        return [trial for trial in self._all() if not trial.user_attrs.get(_LOST)]

    def _place(self, trial: FrozenTrial) -> int:
        """What a trial's draw is seeded by: one that is tried again has its own, and no two others ever have one."""
        again = sum(_PLACE in other.user_attrs for other in self._all() if other.number < trial.number)
        return int(trial.user_attrs.get(_PLACE, trial.number - again))

    def _all(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _try(self, judge: Judge) -> Trial:
        asked = self._study.ask(self._spaces)
        asked.set_user_attr(_WORKER, self._me)
        began, state, values, best = time.monotonic(), TrialState.FAIL, None, self.best()
        race = self._race(best)
        try:
            scores = [float(score) for score in judge(dict(asked.params), self._step(asked, race))]
            values = self.aims.values(scores)
            if not all(map(math.isfinite, scores)):
                raise EvaluationError(Problem(f"the scores are {', '.join(map(str, scores))}"))
            asked.set_user_attr(_SCORES, scores)
            if race is not None and (not best or self.aims.gains(scores) > self.aims.gains(best[0].scores)):
                asked.set_user_attr(_ITEMS, race.items.tolist())
            for place, excess in enumerate(self.aims.guards(scores)):
                asked.set_constraint(str(place), excess)
            state = TrialState.COMPLETE
        except Pruned:
            state = TrialState.PRUNED
        except MergerError as error:
            asked.set_user_attr(_WHY, "; ".join(problem.what for problem in error.problems))
        asked.set_user_attr(_SECONDS, time.monotonic() - began)
        self._study.tell(asked, values if state is TrialState.COMPLETE else None, state)
        return next(_trial(place, trial) for place, trial in enumerate(self._kept()) if trial.number == asked.number)

    def _race(self, best: Sequence[Trial]) -> Race | None:
        """Compares a candidate with the best so far item by item, where the recipe wants that."""
        if self.searched.subset is None:
            return None
        items = self._kept()[best[0].number].user_attrs.get(_ITEMS, ()) if best else ()
        return Race(items, self.aims.higher[0])

    def _step(self, asked: optuna.Trial, race: Race | None) -> Step | None:
        """Tells how a candidate does so far, and leaves it where it falls behind; None where there are several aims."""
        if (self.searched.prune is None and race is None) or len(self.searched.aims) > 1:
            return None

        def step(done: int, so_far: Scored) -> None:
            asked.report(so_far.value, done)
            if asked.should_prune() or (race is not None and race.is_lost(so_far)):
                raise Pruned

        return step

    # ---- workers that die ----

    @contextmanager
    def _beating(self) -> Iterator[None]:
        """Tell the others that this worker lives."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(_BEAT_SECONDS):
                with suppress(Exception):  # the next one may get through; the trials' own words tell what is wrong
                    self._tell_life(time.time())

        self._tell_life(time.time())
        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with suppress(Exception):
                self._tell_life(0.0)

    def _tell_life(self, when: float) -> None:
        self._study.set_user_attr(f"{_WORKER} {self._me}", when)

    def _alive(self) -> set[str]:
        """The workers that have been heard of lately, and of this machine only those whose process is there."""
        told = self._study.user_attrs.items()
        beats = {key.removeprefix(f"{_WORKER} "): when for key, when in told if key.startswith(f"{_WORKER} ")}
        return {who for who, when in beats.items() if time.time() - when < _STALE_SECONDS and _is_there(who, self._me)}

    def _bury(self) -> None:
        """Fail the trials of dead workers, and have what they drew tried again."""
        trials = self._all()
        unsure = [trial for trial in trials if trial.state is TrialState.RUNNING or trial.user_attrs.get(_LOST)]
        alive = self._alive() if unsure else set()
        again = {other.user_attrs.get(_PLACE) for other in trials}
        for trial in unsure:
            place = self._place(trial)
            if trial.state is TrialState.RUNNING:
                is_ours = self._claim(trial, alive)
            else:  # whoever claimed it may have died before it told what is to be tried again
                is_ours = place not in again and trial.user_attrs[_LOST] not in alive
            if is_ours:
                drawn = dict(trial.system_attrs.get("fixed_params", {})) | trial.params
                fixed = drawn if drawn.keys() == self._spaces.keys() else {}  # in part: its place draws the same again
                told = {**trial.system_attrs, "fixed_params": fixed}
                waiting, kept = TrialState.WAITING, {_PLACE: place}
                self._study.add_trial(optuna.trial.create_trial(state=waiting, system_attrs=told, user_attrs=kept))

    def _claim(self, trial: FrozenTrial, alive: set[str]) -> bool:
        """Whether a running trial's worker is dead, and this one, of all that see it, is to have it tried again."""
        owner = trial.user_attrs.get(_LOST, trial.user_attrs.get(_WORKER))
        if owner in alive - {self._me} or (owner is None and alive - {self._me} and _is_young(trial)):
            return False
        try:
            self._storage.set_trial_user_attr(trial._trial_id, _LOST, self._me)
            return self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False


def _trial(number: int, trial: FrozenTrial) -> Trial:
    told = trial.user_attrs
    return Trial(
        number,
        "failed" if trial.state is TrialState.FAIL else trial.state.name.lower(),
        dict(trial.params),
        tuple(told.get(_SCORES, ())) if trial.state is TrialState.COMPLETE else (),
        all(excess <= 0 for excess in trial.constraints.values()),
        float(told.get(_SECONDS, 0.0)),
        str(told.get(_WHY, "")),
    )


def _is_there(who: str, me: str) -> bool:
    """Whether a worker's process may be there: of other machines that cannot be told."""
    (host, process, _), (here, own, _) = who.rsplit(":", 2), me.rsplit(":", 2)
    if host != here or who == me:
        return True
    return process != own and is_running(int(process))  # its own: an earlier worker's, or one's that is at its end


def _is_young(trial: FrozenTrial) -> bool:
    began = trial.datetime_start
    return began is not None and time.time() - began.timestamp() < _STALE_SECONDS


# ---- where it is kept -----------------------------------------------------------------------------------------------


def open_storage(storage: str | None) -> BaseStorage:
    """Where a study is kept: a file, which is made, a database by its address, or the memory.

    Raises:
        EvaluationError: it cannot be opened.
    """
    if storage is None:
        return InMemoryStorage()
    try:
        if "://" in storage:
            return _open_database(storage)
        path = os.path.abspath(os.path.expanduser(storage))
        lock = JournalFileSymlinkLock if LINKS else JournalFileOpenLock
        alone = lock(path, grace_period=_GRACE_SECONDS)
        backend = JournalFileBackend(path, lock_obj=alone)
        _cut_torn_line(path, alone)
        return JournalStorage(backend)
    except Exception as error:  # of databases each has its own kind
        told = " ".join(str(error).split())[:_LETTERS]
        hint = "write storage: study.log, sqlite:///study.db, or the address of a database that is there"
        raise EvaluationError(Problem(f"the study {storage} cannot be opened ({told})", hint=hint)) from None


def _open_database(address: str) -> BaseStorage:
    """Of several workers that make its tables at once all but one fail, and find them there soon after."""
    until = time.monotonic() + _MADE_SECONDS
    while True:
        try:
            storage = optuna.storages.RDBStorage(address)
            weakref.finalize(storage, storage.engine.dispose)  # else its connections stay open
            return storage
        except DBAPIError:
            if time.monotonic() > until:
                raise
        time.sleep(_WAIT_SECONDS)


def _cut_torn_line(path: str, alone: JournalFileSymlinkLock | JournalFileOpenLock) -> None:
    """Take away what a worker wrote last that was killed as it did: the file could not be read after another line."""
    alone.acquire()
    try:
        with open(path, "rb+") as file:
            file.seek(max(0, os.path.getsize(path) - _LINE_BYTES))
            start, end = file.tell(), file.read()
            if end and not end.endswith(b"\n"):
                file.truncate(start + end.rfind(b"\n") + 1)
    finally:
        alone.release()
