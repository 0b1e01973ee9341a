"""What this machine and environment let a merge do, line by line, with a next step for each lack.

No token is told, only whether there is one. Not here: what one recipe takes (plan, run.extras).
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from merger import runtime, system
from merger.errors import BudgetError, ModelError
from merger.planning.budget import BASELINE_BYTES
from merger.safety.numbers import DOWN, size

_NOT_YET_NAMED = "/OWNER/"
_NOT_FOR_PEOPLE = ("action", "all")
_NEED = re.compile(r"""([\w.-]+).*;.*extra == ['"](\w+)['"]""")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        what: a word for it.
        found: how it is.
        hint: the next step, where something is lacking.
        exit_code: that of the errors which a merge would end with for want of it; 0: it can do without.
    """

    what: str
    found: str
    hint: str | None = None
    exit_code: int = 0


def examine() -> Iterator[Finding]:
    """Look at Python, the machine, packages, compiled steps, and last at the Hub, which may take time."""
    address = runtime.addresses().get("Repository", "")
    hint = "whose repository it is stands in [project.urls] of pyproject.toml: docs/release.md, step 1"
    named = f"merger {version(runtime.PACKAGE)} of {address}"
    yield Finding("package", named, hint if _NOT_YET_NAMED in address else None)
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("cores", str(system.cores()))
    yield _memory()
    yield from (_disk(what, place) for what, place in (("folder", os.getcwd()), ("temporary", tempfile.gettempdir())))
    yield _extras()
    yield _steps()
    yield Finding("system", "; ".join(system.plain_forms()) or "has all that a merge makes use of")
    yield from _hub()


def _memory() -> Finding:
    free = system.free_memory()
    if free is None:
        return Finding("memory", "not known here", "write --max-memory, and it is kept")
    lack = f"a merge takes {size(BASELINE_BYTES)} before its first tensor: end other programs, or give it more"
    return _amount("memory", f"{size(free, DOWN)} free", free < BASELINE_BYTES, lack)


def _disk(what: str, place: str) -> Finding:
    free = shutil.disk_usage(place).free
    lack = "free some disk, or go on elsewhere" if what == "folder" else "let TMPDIR name a larger disk"
    return _amount(what, f"{size(free, DOWN)} free in {place}", free < BASELINE_BYTES, lack)


def _amount(what: str, found: str, lacks: bool, hint: str) -> Finding:
    return Finding(what, found, hint, BudgetError.exit_code) if lacks else Finding(what, found)


def _extras() -> Finding:
    needs: dict[str, list[str]] = {}
    for need in filter(None, map(_NEED.match, requires(runtime.PACKAGE) or ())):
        needs.setdefault(need[2], []).append(need[1])
    here = {
        extra: all(map(_is_installed, packages)) for extra, packages in needs.items() if extra not in _NOT_FOR_PEOPLE
    }
    missing = ",".join(extra for extra, is_here in here.items() if not is_here)
    found = ", ".join(extra for extra, is_here in here.items() if is_here) or "none"
    hint = f"for {missing.replace(',', ', ')}: {runtime.install_command(missing)}" if missing else None
    return Finding("extras", found, hint)


def _is_installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def _steps() -> Finding:
    from merger.methods.registry import methods
    from merger.methods.steps.step import STEPS, kept_steps

    methods()
    kept = kept_steps()
    if kept is None:
        return Finding("steps", "compiled anew by each run", "let NUMBA_CACHE_DIR name a folder that may be written")
    hint = None if kept else "nothing to do: the first merge that takes one compiles it, for some seconds"
    return Finding("steps", f"{kept} of {len(STEPS)} compiled before", hint)


def _hub() -> Iterator[Finding]:
    from merger.stores.hub.store import ask_account

    try:
        endpoint, account = ask_account()
    except ModelError as error:
        (problem,) = error.problems
        yield Finding("hub", problem.what, problem.hint, error.exit_code)
        return
    yield Finding("hub", f"{endpoint} answers")
    if account is None:
        yield Finding("token", "none: public models can be read", "to publish: hf auth login, or set HF_TOKEN")
    else:
        hint = "to publish, make a token that may write" if account.may_write is False else None
        yield Finding("token", f"there, of {account.name}", hint)
