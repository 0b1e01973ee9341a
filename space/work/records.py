"""What the Space still knows after a restart: one table in an SQLite file, a row a record, its content as JSON.

A write is on disk when it returns. Not here: what the records say (job_table, bot.webhook_events).
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
CREATE TABLE IF NOT EXISTS records (
    number INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    key TEXT NOT NULL,
    owner TEXT NOT NULL,
    is_over INTEGER NOT NULL,
    content TEXT NOT NULL,
    UNIQUE (kind, key)
);
CREATE INDEX IF NOT EXISTS by_owner ON records (kind, owner);
CREATE INDEX IF NOT EXISTS by_end ON records (kind, is_over);
"""

_FROM_HUEY = """
BEGIN;
INSERT INTO records (kind, key, owner, is_over, content)
SELECT
    CASE WHEN key LIKE 'job:%' THEN 'job' ELSE 'event' END,
    substr(key, 5),
    coalesce(json_extract(content, '$.owner'), ''),
    json_extract(content, '$.state') IN ('done', 'failed', 'cancelled', 'over'),
    json_remove(content, '$.at')
FROM (SELECT key, CAST(value AS TEXT) AS content FROM kv WHERE key LIKE 'job:%' OR key LIKE 'ask:%')
ORDER BY coalesce(json_extract(content, '$.created'), json_extract(content, '$.at'));
DROP TABLE kv;
DROP TABLE task;
DROP TABLE schedule;
DROP TABLE IF EXISTS counter;
COMMIT;
"""
"""The first version kept the same content in the tables of a queue's library."""


class Records:
    """The file and its table.

    Args:
        path: the file; it is made if it is missing.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._file = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._file.executescript(_SCHEMA)
        if self._execute("SELECT 1 FROM sqlite_master WHERE name = 'kv'"):
            self._file.executescript(_FROM_HUEY)

    def add(self, kind: str, key: str, content: Mapping[str, Any]) -> bool:
        """Keep a new record; False, and nothing changes, if there is one with this key."""
        insert = "INSERT OR IGNORE INTO records (kind, key, owner, is_over, content) VALUES (?, ?, '', 0, ?)"
        with self._lock:
            return self._file.execute(insert, (kind, key, json.dumps(content))).rowcount == 1

    def put(self, kind: str, key: str, content: Mapping[str, Any], owner: str = "", is_over: bool = False) -> None:
        """Keep a record in place of the one with this key, if there is one."""
        insert = "INSERT INTO records (kind, key, owner, is_over, content) VALUES (?, ?, ?, ?, ?)"
        update = "UPDATE SET owner = excluded.owner, is_over = excluded.is_over, content = excluded.content"
        self._execute(f"{insert} ON CONFLICT DO {update}", kind, key, owner, is_over, json.dumps(content))

    def find(self, kind: str, **columns: str | bool) -> list[dict[str, Any]]:
        """The records of a kind whose columns key, owner and is_over have these values, the oldest first."""
        where = "".join(f" AND {name} = ?" for name in columns)
        select = f"SELECT content FROM records WHERE kind = ?{where} ORDER BY number"
        return [json.loads(content) for (content,) in self._execute(select, kind, *columns.values())]

    def forget(self, kind: str, most: int, owner: str = "") -> None:
        """Keep no more than so many of an owner's records that are over: the newest."""
        over = "SELECT number FROM records WHERE kind = ? AND owner = ? AND is_over ORDER BY number DESC"
        self._execute(f"DELETE FROM records WHERE number IN ({over} LIMIT -1 OFFSET ?)", kind, owner, most)

    def _execute(self, statement: str, *values: str | int) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._file.execute(statement, values).fetchall()
