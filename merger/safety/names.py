"""What a repo of models on the Hub may be called, in plain Python: for whoever names one before the Hub is asked.

Not here: whether there is such a repo, and who may write to it (stores).
"""

from __future__ import annotations

import re

from merger.errors import Problem, RecipeError

HINT = (
    "write it as its address on the Hub ends, owner/name: letters, digits, -, _ and ., 96 at most in each; "
    "neither begins or ends with - or ., nowhere is -- or .., and .git is no ending"
)

_PART = "[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_OTHER_KINDS = "(?:models|datasets|spaces|kernels|buckets)/"
REPO = rf"^(?!.*(?:--|\.\.|\.git$))(?!{_OTHER_KINDS}){_PART}/{_PART}$"
"""One pattern, for Python and for JSON Schema alike."""

_REPO = re.compile(REPO)


def is_repo(name: str) -> bool:
    """Whether the Hub lets a repo of models be called so.

    >>> is_repo("alice/merged-7b"), is_repo("alice/.."), is_repo("datasets/merged")
    (True, False, False)
    """
    return _REPO.fullmatch(name) is not None


def need_repo(name: str) -> None:
    """Refuse what is no repo's name.

    Raises:
        RecipeError: with the Hub's rule.
    """
    if not is_repo(name):
        raise RecipeError(Problem(f"{name!r} is no repo's name on the Hub", hint=HINT))
