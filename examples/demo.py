"""The demo: merge two fine-tunes of the zoo by the command, then measure parents and merge on text that none has seen.

It ends with exit code 1 and a sentence unless the merge is better on average than either fine-tune. Not here: how a
merge is made, and a benchmark: the models are small, and the numbers only show what merging does.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[1]
ZOO = ROOT / "examples" / "zoo"
RECIPE = "examples/recipes/task-arithmetic.yaml"
MERGE = "./out/demo"
TEXTS = ("kjv", "python")
WINDOW = 128
PROMPTS = ("And the LORD said", "import os\n\ndef main")

Losses = Mapping[str, float]
"""Nats per token by the text's name."""


def main() -> int:
    """Merge, measure, write a few words."""
    arguments = ["run", RECIPE, "--to", MERGE, "--force"]
    print("$ merger", *arguments, flush=True)
    subprocess.run([Path(sys.executable).with_name("merger"), *arguments], cwd=ROOT, check=True)
    print("\nheld-out loss, nats per token (lower is better)\n", flush=True)
    measured = {name: losses(ZOO / name) for name in ("base", *TEXTS)} | {"merge": losses(ROOT / MERGE)}
    print(table(measured))
    for prompt in PROMPTS:
        print(f"\nthe merge goes on from {prompt!r}:\n{continued(ROOT / MERGE, prompt)}")
    return verdict(measured)


def verdict(measured: Mapping[str, Losses]) -> int:
    """Say whether the merge beats both fine-tunes on average, as a sentence and an exit code."""
    better = [name for name in TEXTS if mean(measured[name]) <= mean(measured["merge"])]
    if better:
        print(f"\nThe merge is no better on average than {' and '.join(better)}.", file=sys.stderr)
        return 1
    print(f"\nThe merge is better on average than either fine-tune. It lies in {MERGE}; {MERGE}/README.md is its card.")
    return 0


def mean(row: Losses) -> float:
    """The mean over both texts."""
    return sum(row[text] for text in TEXTS) / len(TEXTS)


def table(measured: Mapping[str, Losses]) -> str:
    """A row for each model, a column for each text and one for the mean."""
    rows = {
        name: [f"{number:.3f}" for number in (*(row[text] for text in TEXTS), mean(row))]
        for name, row in measured.items()
    }
    lines = {"model": [*TEXTS, "mean"]} | rows
    return "\n".join(f"{name:8}" + "".join(f"{cell:>9}" for cell in cells) for name, cells in lines.items())


def losses(folder: Path) -> Losses:
    """The loss of a model's folder on each held-out text."""
    model, tokenizer = load(folder)
    return {text: loss(model, tokenizer, (ZOO / text / "heldout.txt").read_text("utf-8")) for text in TEXTS}


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model's folder by transformers, for arithmetic in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    """The mean cross-entropy of a text in windows of equal length, each predicted from its own beginning."""
    import torch

    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    with torch.inference_mode():
        return float(model(input_ids=windows, labels=windows).loss)


def continued(folder: Path, prompt: str) -> str:
    """A prompt, and some words that a model puts after it."""
    model, tokenizer = load(folder)
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    written = model.generate(**tokens, max_new_tokens=24, do_sample=False, repetition_penalty=1.3)
    return str(tokenizer.decode(written[0], skip_special_tokens=True))


if __name__ == "__main__":
    sys.exit(main())
