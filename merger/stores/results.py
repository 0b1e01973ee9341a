"""Results of ours on the Hub, told from others': a commit that holds a whole one, and pull requests that bring it.

A title alone proves nothing, for anyone may open a pull request under any. Not here: making them (staging).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import yaml
from huggingface_hub import Discussion, HfApi, ModelInfo, constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from merger.checkpoints.checkpoint import SUFFIX
from merger.checkpoints.plain_yaml import load
from merger.checkpoints.shard import Written
from merger.checkpoints.sidefiles import LOCK_NAME
from merger.safety.limits import LOCK
from merger.stores.patience import is_passing
from merger.stores.ports import FileInfo, Located, Published
from merger.stores.ranges import RangeClient


@dataclass
class Results:
    """What there is of a result in a repo.

    Args:
        api: the client, with the writer's token.
        ranges: reads files with it.
        repo: ``owner/name``.
    """

    api: HfApi
    ranges: RangeClient
    repo: str

    def stands(self, identity: str, info: ModelInfo) -> bool:
        """Whether the whole result lies at a commit: a lock of this identity, and each shard that it lists."""
        listed = self._listed(identity, info)
        there = {name: shard.sha256 for name, shard in shards_of(info).items()}
        return bool(listed) and listed.items() <= there.items()

    def _listed(self, identity: str, info: ModelInfo) -> Mapping[str, str]:
        """The shards by the lock at a commit; none where it has no lock, or another merge's."""
        files = {item.rfilename: FileInfo(item.size or 0) for item in info.siblings or ()}
        size = files[LOCK_NAME].size if LOCK_NAME in files else 0
        if not 0 < size <= LOCK.most:
            return {}
        text = bytearray(size)
        try:
            self.ranges.fill(Located(self.repo, self.repo, info.sha, files), LOCK_NAME, 0, memoryview(text))
            content = load(text.decode(), LOCK)
            found = {str(item["file"]): str(item["sha256"]) for item in content["output"]}
            is_ours = content.get("identity") == identity
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
            return {}
        return {name: sha256 for name, sha256 in found.items() if name.endswith(SUFFIX)} if is_ours else {}

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

    def requested(self, identity: str, ending: str) -> int | None:
        """The number of our own open pull request that brings the whole result."""
        for item in self.pulls(ending):
            ref = f"refs/pr/{item.num}"
            info = self.api.model_info(self.repo, revision=ref, files_metadata=True)
            if item.status == "open" and self.stands(identity, info):
                return item.num
        return None

    def page(self, pull: int | None = None) -> str:
        """Where people look at the repo, or at a pull request."""
        return f"{constants.ENDPOINT}/{self.repo}" + ("" if pull is None else f"/discussions/{pull}")

    def published(self, identity: str, ending: str, info: ModelInfo) -> Published | None:
        """The commit of main that made the result, if it still stands there."""
        if not self.stands(identity, info):
            return None
        # whoever merges a pull request adds its number to the title
        commits = self.api.list_repo_commits(self.repo)
        return Published(self.page(), next((item.commit_id for item in commits if ending in item.title), info.sha))


def shards_of(info: ModelInfo) -> dict[str, Written]:
    """The files of tensors at a commit."""
    files = ((item.rfilename, item.size or 0, item.lfs) for item in info.siblings or ())
    return {name: Written(name, size, lfs.sha256) for name, size, lfs in files if lfs and name.endswith(SUFFIX)}


def description(repo: str, identity: str, shards: Collection[Written], files: Collection[str]) -> str:
    """What a pull request says of itself."""
    size = sum(shard.size for shard in shards)
    known = {
        "recipe.yaml": "what was asked for",
        LOCK_NAME: "the commits and checksums of all that it was made of, and of what came out",
    }
    lines = [
        "merger made this from a recipe, and changed nothing on main.",
        "",
        f"- plan: `{identity}`",
        f"- {len(shards)} files of tensors, {size:,} bytes",
        *(f"- `{name}`: {what}" for name, what in known.items() if name in files),
        "",
        "To make a sample of its tensors again and compare, with the number of this pull request in place of N:",
        "",
        f"    merger verify hf://{repo}@refs/pr/N",
    ]
    return "\n".join(lines)
