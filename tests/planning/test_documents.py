"""A recipe of several documents makes in one pass what its documents make one after the other, and stores no stage."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import tiny
import torch
import vocabularies
import yaml
from calls import Command
from loopback import LoopbackHub
from merging import merged

from merger.run import pipeline as run
from merger.run.options import Options
from merger.run.prepare import plan, read_recipe

HIDDEN = 24  # no divisor of a block: methods that work on rows cut tensors elsewhere than those that work on entries
STAGES = {
    "linear": "merge_method: linear\nmodels: [{model: %a}, {model: %b, parameters: {weight: 0.3}}]\n",
    "slerp": "merge_method: slerp\nbase_model: %a\nmodels: [{model: %b}]\nparameters: {t: [0.2, 0.7]}\n",
    "nuslerp-rows": "merge_method: nuslerp\nmodels: [{model: %a}, {model: %b}]\n"
    "parameters: {weight: 0.6, nuslerp_flatten: false}\n",
    "dare_ties": "merge_method: dare_ties\nbase_model: %c\nmodels: [{model: %a}, {model: %b}]\nseed: 7\n"
    "parameters: {density: 0.5, weight: 0.8}\n",
    "tsvm": "merge_method: tsvm\nbase_model: %c\nmodels: [{model: %a}, {model: %b}]\n",
    "scaled": "merge_method: passthrough\nmodels: [{model: %a, parameters: {scale: 1.5}}]\n",
    "stack": "merge_method: passthrough\nslices:\n- sources: [{model: %a, layer_range: [0, 1]}]\n"
    "- sources: [{model: %b, layer_range: [1, 2]}]\n",
}
"""Stages of the models %a, %b and %c."""

RESULTS = {
    "linear": "merge_method: linear\nmodels: [{model: %stage}, {model: %c, parameters: {weight: 0.4}}]\n",
    "ties": "merge_method: ties\nbase_model: %c\nmodels: [{model: %stage}, {model: %a}]\nparameters: {density: 0.6}\n",
    "over-it": "merge_method: task_arithmetic\nbase_model: %stage\ndtype: float32\n"
    "models: [{model: %b}, {model: %c}]\n",
    "tsvm": "merge_method: tsvm\nbase_model: %c\nmodels: [{model: %stage}, {model: %b}]\n",
    "nuslerp-rows": "merge_method: nuslerp\nmodels: [{model: %stage}, {model: %b}]\n"
    "parameters: {weight: 0.6, nuslerp_flatten: false}\n",
    "copied": "merge_method: passthrough\nmodels: [{model: %stage}]\n",
}
"""What is made of a stage and the same models."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three models whose embedding is larger than a block."""
    root = tmp_path_factory.mktemp("models")
    made = {name: tiny.model(root / name, seed, hidden=HIDDEN, vocab=30_000) for seed, name in enumerate("abc")}
    for folder in made.values():
        (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return made


def filled(recipe: str, models: dict[str, Path], stage: str) -> str:
    recipe = recipe.replace("%stage", stage)
    for name, folder in models.items():
        recipe = recipe.replace(f"%{name}", str(folder))
    return recipe


def same(one: Path, other: Path) -> bool:
    """Whether two results hold the same bytes and the same config."""
    return all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in ("model.safetensors", "config.json")
    )


@pytest.fixture(scope="module")
def stored(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each stage, made by a run of its own when it is first asked for."""
    root = tmp_path_factory.mktemp("stages")

    class Made(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = root / name
            merged(filled(STAGES[name], models, ""), self[name])
            return self[name]

    return Made()


PAIRS = [(stage, result) for a, stage in enumerate(STAGES) for b, result in enumerate(RESULTS) if (a + b) % 2 == 0]
"""Half of all pairs, so that each stage meets results of each kind."""


@pytest.mark.parametrize(("stage", "result"), PAIRS)
def test_one_pass_makes_what_two_runs_make(
    stage: str, result: str, models: dict[str, Path], stored: dict[str, Path], tmp_path: Path
) -> None:
    """Whatever stage and result measure, draw or need whole: the bytes and the config are those of two runs."""
    merged(filled(RESULTS[result], models, str(stored[stage])), tmp_path / "twice")
    documents = f"name: first\n{filled(STAGES[stage], models, '')}---\n{filled(RESULTS[result], models, 'first')}"
    merged(documents, tmp_path / "once")
    assert same(tmp_path / "once", tmp_path / "twice")
    assert {path.name for path in tmp_path.iterdir()} == {"twice", "twice.yaml", "once", "once.yaml"}


def test_a_stage_of_a_stage_used_twice_is_made_as_in_separate_runs(models: dict[str, Path], tmp_path: Path) -> None:
    """The published example of several documents: a stage is another's base model, and its parent the result's base."""
    first = "merge_method: linear\nmodels: [{model: %a}, {model: %b}]\nparameters: {weight: 0.5}\n"
    second = "merge_method: slerp\nbase_model: %stage\nmodels: [{model: %c}]\nparameters: {t: 0.5}\ndtype: float16\n"
    last = (
        "merge_method: dare_ties\nbase_model: %a\nmodels:\n- {model: %stage, parameters: {density: 0.6, weight: 0.5}}\n"
        "- {model: %b, parameters: {density: 0.8, weight: 0.5}}\n- {model: %other, parameters: {weight: 0.2}}\n"
    )
    merged(filled(first, models, ""), tmp_path / "1")
    merged(filled(second, models, str(tmp_path / "1")), tmp_path / "2")
    merged(filled(last, models, str(tmp_path / "2")).replace("%other", str(tmp_path / "1")), tmp_path / "3")
    documents = [
        f"name: first-merge\n{filled(first, models, '')}",
        f"name: second-merge\n{filled(second, models, 'first-merge')}",
        filled(last, models, "second-merge").replace("%other", "first-merge"),
    ]
    for number, order in enumerate(([0, 1, 2], [2, 1, 0], [1, 0, 2])):
        planned = merged("---\n".join(documents[place] for place in order), tmp_path / f"once-{number}")
        assert same(tmp_path / f"once-{number}", tmp_path / "3")
    assert [stage.name for stage in planned.locked.stages] == ["first-merge", "second-merge"]


def test_threads_and_order_change_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    """One thread and four make the same bytes, with stages that are kept and stages that are not."""
    documents = f"name: first\n{filled(STAGES['slerp'], models, '')}---\n" + "".join(
        (f"name: second\n{filled(RESULTS['linear'], models, 'first')}---\n", filled(RESULTS["tsvm"], models, "second"))
    )
    merged(documents, tmp_path / "one", threads=1)
    merged(documents, tmp_path / "four", threads=4)
    assert same(tmp_path / "one", tmp_path / "four")


def test_the_disk_for_stages_that_are_kept_is_in_the_plan(models: dict[str, Path], tmp_path: Path) -> None:
    """A stage that is read twice is kept, tensor by tensor; one that is read once in its own blocks never is."""
    (tmp_path / "recipe.yaml").write_text("")
    largest = 30_000 * HIDDEN * 2
    for result, at_least in (("linear", 0), ("ties", largest)):
        text = f"name: first\n{filled(STAGES['linear'], models, '')}---\n{filled(RESULTS[result], models, 'first')}"
        (tmp_path / "recipe.yaml").write_text(text)
        planned, _ = plan(read_recipe(tmp_path / "recipe.yaml"), Options(threads=1))
        assert at_least <= planned.spool <= 3 * at_least


def test_a_tower_of_stages_costs_as_many_steps_as_it_has_floors(models: dict[str, Path], tmp_path: Path) -> None:
    """Each of thirty stages is made twice of the one below: no work is doubled at each floor."""
    floors = [f"name: s0\n{filled(STAGES['linear'], models, '')}"]
    floors += [f"name: s{n}\nmerge_method: linear\nmodels: [{{model: s{n - 1}}}, {{model: {models['c']}}}]\n"
               f"base_model: s{n - 1}\n" for n in range(1, 15)]  # fmt: skip
    floors += [f"name: s{n}\nmerge_method: slerp\nbase_model: s{n - 1}\nmodels: [{{model: s{n - 2}}}]\n"
               "parameters: {t: 0.5}\n" for n in range(15, 30)]  # fmt: skip
    (tmp_path / "recipe.yaml").write_text("---\n".join(floors))
    start = time.process_time()
    planned, _ = plan(read_recipe(tmp_path / "recipe.yaml"), Options(threads=1))
    assert json.dumps(planned.as_json())
    assert time.process_time() - start < 5
    assert len(planned.locked.stages) == 29


def test_card_and_lock_tell_of_stages_and_of_all_models(models: dict[str, Path], tmp_path: Path) -> None:
    """The parents are the stored models; a table says what was made of what."""
    documents = f"name: first\n{filled(STAGES['slerp'], models, '')}---\n{filled(RESULTS['ties'], models, 'first')}"
    merged(documents, tmp_path / "out", card=True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| first | SLERP | b, a |" in card
    assert "| the result | TIES | first, a, c |" in card
    assert "license: mit" in card
    rows = [line.split(" | ") for line in card.splitlines() if " (a local folder) |" in line]
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        ("| b (a local folder)", "model", "mit |"),
        ("| a (a local folder)", "base model", "mit |"),
        ("| c (a local folder)", "base model", "mit |"),
    ]
    held = yaml.safe_load((tmp_path / "out" / "merger.lock.yaml").read_text())
    assert [model["model"] for model in held["models"]] == ["b", "a", "c"]


def test_what_a_stage_gives_and_the_result_does_not_take_is_said(models: dict[str, Path], tmp_path: Path) -> None:
    """A model of a stage is accounted for by what becomes of the stage."""
    stage = "merge_method: linear\nmodels: [{model: %a}, {model: %b}]\n"
    result = "merge_method: passthrough\nslices: [{sources: [{model: first, layer_range: [0, 1]}]}]\n"
    (tmp_path / "recipe.yaml").write_text(f"name: first\n{filled(stage, models, '')}---\n{result}")
    planned, _ = plan(read_recipe(tmp_path / "recipe.yaml"), Options())
    assert planned.config["num_hidden_layers"] == 1
    assert {(left.model, left.why) for left in planned.left_out} == {
        (number, "nothing is made of what the stage first makes of it") for number in (0, 1)
    }
    assert len(planned.left_out) == 18


@pytest.mark.parametrize("block", [
    "tokenizer: {source: union}", "tokenizer: {source: %lender, missing: omp}", "tokenizer: {source: base}",
    "tokenizer: {source: union, pad_to_multiple_of: 32}\nchat_template: chatml",
])  # fmt: skip
@pytest.mark.parametrize("result", ["linear", "ties"])
def test_tokens_of_stages_are_those_of_separate_runs(block: str, result: str, tmp_path: Path) -> None:
    """A stage that unites two vocabularies, and a result that unites them with a third: every file is the same."""
    added = {"a": ["<a>", "<both>"], "b": ["<b>", "<both>"], "c": ["<c>", "<a>"]}
    made = {name: vocabularies.model(tmp_path / name, seed, added[name]) for seed, name in enumerate(added)}
    stage, last = filled(STAGES["linear"], made, ""), RESULTS[result]
    stage, last = stage + "tokenizer: {source: union}\n", last + block.replace("%lender", "%b") + "\n"
    merged(stage, tmp_path / "stage")
    merged(filled(last, made, str(tmp_path / "stage")), tmp_path / "twice")
    merged(f"name: first\n{stage}---\n{filled(last, made, 'first')}", tmp_path / "once")
    assert same(tmp_path / "once", tmp_path / "twice")
    own = {"README.md", "recipe.yaml", "merger.lock.yaml", "merger.measured.json", "pictures"}
    files = {path.name for path in (tmp_path / "twice").iterdir()} - own
    assert files == {path.name for path in (tmp_path / "once").iterdir()} - own >= {"tokenizer.json"}
    for name in files:
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes(), name


def test_from_the_hub_each_byte_is_read_once(
    served: LoopbackHub, command: Command, models: dict[str, Path], tmp_path: Path
) -> None:
    """Models of two documents, one of them in both, by range: no byte twice, and the same result as from folders."""
    for name, folder in models.items():
        served.add_model(f"org/{name}", folder)
    text = f"name: first\n{STAGES['slerp']}---\n{RESULTS['ties']}".replace("%stage", "first")
    merged(filled(text, models, "first"), tmp_path / "local")
    for name in models:
        text = text.replace(f"%{name}", f"org/{name}")
    (tmp_path / "mine.yaml").write_text(text)
    served.clear_log()
    done = command("run", "mine.yaml", "--to", "out", cwd=tmp_path, hub=served)
    assert done.returncode == 0, done.stderr
    assert same(tmp_path / "out", tmp_path / "local")
    sent = sum(r.sent for r in served.log if r.host == "cdn" and r.method == "GET")
    assert sent == sum((folder / "model.safetensors").stat().st_size for folder in models.values())


def test_an_entry_of_a_stage_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    """As in a run of its own: float16 ends at 65,504, even if the result would be small again."""
    held = tiny.tensors()
    held["model.norm.weight"] = torch.full((16,), 60000.0, dtype=torch.float16)
    folder = tiny.write(tmp_path / "a", held)
    text = (
        "name: first\nmerge_method: passthrough\ndtype: float16\n"
        f"models: [{{model: {folder}, parameters: {{scale: 2}}}}]\n"
        "---\nmerge_method: passthrough\nmodels: [{model: first, parameters: {scale: 0.1}}]\n"
    )
    with pytest.raises(
        run.MergerError, match=r"a value in the stage's model\.norm\.weight is beyond float16, .*and no parent"
    ):
        merged(text, tmp_path / "out")
    assert not (tmp_path / "out").exists()
