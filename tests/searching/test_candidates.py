"""A candidate made in a model's own memory is what a run writes, bit for bit, whatever was made there before."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import vocabularies
from merging import merged
from places import ZOO
from thorough import THOROUGH, thorough_only
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from merger.engine.joined import _JoinedWork
from merger.engine.runner import Work
from merger.engine.tensors import Memo
from merger.errors import EvaluationError, MismatchError
from merger.lock.lock import lock
from merger.methods.registry import methods
from merger.methods.steps import arithmetic
from merger.planning.budget import Budget
from merger.planning.plan import Plan, make_plan
from merger.run.options import Options
from merger.run.prepare import parse_text, plan
from merger.searching.candidates import Candidates, trial_memory
from merger.stores.folder import FolderReader, FolderStore
from merger.stores.ports import Located, Ticket
from merger.stores.resolve import Library

TWO = "models:\n  - {{model: {one}, parameters: {{{own}}}}}\n  - {{model: {two}, parameters: {{{own}}}}}\n"
ONE = "models: [{{model: {one}}}]\n"
BASE = "base_model: {base}\n"
CASES: Mapping[str, tuple[str, str]] = {
    "linear": ("weight: {a}", TWO),
    "task_arithmetic": ("weight: [{a}, {b}]", BASE + TWO),
    "ties": ("weight: {a}, density: {b}", BASE + TWO),
    "dare_ties": ("weight: {a}, density: {b}", BASE + TWO),
    "della": ("weight: {a}, density: 0.5, epsilon: 0.2", BASE + TWO),
    "breadcrumbs": ("weight: {a}, density: {b}, gamma: 0.01", BASE + TWO),
    "slerp": ("", BASE + ONE + "parameters: {{t: [{{filter: mlp, value: {a}}}, {{value: {b}}}]}}\n"),
    "sce": ("", BASE + TWO + "parameters: {{select_topk: {b}}}\n"),
    "nuslerp": ("weight: {a}", TWO),
    "multislerp": ("weight: {a}", TWO),
    "ramplus_tl": ("", BASE + TWO + "parameters: {{r: {a}}}\n"),
    "pcb": ("weight: {a}, density: {b}", BASE + TWO),
    "model_stock": ("", BASE + TWO),
    "tsvm": ("weight: {a}", BASE + TWO),
}
LINEAR = "merge_method: linear\n" + TWO.replace("{own}", "weight: {a}")
FORMS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "two stages": (
        "name: first\nmerge_method: ties\n" + BASE + TWO.replace("{own}", "weight: {a}, density: {b}")
        + "---\nmerge_method: linear\n" + TWO.replace("{one}", "first").replace("{own}", "weight: {a}"),
        {},
    ),
    "other tokens": (LINEAR + "tokenizer: {{source: union}}\n", {"two": "more"}),
    "tied": (LINEAR, {"one": "tied", "two": "tied2"}),
    "experts": (LINEAR, {"one": "moe", "two": "moe2"}),
    "layers": (
        "merge_method: passthrough\nslices:\n  - sources: [{{model: {one}, layer_range: [0, 1]}}]\n"
        "  - sources: [{{model: {two}, layer_range: [{layer}, 2], parameters: {{scale: {a}}}}}]\n",
        {},
    ),
}  # fmt: skip
"""What else a recipe may be, and which parents stand for its models."""


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Models of one family by the names that recipes here have for them."""
    root = tmp_path_factory.mktemp("parents")
    found = {name: vocabularies.model(root / name, seed) for seed, name in enumerate(("base", "one", "two"))}
    found["more"] = vocabularies.model(root / "more", 4, added=["<new>"])
    found |= {name: vocabularies.model(root / name, seed, tied=True, tie_word_embeddings=True)
              for seed, name in enumerate(("tied", "tied2"), 5)}  # fmt: skip
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
             "num_key_value_heads": 2, "num_local_experts": 2, "vocab_size": 36}  # fmt: skip
    for seed, name in enumerate(("moe", "moe2")):
        torch.manual_seed(seed)
        MixtralForCausalLM(MixtralConfig(**shape)).save_pretrained(root / name)
        vocabularies.tokenizer().save(str(root / name / "tokenizer.json"))
        found[name] = root / name
    return found


def recipes(case: str, parents: Mapping[str, Path], dtype: str, seed: int) -> Iterator[str]:
    """Recipes without end that differ from the one before in one number or in both."""
    form, other = FORMS.get(case) or ("", {})
    if case in CASES:
        own, rest = CASES[case]
        form = f"merge_method: {case}\n{rest.replace('{own}', own)}"
    named = {**parents, **{name: parents[of] for name, of in other.items()}}
    draw, numbers = random.Random(seed), {"a": 0.5, "b": 0.5}
    while True:
        told = {**numbers, "layer": draw.choice((0, 1)), **named}
        yield f"{form.format(**told)}dtype: {dtype}\n"
        changed = draw.choice((["a"], ["b"], ["a", "b"]))
        numbers |= {name: round(draw.uniform(0.1, 0.9), 3) for name in changed}


def planned(text: str) -> tuple[Plan, Any]:
    return plan(parse_text(text, "r"), Options(threads=2))


def tensors(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that are not the same, in dtype, shape or bits."""
    assert found.keys() == wanted.keys()
    return [name for name in found
            if found[name].dtype != wanted[name].dtype or not torch.equal(found[name], wanted[name])]  # fmt: skip


QUICK = ("task_arithmetic", "ties", "dare_ties", "two stages", "other tokens", "experts", "layers")


@pytest.mark.parametrize("case", [*CASES, *FORMS] if THOROUGH else QUICK)
def test_a_candidate_in_place_is_the_written_merge(case: str, parents: Mapping[str, Path], tmp_path: Path) -> None:
    """After ten changes in a row, tensor by tensor; and its tokenizer has the same tokens."""
    for seed in range(3 if THOROUGH else 1):
        dtype = "bfloat16" if (len(case) + seed) % 2 else "float32"
        texts = recipes(case, parents, dtype, seed)
        ran = "float32" if case in ("task_arithmetic", "experts") else dtype
        with Candidates(*planned(next(texts)), arithmetic=ran) as candidates:
            for text, _ in zip(texts, range(10), strict=False):
                candidates.make(planned(text)[0])
            merged(text, tmp_path / f"{seed}")
            wanted = AutoModelForCausalLM.from_pretrained(tmp_path / f"{seed}", dtype=getattr(torch, ran))
            assert same(tensors(candidates.model), tensors(wanted)) == []
            tokens = AutoTokenizer.from_pretrained(tmp_path / f"{seed}").get_vocab()
            assert candidates.tokenizer.get_vocab() == tokens
            assert candidates._resident is not None
            assert bool(candidates._resident.converted) == (case == "experts")


def made(candidates: Candidates, text: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], int]:
    """The tensors that are made for a recipe, and how many were measured for it."""
    names, measured, get = list[str](), list[object](), Memo.get

    def noting(making: Any) -> Any:
        def make(work: Work, *more: Any) -> memoryview:
            names.extend(job.name for job, _ in work.job.parts)
            return making(work, *more)

        return make

    def counting(memo: Memo, key: Any, measure: Any) -> Any:
        return get(memo, key, lambda: (measured.append(key), measure())[1])

    with monkeypatch.context() as patch:
        patch.setattr(Work, "make", noting(Work.make))
        patch.setattr(_JoinedWork, "make", noting(_JoinedWork.make))
        patch.setattr(Memo, "get", counting)
        candidates.make(planned(text)[0])
    return names, len(measured)


def test_only_what_changed_is_made_and_measured(parents: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A filter's number makes its tensors alone; a weight measures no threshold again, a density does."""
    form = (
        "merge_method: ties\nbase_model: {base}\nmodels:\n"
        "  - model: {one}\n"
        "    parameters: {{weight: [{{filter: up_proj, value: {a}}}, {{value: 0.5}}], density: {b}}}\n"
        "  - {{model: {two}, parameters: {{weight: 0.4, density: 0.5}}}}\n"
    )
    with Candidates(*planned(form.format(a=0.3, b=0.5, **parents))) as candidates:
        every = [job.name for job in candidates._first.jobs]
        assert made(candidates, form.format(a=0.3, b=0.5, **parents), monkeypatch) == ([], 0)
        names, measured = made(candidates, form.format(a=0.4, b=0.5, **parents), monkeypatch)
        assert (set(names), measured) == ({name for name in every if "up_proj" in name}, 0)
        names, measured = made(candidates, form.format(a=0.4, b=0.6, **parents), monkeypatch)
        assert (set(names), measured) == (set(every), len(every))
        assert made(candidates, form.format(a=0.3, b=0.5, **parents), monkeypatch) == (names, 0)


@pytest.mark.parametrize("method", ["slerp", "multislerp"])
def test_what_no_number_changes_is_measured_once(
    method: str, parents: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another angle, or other weights: from the norms and dot products that are known."""
    own, rest = CASES[method]
    form = f"merge_method: {method}\n{rest.replace('{own}', own)}"
    with Candidates(*planned(form.format(a=0.3, b=0.5, **parents))) as candidates:
        monkeypatch.setattr(arithmetic, "dots", None)
        names, _ = made(candidates, form.format(a=0.4, b=0.6, **parents), monkeypatch)
        assert names == [job.name for job in candidates._first.jobs]


def test_a_candidate_that_cannot_be_made_leaves_the_next_one_whole(parents: Mapping[str, Path]) -> None:
    """What was made of it in part is made again."""
    form = "merge_method: linear\nparameters: {{normalize: false}}\nmodels:\n"
    form += "  - {{model: {one}, parameters: {{weight: {a}}}}}\n  - {{model: {two}, parameters: {{weight: {a}}}}}\n"
    form += "dtype: float16\n"
    with Candidates(*planned(form.format(a=0.5, **parents))) as candidates:
        before = tensors(candidates.model)
        with pytest.raises(MismatchError, match="beyond float16"):
            candidates.make(planned(form.format(a=900000, **parents))[0])
        candidates.make(planned(form.format(a=0.5, **parents))[0])
        assert same(tensors(candidates.model), before) == []


def test_plans_of_other_models_follow_each_other(parents: Mapping[str, Path]) -> None:
    """Two by TIES, then each alone, then by TIES on another base: each is what it is by itself."""
    alone = "merge_method: passthrough\nmodels: [{{model: {one}}}]\ndtype: bfloat16\n"
    form = "merge_method: ties\n" + (BASE + TWO).replace("{own}", "weight: 0.5, density: 0.4") + "dtype: bfloat16\n"
    other = {"one": parents["two"], "two": parents["base"], "base": parents["one"]}
    texts = [form.format(**parents), alone.format(**parents), alone.format(**other), form.format(**other)]
    with Candidates(*planned(texts[0])) as candidates:
        for text in texts:
            candidates.make(planned(text)[0])
            with Candidates(*planned(text)) as wanted:
                assert same(tensors(candidates.model), tensors(wanted.model)) == []


ALONE = """
import json, resource, sys
from merger.recipe.searched import Objective
from merger.run.options import Options
from merger.run.prepare import parse_text, plan
from merger.searching.candidates import Candidates, trial_memory
from merger.searching.objectives import batch_tokens, scorers
from pathlib import Path
planned, library = plan(parse_text(sys.argv[1], "r"), Options(threads=2))
judged = scorers([Objective("loss", sys.argv[2])], Path())
with Candidates(planned, library) as candidates:
    candidates.score(judged)
said = trial_memory(planned, batch_tokens(planned.config["vocab_size"]))
print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, said]))
"""


@thorough_only
def test_a_search_stays_within_the_memory_that_is_said() -> None:
    """In a process of its own: Python, torch, the merge, the model and a batch."""
    own = "weight: 0.5, density: 0.4"
    models = {"base": ZOO / "base", "one": ZOO / "kjv", "two": ZOO / "python"}
    text = "merge_method: ties\n" + (BASE + TWO).replace("{own}", own).format(**models)
    line = [sys.executable, "-c", ALONE, text, str(ZOO / "kjv" / "heldout.txt")]
    used, said = json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
    assert 0.3 * said < used <= said


@pytest.mark.parametrize(
    ("dtype", "objective", "able", "more"),
    [
        ("float32", "{loss: a.txt}", False, 0),
        ("bfloat16", "{loss: a.txt}", True, 0),
        ("bfloat16", "{loss: a.txt}", False, 4),
        ("bfloat16", "{task: arc_easy}", True, 0),
    ],
)
def test_what_a_search_holds_beside_a_merge_is_counted(
    dtype: str, objective: str, able: bool, more: int, parents: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four bytes of each parameter that runs in float32, and lm-evaluation-harness with 2048 tokens of its own."""
    monkeypatch.setattr("merger.searching.candidates.computes_in", lambda of: able or of == "float32")
    block = f"dtype: {dtype}\nsearch: {{objectives: [{objective}]}}\n"
    there = planned(LINEAR.format(a="{search: [0, 1]}", **parents) + block)[0]
    harness = (500 << 20) + 12 * 2048 * there.config["vocab_size"] if "task" in objective else 0
    files = sum((parents[name] / "model.safetensors").stat().st_size for name in ("one", "two"))
    alone = there.peak_memory + (700 << 20) + files + there.nbytes
    assert trial_memory(there, 0) == alone + more * there.entries + harness


def test_an_adapter_and_a_model_without_a_tokenizer_are_no_candidates(
    parents: Mapping[str, Path], tmp_path: Path
) -> None:
    """Each is refused in a sentence."""
    extracted = f"extract_lora: {{base_model: {parents['base']}, model: {parents['one']}, rank: 2}}\n"
    with pytest.raises(EvaluationError, match="an adapter is made"), Candidates(*planned(extracted)):
        pass
    mute = tiny.model(tmp_path / "mute")
    with (
        pytest.raises(EvaluationError, match="transformers cannot run"),
        Candidates(*planned(f"merge_method: passthrough\nmodels: [{{model: {mute}}}]\n")),
    ):
        pass


class Pinned(FolderStore):
    """Folders as if each were at a commit of the Hub; what is read of them is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.read = 0

    def locate(self, path: str, revision: str | None) -> Located:
        return replace(super().locate(path, revision), commit="f" * 40)

    def reader(self, tickets: Sequence[Ticket], budget: int) -> FolderReader:
        self.read += sum(ticket.stop - ticket.start for ticket in tickets)
        return super().reader(tickets, budget)


@pytest.mark.parametrize("room", [1 << 40, 0])
def test_parents_on_the_hub_are_read_once(
    room: int, parents: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into memory, or where there is none into a file; and the candidate is the one of the same folders."""
    monkeypatch.setattr("merger.searching.candidates.free_memory", lambda: room)
    texts, far = list(islice(recipes("ties", parents, "bfloat16", 3), 4)), Pinned()
    locked = lock(parse_text(texts[0], "r"), library := Library([far]), {}, False)
    plans = [make_plan(replace(locked, recipe=parse_text(text, "r")), methods(), Budget(threads=2)) for text in texts]
    with Candidates(plans[0], library) as candidates, Candidates(*planned(texts[0])) as wanted:
        for there, text in zip(plans[1:], texts[1:], strict=True):
            candidates.make(there)
            wanted.make(planned(text)[0])
        assert same(tensors(candidates.model), tensors(wanted.model)) == []
    files = sum((parents[name] / "model.safetensors").stat().st_size for name in ("base", "one", "two"))
    assert far.read == files
    for there in (plans[0], planned(texts[0])[0]):
        assert trial_memory(there, 0) >= there.peak_memory + files + there.nbytes
