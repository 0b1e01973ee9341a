"""The bot, from a webhook's bytes to comments and commits on the loopback Hub. Not here: the page."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import waiting
from huggingface_hub import DiscussionComment, HfApi
from loopback import LoopbackHub
from served import ServedSpace, halted, zoo
from thorough import thorough_only

from space.bot.bot import ROUTE

SECRET, TOKEN = "what-only-the-hub-knows", "hf_token_of_the_bot"
BOT = "mergebot"
RECIPE = """\
merge_method: task_arithmetic
base_model: maker/merger-zoo-base
models:
  - model: maker/merger-zoo-kjv
    parameters: {weight: 0.5}
  - model: maker/merger-zoo-python
    parameters: {weight: 0.5}
"""


@pytest.fixture(scope="module")
def space(served: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedSpace]:
    """A Space with a bot that may write into alice's repos and those of `lab`, whose members are bob and the bot."""
    zoo(served)
    served.add_user("bob", token="hf_token_of_bob", orgs=["lab"])
    served.add_user("eve", token="hf_token_of_eve")
    served.add_user(BOT, token=TOKEN, orgs=["lab", "alice"])
    settings = {"MERGER_BOT_TOKEN": TOKEN, "MERGER_BOT_SECRET": SECRET, "MERGER_SPACE_SHARD_SIZE": "1MB"}
    found = ServedSpace(served, tmp_path_factory.mktemp("space"), settings)
    found.start()
    yield found
    found.kill()


class Hooks:
    """What the Hub does for a repo with a webhook: it tells of comments and commits."""

    def __init__(self, space: ServedSpace, hub: LoopbackHub) -> None:
        self.space, self.hub = space, hub

    def api(self, user: str) -> HfApi:
        return HfApi(endpoint=self.hub.url, token=f"hf_token_of_{user}")

    def send(self, payload: Mapping[str, Any] | bytes, secret: str = SECRET) -> tuple[int, dict[str, Any]]:
        """One delivery."""
        body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        headers = {"X-Webhook-Secret": secret, "Content-Type": "application/json"}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.space.url + ROUTE, body, headers)) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def comment(self, user: str, repo: str, text: str, **changed: Any) -> int:
        """Open a discussion, write into it, and tell of it; its number."""
        num = self.api(user).create_discussion(repo, "a question", description="hello").num
        made = self.api(user).comment_discussion(repo, num, text)
        assert self.send(commented(repo, num, made.id, text, **changed))[0] == 200
        return num

    def said(self, repo: str, num: int) -> list[str]:
        """What the bot has said in a discussion; nothing as long as there is none."""
        if num not in [item.num for item in self.api("alice").get_repo_discussions(repo)]:
            return []
        events = self.api("alice").get_discussion_details(repo, num).events
        return [event.content for event in events if isinstance(event, DiscussionComment) and event.author == BOT]

    def until(self, repo: str, num: int, words: str) -> str:
        """Wait until it has said something with these words."""
        return waiting.until(
            lambda: next((said for said in self.said(repo, num) if words in said), ""),
            lambda: (self.said(repo, num), self.space.log()),
        )

    def push(self, repo: str, files: Mapping[str, str]) -> dict[str, Any]:
        """A commit to main, and the payload that tells of it."""
        old = self.hub.commits(repo)[0].sha
        new = self.hub.commit(repo, {name: text.encode() for name, text in files.items()})
        moved = [{"ref": "refs/heads/main", "oldSha": old, "newSha": new}]
        return payload(repo, "repo.content", "update", updatedRefs=moved)


def payload(repo: str, scope: str, action: str, **more: Any) -> dict[str, Any]:
    """What every webhook of the Hub says."""
    url = {"web": "http://127.0.0.1/", "api": "http://127.0.0.1/"}
    about = {"type": "model", "name": repo, "id": "1", "private": False, "owner": {"id": "2"}, "url": url}
    hook = {"id": "3", "version": 3}
    return {"event": {"action": action, "scope": scope}, "repo": about, "webhook": hook, **more}


def commented(repo: str, num: int, id: str, text: str, **changed: Any) -> dict[str, Any]:
    """Of a new comment."""
    url = {"web": "http://127.0.0.1/", "api": "http://127.0.0.1/"}
    comment = {"id": id, "author": {"id": "9"}, "content": text, "hidden": False, "url": url, **changed}
    discussion = {
        "id": "4", "num": num, "author": {"id": "9"}, "url": url, "title": "a question",
        "isPullRequest": False, "status": "open",
    }  # fmt: skip
    return payload(repo, "discussion.comment", "create", discussion=discussion, comment=comment)


@pytest.fixture
def hooks(space: ServedSpace, served: LoopbackHub) -> Hooks:
    return Hooks(space, served)


def asking(verb: str, recipe: str = RECIPE) -> str:
    return f"Please\n\n@{BOT} {verb}\n\n```yaml\n{recipe}```\n"


def test_a_comment_is_answered_with_its_plan(hooks: Hooks, served: LoopbackHub) -> None:
    """Whoever asks, and nothing is written."""
    served.add_model("alice/asked", {"README.md": b"mine\n"})
    num = hooks.comment("eve", "alice/asked", asking("plan"))
    said = hooks.until("alice/asked", num, "| method |")
    assert "maker/merger-zoo-kjv" in said
    assert "task\\_arithmetic" in said or "task_arithmetic" in said
    assert len(served.commits("alice/asked")) == 1


def test_an_answer_that_the_hub_refuses_is_given_again(hooks: Hooks, served: LoopbackHub) -> None:
    """Trouble at the Hub that passes costs some seconds and nothing else."""
    served.add_model("alice/troubled", {"README.md": b"mine\n"})
    num = hooks.api("eve").create_discussion("alice/troubled", "a question", description="hello").num
    made = hooks.api("eve").comment_discussion("alice/troubled", num, asking("plan"))
    trouble = served.fail(lambda request: "alice/troubled/discussions" in request.path, times=3)
    assert hooks.send(commented("alice/troubled", num, made.id, ""))[0] == 200
    waiting.until(lambda: not trouble.left)
    assert "maker/merger-zoo-kjv" in hooks.until("alice/troubled", num, "| method |")
    assert len(hooks.said("alice/troubled", num)) == 1


def test_the_owner_has_it_merged_into_their_repo(hooks: Hooks, served: LoopbackHub) -> None:
    """Plan, beginning and result are comments; the result is one commit on main."""
    served.add_model("alice/wanted", {"README.md": b"mine\n"})
    num = hooks.comment("alice", "alice/wanted", asking("merge"))
    said = hooks.until("alice/wanted", num, "Published")
    commits = served.commits("alice/wanted")
    assert len(commits) == 2
    assert commits[0].sha in said
    assert any("The merge has begun" in words or "Published" in words for words in hooks.said("alice/wanted", num))
    assert "model-00001-of-00003.safetensors" in served.files("alice/wanted")


def test_a_member_of_the_organisation_gets_a_pull_request(hooks: Hooks, served: LoopbackHub) -> None:
    """The Hub does not tell what a member may write, so main stays as it is until somebody merges it."""
    served.add_model("lab/shared", {"README.md": b"ours\n"}, owner="lab")
    num = hooks.comment("bob", "lab/shared", asking("merge"))
    said = hooks.until("lab/shared", num, "Published")
    assert "/lab/shared/discussions/" in said
    assert len(served.commits("lab/shared")) == 1


def test_nobody_else_has_anything_merged(hooks: Hooks, served: LoopbackHub) -> None:
    """It is said why, and neither a branch nor a pull request is made."""
    served.add_model("alice/closed", {"README.md": b"mine\n"})
    num = hooks.comment("eve", "alice/closed", asking("merge"))
    assert "only who may write to alice/closed" in hooks.until("alice/closed", num, "Not merged")
    assert len(served.commits("alice/closed")) == 1
    assert [item.is_pull_request for item in hooks.api("alice").get_repo_discussions("alice/closed")] == [False]


def test_a_changed_merge_yaml_is_merged_into_its_repo(hooks: Hooks, served: LoopbackHub) -> None:
    """Once: the same webhook again, and that of the merge's own commit, come to nothing; a later change replaces it."""
    served.add_model("alice/filed", {"README.md": b"mine\n"})
    told = hooks.push("alice/filed", {"merge.yaml": RECIPE})
    assert hooks.send(told) == (200, {"state": "heard"})
    hooks.until("alice/filed", 1, "Published")
    assert hooks.send(told) == (200, {"state": "known already"})
    merged = served.commits("alice/filed")[0].sha
    before = told["updatedRefs"][0]["newSha"]
    own = [{"ref": "refs/heads/main", "oldSha": before, "newSha": merged}]
    assert hooks.send(payload("alice/filed", "repo.content", "update", updatedRefs=own))[1] == {"state": "heard"}
    again = hooks.push("alice/filed", {"merge.yaml": RECIPE.replace("0.5", "0.25")})
    assert hooks.send(again)[0] == 200
    hooks.until("alice/filed", 2, "Published")
    assert len(served.commits("alice/filed")) == 5
    assert {"merge.yaml", "model-00003-of-00003.safetensors"} <= set(served.files("alice/filed"))


def test_a_merge_yaml_may_ask_for_a_pull_request(hooks: Hooks, served: LoopbackHub) -> None:
    """Then main stays as it is until somebody merges it."""
    served.add_model("alice/reviewed", {"README.md": b"mine\n"})
    assert hooks.send(hooks.push("alice/reviewed", {"merge.yaml": RECIPE + "publish: {create_pr: true}\n"}))[0] == 200
    assert "/alice/reviewed/discussions/" in hooks.until("alice/reviewed", 1, "Published")
    assert len(served.commits("alice/reviewed")) == 2


def test_a_wrong_merge_yaml_becomes_a_discussion(hooks: Hooks, served: LoopbackHub) -> None:
    """With the problem at its line, and nothing of it is Markdown or calls anybody."""
    served.add_model("alice/wrong", {"README.md": b"mine\n"})
    told = hooks.push("alice/wrong", {"merge.yaml": RECIPE + "'@alice ``` <b>': 1\n"})
    assert hooks.send(told)[0] == 200
    said = hooks.until("alice/wrong", 1, "is not merged")
    assert "recipe.yaml:8:1" in said
    assert said.rstrip().endswith("````")
    assert len(served.commits("alice/wrong")) == 2


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (RECIPE.replace("maker/merger-zoo-kjv", "../secrets"), "is no model on the Hub"),
        (RECIPE.replace("maker/merger-zoo-kjv", "file:///etc"), "is no model on the Hub"),
        (RECIPE.replace("maker/merger-zoo-kjv", "maker/gone"), "maker/gone"),
        (RECIPE.replace("maker/merger-zoo-kjv", "alice/private"), "alice/private"),
        (RECIPE + "publish: {repo: eve/elsewhere}\n", "the recipe publishes to eve/elsewhere"),
    ],
)
def test_the_bot_reads_public_models_and_writes_where_it_is_asked(
    recipe: str, words: str, hooks: Hooks, served: LoopbackHub
) -> None:
    """A private model of the repo's owner is none that the bot reads for others, and the bot's own token reads none."""
    if "alice/private" not in served.world.repos:
        served.add_model("alice/private", {"README.md": b""}, private=True)
        served.add_model("alice/strict", {"README.md": b"mine\n"})
    num = hooks.comment("alice", "alice/strict", asking("merge", recipe))
    assert words in hooks.until("alice/strict", num, "Not merged")


def test_what_a_webhook_claims_is_read_from_the_hub(hooks: Hooks, served: LoopbackHub) -> None:
    """A comment that is not there, or was written by somebody else than the payload says, gives nobody any right."""
    served.add_model("alice/claimed", {"README.md": b"mine\n"})
    num = hooks.comment("eve", "alice/claimed", "nothing", content=asking("merge"), author={"id": "alice"})
    assert hooks.send(commented("alice/claimed", num, "0123", asking("merge")))[0] == 200
    later = hooks.comment("eve", "alice/claimed", asking("plan"))
    hooks.until("alice/claimed", later, "| method |")  # what came before is answered before
    assert hooks.said("alice/claimed", num) == []
    assert len(served.commits("alice/claimed")) == 1


@pytest.mark.parametrize(("body", "secret", "status"), [
    (b"{}", "guess", 403), (b"{}", "", 403), (b"{}", SECRET + "x", 403), (b"{}", SECRET, 400), (b"[1, 2", SECRET, 400),
    (b" " * (2 << 20), SECRET, 413),
])  # fmt: skip
def test_a_forged_or_broken_webhook_is_refused(body: bytes, secret: str, status: int, hooks: Hooks) -> None:
    """With a sentence, and the log has neither the secret nor the token."""
    found, told = hooks.send(body, secret)
    assert (found, list(told)) == (status, ["error"])
    assert SECRET not in hooks.space.log()
    assert TOKEN not in hooks.space.log()


def test_the_newer_of_two_quick_commits_is_what_stands_there_in_the_end(hooks: Hooks, served: LoopbackHub) -> None:
    """It comes while the older one is being merged, and waits until that has found that main has moved."""
    served.add_model("alice/quick", {"README.md": b"mine\n"})
    older = hooks.push("alice/quick", {"merge.yaml": RECIPE})
    reached, go = halted(served)
    assert hooks.send(older)[0] == 200
    assert reached.wait(waiting.HANGS_SECONDS), hooks.space.log()
    newer = hooks.push("alice/quick", {"merge.yaml": RECIPE.replace("0.5", "0.25")})
    assert hooks.send(newer) == (200, {"state": "heard"})
    go.set()
    hooks.until("alice/quick", 1, "A newer merge.yaml is merged in its place")
    hooks.until("alice/quick", 2, "Published")
    assert b"0.25" in served.read("alice/quick", "recipe.yaml")
    assert len(served.commits("alice/quick")) == 4


def test_a_merge_that_main_moved_away_from_is_made_again(hooks: Hooks, served: LoopbackHub) -> None:
    """On top of a commit that has nothing to do with it; that commit's own webhook asks for nothing."""
    served.add_model("alice/moved", {"README.md": b"mine\n"})
    first = hooks.push("alice/moved", {"merge.yaml": RECIPE})
    reached, go = halted(served)
    assert hooks.send(first)[0] == 200
    assert reached.wait(waiting.HANGS_SECONDS), hooks.space.log()
    assert hooks.send(hooks.push("alice/moved", {"notes.txt": "mine"}))[0] == 200
    go.set()
    hooks.until("alice/moved", 1, "There is a newer commit on main")
    hooks.until("alice/moved", 1, "Published")
    assert {"notes.txt", "model-00003-of-00003.safetensors"} <= set(served.files("alice/moved"))
    assert len(served.commits("alice/moved")) == 4


@thorough_only
def test_a_killed_bot_goes_on_by_itself(hooks: Hooks, served: LoopbackHub) -> None:
    """What it was asked before it was killed it does after it is started again, without anybody's help."""
    served.add_model("alice/killed", {"README.md": b"mine\n"})
    held = served.fail(lambda request: "/commit/merge-staging" in request.path, times=99)
    num = hooks.comment("alice", "alice/killed", asking("merge"))
    hooks.until("alice/killed", num, "The merge has begun")
    hooks.space.kill()
    held.left = 0
    hooks.space.start()
    hooks.until("alice/killed", num, "Published")
    assert len(served.commits("alice/killed")) == 2
