"""Models on the Hub, by byte ranges at one commit or out of the client's cache.

Not here: repos of results (repo).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi, RepoFile, constants, get_token, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    OIDCError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, hf_raise_for_status, httpx

from merger.errors import GatedError, MissingError, ModelError, Problem, UploadError
from merger.models.checkpoint import is_single
from merger.models.gguf.header import parts_of
from merger.runtime import lacking
from merger.safety import limits, secrets
from merger.stores.folder import FolderStore
from merger.stores.hub.http import TIMEOUT_SECONDS, UnreadableAnswer, headers_now, is_passing, patiently, status_of
from merger.stores.hub.ranges import RangeClient
from merger.stores.hub.reading import Beginnings, RangeReader, confirm
from merger.stores.ports import FileInfo, Located, Reader, Store, Ticket, readers, refuse_large

NO_ANSWER = "does a proxy or a sign-in page of the network answer in its place? then check HF_ENDPOINT, and try again"


class HubStore:
    """Models by repo id.

    Args:
        token: the reader's token; None takes the environment's, False none.
    """

    def __init__(self, token: str | bool | None = None) -> None:
        self._api = HfApi(token=token)
        self._ranges = RangeClient(token)
        self._beginnings = Beginnings()

    def has(self, path: str) -> bool:
        """Whatever is written like ``owner/name`` may be on the Hub, with or without a folder or a file of it."""
        return path.count("/") >= 1

    def locate(self, path: str, revision: str | None) -> Located:
        """Ask the Hub for the model's commit and files; of ``owner/name/folder`` those in there, of a file itself."""
        owner, *rest = path.split("/", 2)
        repo, within = "/".join([owner, *rest[:1]]), rest[1] if len(rest) == 2 else ""
        with _refusals(repo, revision):
            info = patiently(lambda: self._api.model_info(repo, revision=revision, files_metadata=True))
        files = {
            item.rfilename: FileInfo(item.size or 0, item.lfs.sha256 if item.lfs else None, oid=item.blob_id)
            for item in info.siblings or ()
        }
        inside = within.rpartition("/")[0] if is_single(within) else within
        inside = f"{inside.strip('/')}/" if inside else ""
        held = {name.removeprefix(inside): file for name, file in files.items() if name.startswith(inside)}
        if is_single(within):
            held = {name: held[name] for name in parts_of(within.rpartition("/")[2], held)}
        if not held:
            page = hub_page(f"{repo}/tree/{info.sha}")
            raise ModelError(Problem(f"there is no {within!r} in {repo}", hint=f"see {page}"))
        card = info.card_data.to_dict() if info.card_data else {}  # type: ignore[no-untyped-call]
        name = f"{info.id}/{within}" if within else info.id
        moved = repo if info.id != repo else None
        return Located(name, info.id, info.sha, held, inside, card, bool(info.gated), bool(info.private), moved)

    def names(self, path: str, of_folders: bool) -> list[str]:
        """The names of a repo's branches and tags."""
        repo = "/".join(path.split("/")[:2])
        with _refusals(repo, None):
            found = patiently(lambda: self._api.list_repo_refs(repo))
        return list(dict.fromkeys(ref.name for ref in (*found.branches, *found.tags)))

    def fetch(self, model: Located, file: str, start: int = 0, stop: int | None = None) -> bytes:
        """Ask for a part of a file; for all of it when no end is given."""
        whole = model.files[file].size
        if stop is None:
            refuse_large(model, file, whole, limits.of(file))
        data = bytearray((whole if stop is None else stop) - start)
        with _refusals(model.where, model.commit):
            self._ranges.fill(model, file, start, memoryview(data))
        if len(data) == whole:
            confirm((model, file), hashlib.sha256(data).hexdigest())
        self._beginnings.add((model, file), start, data)
        return bytes(data)

    def reader(self, tickets: Sequence[Ticket], budget: int) -> RangeReader:
        """A reader that fetches ahead of need and checks the files that it reads whole."""

        def fill(model: Located, file: str, start: int, out: memoryview) -> None:
            with _refusals(model.where, model.commit):
                self._ranges.fill(model, file, start, out)

        return RangeReader(tickets, budget, fill, beginnings=self._beginnings)


@dataclass(frozen=True)
class Account:
    """Whom the Hub takes us for, and whether the token may write; None: that depends on the repo."""

    name: str
    may_write: bool | None


def ask_account() -> tuple[str, Account | None]:
    """The Hub's address, and whose token it is that the client finds; None: there is none.

    Raises:
        ModelError: it cannot be asked, or does not accept the token.
    """
    with _refusals("this account", None):
        headers = headers_now(None)
        answer = get_session().get(f"{constants.ENDPOINT}/api/whoami-v2", headers=headers, timeout=TIMEOUT_SECONDS)
        if answer.status_code == 401 and "authorization" not in headers:
            return constants.ENDPOINT, None
        hf_raise_for_status(answer)
        match answer.json():
            case {"name": str(name), "auth": {"accessToken": {"role": str(role)}}}:
                return constants.ENDPOINT, Account(name, {"read": False, "write": True}.get(role))
            case {"name": str(name)}:
                return constants.ENDPOINT, Account(name, None)
        raise UnreadableAnswer("no account in it")


def hub_page(path: str) -> str:
    """The address of a page of the Hub."""
    return f"{constants.ENDPOINT}/{path}"


def hub_file(repo: str, file: str, revision: str | None, of_dataset: bool, token: str | bool | None) -> bytes:
    """A file of a model's or a data set's repo, by way of Hugging Face's cache.

    Raises:
        ModelError: it is not there, too large, or may not be read.
    """
    api, kind = HfApi(token=token), "dataset" if of_dataset else "model"
    with _refusals(repo, revision):
        found = patiently(lambda: api.get_paths_info(repo, [file], revision=revision, repo_type=kind))
        size = next((item.size for item in found if isinstance(item, RepoFile)), None)
        if size is None:
            raise ModelError(Problem(f"{repo} has no file {file}", hint="look at the repo's files"))
        if problem := limits.excess(f"{repo}/{file}", size, limits.TEXT):
            raise ModelError(problem)
        path = patiently(lambda: api.hf_hub_download(repo, file, revision=revision, repo_type=kind))
    return limits.read_limited(Path(path), limits.TEXT, ModelError)


def trusted_publisher(repo: str) -> str:
    """The token that the Hub gives to this CI job for one repo; from now on its client takes it, and renews it.

    Raises:
        UploadError: the Hub does not trust this job with that repo, or cannot tell.
    """
    os.environ["HF_OIDC_RESOURCE"] = repo
    try:
        return patiently(_published_token)
    except (OIDCError, ValueError, httpx.HTTPError) as error:
        raise lacking(error) or UploadError(no_token(error, repo)) from None


def _published_token() -> str:
    token = get_token()
    if not isinstance(token, str) or not token:
        raise UnreadableAnswer("no token in it")
    secrets.watch_for(token)
    return token


def no_token(error: Exception, repo: str) -> Problem:
    """Why a CI job gets no token for a repo."""
    status, what = status_of(error), f"the Hub gives this job no token for {repo}"
    if isinstance(error, UnreadableAnswer | ValueError):
        return Problem(f"{what}: an answer on the way to it is none of the Hub's or GitHub's", hint=NO_ANSWER)
    if isinstance(error, httpx.HTTPError) and is_passing(error):
        why = f"HTTP {status}" if status else type(error).__name__
        return Problem(f"{what}: GitHub or the Hub is in trouble ({why})", hint="run the job again later")
    page = hub_page(f"{repo}/settings")
    hint = f"the repo has to exist, and to name this workflow as a trusted publisher in {page}"
    return Problem(f"{what} ({f'HTTP {status}' if status else error})", hint=hint)


@contextmanager
def _refusals(path: str, revision: str | None) -> Iterator[None]:
    """Turn the client's errors into a sentence and a next step."""
    try:
        yield
    except (OIDCError, OfflineModeIsEnabled, EntryNotFoundError, ValueError, httpx.HTTPError) as error:
        raise lacking(error) or _kind(error)(_in_words(error, path, revision)) from None


def _kind(error: Exception) -> type[ModelError]:
    """GatedRepoError is a kind of RepositoryNotFoundError, so it is asked for first."""
    if isinstance(error, GatedRepoError):
        return GatedError
    return MissingError if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError) else ModelError


def _in_words(error: Exception, path: str, revision: str | None) -> Problem:
    page = hub_page(path)
    match error:
        case GatedRepoError():
            hint = f"accept its terms at {page} and give a token of that account as HF_TOKEN"
            return Problem(f"{path} is gated and this account has no access", hint=hint)
        case RepositoryNotFoundError():
            hint = "check the spelling; a private model needs HF_TOKEN; a folder starts with ./"
            return Problem(f"there is no model {path} on the Hub that we may read", hint=hint)
        case RevisionNotFoundError():
            return Problem(f"{path} has no revision {revision!r}", hint=f"see {page}/commits/main")
        case LocalEntryNotFoundError():
            return Problem(f"the Hub cannot be reached for {path}", hint="check the network, then HF_ENDPOINT")
        case EntryNotFoundError():
            return Problem(f"{path}: a file of it is gone", hint=f"see {page}/tree/main")
        case HFValidationError():
            return Problem(f"{path!r} is no model's name", hint="write owner/name, or ./folder")
        case OfflineModeIsEnabled():
            return Problem(f"the Hub may not be asked for {path}: HF_HUB_OFFLINE is set", hint="unset HF_HUB_OFFLINE")
        case OIDCError():
            return no_token(error, path)
        case UnreadableAnswer() | ValueError() if status_of(error) is None:
            return Problem(f"the answer for {path} is none of the Hub's", hint=NO_ANSWER)
    match status_of(error):
        case None:
            what = f"the Hub cannot be reached for {path} ({type(error).__name__})"
            return Problem(what, hint="check the network, then HF_ENDPOINT")
        case 401:
            return Problem(f"the Hub does not accept our token for {path}", hint="set HF_TOKEN anew, or unset it")
        case status:
            return Problem(f"the Hub does not answer for {path} (HTTP {status})", hint="try again later")


# ---- the client's cache ---------------------------------------------------------------------------------------------


class CachedStore:
    """The Hub, and before it the cache.

    Args:
        hub: where models and all other files come from.
    """

    def __init__(self, hub: Store) -> None:
        self._hub = hub
        self._disk = FolderStore()

    def has(self, path: str) -> bool:
        return self._hub.has(path)

    def locate(self, path: str, revision: str | None) -> Located:
        """Ask the Hub: only it knows which commit a name means now."""
        return self._hub.locate(path, revision)

    def names(self, path: str, of_folders: bool) -> list[str]:
        return self._hub.names(path, of_folders)

    def fetch(self, model: Located, file: str, start: int = 0, stop: int | None = None) -> bytes:
        """From the disk if the file is there."""
        cached = _find_cached(model, file)
        if cached is None:
            return self._hub.fetch(model, file, start, stop)
        return self._disk.fetch(cached, file, start, stop)

    def reader(self, tickets: Sequence[Ticket], budget: int) -> Reader:
        """A reader of the disk for what is there, one of the Hub for the rest."""
        files = {(ticket.model, ticket.file): _find_cached(ticket.model, ticket.file) for ticket in tickets}
        found = [files[ticket.model, ticket.file] for ticket in tickets]
        placed = [
            (self._hub, ticket) if cached is None else (self._disk, replace(ticket, model=cached))
            for ticket, cached in zip(tickets, found, strict=True)
        ]
        return readers(placed, budget)


def _find_cached(model: Located, file: str) -> Located | None:
    """The model as a folder of the cache, if this file of it lies there; a link's target is named by its SHA-256."""
    info = model.files[file]
    path = try_to_load_from_cache(model.where, model.inside + file, revision=model.commit)
    if info.sha256 is None or not isinstance(path, str):
        return None
    real = Path(os.path.realpath(path))
    is_locked = real.name == info.sha256 and real.stat().st_size == info.size
    return replace(model, where=path[: -len(file)]) if is_locked else None
