"""docs/architectures.md, written from what comes of the trials by `python tests/architectures/page.py`: a minute.

Not here: the trials (trial), and comparing the page with them (tests/planning/test_architectures.py).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers.utils import logging

from architectures.cases import CASES, GROUPS
from architectures.pairs import PAIRS
from architectures.trial import Row, tried

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"

HEAD = """\
# Which models can be merged

Written from `tests/architectures` by `make tables`; `tests/planning/test_architectures.py` tries it in every run of
the tests.

There is no list of architectures in the code: a stack of layers is a run of tensor names that count from zero, and
`config.json` is edited by what its keys say. So a class that is not on this page most likely works, and these are the
classes it was tried with, each from a config so small that a model of it has some thousand numbers. For each class:

- transformers saves a random model, and another is made of other numbers; their `linear` merge holds every tensor,
  each the mean of both (integers and constants are copied), under an unchanged config (its count of prediction layers
  apart);
- each stack of layers is made anew by `passthrough` with another number of layers: two of one model and all but the
  first of the other ("5 of 4"). Where a class takes its layers in a fixed rhythm, whole halves are tried as well. All
  other tensors are one model's. Each layer of it is built as the one it was taken from (its parts, its kind of
  attention, its window), and it computes numbers, and other ones than before;
- each result is loaded by transformers, with no tensor missing, unexpected, re-initialised or of another shape. Where a
  class is "predicting", its files hold a layer of multi-token prediction, which transformers leaves to other programs.

Where a class has several stacks, `modules:` names them as the table does: see [recipes.md](recipes.md). What the config
cannot describe is refused with the sentence in the table.
"""
_PAIRS = """\
## Language models into models that see

Saved by the class of its language model alone, a fine-tune has other names than in the model that sees. Each of these
is merged with its base by `linear`: by transformers' own names each tensor of the language model is the mean of both,
all others are the base's, and the class loads the result (`tests/planning/test_matched.py`, which tries BERT with and
without `bert.`, too). Where the names differ, a stack is matched to the one in its place whose first layer has the same
roles and shapes; where there are two, the recipe is refused with both.
"""
_TABLE = ("model", "class in transformers", "tensors", "other numbers of layers")


def text(rows: Mapping[str, Row]) -> str:
    """The whole page, from each case's row."""
    lines = [HEAD]
    for group, cases in GROUPS.items():
        lines += [f"## {group}", "", _table(_TABLE, [cells(name, rows[name]) for name in cases]), ""]
    return "\n".join([*lines, pairs()])


def pairs() -> str:
    """The section on language models under other names."""
    rows = [(name, f"`{pair.of.model}`", f"`{pair.alone}`") for name, pair in PAIRS.items()]
    return f"{_PAIRS}\n{_table(('model', 'class', 'class of the language model'), rows)}\n"


def cells(name: str, row: Row) -> Sequence[str]:
    """A row of the table."""
    told = "<br>".join(f"`{stack}`: {outcome}" for stack, outcome in row.stacks.items())
    return name, f"`{row.model}`", str(row.tensors), told or "no stack of layers"


def line(cells: Iterable[str]) -> str:
    """The same in Markdown."""
    return f"| {' | '.join(cells)} |"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(line(row) for row in [head, ["---"] * len(head), *rows])


def _rows() -> dict[str, Row]:
    found = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = tried(case, Path(folder))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    PAGE.write_text(text(_rows()), "utf-8")
