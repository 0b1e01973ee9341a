"""Results published to the Hub: shard by shard onto a staging branch, then one commit on main.

Who may not make a branch there, but shall ask by a pull request, has the shards wait in its draft. Never deletes a repo
and never touches main before the last step. Not here: a commit by itself (commits), and reading models (hub).
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import yaml
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelInfo,
)
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import httpx

from merger.errors import BudgetError, DamagedError, MissingError, Problem, UploadError, VerificationError
from merger.models.formats.safetensors import Outlet, WrittenShard, file_sha256
from merger.models.side_files import CARD_NAME, PICTURES, side_files
from merger.safety import secrets
from merger.safety.limits import MEASURED
from merger.safety.names import HINT, is_repo
from merger.stores.hub.commits import MAIN, MOVED, Commit, Operation, in_words, make_commit, refusals
from merger.stores.hub.http import headers_now, patiently, status_of
from merger.stores.hub.ranges import RangeClient
from merger.stores.hub.store import Results, description, shards_of
from merger.stores.hub.uploads import Sending, Target, plain_uploads, refuse_no_streams, streams
from merger.stores.ports import Content, FileInfo, Leftover, Located, Published, refuse_large, write
from merger.stores.scratch import Scratch, sweep

_MODEL_FILE = re.compile(r"\.(safetensors|bin|gguf|pt|pth|index\.json)$|^(adapter_)?config\.json$")
_STAGING, _NOTES, _COPIES, _PULLS = "merge-staging/", "merge-notes/", "copies", "refs/pr/"
_UNDER_WAY, _WAIT = "Merge under way", "merger is at work here: this is opened once all of it is there."
_FORBIDDEN, _GONE = 403, 404
_COPY_BYTES = 16 << 20


@dataclass(frozen=True)
class _Run:
    """What one run is called in its repo."""

    identity: str

    @property
    def ending(self) -> str:
        """What the titles of its commits and pull requests end with."""
        return f"[{self.identity[:16]}]"

    def title(self, message: str) -> str:
        """A title of its own."""
        return f"{message} {self.ending}"


class HubRepo:
    """A repo on the Hub that a result goes to, or lies in.

    Args:
        repo: ``owner/name``.
        private: whether it is private if it has to be created.
        force: replace another model that is there.
        create_pr: open a pull request in place of the commit on main.
        stream: send shards as they are made, without a file on disk.
        token: the writer's token; None takes the environment's.
    """

    def __init__(
        self,
        repo: str,
        private: bool = False,
        force: bool = False,
        create_pr: bool = False,
        stream: bool = False,
        token: str | None = None,
    ) -> None:
        self.name, self.create_pr = repo, create_pr
        self._private, self._force, self._stream = private, force, stream
        self.api = HfApi(token=token)
        self.ranges = RangeClient(token)
        self.results = Results(self.api, self.ranges, repo)

    # ---- what can be asked at any time -------------------------------------------------------------------------------

    def published(self, run: _Run, info: ModelInfo) -> Published | None:
        """What an earlier run of this very plan brought about; --force is for other models, not for equal requests."""
        if not self._force and (done := self.results.published(run.identity, run.ending, info)):
            return done
        return self.requested(run)

    def requested(self, run: _Run) -> Published | None:
        """The pull request with the whole result of this plan, if results are brought by such."""
        pull = self.results.requested(run.identity, run.ending) if self.create_pr else None
        return None if pull is None else Published(self.results.page(pull))

    def files_at(self, revision: str | None = None) -> ModelInfo:
        """What lies there."""
        return patiently(lambda: self.api.model_info(self.name, revision=revision, files_metadata=True))

    def staged(self, run: _Run, branch: str) -> tuple[dict[str, WrittenShard], Located]:
        """The shards that commits of ours put on a branch, which also has what main had when it was made; its files."""
        titles = {item.title for item in self.api.list_repo_commits(self.name, revision=branch)}
        info = self.api.model_info(self.name, revision=branch, files_metadata=True)
        shards = {name: shard for name, shard in shards_of(info).items() if run.title(f"Stage {name}") in titles}
        return shards, self.located(info)

    def located(self, info: ModelInfo) -> Located:
        """What lies there, to be read."""
        files = {item.rfilename: FileInfo(item.size or 0) for item in info.siblings or ()}
        return Located(self.name, self.name, info.sha, files)

    def leftovers(self) -> list[Leftover]:
        """The staging branches of the repo, and our own drafts."""
        with self.refusals():
            try:
                branches = patiently(lambda: self.api.list_repo_refs(self.name)).branches
            except RepositoryNotFoundError:
                hint = "check the spelling; for a private repo set HF_TOKEN"
                raise MissingError(Problem(f"there is no repo {self.name} that we may read", hint=hint)) from None
            names = {item.name: item.name.removeprefix(_STAGING) for item in branches if item.name.startswith(_STAGING)}
            for item in patiently(lambda: list(self.results.pulls("]"))):
                if item.status == "draft" and item.title.startswith(_UNDER_WAY):
                    names[f"{_PULLS}{item.num}"] = item.title.rpartition("[")[2].removesuffix("]")
            return [self._leftover(*found) for found in names.items()]

    def _leftover(self, branch: str, identity: str) -> Leftover:
        staged, _ = patiently(lambda: self.staged(_Run(identity), branch))
        return Leftover(branch, len(staged), sum(shard.size for shard in staged.values()))

    def clean(self, leftover: Leftover) -> None:
        """Remove one of them: never another branch, never a repo; a draft is closed."""
        assert leftover.where.startswith((_STAGING, _PULLS))
        with self.refusals():
            if leftover.where.startswith(_PULLS):
                self.close_pull(int(leftover.where.removeprefix(_PULLS)), "Its run is given up.")
            else:
                patiently(lambda: self.api.delete_branch(self.name, branch=leftover.where))

    def check_card(self, text: str) -> None:
        """Ask the Hub; where it gives no answer, the commit will ask again."""
        secrets.refuse_tokens({CARD_NAME: text})
        try:
            ModelCard(text).validate()
        except (HfHubHTTPError, httpx.HTTPError):
            pass
        except (ValueError, TypeError, yaml.YAMLError) as error:
            what = f"the Hub refuses the card of {self.name}: {_plain(str(error))[:300]}"
            raise UploadError(Problem(what, hint="change publish: in the recipe, or its template")) from None

    def close_pull(self, pull: int, words: str) -> None:
        """Close a pull request of ours, and say why."""
        patiently(lambda: self.api.change_discussion_status(self.name, pull, "closed", comment=words))

    def amend(self, small: Mapping[str, bytes], message: str, seen: Located) -> Published:
        """One commit on main, if main is still what was seen; that commit's name makes the title one of its kind."""
        head, scratch = seen.commit or "", Scratch()
        try:
            with self.refusals():
                sending = patiently(lambda: plain_uploads(Target(self.api, self.name), scratch))
                operations = [add(self.api, sending, scratch, *file) for file in small.items()]
                commit = make_commit(self.results, Commit(operations, _Run(head).title(message), parent=head))
        finally:
            scratch.close()
        return Published(self.results.page(), commit.oid)

    def refusals(self) -> AbstractContextManager[None]:
        """Turn the client's errors into a sentence and a next step."""
        return refusals(lambda error: in_words(error, self.name, self.create_pr))

    # ---- a run -------------------------------------------------------------------------------------------------------

    def open(self, identity: str, shared: bool = False) -> Staging | Published:
        """Create the repo if there is none, see what is in it, and open the staging branch or find it again."""
        if not is_repo(self.name):
            raise UploadError(Problem(f"{self.name!r} is no repo's name on the Hub", hint=HINT))
        sweep()  # what killed runs left takes the room of what is to come
        if self._stream:
            refuse_no_streams()
        run = _Run(identity)
        with self.refusals():
            patiently(lambda: self.api.create_repo(self.name, private=self._private, exist_ok=True))
            info = self.files_at()
            if done := patiently(lambda: self.published(run, info)):
                self._remove_left(run)
                return done
        old = [item.rfilename for item in info.siblings or ()]
        self._refuse_loss(old, is_private=bool(info.private))
        return Staging(self, run, info.sha or "", old, self._stream)

    def _remove_left(self, run: _Run) -> None:
        """The staging branch of a run that was killed when all else was done."""
        branch = f"{_STAGING}{run.identity[:16]}"
        if any(item.name == branch for item in patiently(lambda: self.api.list_repo_refs(self.name)).branches):
            patiently(lambda: self.remove_branch(branch))

    def remove_branch(self, branch: str) -> None:
        """Remove it; if it is gone, an earlier try did that and the answer was lost."""
        try:
            self.api.delete_branch(self.name, branch=branch)
        except HfHubHTTPError as error:
            if status_of(error) != _GONE:
                raise

    def _refuse_loss(self, files: Sequence[str], is_private: bool) -> None:
        if self._private and not is_private:
            what = f"{self.name} is there already and public, but the recipe says private"
            raise UploadError(Problem(what, hint="make it private on the Hub, or publish to another name"))
        models = [name for name in files if _MODEL_FILE.search(name)]
        if models and not self._force:
            what = f"{self.name} already holds a model ({models[0]})"
            raise UploadError(Problem(what, hint="publish to another name, or replace it in one commit with --force"))


class Staging:
    """One run's work on a repo: shards go to a branch of its own, or to the draft of a pull request.

    Args:
        repo: the repo.
        run: what the run is called there.
        head: the commit that main is at.
        old: the files that main has.
        stream: send shards as they are made.

    Raises:
        UploadError: the branch cannot be opened, or shards cannot be sent.
    """

    def __init__(self, repo: HubRepo, run: _Run, head: str, old: Sequence[str], stream: bool) -> None:
        self._repo, self._api, self._run, self._head, self._old = repo, repo.api, run, head, old
        self._branch, self._draft = f"{_STAGING}{run.identity[:16]}", None
        self._scratch, self._gate = Scratch(), Lock()
        self._under_way: set[Future[None]] = set()
        with self._refusals():
            to = Target(repo.api, repo.name, repo.create_pr)
            self._sending: Sending = patiently(
                lambda: streams(to, self._refusals) if stream else plain_uploads(to, self._scratch)
            )
            self._uploads = ThreadPoolExecutor(self._sending.at_once, thread_name_prefix="upload")
            self._branch, self._draft = patiently(self._open_branch)
            self._shards, self._found = patiently(lambda: repo.staged(run, self._branch))

    def _open_branch(self) -> tuple[str, int | None]:
        """The staging branch; where we may not make one, a draft of the pull request, which is a branch of its own."""
        try:
            self._api.create_branch(self._repo.name, branch=self._branch, revision=self._head, exist_ok=True)
        except HfHubHTTPError as error:
            if not self._repo.create_pr or status_of(error) != _FORBIDDEN:
                raise
            draft = self._open_draft()
            return f"{_PULLS}{draft}", draft
        return self._branch, None

    def _open_draft(self) -> int:
        title = self._run.title(_UNDER_WAY)
        there = (item.num for item in self._repo.results.pulls(title) if item.status == "draft")
        if (known := next(there, None)) is not None:
            return known
        return int(self._api.create_pull_request(self._repo.name, title=title, description=_WAIT).num)

    def held(self) -> Mapping[str, WrittenShard]:
        """The shards on the staging branch."""
        return dict(self._shards)

    def reserve(self, needed: int) -> None:
        """Look at the disk of temporary files."""
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        if free < needed:
            what = f"{needed:,} bytes of disk are needed for the work, {free:,} are free in {folder}"
            raise BudgetError(Problem(what, hint="set TMPDIR to a larger disk, or use a smaller --shard-size"))

    def open(self, name: str) -> Outlet:
        """A file in a temporary folder, or a stream; not before at most one other shard is on this disk."""
        self._settle(but=1)
        return self._sending.open(name)

    def take(self, shard: WrittenShard, note: str = "") -> None:
        """Upload the shard while what follows is made."""
        self._shards[shard.name] = shard
        self._under_way.add(self._uploads.submit(self._stage, shard, note))

    def _stage(self, shard: WrittenShard, note: str) -> None:
        """The note goes into the same commit, so that there is none without the other; it never reaches main."""
        additions = [self._sending.shard(shard)]
        if note:
            additions.append(self._add(_note(shard.name), note.encode()))
        self._commit(additions, f"Stage {shard.name}")
        self._sending.committed(shard.name)

    def _add(self, name: str, content: Content) -> CommitOperationAdd:
        return add(self._api, self._sending, self._scratch, name, content)

    def _commit(self, operations: Sequence[Operation], message: str) -> CommitInfo:
        """Onto the branch, where parts of the same run commit, too."""
        return make_commit(self._repo.results, Commit(operations, self._run.title(message), self._branch), self._gate)

    def notes(self) -> Iterator[str]:
        """Those that lay beside the shards on the staging branch when it was found again."""
        for name in self._shards:
            if (file := self._found.files.get(_note(name))) is not None:
                refuse_large(self._found, _note(name), file.size, MEASURED)
                content = bytearray(file.size)
                with self._refusals():
                    self._repo.ranges.fill(self._found, _note(name), 0, memoryview(content))
                yield content.decode()

    def _settle(self, but: int = 0) -> None:
        """Wait until all uploads but so many are over, and tell of one that failed."""
        while True:
            patience = None if len(self._under_way) > but else 0
            over, self._under_way = wait(self._under_way, patience, FIRST_COMPLETED)
            if not over:
                return
            with self._refusals():
                for upload in over:
                    upload.result()

    def forget(self, names: Sequence[str]) -> None:
        """Remove them from the staging branch."""
        self._settle()
        if names:
            with self._refusals():
                self._commit([CommitOperationDelete(name) for name in names], "Take back shards")

    def export(self, folder: Path) -> None:
        """Copies of what is on the staging branch."""
        self._settle()
        with self._refusals():
            staged = self._repo.located(self._repo.files_at(self._branch))
            for shard in self._shards.values():
                self._copy(staged, shard, folder / shard.name)

    def _copy(self, staged: Located, shard: WrittenShard, to: Path) -> None:
        with to.open("wb", buffering=0) as file:
            for start in range(0, shard.size, _COPY_BYTES):
                part = bytearray(min(_COPY_BYTES, shard.size - start))
                self._repo.ranges.fill(staged, shard.name, start, memoryview(part))
                file.write(part)
        if file_sha256(to) != shard.sha256:
            what = f"{shard.name} did not come back from {self._branch} as it was made"
            raise DamagedError(Problem(what, hint="remove that branch with merger clean, and run it again"))

    # ---- the end -----------------------------------------------------------------------------------------------------

    def finish(self, files: Mapping[str, Content], message: str) -> Published:
        """One commit on main (or one pull request), checked; then the staging branch is removed."""
        self._settle()
        with self._refusals():
            done = patiently(lambda: self._repo.requested(self._run))
            if done is not None:  # by a run that was faster
                self._step_back(self._draft, done.where)
                self._unstage()
                return done
            commit = self._publish(files, message)
        where = commit.pr_url or self._repo.results.page(self._draft)
        with self._refusals(f"{where} is made (commit {commit.oid}), but what follows went wrong: "):
            if self._draft is not None:
                self._open_request(self._draft, message, files)
            if not self._repo.create_pr:
                self._check(commit.oid)
            elif first := patiently(lambda: self._repo.requested(self._run)):
                self._step_back(commit.pr_num or self._draft, first.where)
                where = first.where
            self._unstage()
        return Published(where, commit.oid)

    def _publish(self, files: Mapping[str, Content], message: str) -> CommitInfo:
        """What the whole result takes, in one commit: on main, in a pull request, or in the draft of one."""
        shards = list(self._shards)
        # An old tokenizer, template or picture beside the new model would be taken for its own.
        others = (name for name in self._old if _MODEL_FILE.search(name) or name.startswith(PICTURES))
        old = {*side_files(self._old, {}), *others}
        operations: list[Operation] = [
            *(CommitOperationDelete(name) for name in sorted(old - {*shards, *files})),
            *(self._add(name, content) for name, content in files.items()),
        ]
        if self._draft is not None:
            staged = self._repo.located(self._repo.files_at(self._branch)).files
            operations += [CommitOperationDelete(name) for name in staged if name.startswith(_NOTES)]
            return self._commit(operations, message)
        operations += [CommitOperationCopy(name, name, src_revision=self._branch) for name in shards]
        names = [operation.path_in_repo for operation in operations]
        request = self._description(names) if self._repo.create_pr else None
        wanted = Commit(operations, self._run.title(message), MAIN, self._head, request)
        return make_commit(self._repo.results, wanted, self._gate)

    def _description(self, files: Sequence[str]) -> str:
        return description(self._repo.name, self._run.identity, self._shards.values(), files)

    def _open_request(self, draft: int, message: str, files: Mapping[str, Content]) -> None:
        """Now that all of it is there."""
        words, repo = self._description(list(files)), self._repo.name
        patiently(lambda: self._api.rename_discussion(repo, draft, self._run.title(message)))
        patiently(lambda: self._api.change_discussion_status(repo, draft, "open", comment=words))

    def _step_back(self, pull: int | None, first: str) -> None:
        """Of equal pull requests, which runs opened at the same moment, the earliest stays."""
        if pull is not None and self._repo.results.page(pull) != first:
            words = f"Equal to {first}, which another run of the same merge opened at the same time."
            self._repo.close_pull(pull, words)

    def _check(self, commit: str) -> None:
        """What stands on main must be what was made."""
        there = shards_of(self._repo.files_at(commit))
        for shard in self._shards.values():
            if shard.name not in there or there[shard.name].sha256 != shard.sha256:
                what = f"{self._repo.name}: {shard.name} on main is not the file that was made"
                raise VerificationError(Problem(what, hint=f"the shards are still on the branch {self._branch}"))

    def _unstage(self) -> None:
        """Remove the staging branch, and all that is held for it here."""
        if self._draft is None:
            patiently(lambda: self._repo.remove_branch(self._branch))
        self._close()

    def leave(self) -> None:
        """Leave main as it was; the staging branch stays, for another run."""
        try:
            self._settle()
        finally:
            self._close()

    def _close(self) -> None:
        self._uploads.shutdown(wait=True, cancel_futures=True)
        self._sending.close()
        self._scratch.close()

    # ---- words -------------------------------------------------------------------------------------------------------

    def _refusals(self, so_far: str = "") -> AbstractContextManager[None]:
        """Turn the client's errors into a sentence and a next step, also where another run is the cause."""
        return refusals(self._in_words, so_far)

    def _in_words(self, error: Exception) -> Problem:
        is_gone = isinstance(error, RevisionNotFoundError)
        if (is_gone or status_of(error) == MOVED) and (done := self._meanwhile()):
            what = f"another run of this merge was faster: {done.where} is made"
            return Problem(what, hint="nothing is left to do: the same command again only says so")
        if not is_gone:
            return in_words(error, self._repo.name, self._repo.create_pr)
        what = f"the branch {self._branch} of {self._repo.name} is gone: another run ended, or merger clean removed it"
        return Problem(what, hint="let one run at a time write there, and run it again")

    def _meanwhile(self) -> Published | None:
        """What another run of this very plan has brought about since we began."""
        with suppress(httpx.HTTPError, OSError, ValueError):
            info, run = self._repo.files_at(), self._run
            results = self._repo.results
            return patiently(lambda: results.published(run.identity, run.ending, info) or self._repo.requested(run))
        return None


def add(api: HfApi, sending: Sending, scratch: Scratch, name: str, content: Content) -> CommitOperationAdd:
    """What a commit takes to add a small file: the one place where such files leave.

    What is copied lies on this disk until the commit is made.

    Raises:
        LeakError: a token stands in it.
    """
    headers_now(api.token)  # by now the client may have renewed its token
    if isinstance(content, bytes):
        secrets.refuse_tokens({name: content})
        return sending.small(name, content)
    path = scratch.folder() / _COPIES / name
    write(content, path)
    return sending.file(name, path)


def _plain(words: str) -> str:
    """What is said about a card, on one line: the Hub's answer is JSON."""
    with suppress(ValueError, KeyError, TypeError):
        words = "; ".join(str(item["message"]) for item in json.loads(words)["errors"])
    return " ".join(words.split())


def _note(shard: str) -> str:
    """Where on the staging branch the note of a shard lies."""
    return f"{_NOTES}{shard}.json"
