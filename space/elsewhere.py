"""Where a merge goes that is too big for the Space: files for the GitHub Action, and a command for a paid Hub Job.

Not here: whether it is too big (rules).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

_EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

STEPS = """\
**Make it with the GitHub Action**, which is free for public repositories: put this recipe into `merges/mine.yaml` of a
repository on GitHub, the workflow below into `.github/workflows/merge.yml`, and a token of the Hub that may write into
the repository's secret `HF_TOKEN`. The workflow shares the merge between several runners.

**Or as Jobs on the Hub**, which cost money, under your own account: `merger run mine.yaml --engine jobs --parts 4` on
your own machine. No button here starts them: that would take a right to spend your money, and signing in asks for none.
"""


@cache
def workflow() -> str:
    """A workflow that makes one big merge in parts."""
    return (_EXAMPLES / "workflow-parts.yml").read_text("utf-8")
