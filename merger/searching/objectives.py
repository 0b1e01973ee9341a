"""What candidates are scored by: texts, questions, answers, tasks, one's own function; and whether a gain is noise.

Each text or question is an item, whose scores of two models are compared in pairs. Not here: what a recipe may name
(recipe.searched), and what is scored (candidates).
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from merger.errors import EvaluationError, Problem, RecipeError
from merger.evaluation.evaluate import read_source
from merger.recipe.searched import Objective
from merger.safety.limits import parse_json
from merger.safety.paths import ANYWHERE

Item = TypeVar("Item")
Floats = NDArray[np.float64]

WINDOW = 256
"""How many tokens of a text a model sees at once; each window is an item."""

ANSWER_TOKENS = 256
"""As long an answer may become whose length is measured."""

_BATCH_TOKENS, _BATCH_LOGITS = 4096, 1 << 26
"""A batch has at most so many tokens, and so many numbers that tell of the next one."""

_RESAMPLED, _AT_ONCE, _LEVEL = 2000, 100, 0.95
_AT = "search.objectives"


@dataclass(frozen=True)
class Scored:
    """What a scorer says of a model.

    Args:
        value: of all items; not a number where the model's numbers are damaged.
        items: of each item, whose mean the value is; empty where there are none.
    """

    value: float
    items: Floats = field(default_factory=lambda: np.empty(0))


Step = Callable[[int, Scored], None]
"""Is told after each batch how many there were, and the score so far; what it raises ends the scoring."""


class Scorer(Protocol):
    """Scores a model."""

    name: str
    higher: bool

    def score(self, model: Any, tokenizer: Any, step: Step | None = None) -> Scored:
        """Its score.

        Raises:
            EvaluationError: the model cannot be scored.
        """


@dataclass(frozen=True)
class Gain:
    """How much better one model is than another, and between which numbers that lies in 19 of 20 draws of the items."""

    value: float
    low: float
    high: float

    @property
    def within_noise(self) -> bool:
        """Whether other items of the same kind might as well have said that there is none."""
        return not (self.low > 0 or self.high < 0)


def gain(found: Scored, before: Scored, higher: bool) -> Gain:
    """By how much `found` is better, with a paired bootstrap of the items; without pairs nothing is known of the noise.

    Args:
        found, before: scores of two models by the same scorer.
        higher: whether more is better.
    """
    sign = 1 if higher else -1
    value = sign * (found.value - before.value)
    if not found.items.size or found.items.shape != before.items.shape:
        return Gain(value, -math.inf, math.inf)
    pairs, draw = sign * (found.items - before.items), np.random.default_rng(0)
    means = [pairs[draw.integers(pairs.size, size=(_AT_ONCE, pairs.size))].mean(axis=1)
             for _ in range(_RESAMPLED // _AT_ONCE)]  # fmt: skip
    low, high = np.quantile(np.concatenate(means), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Gain(value, float(low), float(high))


def scorers(
    objectives: Sequence[Objective], folder: Path, token: str | bool | None = None, root: Path | None = ANYWHERE
) -> list[Scorer]:
    """What scores by these, with all that it reads at hand.

    Args:
        objectives: as a recipe names them.
        folder: where the recipe lies, and functions that it names.
        token: the reader's, for files on the Hub.
        root: inside of which files have to lie (safety.paths).

    Raises:
        RecipeError: a file, a task or a function is not there, or is not what it has to be.
        ModelError: a file on the Hub cannot be read.
    """
    return [_KINDS[objective.kind](_Source(objective, folder, token, root)) for objective in objectives]


@dataclass(frozen=True)
class _Source:
    """An objective, and where what it names is read from; see `scorers`."""

    objective: Objective
    folder: Path
    token: str | bool | None
    root: Path | None

    def refuse(self, what: str, hint: str | None = None) -> RecipeError:
        """Why it cannot be used, where it stands."""
        return RecipeError(Problem(f"{self.objective.source}: {what}", self.objective.at, _AT, hint))

    def text(self) -> str:
        """What the file holds."""
        name = self.objective.source
        if name.endswith(".parquet"):
            raise self.refuse("parquet is not read", "save it as JSON lines or as text")
        return read_source(name, self.objective.at, _AT, self.token, self.root)

    @property
    def is_lines(self) -> bool:
        """Whether the file has an item a line."""
        return self.objective.source.endswith((".jsonl", ".json"))

    def lines(self, keys: Mapping[str, type | tuple[type, ...]]) -> list[dict[str, Any]]:
        """The items of JSON lines, each with these keys."""
        found = list[dict[str, Any]]()
        for number, line in enumerate(self.text().splitlines(), 1):
            if len(found) == self.objective.limit:
                break
            if line.strip():
                found.append(self._item(number, line, keys))
        if not found:
            raise self.refuse("there is nothing in it")
        return mixed(found)

    def _item(self, number: int, line: str, keys: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
        try:
            item = parse_json(line)
        except ValueError as error:
            raise self.refuse(f"line {number} is no JSON ({error})", "write one object a line") from None
        for key, kind in keys.items():
            if not isinstance(item, dict) or not isinstance(item.get(key), kind) or item[key] in ("", []):
                raise self.refuse(f"line {number} has no {key!r}", f"each line has {', '.join(keys)}")
        return dict(item)


def mixed(items: Sequence[Item]) -> list[Item]:
    """Them in an order of chance, always the same one: so the first batches tell of all, and pruning is fair."""
    return random.Random(0).sample(items, len(items))


# ---- likelihoods ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """Tokens that are run through a model, and the first of those whose likelihood counts."""

    tokens: Sequence[int]
    first: int = 1


def batch_tokens(vocabulary: int) -> int:
    """How many tokens are run through a model at once, by how many there are to choose among."""
    return max(1, min(_BATCH_TOKENS, _BATCH_LOGITS // max(1, vocabulary)))


def _batches(rows: Sequence[_Row], model: Any) -> Iterator[Sequence[_Row]]:
    """Consecutive rows, as many as fit."""
    most, held = batch_tokens(model.config.get_text_config().vocab_size), list[_Row]()
    for row in rows:
        if held and max(len(row.tokens), *(len(each.tokens) for each in held)) * (len(held) + 1) > most:
            yield held
            held = []
        held.append(row)
    if held:
        yield held


def _nats(rows: Sequence[_Row], model: Any) -> Iterator[list[Floats]]:
    """Batch by batch, of each row the negative log-likelihoods of its tokens that count.

    Rows are filled up at their end, which no token before can see.
    """
    torch, scoring = import_module("torch"), import_module("merger.evaluation.scoring")
    for batch in _batches(rows, model):
        longest = max(len(row.tokens) for row in batch)
        filled = torch.tensor([[*row.tokens, *[0] * (longest - len(row.tokens))] for row in batch])
        found = scoring.nats(model, filled).cpu().numpy()
        yield [of[row.first - 1 : len(row.tokens) - 1] for of, row in zip(found, batch, strict=True)]


class _Remembered(Generic[Item]):
    """What was made of texts for a tokenizer: candidates share theirs until one of other models comes."""

    def __init__(self) -> None:
        self._made: tuple[object, Item] | None = None

    def of(self, tokenizer: object, make: Callable[[], Item]) -> Item:
        """It, made by `make` where it was last made for another tokenizer."""
        if self._made is None or self._made[0] is not tokenizer:
            self._made = tokenizer, make()
        return self._made[1]


class _Loss:
    """Nats a token of held-out texts, in windows that do not overlap."""

    higher = False

    def __init__(self, source: _Source) -> None:
        objective = source.objective
        self.name, self._ids = objective.label, _Remembered[list[list[int]]]()
        if source.is_lines:
            self._texts = [item[objective.column] for item in source.lines({objective.column: str})]
        else:
            self._texts = [source.text()[: objective.limit]]
        if not any(text.strip() for text in self._texts):
            raise source.refuse("there is nothing in it")

    def score(self, model: Any, tokenizer: Any, step: Step | None = None) -> Scored:
        window = min(WINDOW, getattr(model.config, "max_position_embeddings", None) or WINDOW)
        ids = self._ids.of(tokenizer, lambda: [tokenizer(of, add_special_tokens=False).input_ids for of in self._texts])
        cut = (of[start : start + window] for of in ids for start in range(0, len(of), window))
        rows = mixed([_Row(tokens) for tokens in cut if len(tokens) > 1])
        counts, sums, so_far = [len(row.tokens) - 1 for row in rows], list[float](), Scored(math.nan)
        for number, batch in enumerate(_nats(rows, model), 1):
            sums += [float(of.sum()) for of in batch]
            items = np.array(sums) * len(rows) / sum(counts)
            so_far = Scored(math.fsum(sums) / sum(counts[: len(sums)]), items)
            if step is not None:
                step(number, so_far)
        return so_far


def _prompted(tokenizer: Any, prompt: str, answer: str) -> _Row:
    """Tokens of both, of which those of the answer count: tokens that a prompt has alone are taken to be its own."""
    before, whole = (tokenizer(text).input_ids for text in (prompt, prompt + answer))
    same = next((place for place, pair in enumerate(zip(before, whole, strict=False)) if pair[0] != pair[1]),
                min(len(before), len(whole)))  # fmt: skip
    return _Row(whole, max(1, min(same, len(whole) - 1)))


class _Accuracy:
    """How often the right choice is the likeliest one, by log-likelihood for each of its bytes."""

    higher = True

    def __init__(self, source: _Source) -> None:
        self.name, self._rows = source.objective.label, _Remembered[list[_Row]]()
        self._items = source.lines({"prompt": str, "choices": list, "answer": (int, str)})
        for number, item in enumerate(self._items, 1):
            item["choices"], answer = list(map(str, item["choices"])), item["answer"]
            right = item["choices"].index(answer) if answer in item["choices"] else answer
            if isinstance(right, str) or not 0 <= right < len(item["choices"]):
                raise source.refuse(f"the answer of item {number} is none of its choices", "write its text or number")
            item["answer"] = right

    def score(self, model: Any, tokenizer: Any, step: Step | None = None) -> Scored:
        rows = self._rows.of(
            tokenizer,
            lambda: [_prompted(tokenizer, of["prompt"], choice) for of in self._items for choice in of["choices"]],
        )
        found, hits = list[float](), list[float]()
        for number, batch in enumerate(_nats(rows, model), 1):
            found += [float(of.sum()) for of in batch]
            while len(hits) < len(self._items) and len(found) >= len(self._items[len(hits)]["choices"]):
                item = self._items[len(hits)]
                rates = [found.pop(0) / len(choice.encode()) for choice in item["choices"]]
                hits.append(float(rates.index(min(rates)) == item["answer"]) if np.isfinite(rates).all() else math.nan)
            if step is not None and hits:
                step(number, Scored(float(np.mean(hits)), np.array(hits)))
        return Scored(float(np.mean(hits)), np.array(hits))


# ---- answers --------------------------------------------------------------------------------------------------------


def _answers(prompts: Sequence[str], model: Any, tokenizer: Any, most: int) -> Iterator[list[Sequence[int]]]:
    """Batch by batch the tokens that a model goes on with, always the likeliest, up to where it ends by itself."""
    torch, generation = import_module("torch"), import_module("transformers").GenerationConfig
    ends = model.generation_config.eos_token_id
    stops = set(ends if isinstance(ends, list) else [ends])
    how = generation(do_sample=False, max_new_tokens=most, eos_token_id=ends, pad_token_id=0)
    rows = [_Row([*tokenizer(prompt).input_ids] or [0]) for prompt in prompts]
    for batch in _batches([_Row([*row.tokens, *[0] * most]) for row in rows], model):
        asked = [row.tokens[: len(row.tokens) - most] for row in batch]
        longest = max(map(len, asked))
        ids = torch.tensor([[*[0] * (longest - len(of)), *of] for of in asked], device=model.device)
        seen = torch.tensor([[*[0] * (longest - len(of)), *[1] * len(of)] for of in asked], device=model.device)
        with torch.inference_mode():
            made = model.generate(input_ids=ids, attention_mask=seen, generation_config=how)[:, longest:].tolist()
        yield [of[: next((place for place, token in enumerate(of) if token in stops), len(of))] for of in made]


def _most(wanted: Sequence[str], tokenizer: Any) -> int:
    """How many tokens are made to see whether an answer is one of these, in other tokens maybe."""
    return 2 * max(len(tokenizer(f" {answer}").input_ids) for answer in wanted) + 2


class _Answers:
    """Answers that a model writes to prompts: how often they are the right ones, or how long they are."""

    def __init__(self, source: _Source) -> None:
        self.name, self.higher = source.objective.label, source.objective.kind == "exact_match"
        self._items = source.lines({"prompt": str, "answer": str} if self.higher else {"prompt": str})

    def score(self, model: Any, tokenizer: Any, step: Step | None = None) -> Scored:
        wanted = [" ".join(item["answer"].split()) for item in self._items] if self.higher else []
        most = _most(wanted, tokenizer) if self.higher else ANSWER_TOKENS
        prompts, found = [item["prompt"] for item in self._items], list[float]()
        for number, batch in enumerate(_answers(prompts, model, tokenizer, most), 1):
            for tokens in batch:
                said = tokenizer.decode(tokens, skip_special_tokens=True).strip().partition("\n")[0]
                right = self.higher and " ".join(said.split()) == wanted[len(found)]
                found.append(float(right if self.higher else len(tokens)))
            if step is not None:
                step(number, Scored(float(np.mean(found)), np.array(found)))
        return Scored(float(np.mean(found)), np.array(found))


# ---- what others score ----------------------------------------------------------------------------------------------


class _Task:
    """A task of lm-evaluation-harness, by its first metric."""

    def __init__(self, source: _Source) -> None:
        objective = source.objective
        self.name, self._limit, self.higher = objective.label, objective.limit, True
        self._scoring = import_module("merger.evaluation.scoring")
        try:
            manager, (name,) = self._scoring.task_manager([objective.source])
            unknown = name not in manager.all_tasks
        except ImportError:
            raise source.refuse("lm-evaluation-harness is not installed here") from None
        if unknown:
            raise source.refuse("lm-evaluation-harness has no such task", "see lm_eval ls tasks, or name a YAML file")
        self._task = objective.source

    def score(self, model: Any, tokenizer: Any, step: Step | None = None) -> Scored:
        found = self._scoring.run_tasks(model, tokenizer, [self._task], self._limit, samples=True)
        ((name, result),) = found["results"].items()
        told = next(self._scoring.scores_of_task(name, result, found))
        self.higher = told["higher"]
        items = [item.get(told["metric"]) for item in found["samples"].get(name, [])]
        numbers = np.array([of for of in items if isinstance(of, int | float)], np.float64)
        return Scored(told["value"], numbers if len(numbers) == len(items) else np.empty(0))


class _Function:
    """A function of a model and its tokenizer; the more it returns the better."""

    higher = True

    def __init__(self, source: _Source) -> None:
        self.name = source.objective.label
        if source.root is not ANYWHERE:
            raise source.refuse("functions are run for one's own recipes alone", "name a file or a task")
        module, _, name = source.objective.source.partition(":")
        sys.path.insert(0, str(source.folder.resolve()))
        try:
            self._function = getattr(import_module(module), name)
        except (ImportError, AttributeError, SyntaxError) as error:
            raise source.refuse(f"cannot be imported ({error})", "let it lie beside the recipe") from None
        finally:
            sys.path.pop(0)

    def score(self, model: Any, tokenizer: Any, step: Step | None = None) -> Scored:
        try:
            return Scored(float(self._function(model, tokenizer)))
        except Exception as error:  # it is someone's own code
            what = f"{self.name}: {type(error).__name__}: {error}"
            raise EvaluationError(Problem(what)) from error


_KINDS: Mapping[str, Callable[[_Source], Scorer]] = {
    "loss": _Loss, "accuracy": _Accuracy, "exact_match": _Answers, "length": _Answers, "task": _Task,
    "function": _Function,
}  # fmt: skip
