"""Results published to the Hub: shard by shard onto a staging branch, then one commit on main.

Who may not make a branch there, but shall ask by a pull request, has the shards wait in its draft. Never deletes a repo
and never touches main before the last step. Not here: reading models (hub).
"""

from __future__ import annotations

import io
import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
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
    constants,
)
from huggingface_hub.errors import HfHubHTTPError, OIDCError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import httpx

from merger.errors import BudgetError, DamagedError, MissingError, Problem, UploadError, VerificationError
from merger.models.formats.safetensors import Outlet, WrittenShard, file_sha256
from merger.models.side_files import CARD_NAME, PICTURES, side_files
from merger.runtime import lacking
from merger.safety import secrets
from merger.safety.limits import MEASURED
from merger.safety.names import HINT, is_repo
from merger.stores.folder import Scratch, sweep
from merger.stores.http import (
    UnreadableAnswer,
    headers_now,
    is_passing,
    patiently,
    seconds_asked,
    status_of,
    understood,
)
from merger.stores.hub import NO_ANSWER, Results, description, no_token, shards_of
from merger.stores.ports import Content, FileInfo, Leftover, Located, Published, refuse_large, write
from merger.stores.ranges import RangeClient
from merger.stores.retries import TRIES, pause
from merger.stores.uploads import Destination, Files, Sending, plain_uploads, refuse_no_streams, streams

_MODEL_FILE = re.compile(r"\.(safetensors|bin|gguf|pt|pth|index\.json)$|^(adapter_)?config\.json$")
_STAGING, _NOTES, _COPIES, _PULLS = "merge-staging/", "merge-notes/", "copies", "refs/pr/"
_UNDER_WAY, _WAIT = "Merge under way", "merger is at work here: this is opened once all of it is there."
_FORBIDDEN, _GONE, _MOVED = 403, 404, 412
_CROSSED = (409, _MOVED)
_EXPIRED = (401, 403)
_COPY_BYTES = 16 << 20


class HubSink:
    """A repo on the Hub.

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
        self._private, self._force, self._create_pr, self._stream = private, force, create_pr, stream
        self._api = HfApi(token=token)
        self._ranges = RangeClient(token)
        self._results = Results(self._api, self._ranges, repo)
        self._scratch = Scratch()
        self._sending: Sending = Files(self._scratch)
        self._uploads = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._under_way: set[Future[None]] = set()
        self._commits = Lock()
        self._shards: dict[str, WrittenShard] = {}
        self._noted: Located | None = None
        self._branch = self._identity = self._head = ""
        self._draft: int | None = None
        self._old_files: tuple[str, ...] = ()

    def prepare(self, identity: str, shared: bool = False) -> Published | None:
        """Create the repo if there is none, see what is in it, and open the staging branch or find it again."""
        if not is_repo(self.name):
            raise UploadError(Problem(f"{self.name!r} is no repo's name on the Hub", hint=HINT))
        sweep()  # what killed runs left takes the room of what is to come
        if self._stream:
            refuse_no_streams()
        self._identity, self._branch = identity, f"{_STAGING}{identity[:16]}"
        with self._refusals():
            patiently(lambda: self._api.create_repo(self.name, private=self._private, exist_ok=True))
            info = patiently(lambda: self._api.model_info(self.name, files_metadata=True))
            self._head = info.sha or ""
            if done := patiently(lambda: self._done(info)):
                self._remove_left()
                return done
            self._old_files = tuple(item.rfilename for item in info.siblings or ())
            self._refuse_loss(is_private=bool(info.private))
            to = Destination(self._api, self.name, self._create_pr)
            self._sending = patiently(
                lambda: streams(to, self._refusals) if self._stream else plain_uploads(to, self._scratch)
            )
            self._uploads = ThreadPoolExecutor(self._sending.at_once, thread_name_prefix="upload")
            patiently(self._open_branch)
            self._shards = patiently(self._staged)
        return None

    def _open_branch(self) -> None:
        """The staging branch; where we may not make one, a draft of the pull request, which is a branch of its own."""
        try:
            self._api.create_branch(self.name, branch=self._branch, revision=self._head, exist_ok=True)
        except HfHubHTTPError as error:
            if not self._create_pr or status_of(error) != _FORBIDDEN:
                raise
            self._draft = self._drafted()
            self._branch = f"{_PULLS}{self._draft}"

    def _drafted(self) -> int:
        there = (item.num for item in self._results.pulls(self._title(_UNDER_WAY)) if item.status == "draft")
        if (known := next(there, None)) is not None:
            return known
        return int(self._api.create_pull_request(self.name, title=self._title(_UNDER_WAY), description=_WAIT).num)

    def _done(self, info: ModelInfo) -> Published | None:
        """What an earlier run of this very plan brought about; --force is for other models, not for equal requests."""
        if not self._force and (done := self._results.published(self._identity, self._ending, info)):
            return done
        return self._requested() if self._create_pr else None

    def _requested(self) -> Published | None:
        pull = self._results.requested(self._identity, self._ending)
        return None if pull is None else Published(self._results.page(pull))

    def _remove_left(self) -> None:
        """The staging branch of a run that was killed when all else was done."""
        if any(item.name == self._branch for item in patiently(lambda: self._api.list_repo_refs(self.name)).branches):
            patiently(self._unstage)

    @property
    def _ending(self) -> str:
        return f"[{self._identity[:16]}]"

    def _staged(self) -> dict[str, WrittenShard]:
        """The shards that commits of ours put on the branch; it also has the files that main had when it was made."""
        titles = {item.title for item in self._api.list_repo_commits(self.name, revision=self._branch)}
        info = self._api.model_info(self.name, revision=self._branch, files_metadata=True)
        self._noted = self._located(info)
        return {name: shard for name, shard in shards_of(info).items() if self._title(f"Stage {name}") in titles}

    def _located(self, info: ModelInfo) -> Located:
        files = {item.rfilename: FileInfo(item.size or 0) for item in info.siblings or ()}
        return Located(self.name, self.name, info.sha, files)

    def _title(self, message: str) -> str:
        return f"{message} {self._ending}"

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

    def _refuse_loss(self, is_private: bool) -> None:
        if self._private and not is_private:
            what = f"{self.name} is there already and public, but the recipe says private"
            raise UploadError(Problem(what, hint="make it private on the Hub, or publish to another name"))
        models = [name for name in self._old_files if _MODEL_FILE.search(name)]
        if models and not self._force:
            what = f"{self.name} already holds a model ({models[0]})"
            raise UploadError(Problem(what, hint="publish to another name, or replace it in one commit with --force"))

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
            additions.append(self._small(_note(shard.name), note.encode()))
        self._commit(additions, f"Stage {shard.name}", self._branch)
        self._sending.committed(shard.name)

    def notes(self) -> Iterator[str]:
        """Those that lay beside the shards on the staging branch when it was found again."""
        for name in self._shards:
            if self._noted is not None and (file := self._noted.files.get(_note(name))) is not None:
                refuse_large(self._noted, _note(name), file.size, MEASURED)
                content = bytearray(file.size)
                with self._refusals():
                    self._ranges.fill(self._noted, _note(name), 0, memoryview(content))
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
                self._commit([CommitOperationDelete(name) for name in names], "Take back shards", self._branch)

    def lend(self, folder: Path) -> None:
        """Copies of what is on the staging branch."""
        self._settle()
        with self._refusals():
            info = patiently(lambda: self._api.model_info(self.name, revision=self._branch, files_metadata=True))
            staged = self._located(info)
            for shard in self._shards.values():
                self._copy(staged, shard, folder / shard.name)

    def _copy(self, staged: Located, shard: WrittenShard, to: Path) -> None:
        with to.open("wb", buffering=0) as file:
            for start in range(0, shard.size, _COPY_BYTES):
                part = bytearray(min(_COPY_BYTES, shard.size - start))
                self._ranges.fill(staged, shard.name, start, memoryview(part))
                file.write(part)
        if file_sha256(to) != shard.sha256:
            what = f"{shard.name} did not come back from {self._branch} as it was made"
            raise DamagedError(Problem(what, hint="remove that branch with merger clean, and run it again"))

    def finish(self, files: Mapping[str, Content], message: str) -> Published:
        """One commit on main (or one pull request), checked; then the staging branch is removed."""
        self._settle()
        with self._refusals():
            if self._create_pr and (done := patiently(self._requested)):  # by a run that was faster
                self._step_back(self._draft, done.where)
                patiently(self._unstage)
                self._clean()
                return done
            commit = self._publish(files, message)
        where = commit.pr_url or self._results.page(self._draft)
        with self._refusals(f"{where} is made (commit {commit.oid}), but what follows went wrong: "):
            if self._draft is not None:
                self._open_draft(self._draft, message, files)
            if not self._create_pr:
                self._check(commit.oid)
            elif first := patiently(self._requested):
                self._step_back(commit.pr_num or self._draft, first.where)
                where = first.where
            patiently(self._unstage)
        self._clean()
        return Published(where, commit.oid)

    def _open_draft(self, draft: int, message: str, files: Mapping[str, Content]) -> None:
        """Now that all of it is there."""
        words = description(self.name, self._identity, self._shards.values(), files)
        patiently(lambda: self._api.rename_discussion(self.name, draft, self._title(message)))
        patiently(lambda: self._api.change_discussion_status(self.name, draft, "open", comment=words))

    def _step_back(self, pull: int | None, first: str) -> None:
        """Of equal pull requests, which runs opened at the same moment, the earliest stays."""
        if pull is not None and self._results.page(pull) != first:
            self._close(pull, f"Equal to {first}, which another run of the same merge opened at the same time.")

    def _close(self, pull: int, words: str) -> None:
        patiently(lambda: self._api.change_discussion_status(self.name, pull, "closed", comment=words))

    def amend(self, small: Mapping[str, bytes], message: str, seen: Located) -> Published:
        """One commit on main, if main is still what was seen; that commit's name makes the title one of its kind."""
        self._head = self._identity = seen.commit or ""
        with self._refusals():
            self._sending = patiently(lambda: plain_uploads(Destination(self._api, self.name), self._scratch))
            commit = self._commit([self._small(*file) for file in small.items()], message, "main")
        self._clean()
        return Published(f"{constants.ENDPOINT}/{self.name}", commit.oid)

    def _unstage(self) -> None:
        """Remove the staging branch; if it is gone, an earlier try did it and the answer was lost."""
        if self._draft is not None:
            return
        try:
            self._api.delete_branch(self.name, branch=self._branch)
        except HfHubHTTPError as error:
            if status_of(error) != _GONE:
                raise

    def _publish(self, files: Mapping[str, Content], message: str) -> CommitInfo:
        shards = list(self._shards)
        # An old tokenizer, template or picture beside the new model would be taken for its own.
        others = (name for name in self._old_files if _MODEL_FILE.search(name) or name.startswith(PICTURES))
        old = {*side_files(self._old_files, {}), *others}
        operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
            *(CommitOperationDelete(name) for name in sorted(old - {*shards, *files})),
            *(self._small(name, content) for name, content in files.items()),
        ]
        if self._draft is None:
            operations += [CommitOperationCopy(name, name, src_revision=self._branch) for name in shards]
            return self._commit(operations, message, "main")
        staged = patiently(lambda: self._api.model_info(self.name, revision=self._branch)).siblings or ()
        names = [item.rfilename for item in staged]
        operations += [CommitOperationDelete(name) for name in names if name.startswith(_NOTES)]
        return self._commit(operations, message, self._branch)

    def _small(self, name: str, content: Content) -> CommitOperationAdd:
        """The one place where small files leave. What is copied lies on this disk until the commit is made."""
        headers_now(self._api.token)  # by now the client may have renewed its token
        if isinstance(content, bytes):
            secrets.refuse_tokens({name: content})
            return self._sending.small(name, content)
        path = self._scratch.folder() / _COPIES / name
        write(content, path)
        return self._sending.file(name, path)

    def _commit(
        self,
        operations: Iterable[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete],
        message: str,
        branch: str,
    ) -> CommitInfo:
        """Commit once: when the answer is lost, the history tells whether it was done before it is tried again."""
        title, operations = self._title(message), list(operations)
        on_main = branch == "main"
        names = [operation.path_in_repo for operation in operations]
        shards = list(self._shards.values())
        about = description(self.name, self._identity, shards, names) if on_main and self._create_pr else None
        secrets.refuse_tokens({"the commit's message": f"{title}\n{about}"})
        tries = 0
        additions = [operation for operation in operations if isinstance(operation, CommitOperationAdd)]
        while True:
            try:
                _rewind(additions)
                if not on_main:  # files travel side by side; commits of ours must not cross
                    with understood():
                        self._api.preupload_lfs_files(self.name, additions, revision=branch, free_memory=False)
                with self._commits, understood():
                    return self._api.create_commit(
                        self.name,
                        operations,
                        commit_message=title,
                        commit_description=about,
                        revision=branch,
                        parent_commit=self._head if on_main else None,
                        create_pr=on_main and self._create_pr,
                    )
            except (HfHubHTTPError, httpx.TransportError, RuntimeError) as failed:
                tries += 1
                error = _cause(failed)
                # An address to upload to that has expired is asked for anew. Parts commit to the staging branch at the
                # same time, and the Hub lets only one through.
                mended = _EXPIRED if error is not failed else () if on_main else _CROSSED
                if not is_passing(error) and status_of(error) not in mended:
                    raise
                if done := patiently(lambda: self._found(title, branch)):
                    return done
                if tries == TRIES:
                    raise
                time.sleep(pause(tries, seconds_asked(error)))

    def _found(self, title: str, branch: str) -> CommitInfo | None:
        """The commit that we made, or the pull request; on main the newest: an older one is an earlier merge's."""
        page, pull = f"{constants.ENDPOINT}/{self.name}", None
        if branch == "main" and self._create_pr:
            pull = next((item.num for item in self._results.pulls(title)), None)
            if pull is None:
                return None
            branch = f"refs/pr/{pull}"
        commits = self._api.list_repo_commits(self.name, revision=branch)
        ours = next(
            (item.commit_id for item in (commits[:1] if branch == "main" else commits) if item.title == title), None
        )
        if ours is None:
            return None
        return CommitInfo(
            commit_url=f"{page}/commit/{ours}",
            commit_message=title,
            commit_description="",
            oid=ours,
            pr_url=None if pull is None else f"{page}/discussions/{pull}",
        )

    def _check(self, commit: str) -> None:
        """What stands on main must be what was made."""
        info = patiently(lambda: self._api.model_info(self.name, revision=commit, files_metadata=True))
        there = {item.rfilename: item.lfs.sha256 if item.lfs else None for item in info.siblings or ()}
        for shard in self._shards.values():
            if there.get(shard.name) != shard.sha256:
                what = f"{self.name}: {shard.name} on main is not the file that was made"
                raise VerificationError(Problem(what, hint=f"the shards are still on the branch {self._branch}"))

    def leave(self) -> None:
        """Leave main as it was; the staging branch stays, for another run."""
        try:
            self._settle()
        finally:
            self._clean()

    def leftovers(self) -> list[Leftover]:
        """The staging branches of the repo, and our own drafts."""
        with self._refusals():
            try:
                branches = patiently(lambda: self._api.list_repo_refs(self.name)).branches
            except RepositoryNotFoundError:
                hint = "check the spelling; for a private repo set HF_TOKEN"
                raise MissingError(Problem(f"there is no repo {self.name} that we may read", hint=hint)) from None
            names = {item.name: item.name.removeprefix(_STAGING) for item in branches if item.name.startswith(_STAGING)}
            for item in patiently(lambda: list(self._results.pulls("]"))):
                if item.status == "draft" and item.title.startswith(_UNDER_WAY):
                    names[f"{_PULLS}{item.num}"] = item.title.rpartition("[")[2].removesuffix("]")
            return [self._leftover(*found) for found in names.items()]

    def _leftover(self, branch: str, identity: str) -> Leftover:
        self._branch, self._identity = branch, identity
        staged = patiently(self._staged).values()
        return Leftover(branch, len(staged), sum(shard.size for shard in staged))

    def clean(self, leftover: Leftover) -> None:
        """Remove one of them: never another branch, never a repo; a draft is closed."""
        assert leftover.where.startswith((_STAGING, _PULLS))
        with self._refusals():
            if leftover.where.startswith(_PULLS):
                self._close(int(leftover.where.removeprefix(_PULLS)), "Its run is given up.")
                return
            patiently(lambda: self._api.delete_branch(self.name, branch=leftover.where))

    def _clean(self) -> None:
        self._uploads.shutdown(wait=True, cancel_futures=True)
        self._sending.close()
        self._scratch.close()

    @contextmanager
    def _refusals(self, so_far: str = "") -> Iterator[None]:
        """Turn errors of the client and of its uploads (RuntimeError, OSError) into a sentence and a next step."""
        try:
            yield
        except (OSError, ValueError, RuntimeError, OIDCError, httpx.HTTPError) as error:
            told = lacking(error) or UploadError(self._in_words(_cause(error)))
            (problem,) = told.problems
            raise type(told)(replace(problem, what=so_far + problem.what)) from None

    def _in_words(self, error: Exception) -> Problem:
        is_gone = isinstance(error, RevisionNotFoundError)
        if not self._head or not (is_gone or status_of(error) == _MOVED):
            return _in_words(error, self.name, self._create_pr)
        if done := self._meanwhile():
            what = f"another run of this merge was faster: {done.where} is made"
            return Problem(what, hint="nothing is left to do: the same command again only says so")
        if not is_gone:
            return _in_words(error, self.name, self._create_pr)
        what = f"the branch {self._branch} of {self.name} is gone: another run ended, or merger clean removed it"
        return Problem(what, hint="let one run at a time write there, and run it again")

    def _meanwhile(self) -> Published | None:
        """What another run of this very plan has brought about since we began."""
        with suppress(httpx.HTTPError, OSError, ValueError):
            info = patiently(lambda: self._api.model_info(self.name, files_metadata=True))
            return patiently(lambda: self._results.published(self._identity, self._ending, info) or self._requested())
        return None


def _plain(words: str) -> str:
    """What is said about a card, on one line: the Hub's answer is JSON."""
    with suppress(ValueError, KeyError, TypeError):
        words = "; ".join(str(item["message"]) for item in json.loads(words)["errors"])
    return " ".join(words.split())


def _rewind(additions: Iterable[CommitOperationAdd]) -> None:
    """The client leaves an open file where an upload of it broke off, and would go on there."""
    for addition in additions:
        if isinstance(addition.path_or_fileobj, io.BufferedIOBase):
            addition.path_or_fileobj.seek(0)


def _note(shard: str) -> str:
    """Where on the staging branch the note of a shard lies."""
    return f"{_NOTES}{shard}.json"


def _cause(error: Exception) -> Exception:
    """The client wraps what went wrong with an upload in a RuntimeError."""
    cause = error.__cause__
    wrapped = isinstance(error, RuntimeError) and isinstance(cause, (HfHubHTTPError, httpx.HTTPError))
    return cause if wrapped and isinstance(cause, Exception) else error


def _in_words(error: Exception, repo: str, by_request: bool) -> Problem:
    if isinstance(error, OIDCError):
        return no_token(error, repo)
    if isinstance(error, UnreadableAnswer):
        return Problem(f"{repo} cannot be written: an answer is none of the Hub's", hint=NO_ANSWER)
    if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):
        return Problem(f"{repo}: the Hub's client refuses: {error}", hint="change the recipe's publish: block, or --to")
    match status_of(error):
        case 401:
            return Problem(f"the Hub does not know our token, so {repo} cannot be written", hint="set HF_TOKEN")
        case 403 | 404 if by_request:
            hint = "to ask for it takes a token that may write, if only to repos of your own"
            return Problem(f"we may not open a pull request on {repo}", hint=hint)
        case 403 | 404:
            hint = "the token needs the right to write there (a fine-grained token: write access to this repo)"
            return Problem(f"we may not write to {repo}", hint=hint)
        case status if status == _MOVED:
            hint = "run it again, or set publish.create_pr: true to open a pull request"
            return Problem(f"main of {repo} moved while the merge was made", hint=hint)
        case None:
            return Problem(f"{repo} cannot be written ({type(error).__name__})", hint="check the name and the network")
        case status:
            words = error.server_message if isinstance(error, HfHubHTTPError) else None
            said = f": {words[:300]}" if words else ""
            hint = "try again later" if is_passing(error) else "change what it objects to, and run it again"
            return Problem(f"the Hub refuses to write {repo} (HTTP {status}{said})", hint=hint)
