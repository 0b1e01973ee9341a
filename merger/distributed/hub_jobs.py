"""Hub jobs, containers that Hugging Face runs for us by the minute: started, waited for, cancelled.

Not here: what they do (start). A job without that word before it is the making of a tensor, as everywhere.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

from huggingface_hub import HfApi, JobInfo, JobStage, constants, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx

from merger.errors import PartError, Problem
from merger.safety import secrets
from merger.stores.hub.http import is_passing, patiently, status_of, understood

_ENDS = (JobStage.COMPLETED, JobStage.CANCELED, JobStage.ERROR, JobStage.DELETED)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 15.0
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubJob:
    """A Hub job that was started: its name for people, its number, whose it is, and the page with its log."""

    name: str
    number: str
    owner: str
    page: str


class HubJobs:
    """A few Hub jobs; those still at work when we leave before their end are cancelled, for they cost money.

    Args:
        flavor: the hardware, in the Hub's words.
        timeout: how long each may run, such as ``6h``.
    """

    def __init__(self, flavor: str, timeout: str) -> None:
        self._api = HfApi()
        self._flavor, self._timeout = flavor, timeout
        self._open: list[HubJob] = []
        # An interrupt in the middle of a request would leave the client's connections locked, for the cancelling too.
        self._looking = ThreadPoolExecutor(1, thread_name_prefix="hub-jobs")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._looking.shutdown()
        for job in self._open:
            try:
                patiently(partial(self._api.cancel_job, job_id=job.number, namespace=job.owner))
            except (HfHubHTTPError, httpx.HTTPError):  # no error of its own: what went wrong first is what is told
                _LOG.warning("%s could not be cancelled, and may cost money: look at %s", job.name, job.page)

    def start(self, name: str, image: str, command: Sequence[str], environment: Mapping[str, str]) -> HubJob:
        """Start one. It is handed our token as a secret, which the Hub keeps encrypted, and our endpoint.

        Raises:
            PartError: the Hub does not start it.
            UploadError: a token stands in what it would be told besides.
        """
        token = get_token()
        if token is None:
            raise PartError(Problem("a Hub job needs a token, and there is none", hint="set HF_TOKEN"))
        secrets.watch_for(token)
        secrets.refuse_tokens({"the Hub job's command": "\n".join([*command, *environment.values()])})
        with _refusals(name, token):
            # Not tried again when the answer is lost: it may have been started, and would cost twice.
            info = self._api.run_job(
                image=image,
                command=list(command),
                env={"HF_ENDPOINT": constants.ENDPOINT, **environment},
                secrets={"HF_TOKEN": token},
                flavor=self._flavor,
                timeout=self._timeout,
                name=name,
            )
        job = HubJob(name, info.id, info.owner.name, info.url)
        self._open.append(job)
        return job

    def ended(self) -> Iterator[tuple[HubJob, str | None]]:
        """Each Hub job as it ends, with what went wrong.

        Raises:
            PartError: the Hub does not tell how they are.
        """
        pause = _FIRST_PAUSE
        while self._open:
            for job in tuple(self._open):
                info = self._looking.submit(self._look, job).result()
                if info is not None and info.status.stage in _ENDS:
                    self._open.remove(job)
                    yield job, _trouble(info)
            if self._open:
                time.sleep(pause)
                pause = min(_LONGEST_PAUSE, 1.3 * pause)

    def _look(self, job: HubJob) -> JobInfo | None:
        """How it is; None while the Hub cannot be reached: a network that is down must not cost hours of work."""
        with _refusals(job.name):
            try:
                with understood():
                    return self._api.inspect_job(job_id=job.number, namespace=job.owner)
            except (HfHubHTTPError, httpx.TransportError) as error:
                if not is_passing(error):
                    raise
        return None


def _trouble(info: JobInfo) -> str | None:
    if info.status.stage == JobStage.COMPLETED:
        return None
    said = f": {info.status.message}" if info.status.message else ""
    return f"its Hub job ended as {info.status.stage}{said}"


@contextmanager
def _refusals(name: str, token: str = "") -> Iterator[None]:
    """Turn the client's errors into a sentence and a next step, without the token should the Hub repeat it."""
    try:
        with understood():
            yield
    except (HfHubHTTPError, httpx.HTTPError) as error:
        problem = _in_words(error, name)
        hidden = problem.what.replace(token, "***") if token else problem.what
        raise PartError(replace(problem, what=hidden)) from None


def _in_words(error: Exception, name: str) -> Problem:
    match status_of(error):
        case 401:
            return Problem(f"{name}: the Hub does not know our token", hint="set HF_TOKEN")
        case 402:
            hint = "Hub jobs are paid for: add credit on the billing page of your account"
            return Problem(f"{name}: this account has no credit for Hub jobs", hint=hint)
        case 403:
            hint = "a fine-grained token needs the right to start jobs"
            return Problem(f"{name}: our token may not start Hub jobs", hint=hint)
        case None:
            what = f"{name}: the Hub cannot be reached ({type(error).__name__})"
            return Problem(what, hint="check the network; see on the Hub's page of jobs whether it was started")
        case status:
            words = error.server_message if isinstance(error, HfHubHTTPError) else None
            said = f": {words[:300]}" if words else ""
            hint = "try again later" if is_passing(error) else "change what it objects to, and run it again"
            return Problem(f"{name}: the Hub refuses the job (HTTP {status}{said})", hint=hint)
