"""What the Space knows after a restart, and after a start with the file of its first version."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from space.bot.webhook_events import WebhookEvent, WebhookEvents
from space.work.admission import Limits
from space.work.job_table import OVER, How, JobTable, QueuedMerge
from space.work.queue import MergeQueue, Token
from space.work.records import Records

PULL_REQUEST = How(is_public=True, create_pr=True)
JOB = QueuedMerge("a", "alice", "x: 1\n", "hf://alice/a", {"org/b": "0" * 40}, 9, log=("é",), how=PULL_REQUEST)
PUSHED, SAID = "org/name@" + "a" * 40, "org/name/7/abc"


@pytest.mark.parametrize("state", ["queued", "running", "waiting", *OVER])
def test_a_job_is_read_as_it_was_written(state: Any, tmp_path: Path) -> None:
    """In every state; those that are not over are known as such."""
    table = JobTable(Records(tmp_path / "jobs.db"))
    table.put(JOB)
    job = table.change("a", state=state, problems=("one", "two"), ended=2.5)
    again = JobTable(Records(tmp_path / "jobs.db"))
    assert again.get("a") == job
    assert again.of("alice") == [job]
    assert again.of("bob") == []
    assert again.open() == ([] if job.is_over else [job])


def test_progress_is_seen_at_once_and_kept_in_memory_alone(tmp_path: Path) -> None:
    """By its name and in its owner's list; what an earlier run had made counts."""
    table = JobTable(Records(tmp_path / "jobs.db"))
    table.put(replace(JOB, kept=4))
    table.progress("a", 3)
    table.progress("a", 5, "half of it")
    job = replace(JOB, kept=4, made=9, log=("é", "half of it"))
    assert (table.get("a"), table.of("alice"), table.open()) == (job, [job], [job])
    assert JobTable(Records(tmp_path / "jobs.db")).get("a") == replace(JOB, kept=4)


def test_a_write_is_on_disk_when_it_returns(tmp_path: Path) -> None:
    """SQLite forces its log to the disk at each commit, and each write is one."""
    records = Records(tmp_path / "jobs.db")
    assert records._execute("PRAGMA synchronous") == [(2,)]
    assert records._execute("PRAGMA journal_mode") == [("wal",)]
    assert records.add("job", "a", {"key": 1})
    assert not records._file.in_transaction


def test_records_keep_their_order_and_their_kind(tmp_path: Path) -> None:
    """A change moves none; the same key of another kind is another record; the oldest that are over go."""
    records = Records(tmp_path / "jobs.db")
    assert [records.add("event", key, {"key": key}) for key in ("b", "a", "b")] == [True, True, False]
    records.put("job", "b", {"key": "job"}, owner="alice")
    records.put("event", "b", {"key": "b", "state": "over"}, is_over=True)
    assert records.find("event") == [{"key": "b", "state": "over"}, {"key": "a"}]
    assert records.find("event", is_over=False) == [{"key": "a"}]
    for number in range(4):
        records.put("job", f"{number}", {"key": number}, owner="alice", is_over=True)
    records.forget("job", 2, "alice")
    records.forget("job", 0, "bob")
    assert records.find("job") == [{"key": "job"}, {"key": 2}, {"key": 3}]
    assert len(records.find("event")) == 2


def old_job(id: str, state: str, created: float) -> dict[str, Any]:
    """As the first version wrote it."""
    made = {"started": 0.0, "ended": 0.0, "kept": 5, "made": 7, "log": ["so far"], "problems": []}
    how = {"is_public": False, "create_pr": True, "force": False}
    asked = {"recipe": "x: 1\n", "to": f"hf://alice/{id}", "pins": {"org/b": "0" * 40}, "total": 10, "turn": 3}
    end = {"where": "", "commit": "", "is_new": False, "how": how}
    return {"id": id, "owner": "alice", "state": state, "created": created, **asked, **made, **end}


def old_event(key: str, state: str, at: float) -> dict[str, Any]:
    """As the first version wrote it."""
    known = {"key": key, "repo": "org/name", "num": 7, "comment": "abc", "old": "", "new": "", "state": state}
    rest = {"job": "", "main": "", "is_begun": False, "is_meant": True, "again": 0.0, "tries": 2, "at": at}
    return {**known, **rest}


def write_old_file(path: Path, contents: Mapping[str, Mapping[str, Any]]) -> None:
    """The tables that Huey 3 made, with something in each."""
    file = sqlite3.connect(path)
    file.executescript(
        """
        CREATE TABLE kv (queue text not null, key text not null, value blob not null, primary key(queue, key));
        CREATE TABLE schedule (id integer primary key, queue text not null, data blob not null, timestamp real);
        CREATE INDEX schedule_queue_timestamp ON schedule (queue, timestamp);
        CREATE TABLE task (id integer primary key, queue text not null, data blob not null, priority real);
        CREATE TABLE counter (queue text not null, key text not null, value integer, primary key(queue, key));
        INSERT INTO task (queue, data, priority) VALUES ('space', x'80', 0);
        """
    )
    rows = [("space", key, json.dumps(content).encode()) for key, content in contents.items()]
    with file:
        file.executemany("INSERT INTO kv VALUES (?, ?, ?)", rows)
    file.close()


def test_a_file_of_the_first_version_is_read_once(tmp_path: Path) -> None:
    """Jobs that were not over wait for their owner, with their log; those that are over and the bot's events stay."""
    states = {"z": "running", "y": "queued", "x": "waiting", "w": "done", "v": "failed", "u": "cancelled"}
    jobs = {f"job:{id}": old_job(id, state, number) for number, (id, state) in enumerate(states.items())}
    events = {f"ask:{key}": old_event(key, state, 1.0) for key, state in ((PUSHED, "job"), (SAID, "over"))}
    write_old_file(tmp_path / "jobs.db", dict(reversed({**events, **jobs}.items())))
    for _ in range(2):
        queue = MergeQueue(tmp_path, Limits())
        assert [job.id for job in queue.jobs.of("alice")] == list(states)
        ended = {"w": "done", "v": "failed", "u": "cancelled"}
        assert {job.id: job.state for job in queue.jobs.of("alice")} == {**dict.fromkeys("zyx", "waiting"), **ended}
        first, known = queue.jobs.of("alice")[0], WebhookEvents(queue.records)
        assert (first.log, first.made, first.pins) == (("so far",), 0, {"org/b": "0" * 40})
        assert first.how == How(create_pr=True)
        pushed = WebhookEvent(PUSHED, "org/name", 7, "abc", state="job", is_meant=True, tries=2)
        assert known.open() == [pushed]
        assert [known.add(WebhookEvent(key, "org/name")) for key in (PUSHED, SAID)] == [False, False]
        queue.stop()
    queue.register_token("alice", Token("hf_alice_secret"))
    assert [job.id for job in queue.jobs.open() if job.state == "queued"] == ["z", "y", "x"]
