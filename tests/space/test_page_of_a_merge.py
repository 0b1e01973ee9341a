"""A merge's own page: what it tells to whoever has its link, and that words of others are text there.

Not here: the link to it, and a real browser (test_page).
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fastapi import FastAPI
from hostile import HOSTILE, obeyed
from starlette.testclient import TestClient

from space.page import merge_page
from space.work.job_table import How, QueuedMerge
from space.work.queue import MergeQueue

RECIPE = """\
merge_method: linear
parameters: {weight: 1}
models: [{model: org/a}, {model: org/b}]
"""
CARD = """\
---
license: mit
---
# made

A merge of [a](/org/a).

## Use it

```python
model = AutoModelForCausalLM.from_pretrained("alice/made")
```

In llama.cpp:

```bash
llama-cli -hf alice/made:Q8_0
```

## Limits

![Lineage](pictures/lineage.png)

<details>
<summary>All of it</summary>

| one | two |
|---|---|

</details>
"""
JOB = QueuedMerge("id-1", "alice", RECIPE, "hf://alice/made", {}, 1_000_000, created=1_700_000_000.0)
Open = Callable[[QueuedMerge, str], Any]


@pytest.fixture
def opened() -> Open:
    """Asks for the page of an id where there is this one job."""

    def get(job: QueuedMerge, id: str = "id-1") -> Any:
        app = FastAPI()
        jobs = SimpleNamespace(get={job.id: job}.get)
        merge_page.offer_pages(app, cast(MergeQueue, SimpleNamespace(jobs=jobs, ahead=lambda found: 2)))
        return TestClient(app).get(f"/merges/{id}")

    return get


def words(page: str) -> str:
    body = page.partition("<body>")[2]
    return html.unescape(" ".join(re.sub(r"<[^>]*>", " ", body).split()))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, ["waits its turn: 2 merges before it", "asked for 2023-11-14 22:13 UTC", "merge_method: linear"]),
        ({"state": "running", "started": 1_700_000_060.0, "made": 500_000}, ["is being made", "500.0 kB of 1.0 MB"]),
        ({"state": "failed", "problems": ("it is full",), "log": ("made a",)}, ["not made", "It is full", "made a"]),
        (
            {"state": "done", "where": "http://hub/alice/made", "is_new": True, "ended": 1_700_000_120.0, "card": CARD},
            ["is published", "ended 2023-11-14 22:15 UTC", "Its model card made A merge of a .", "All of it one two",
             'Use it model = AutoModelForCausalLM.from_pretrained("alice/made") In llama.cpp: llama-cli -hf '
             "alice/made:Q8_0 Its model card"],
        ),
        ({"state": "done", "card": CARD.replace("model =", "tokenizer.apply_chat_template")},
         ["In a terminal: transformers chat alice/made Its model card"]),
    ],
    ids=["queued", "running", "failed", "done", "one that chats"],
)  # fmt: skip
def test_each_state(opened: Open, changes: dict[str, Any], told: list[str]) -> None:
    """How far it is with dates and bytes, why it failed, or how the result is used; it looks again until it is over."""
    job = replace(JOB, **changes)
    answer = opened(job)
    assert [each for each in told if each not in words(answer.text)] == []
    assert ("data-open" in answer.text.partition("<body>")[2]) == (not job.is_over)
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_what_a_pull_request_proposes_is_not_there_to_be_used(opened: Open) -> None:
    """Its card tells how it is used once it is."""
    told = [words(opened(replace(JOB, state="done", card=CARD, how=How(create_pr=is_pull))).text)
            for is_pull in (True, False)]  # fmt: skip
    assert [text.count("Use it") for text in told] == [1, 2]


def test_words_of_others_are_text(opened: Open) -> None:
    """In name, log, problems, recipe and card."""
    job = replace(JOB, to=f"hf://a/{HOSTILE}", log=(HOSTILE,), problems=(HOSTILE,), recipe=HOSTILE, state="failed")
    body = opened(job).text.partition("<body>")[2]
    assert "\\x1b" in body
    assert [each for each in obeyed(body) if "a line" not in each] == []
    card = f"# {HOSTILE}\n\n<script>alert(1)</script> [go](javascript:alert) ![see](https://evil.example)\n"
    body = opened(replace(job, state="done", log=(), problems=(), recipe="", card=card)).text.partition("<body>")[2]
    assert "\\x1b" in body
    assert [each for each in ("\x1b", "<script", 'href="javascript') if each in body] == []


def test_what_is_not_there(opened: Open) -> None:
    """A sentence, and the way to the Space."""
    answer = opened(JOB, "id-2")
    assert answer.status_code == 404
    assert "There is no such merge here" in answer.text
