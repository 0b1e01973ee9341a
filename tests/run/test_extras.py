"""A recipe takes an extra of the package for what it asks for, and nothing else: no other merge imports torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from merger.errors import RecipeError
from merger.methods.registry import methods
from merger.run import extras
from merger.run.options import Options
from merger.run.prepare import parse_text, plan
from merger.runtime import install_command

BOTH = "models: [{model: ./examples/zoo/kjv}, {model: ./examples/zoo/python}]\nbase_model: ./examples/zoo/base\n"
ADAPTED = "models: [{model: ./examples/zoo/base+OUT/adapter}, {model: ./examples/zoo/python}]\nmerge_method: linear\n"
EXPERTS = "".join(
    f"- {{source_model: ./examples/zoo/{name}, positive_prompts: [{name}]}}\n" for name in ("kjv", "python")
)
MIXED = f"base_model: ./examples/zoo/base\nexperts:\n{EXPERTS}gate_mode: "
LIGHT: dict[str, str] = {
    **{method: f"merge_method: {method}\n{BOTH}" for method in ("ties", "dare_linear", "della", "tsvm", "knots")},
    "slerp": "merge_method: slerp\nparameters: {t: 0.5}\nmodels: [{model: ./examples/zoo/python}]\n"
    "base_model: ./examples/zoo/base\n",
    "a LoRA": ADAPTED,
    "adapters": "merge_method: ties\nadapters: [{model: OUT/adapter}, {model: OUT/adapter}]\nlora: {rank: 2}\n",
    "rows for other tokens": f"merge_method: linear\n{BOTH}tokenizer: {{source: union}}\n",
    "routers by chance": MIXED + "random\n",
    "routers from embeddings": MIXED + "cheap_embed\n",
}
SETTLED = "publish: {license: apache-2.0}\n"


def test_no_merge_but_those_that_ask_for_it_imports_torch(tmp_path: Path) -> None:
    """Nor does an extraction, verify or diff: one after the other in a process of its own."""
    zoo, out = "./examples/zoo", str(tmp_path)
    adapter = ["--rank", "4", "--include", "mlp", "--skip-rest", "--to", f"{out}/adapter", "--quiet"]
    commands = [["extract-lora", f"{zoo}/kjv", f"{zoo}/base", *adapter]]
    for name, text in LIGHT.items():
        (tmp_path / f"{name}.yaml").write_text(text.replace("OUT", out) + SETTLED)
        commands.append(["run", f"{out}/{name}.yaml", "--to", f"{out}/{name}", "--quiet"])
    commands += [["verify", f"{out}/ties"], ["diff", f"{zoo}/kjv", f"{zoo}/python", "--json"]]
    code = (
        "import json, sys\nfrom merger.cli.commands import main\n"
        "for command in json.loads(sys.argv[1]): print(main(command), 'torch' in sys.modules, file=sys.stderr)"
    )
    line = [sys.executable, "-c", code, json.dumps(commands)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    told = [row for row in done.stderr.splitlines() if row.endswith((" False", " True"))]
    assert told == ["0 False"] * (len(commands) - 1) + ["7 False"], done.stderr


HEAVY: dict[str, tuple[str, str, list[tuple[str, tuple[str, ...]]]]] = {
    "hidden states": (MIXED + "hidden\n", "cpu", [("moe", ("torch", "transformers"))]),
    "perplexity": (
        f"merge_method: ties\n{BOTH}evaluate: {{perplexity: {{text: {ROOT}/README.md}}}}\n", "cpu",
        [("eval", ("torch", "transformers"))],
    ),
    "tasks": (
        f"merge_method: ties\n{BOTH}evaluate: {{tasks: [arc_easy]}}\n", "cpu",
        [("eval", ("torch", "transformers", "lm_eval"))],
    ),
    "a GPU": (f"merge_method: ties\n{BOTH}", "cuda", [("torch", ("torch",))]),
    "a study in a database": (
        f"merge_method: task_arithmetic\n{BOTH}parameters: {{weight: {{search: [0, 1]}}}}\n"
        "search: {objectives: [{loss: ./README.md}], storage: 'postgresql://host/name'}\n", "cpu",
        [("search", ("optuna", "torch", "transformers")), ("postgres", ("psycopg",))],
    ),
    "a method of one's own": (f"merge_method: sce\n{BOTH}", "cpu", [("torch", ("torch",))]),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEAVY)
def test_what_is_not_installed_is_refused_by_the_plan(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And by check, where the recipe alone says it; with the command that installs it."""
    text, device, wanted = HEAVY[kind]
    monkeypatch.chdir(ROOT)
    table: Any = methods()
    monkeypatch.setitem(table, "sce", replace(methods()["sce"], needs="torch"))
    recipe = parse_text(text, "mine.yaml")
    assert [(need.extra, need.packages) for need in extras.needs_of(recipe, device)] == wanted
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(RecipeError) as refused:
        plan(recipe, Options(device=device))
    for (extra, packages), problem in zip(wanted, refused.value.problems, strict=True):
        assert f"takes {' and '.join(packages)}, which is not installed here" in problem.what
        assert problem.hint == install_command(extra)


@pytest.mark.parametrize("kind", LIGHT)
def test_all_else_takes_nothing_but_the_package(kind: str) -> None:
    """Whatever it computes."""
    assert list(extras.needs_of(parse_text(LIGHT[kind], "mine.yaml"))) == []
