"""What people bring and are answered, sentence by sentence, where each is read: terminal, Action, Space.

The three tell a problem, and a plan, by code of their own. Not here: what else each of them tells (test_command,
test_action, space/test_views).
"""

from __future__ import annotations

import contextlib
import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
import tiny
import torch
import vocabularies
from actions import commands, environment
from brought import cloned, of_gguf, of_mlx
from calls import called

import merger
from merger.action import step
from merger.card.facts import PlanSummary
from merger.cli.markdown import plan_section
from merger.errors import BudgetError, MergerError
from merger.run.options import Options
from merger.run.prepare import read_recipe
from space.api import Api
from space.page import views
from space.page.texts import for_the_page
from space.work import admission
from space.work.admission import Limits
from space.work.service import Service

TWO = "models: [{model: org/a, parameters: {weight: 1}}, {model: org/b, parameters: {weight: 1}}]\n"
BOTH = "merge_method: linear\nparameters: {{weight: 1}}\nmodels:\n  - model: ./{}\n  - model: ./{}\n"
ALONE = "merge_method: passthrough\nmodels:\n  - model: {}\n"


@dataclass(frozen=True)
class Says:
    """An error of a recipe, or a warning: its place, the sentence and the next step."""

    line: int
    column: int
    what: str
    hint: str
    kind: str = "error"


def warns(line: int, column: int, what: str, hint: str) -> Says:
    return Says(line, column, what, hint, "warning")


RECIPES: Mapping[str, tuple[str, Says]] = {
    "a base outside of linear's models": (
        "merge_method: linear\nbase_model: org/base\nparameters: {weight: 0.5}\nmodels: [{model: org/a}]\n",
        warns(2, 13, "base_model: org/base gives config and tokenizer and is not merged (mergekit: one model more, "
              "with the weight that stands above the models)", "to merge it too, list it among the models")),
    "a model listed twice": (
        "merge_method: linear\nparameters: {weight: 1}\nmodels:\n  - model: org/a\n  - model: org/a\n",
        warns(5, 5, "models[org/a]: org/a is listed twice, and counts twice (mergekit: once, with the numbers of the "
              "first)", "take one of them out, unless that is meant")),
    "a last slice with more sources": (
        "merge_method: linear\nparameters: {weight: 1}\nslices:\n"
        "  - sources: [{model: org/a, layer_range: [0, 2]}]\n"
        "  - sources: [{model: org/a, layer_range: [2, 4]}, {model: org/b, layer_range: [2, 4]}]\n",
        warns(5, 5, "slices: the sources of the last slice are all merged into what follows the layers: final norm and "
              "head (mergekit: only as many of them as the first slice has sources)",
              "to have the same in both, give the first slice and the last equally many sources")),
    "float64": (
        f"merge_method: linear\n{TWO}dtype: float64\nout_dtype: float32\n",
        warns(3, 8, "dtype: float64 is not what methods compute in: that is float32, with sums, norms and angles in "
              "float64 (mergekit: all in float64)", "leave dtype out, or write float32: out_dtype is the result's")),
    "an architecture of mergekit's": (
        "merge_method: passthrough\nmodels: [{model: {model: org/a, override_architecture: X}}]\n",
        warns(2, 33, "models[org/a].model.override_architecture: override_architecture has no effect: the architecture "
              "is learned from the tensors' names (mergekit: the table of tensors that it takes for the model)",
              "take it out")),
    "one model alone": (
        "merge_method: karcher\nmodels: [{model: org/a}]\n",
        warns(2, 1, "models: nothing is merged: org/a is the only model, and comes out as it is",
              "list more models, if some are missing")),
    "an empty list": (
        "merge_method: linear\nparameters: {weight: 2}\nmodels: [{model: org/a, parameters: {weight: []}}]\n",
        warns(3, 38, "models[org/a].parameters.weight: an empty list gives no value, so that of the level above holds",
              "take it out")),
    "a key of old releases": (
        "merge_method: slerp\nbase_model: org/a\nmodels: [{model: org/b}]\nparameters: {t: 0.5, embed_slerp: true}\n",
        warns(4, 22, "parameters.embed_slerp: embed_slerp has no effect: only old releases of mergekit knew it",
              "take it out")),
    "a search of mergekit-evolve": (
        "genome: {models: [org/a]}\ntasks: []\n",
        Says(1, 1, "this is a search of mergekit-evolve, and no recipe",
             "run the recipe that it found: best_config.yaml in its folder")),
    "tasks of mergekit-evolve": (
        f"merge_method: linear\ntasks: [arc_easy]\n{TWO}",
        Says(2, 1, "unknown key 'tasks'", "tasks that the result is tried on belong into evaluate: {tasks: [...]}")),
    "random_seed among parameters": (
        f"merge_method: linear\n{TWO}parameters: {{random_seed: 7}}\n",
        Says(3, 14, "parameters: unknown key 'random_seed'", "write seed: at the top of the recipe")),
    "padding at the top": (
        f"merge_method: linear\n{TWO}pad_to_multiple_of: 64\n",
        Says(3, 1, "unknown key 'pad_to_multiple_of'",
             "write it into the tokenizer's block: tokenizer: {source: base, pad_to_multiple_of: 64}")),
    "model: before a tokenizer's": (
        f"merge_method: linear\n{TWO}tokenizer_source: model:org/chat\n",
        Says(3, 19, "tokenizer_source: 'model:org/chat' begins with 'model:'", "take it out: write org/chat")),
    "an unknown method": (
        f"merge_method: TISE\nbase_model: org/base\n{TWO}",
        Says(1, 15, "merge_method: there is no merge method 'TISE'", "did you mean 'ties'?")),
    "a slip beside a key that holds an anchor": (
        "constant: &one org/a\nmerge_method: passthrough\ndtpye: bfloat16\nmodels: [{model: *one}]\n",
        Says(3, 1, "unknown key 'dtpye'", "did you mean 'dtype'?")),
    "a word for a number": (
        f"merge_method: linear\nseed: four\n{TWO}",
        Says(2, 7, "seed: expected a whole number, found the text 'four'",
             "any whole number will do, such as seed: 42")),
    "an address that is no model's": (
        f"merge_method: linear\n{TWO}publish: {{repo: https://huggingface.co/org}}\n",
        Says(3, 17, "publish.repo: 'https://huggingface.co/org' is no repo's name on the Hub",
             "write it as its address on the Hub ends, owner/name: letters, digits, -, _ and ., 96 at most in each; "
             "neither begins or ends with - or ., nowhere is -- or .., and .git is no ending")),
}  # fmt: skip
"""What is told of a recipe before its models are looked at."""

ROWS = ("add tokenizer: {source: union} for the tokens of all models, or tokenizer: {source: base} for those of one; "
        "tokenizer: {source: base, rows: base} has as many rows as the base")  # fmt: skip
MODELS: Mapping[str, tuple[str, Says]] = {
    "a pointer of Git LFS": (
        ALONE.format("./cloned"),
        Says(3, 12, "models[./cloned]: model.safetensors is a pointer of Git LFS, not the file itself",
             "git lfs pull, in its folder, fetches the files; or download the model with hf download owner/name")),
    "a GGUF file that is none": (
        ALONE.format("./gguf"),
        Says(3, 12, "models[./gguf]: model-Q4_K_M.gguf: the GGUF header cannot be read: "
             "it is of version 0, and 2 and 3 are read",
             "download it again, or ask its author")),
    "a DoRA of MLX": (
        ALONE.format("./one+./mlx"),
        Says(3, 12, "models[./mlx]: is a fine-tune of MLX by 'dora'; LoRA is the only kind that is built",
             "merge it into its model with mlx_lm.fuse (--dequantize), and name the folder of the result")),
    "NVFP4": (
        ALONE.format("./nvfp4"),
        Says(3, 12, "models[./nvfp4]: is quantised by NVFP4; its stored numbers must not be merged as they are",
             "merge the model that it was quantised from, in bfloat16, float16 or float32, and quantise the result")),
    "a word": (
        ALONE.format("it"),
        Says(3, 12, "models[it]: there is no folder 'it' here, and the Hub may not be asked for it: HF_HUB_OFFLINE is "
             "set", "unset HF_HUB_OFFLINE")),
    "padded rows": (
        BOTH.format("padded", "trimmed"),
        Says(5, 5, "models[./trimmed]: model.embed_tokens.weight is 48x16 in padded, but 36x16 in trimmed", ROWS)),
    "layers that may be either of two": (
        BOTH.format("one", "omni"),
        Says(5, 5, "models[./omni]: the layers model.layers.N of one may be talker.model.layers.N or "
                   "thinker.model.layers.N of omni",
             "by roles and shapes both fit: save the one that is meant by itself, and merge that")),
}  # fmt: skip
"""What is told of the models that a recipe names."""

PLANNED: Mapping[str, tuple[str, str, str]] = {
    "leftover tensors of a recipe without ranges": (
        BOTH.format("one", "towered"),
        "left out\n  tower.layers.0.w.weight, tower.layers.1.w.weight: towered: one has no such layer\n",
        "**Left out:** 2 tensors: one has no such layer"),
    "files beside the model": (
        ALONE.format("./beside"),
        "left out\n  params.json: beside: goes with weights that the result does not have\n",
        "**Files left out:** `params.json`: goes with weights that the result does not have"),
    "rows that are cut": (
        BOTH.format("padded", "trimmed") + "tokenizer: {source: base}\n",
        "tokens  36 rows: the tokenizer of padded; 12 rows of padded behind its last token are left out (rows: base "
        "keeps them)\n",
        "| tokens | 36 rows: the tokenizer of padded; 12 rows of padded behind its last token are left out (rows: base "
        "keeps them) |"),
}  # fmt: skip
"""What is told of a plan: on the terminal, and as Markdown in the Action's summary and on the Space's page."""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkout with all the recipes and models, in which one works, without the Hub."""
    root = tmp_path_factory.mktemp("checkout")
    for made, name in ((cloned("model.safetensors"), "cloned"), (of_gguf, "gguf"), (of_mlx, "mlx")):
        made(root / name)
    tensors, scale = tiny.tensors(), "model.layers.0.mlp.down_proj.weight_scale_2"
    tiny.write(root / "one", tensors)
    tiny.write(root / "beside", tensors)
    (root / "beside/params.json").write_text("{}")
    modelopt = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    tiny.write(root / "nvfp4", tensors | {scale: torch.ones(1)}, quantization_config=modelopt)
    tiny.write(root / "towered", tensors | {f"tower.layers.{n}.w.weight": torch.ones(2) for n in range(2)})
    twice = {f"{part}.{name}": tensor.clone() for part in ("thinker", "talker") for name, tensor in tensors.items()}
    tiny.write(root / "omni", twice)
    vocabularies.model(root / "padded", 1, rows=48)
    vocabularies.model(root / "trimmed", 2)
    for table in (RECIPES, MODELS, PLANNED):
        for name, (recipe, *_) in table.items():
            (root / file(name)).write_text(recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield root


NO_SERVICE = cast(Service, None)
"""A recipe is checked without one."""


def file(name: str) -> str:
    return f"{re.sub('[^a-z0-9]+', '-', name.lower())}.yaml"


@dataclass(frozen=True)
class Step:
    """A step of the Action over all recipes: its commands to GitHub, and the job's summary."""

    commands: Sequence[str]
    summary: str


def stepped(root: Path, place: Path, recipes: str, **given: str) -> Step:
    """The step in this process."""
    told = io.StringIO()
    settings = {f"INPUT_{name.upper()}": text for name, text in {"recipe": recipes, **given}.items()}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(told):
        patch.chdir(root)
        for name, value in (environment(place, root, "workflow_dispatch", {}) | settings).items():
            patch.setenv(name, value)
        step.main()
    summary = place / "summary"
    return Step(commands(told.getvalue()), summary.read_text() if summary.exists() else "")


@pytest.fixture(scope="module")
def steps(here: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Step]:
    """The recipes as the Action checks them, and those with models as it plans them, by mode."""
    every = {"check": (*RECIPES,), "plan": (*MODELS, *PLANNED)}
    return {
        mode: stepped(here, tmp_path_factory.mktemp("runner"), "\n".join(map(file, names)), mode=mode)
        for mode, names in every.items()
    }


def in_text(says: Says, name: str) -> str:
    return f"{file(name)}:{says.line}:{says.column}: {says.what}\n    {says.hint}\n"


def on_github(step: Step, says: Says, name: str) -> list[str]:
    """The commands about a recipe, of which the first says it, as the summary does too."""
    what = f"{says.what}\n    {says.hint}".replace("%", "%25").replace("\n", "%0A")
    told = [line for line in step.commands if f"file={file(name)}," in line]
    assert told[0] == f"::{says.kind} file={file(name)},line={says.line},col={says.column},title=Merger::{what}"
    assert f"```text\n{in_text(says, name)}" in step.summary
    return told


def in_the_space(says: Says) -> str:
    """In small letters: with which a sentence begins is for the page's own tests."""
    return f"{says.kind} line {says.line} {says.what} {for_the_page(says.hint)}".lower()


def words(page: str) -> str:
    """The text of a page, as a reader gets it."""
    return " ".join(html.unescape(re.sub(r"<style>.*?</style>|<[^>]*>", " ", page)).split())


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_said_of_a_recipe(name: str, here: Path, steps: Mapping[str, Step]) -> None:
    """And nothing else, on the terminal; at its line on GitHub, and in the summary; in the Space's page and answers."""
    recipe, says = RECIPES[name]
    done = called(["check", file(name)])
    code, kind = (2, "") if says.kind == "error" else (0, "warning: ")
    assert (done.code, done.err) == (code, kind + in_text(says, name))
    assert len(on_github(steps["check"], says, name)) == 1
    assert words(views.problem_list(admission.check(recipe))).lower() == in_the_space(says)
    answer = Api(NO_SERVICE).check(recipe)
    (told,) = answer["problems" if says.kind == "error" else "warnings"]
    where = f"{told['where']}: " if told["where"] else ""
    assert (told["line"], told["column"], where + told["what"], told["hint"]) == (
        says.line, says.column, says.what, says.hint,
    )  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_what_is_said_of_a_model(name: str, here: Path, steps: Mapping[str, Step]) -> None:
    """First, on the terminal and in the Space; at the model's line on GitHub, and in the summary."""
    says = MODELS[name][1]
    done = called(["plan", file(name)])
    assert done.code in (3, 4)
    assert done.err.startswith(in_text(says, name))
    assert on_github(steps["plan"], says, name)
    with pytest.raises(MergerError) as caught:
        merger.plan(file(name))
    assert words(views.refusal_html(caught.value.problems)).lower().startswith(in_the_space(says))


@pytest.mark.parametrize("name", PLANNED)
def test_what_is_said_of_a_plan(name: str, here: Path, steps: Mapping[str, Step]) -> None:
    """In the plan on the terminal, and as Markdown in the summary, and as the Space's page has it."""
    _, terminal, markdown = PLANNED[name]
    done = called(["plan", file(name)])
    assert (done.code, terminal in done.out) == (0, True), done.out
    planned = merger.plan(Path(file(name)))
    for told in (steps["plan"].summary, plan_section(PlanSummary(planned))):
        assert markdown in told.replace("\\", ""), told


INPUTS: Mapping[str, tuple[str, str, str]] = {
    "so few bytes": ("max_memory", "4", "input max-memory: 4 bytes? write 4GB"),
    "a folder or a repo": ("to", "you/merged", "'you/merged' may be a folder here or a repo on the Hub%0A"
                           "    write ./you/merged for the folder, hf://you/merged for the repo"),
}  # fmt: skip


@pytest.mark.parametrize("case", INPUTS)
def test_what_is_said_of_an_input(case: str, here: Path, tmp_path: Path) -> None:
    """As the command says it of an option."""
    name, value, says = INPUTS[case]
    told = stepped(here, tmp_path, file("files beside the model"), mode="run", **{name: value}).commands
    assert any(line.endswith(f"::{says}") for line in told), told
    assert not (here / "you").exists()


def test_what_takes_memory_is_told_wherever_there_is_too_little(here: Path, tmp_path: Path) -> None:
    """How much is needed and allowed; the Space has another next step."""
    name = file("files beside the model")
    done = called(["plan", name, "--max-memory", "1,000,000"])
    what, hint = done.err.splitlines()
    assert re.fullmatch(r"this merge needs [\d.]+ MB of memory, and 1.0 MB are allowed", what)
    assert re.search(r"small buffers: [\d.]+ MB for Python and its libraries, [\d.]+ \w+ for the work on \S+, ", hint)
    (told,) = [line for line in stepped(here, tmp_path, name, mode="plan", max_memory="1,000,000").commands
               if line.startswith("::error")]  # fmt: skip
    assert told.endswith(f"::{what}%0A{hint}")
    with pytest.raises(BudgetError) as caught:
        admission.plan_recipe(read_recipe(Path(name)), Options(max_memory=1_000_000), Limits())
    assert words(views.refusal_html(caught.value.problems)).lower() == (
        f"error {what} it is too big for this Space; the GitHub Action or your own machine can make it".lower()
    )
