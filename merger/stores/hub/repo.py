"""A repo of results on the Hub: what lies on its main, on our branches and in our pull requests.

Not here: what a run changes there (staging).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import yaml
from huggingface_hub import Discussion, HfApi, ModelInfo, constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from merger.models.checkpoint import SUFFIX
from merger.models.formats.safetensors import WrittenShard
from merger.models.gguf.layout import ENDING
from merger.models.plain_yaml import load_yaml
from merger.models.side_files import LOCK_NAME
from merger.safety.limits import LOCK
from merger.safety.numbers import size
from merger.stores.hub.http import is_passing, patiently
from merger.stores.hub.ranges import RangeClient
from merger.stores.ports import FileInfo, Located, Published

_SHARDS = (SUFFIX, ENDING)
STAGING, PULLS = "merge-staging/", "refs/pr/"
UNDER_WAY = "Merge under way"


@dataclass(frozen=True)
class Run:
    """What one run is called in its repo."""

    identity: str

    @property
    def ending(self) -> str:
        """What the titles of its commits and pull requests end with."""
        return f"[{self.identity[:16]}]"

    @property
    def branch(self) -> str:
        """The staging branch of its own."""
        return f"{STAGING}{self.identity[:16]}"

    def title(self, message: str) -> str:
        """A title of its own."""
        return f"{message} {self.ending}"


@dataclass
class Results:
    """What there is of results in a repo, and can be asked at any time.

    Args:
        api: the client, with the writer's token.
        ranges: reads files with it.
        repo: ``owner/name``.
        by_request: results are brought by pull requests.
    """

    api: HfApi
    ranges: RangeClient
    repo: str
    by_request: bool = False

    def files_at(self, revision: str | None = None) -> ModelInfo:
        """What lies there."""
        return patiently(lambda: self.api.model_info(self.repo, revision=revision, files_metadata=True))

    def located(self, info: ModelInfo) -> Located:
        """What lies there, to be read."""
        files = {item.rfilename: FileInfo(item.size or 0) for item in info.siblings or ()}
        return Located(self.repo, self.repo, info.sha, files)

    def staged(self, run: Run, branch: str) -> tuple[dict[str, WrittenShard], Located]:
        """The shards that commits of ours put on a branch, which also has what main had when it was made; its files."""
        titles = {item.title for item in self.api.list_repo_commits(self.repo, revision=branch)}
        info = self.api.model_info(self.repo, revision=branch, files_metadata=True)
        shards = {name: shard for name, shard in shards_of(info).items() if run.title(f"Stage {name}") in titles}
        return shards, self.located(info)

    def unfinished(self) -> dict[str, Run]:
        """The staging branches, and our own drafts, with the runs that they are of."""
        branches = (item.name for item in patiently(lambda: self.api.list_repo_refs(self.repo)).branches)
        found = {name: Run(name.removeprefix(STAGING)) for name in branches if name.startswith(STAGING)}
        for item in patiently(lambda: list(self.pulls("]"))):
            if item.status == "draft" and item.title.startswith(UNDER_WAY):
                found[f"{PULLS}{item.num}"] = Run(item.title.rpartition("[")[2].removesuffix("]"))
        return found

    def stands(self, identity: str, info: ModelInfo) -> bool:
        """Whether the whole result lies at a commit: a lock of this identity, and each shard that it lists."""
        listed = self._listed(identity, info)
        there = {name: shard.sha256 for name, shard in shards_of(info).items()}
        return bool(listed) and listed.items() <= there.items()

    def _listed(self, identity: str, info: ModelInfo) -> Mapping[str, str]:
        """The shards by the lock at a commit; none where it has no lock, or another merge's."""
        place = self.located(info)
        length = place.files[LOCK_NAME].size if LOCK_NAME in place.files else 0
        if not 0 < length <= LOCK.most:
            return {}
        text = bytearray(length)
        try:
            self.ranges.fill(place, LOCK_NAME, 0, memoryview(text))
            content = load_yaml(text.decode(), LOCK)
            found = {str(item["file"]): str(item["sha256"]) for item in content["output"]}
            is_ours = content.get("identity") == identity
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
            return {}
        return {name: sha256 for name, sha256 in found.items() if name.endswith(_SHARDS)} if is_ours else {}

    @cached_property
    def me(self) -> str | None:
        """Whose token we have; None: the Hub does not say, as of a token without a user."""
        try:
            name = self.api.whoami()["name"]
        except LocalTokenNotFoundError:
            return None
        except HfHubHTTPError as error:
            if is_passing(error):
                raise
            return None
        return name if isinstance(name, str) else None

    def pulls(self, ending: str) -> Iterator[Discussion]:
        """Our own pull requests that are open or drafts, and whose titles end so; the earliest first."""
        if self.me is None:
            return
        found = self.api.get_repo_discussions(
            self.repo, author=self.me, discussion_type="pull_request", discussion_status="open"
        )
        ours = [item for item in found if item.title.endswith(ending) and item.author == self.me]
        yield from sorted(ours, key=lambda item: item.num)

    def requested(self, run: Run) -> Published | None:
        """Our own pull request that is open and brings the whole result, if results are brought by such."""
        for item in self.pulls(run.ending) if self.by_request else ():
            info = self.api.model_info(self.repo, revision=f"{PULLS}{item.num}", files_metadata=True)
            if item.status == "open" and self.stands(run.identity, info):
                return Published(self.page(item.num))
        return None

    def close_pull(self, pull: int, words: str) -> None:
        """Close a pull request of ours, and say why."""
        patiently(lambda: self.api.change_discussion_status(self.repo, pull, "closed", comment=words))

    def page(self, pull: int | None = None) -> str:
        """Where people look at the repo, or at a pull request."""
        return f"{constants.ENDPOINT}/{self.repo}" + ("" if pull is None else f"/discussions/{pull}")

    def published(self, run: Run, info: ModelInfo) -> Published | None:
        """The commit of main that made the result, if it still stands there."""
        if not self.stands(run.identity, info):
            return None
        # whoever merges a pull request adds its number to the title
        commits = self.api.list_repo_commits(self.repo)
        return Published(self.page(), next((item.commit_id for item in commits if run.ending in item.title), info.sha))


def shards_of(info: ModelInfo) -> dict[str, WrittenShard]:
    """The files of tensors at a commit."""
    files = ((item.rfilename, item.size or 0, item.lfs) for item in info.siblings or ())
    return {name: WrittenShard(name, many, lfs.sha256) for name, many, lfs in files if lfs and name.endswith(_SHARDS)}


def description(repo: str, run: Run, shards: Collection[WrittenShard], files: Collection[str]) -> str:
    """What a pull request says of itself."""
    known = {
        "recipe.yaml": "what was asked for",
        LOCK_NAME: "the commits and checksums of all that it was made of, and of what came out",
    }
    lines = [
        "merger made this from a recipe, and changed nothing on main.",
        "",
        f"- plan: `{run.identity}`",
        f"- {len(shards)} files of tensors, {size(sum(shard.size for shard in shards))}",
        *(f"- `{name}`: {what}" for name, what in known.items() if name in files),
        "",
        "To make a sample of its tensors again and compare, with the number of this pull request in place of N:",
        "",
        f"    merger verify hf://{repo}@refs/pr/N",
    ]
    return "\n".join(lines)
