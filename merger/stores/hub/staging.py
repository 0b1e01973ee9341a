"""Results published to the Hub: shard by shard onto a staging branch, then one commit on main.

Who may not make a branch there, but shall ask by a pull request, has the shards wait in its draft. Never deletes a repo
and never touches main before the last step. Not here: a commit by itself (commits), and reading models (hub).
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Lock

import yaml
from huggingface_hub import CommitInfo, CommitOperationCopy, CommitOperationDelete, HfApi, ModelCard, ModelInfo
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import httpx

from merger.errors import (
    BudgetError,
    DamagedError,
    MissingError,
    OccupiedError,
    Problem,
    UploadError,
    VerificationError,
)
from merger.models.formats.safetensors import Outlet, WrittenShard, file_sha256
from merger.models.side_files import CARD_NAME, PICTURES, side_files
from merger.safety import secrets
from merger.safety.limits import MEASURED
from merger.safety.names import HINT, is_repo
from merger.safety.numbers import DOWN, UP, size
from merger.stores.hub.commits import MAIN, MOVED, Commit, Operation, in_words, make_commit, refusals
from merger.stores.hub.http import patiently, status_of
from merger.stores.hub.ranges import RangeClient
from merger.stores.hub.repo import PULLS, STAGING, UNDER_WAY, Results, Run, description, shards_of
from merger.stores.hub.uploads import Target, Uploads, refuse_no_streams
from merger.stores.ports import Content, Leftover, Located, Published, in_folder, refuse_large
from merger.stores.scratch import sweep

_MODEL_FILE = re.compile(r"\.(safetensors|bin|gguf|pt|pth|index\.json)$|^(adapter_)?config\.json$")
_NOTES = "merge-notes/"
_WAIT = "merger is at work here: this is opened once all of it is there."
_FORBIDDEN, _GONE = 403, 404
_COPY_BYTES = 16 << 20


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
        self.name = repo
        self._private, self._force, self._stream = private, force, stream
        self._results = Results(HfApi(token=token), RangeClient(token), repo, create_pr)

    def open(self, identity: str, shared: bool = False) -> Staging | Published:
        """Create the repo if there is none, see what is in it, and open the staging branch or find it again."""
        if not is_repo(self.name):
            raise UploadError(Problem(f"{self.name!r} is no repo's name on the Hub", hint=HINT))
        sweep()  # what killed runs left takes the room of what is to come
        if self._stream:
            refuse_no_streams()
        repo, run = self._results, Run(identity)
        with self._refusals():
            patiently(lambda: repo.api.create_repo(self.name, private=self._private, exist_ok=True))
            info = repo.files_at()
            if done := patiently(lambda: self._done(run, info)):
                self._remove_left(run)
                return done
        self._refuse_other(info)
        return Staging(repo, run, info.sha or "", [item.rfilename for item in info.siblings or ()], self._stream)

    def refuse_loss(self, identity: str) -> None:
        """As a run would be refused, of what all may see who have our token."""
        with self._refusals():
            try:
                info = self._results.files_at()
            except RepositoryNotFoundError:
                return
            if patiently(lambda: self._done(Run(identity), info)):
                return
        self._refuse_other(info)

    def _done(self, run: Run, info: ModelInfo) -> Published | None:
        """What an earlier run of this very plan brought about; --force is for other models, not for equal requests."""
        done = None if self._force else self._results.published(run, info)
        return done or self._results.requested(run)

    def _remove_left(self, run: Run) -> None:
        """The staging branch of a run that was killed when all else was done."""
        refs = patiently(lambda: self._results.api.list_repo_refs(self.name))
        if any(item.name == run.branch for item in refs.branches):
            _Branch(self._results, run, run.branch).remove()

    def _refuse_other(self, info: ModelInfo) -> None:
        if self._private and not info.private:
            what = f"{self.name} is there already and public, but the recipe says private"
            raise UploadError(Problem(what, hint="make it private on the Hub, or publish to another name"))
        models = [item.rfilename for item in info.siblings or () if _MODEL_FILE.search(item.rfilename)]
        if models and not self._force:
            what = f"{self.name} already holds a model ({models[0]})"
            raise OccupiedError(Problem(what, hint="publish to another name, or replace it in one commit with --force"))

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

    def amend(self, small: Mapping[str, bytes], message: str, seen: Located) -> Published:
        """One commit on main, if main is still what was seen; that commit's name makes the title one of its kind."""
        head, repo = seen.commit or "", self._results
        with self._refusals(), closing(Uploads(Target(repo.api, self.name), False, self._refusals)) as uploads:
            operations = [uploads.add(*file) for file in small.items()]
            commit = make_commit(repo, Commit(operations, Run(head).title(message), parent=head))
        return Published(repo.page(), commit.oid)

    def leftovers(self) -> list[Leftover]:
        """The staging branches of the repo, and our own drafts."""
        with self._refusals():
            try:
                found = self._results.unfinished()
            except RepositoryNotFoundError:
                hint = "check the spelling; for a private repo set HF_TOKEN"
                raise MissingError(Problem(f"there is no repo {self.name} that we may read", hint=hint)) from None
            return [self._leftover(*each) for each in found.items()]

    def _leftover(self, branch: str, run: Run) -> Leftover:
        staged, _ = patiently(lambda: self._results.staged(run, branch))
        return Leftover(branch, len(staged), sum(shard.size for shard in staged.values()))

    def clean(self, leftover: Leftover) -> None:
        """Remove one of them: never another branch, never a repo; a draft is closed."""
        assert leftover.where.startswith((STAGING, PULLS))
        with self._refusals():
            if leftover.where.startswith(PULLS):
                self._results.close_pull(int(leftover.where.removeprefix(PULLS)), "Its run is given up.")
            else:
                patiently(lambda: self._results.api.delete_branch(self.name, branch=leftover.where))

    def _refusals(self) -> AbstractContextManager[None]:
        return refusals(lambda error: in_words(error, self.name, self._results.by_request))


# ---- a run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Branch:
    """Where a run's shards wait: a branch of its own, or the draft of a pull request, which is one, too."""

    repo: Results
    run: Run
    name: str
    draft: int | None = None
    gate: Lock = field(default_factory=Lock)

    def open(self, head: str) -> _Branch:
        """Make it where main is, or find it again; where we may not make one, such a draft in its place."""
        try:
            self.repo.api.create_branch(self.repo.repo, branch=self.name, revision=head, exist_ok=True)
        except HfHubHTTPError as error:
            if not self.repo.by_request or status_of(error) != _FORBIDDEN:
                raise
            draft = self._open_draft()
            return replace(self, name=f"{PULLS}{draft}", draft=draft)
        return self

    def _open_draft(self) -> int:
        title = self.run.title(UNDER_WAY)
        there = (item.num for item in self.repo.pulls(title) if item.status == "draft")
        if (known := next(there, None)) is not None:
            return known
        return int(self.repo.api.create_pull_request(self.repo.repo, title=title, description=_WAIT).num)

    def commit(self, operations: Sequence[Operation], message: str) -> CommitInfo:
        """Where parts of the same run commit, too."""
        return make_commit(self.repo, Commit(operations, self.run.title(message), self.name), self.gate)

    def files(self) -> Located:
        return self.repo.located(self.repo.files_at(self.name))

    def remove(self) -> None:
        """A draft stays, as the pull request; a branch that is gone an earlier try removed, whose answer was lost."""
        if self.draft is None:
            patiently(self._delete)

    def _delete(self) -> None:
        try:
            self.repo.api.delete_branch(self.repo.repo, branch=self.name)
        except HfHubHTTPError as error:
            if status_of(error) != _GONE:
                raise

    def refusals(self, so_far: str = "") -> AbstractContextManager[None]:
        """Turn the client's errors into a sentence and a next step, also where another run is the cause."""
        return refusals(self._in_words, so_far)

    def _in_words(self, error: Exception) -> Problem:
        is_gone, repo = isinstance(error, RevisionNotFoundError), self.repo.repo
        if (is_gone or status_of(error) == MOVED) and (done := self._meanwhile()):
            what = f"another run of this merge was faster: {done.where} is made"
            return Problem(what, hint="nothing is left to do: the same command again only says so")
        if not is_gone:
            return in_words(error, repo, self.repo.by_request)
        what = f"the branch {self.name} of {repo} is gone: another run ended, or merger clean removed it"
        return Problem(what, hint="let one run at a time write there, and run it again")

    def _meanwhile(self) -> Published | None:
        """What another run of this very plan has brought about since we began."""
        with suppress(httpx.HTTPError, OSError, ValueError):
            info = self.repo.files_at()
            return patiently(lambda: self.repo.published(self.run, info) or self.repo.requested(self.run))
        return None


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

    def __init__(self, repo: Results, run: Run, head: str, old: Sequence[str], stream: bool) -> None:
        self._repo, self._run, self._head, self._old = repo, run, head, old
        self._branch = _Branch(repo, run, run.branch)
        with self._refusals():
            self._uploads = Uploads(Target(repo.api, repo.repo, repo.by_request), stream, self._refusals)
            self._branch = patiently(lambda: self._branch.open(head))
            self._shards, self._found = patiently(lambda: repo.staged(run, self._branch.name))

    def _refusals(self) -> AbstractContextManager[None]:
        return self._branch.refusals()

    def held(self) -> Mapping[str, WrittenShard]:
        """The shards on the staging branch."""
        return dict(self._shards)

    def reserve(self, needed: int) -> None:
        """Look at the disk of temporary files."""
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        if free < needed:
            what = f"the work needs {size(needed, UP)} of disk, and {size(free, DOWN)} are free in {folder}"
            raise BudgetError(Problem(what, hint="set TMPDIR to a larger disk, or use a smaller --shard-size"))

    def open(self, name: str) -> Outlet:
        """A file in a temporary folder, or a stream; not before at most one other shard is on this disk."""
        self._uploads.settle(but=1)
        return self._uploads.sending.open(name)

    def take(self, shard: WrittenShard, note: str = "") -> None:
        """Upload the shard while what follows is made."""
        self._shards[shard.name] = shard
        self._uploads.begin(partial(self._stage, shard, note))

    def _stage(self, shard: WrittenShard, note: str) -> None:
        """The note goes into the same commit, so that there is none without the other; it never reaches main."""
        additions = [self._uploads.sending.shard(shard)]
        if note:
            additions.append(self._uploads.add(_note(shard.name), note.encode()))
        self._branch.commit(additions, f"Stage {shard.name}")
        self._uploads.sending.committed(shard.name)

    def notes(self) -> Iterator[str]:
        """Those that lay beside the shards on the staging branch when it was found again."""
        for name in self._shards:
            if (file := self._found.files.get(_note(name))) is not None:
                refuse_large(self._found, _note(name), file.size, MEASURED)
                content = bytearray(file.size)
                with self._refusals():
                    self._repo.ranges.fill(self._found, _note(name), 0, memoryview(content))
                yield content.decode()

    def forget(self, names: Sequence[str]) -> None:
        """Remove them from the staging branch."""
        self._uploads.settle()
        if names:
            with self._refusals():
                self._branch.commit([CommitOperationDelete(name) for name in names], "Take back shards")

    def export(self, folder: Path) -> None:
        """Copies of what is on the staging branch."""
        self._uploads.settle()
        with self._refusals():
            staged = self._branch.files()
            for shard in self._shards.values():
                _copy(self._repo.ranges, staged, shard, folder)
                if file_sha256(folder / shard.name) != shard.sha256:
                    what = f"{shard.name} did not come back from {self._branch.name} as it was made"
                    raise DamagedError(Problem(what, hint="remove that branch with merger clean, and run it again"))

    def finish(self, files: Mapping[str, Content], message: str) -> Published:
        """One commit on main (or one pull request), checked; then the staging branch is removed."""
        self._uploads.settle()
        branch, repo, run = self._branch, self._repo, self._run
        with branch.refusals():
            done = patiently(lambda: repo.requested(run))
            if done is not None:  # by a run that was faster
                _step_back(repo, branch.draft, done.where)
                self._unstage()
                return done
            commit = self._publish(files, message)
        where = commit.pr_url or repo.page(branch.draft)
        with branch.refusals(f"{where} is made (commit {commit.oid}), but what follows went wrong: "):
            if branch.draft is not None:
                self._open_request(branch.draft, message, files)
            if not repo.by_request:
                _check(repo, commit.oid, self._shards.values(), branch.name)
            elif first := patiently(lambda: repo.requested(run)):
                _step_back(repo, commit.pr_num or branch.draft, first.where)
                where = first.where
            self._unstage()
        return Published(where, commit.oid)

    def _publish(self, files: Mapping[str, Content], message: str) -> CommitInfo:
        """What the whole result takes, in one commit: on main, in a pull request, or in the draft of one."""
        shards, branch = list(self._shards), self._branch
        # An old tokenizer, template or picture beside the new model would be taken for its own.
        others = (name for name in self._old if _MODEL_FILE.search(name) or name.startswith(PICTURES))
        old = {*side_files(self._old, {}), *others}
        operations: list[Operation] = [
            *(CommitOperationDelete(name) for name in sorted(old - {*shards, *files})),
            *(self._uploads.add(name, content) for name, content in files.items()),
        ]
        if branch.draft is not None:
            operations += [CommitOperationDelete(name) for name in branch.files().files if name.startswith(_NOTES)]
            return branch.commit(operations, message)
        operations += [CommitOperationCopy(name, name, src_revision=branch.name) for name in shards]
        names = [operation.path_in_repo for operation in operations]
        request = self._description(names) if self._repo.by_request else None
        wanted = Commit(operations, self._run.title(message), MAIN, self._head, request)
        return make_commit(self._repo, wanted, branch.gate)

    def _description(self, files: Sequence[str]) -> str:
        return description(self._repo.repo, self._run, self._shards.values(), files)

    def _open_request(self, draft: int, message: str, files: Mapping[str, Content]) -> None:
        """Now that all of it is there."""
        words, repo, api = self._description(list(files)), self._repo.repo, self._repo.api
        patiently(lambda: api.rename_discussion(repo, draft, self._run.title(message)))
        patiently(lambda: api.change_discussion_status(repo, draft, "open", comment=words))

    def _unstage(self) -> None:
        self._branch.remove()
        self._uploads.close()

    def leave(self) -> None:
        """Leave main as it was; the staging branch stays, for another run."""
        try:
            self._uploads.settle()
        finally:
            self._uploads.close()


def _copy(ranges: RangeClient, staged: Located, shard: WrittenShard, folder: Path) -> None:
    with in_folder(folder, shard.name).open("wb", buffering=0) as file:
        for start in range(0, shard.size, _COPY_BYTES):
            part = bytearray(min(_COPY_BYTES, shard.size - start))
            ranges.fill(staged, shard.name, start, memoryview(part))
            file.write(part)


def _check(repo: Results, commit: str, shards: Iterable[WrittenShard], branch: str) -> None:
    """What stands on main must be what was made."""
    there = shards_of(repo.files_at(commit))
    for shard in shards:
        if shard.name not in there or there[shard.name].sha256 != shard.sha256:
            what = f"{repo.repo}: {shard.name} on main is not the file that was made"
            raise VerificationError(Problem(what, hint=f"the shards are still on the branch {branch}"))


def _step_back(repo: Results, pull: int | None, first: str) -> None:
    """Of equal pull requests, which runs opened at the same moment, the earliest stays."""
    if pull is not None and repo.page(pull) != first:
        repo.close_pull(pull, f"Equal to {first}, which another run of the same merge opened at the same time.")


def _plain(words: str) -> str:
    """What is said about a card, on one line: the Hub's answer is JSON."""
    with suppress(ValueError, KeyError, TypeError):
        words = "; ".join(str(item["message"]) for item in json.loads(words)["errors"])
    return " ".join(words.split())


def _note(shard: str) -> str:
    """Where on the staging branch the note of a shard lies."""
    return f"{_NOTES}{shard}.json"
