"""Layers of multi-token prediction: an optional part behind the layers, in the files or not, and counted by the config.

Not here: which classes of transformers there are (test_architectures).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from architectures.cases import CASES
from calls import called
from safetensors.torch import save_file
from torch import Tensor

BEHIND = ("eh_proj.weight", "embed_tokens.weight", "shared_head.head.weight", "self_attn.q_proj.weight")
KEPT = "multi-token prediction: the layers of {} are kept as they are, for not every model has such"
NONE = "multi-token prediction: the result has no such layers ({})"


def _model(folder: Path, name: str, seed: int, key: str, names: tuple[str, ...]) -> Path:
    """A model of 4 layers as transformers saves it, its config counting one of prediction, and that one's tensors."""
    CASES[name].make(seed).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: 1}))
    rows = torch.Generator().manual_seed(seed)
    more = {each: torch.randn(40 if "head" in each or "embed" in each else 16, 16, generator=rows) for each in names}
    save_file({**tiny.read(folder), **more}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As GLM-4.5 and Qwen3-Next are published, and as transformers saves their fine-tunes."""
    root = tmp_path_factory.mktemp("models")
    behind = tuple(f"model.layers.4.{role}" for role in BEHIND)
    for seed, name in enumerate(("whole", "whole-too", "tuned")):
        mine = behind if name != "tuned" else ()
        _model(root / name, "GLM 4 MoE", seed, "num_nextn_predict_layers", mine)
    apart = ("mtp.fc.weight", "mtp.layers.0.self_attn.q_proj.weight")
    _model(root / "next", "Qwen 3 Next", 1, "mtp_num_hidden_layers", apart)
    _model(root / "next-tuned", "Qwen 3 Next", 2, "mtp_num_hidden_layers", ())
    return root


def _of(*names: str, more: str = "merge_method: linear\nparameters: {weight: 0.5}") -> str:
    return f"{more}\nmodels: [{', '.join(f'{{model: ./{name}}}' for name in names)}]\n"


def _stacked(*slices: tuple[str, int, int]) -> str:
    rows = "".join(f"  - sources: [{{model: ./{name}, layer_range: [{a}, {b}]}}]\n" for name, a, b in slices)
    return f"merge_method: passthrough\nslices:\n{rows}"


TASKS = "merge_method: task_arithmetic\nbase_model: ./whole\nparameters: {weight: 0.5}"


@dataclass(frozen=True)
class Case:
    """A recipe; how many layers its result has; whose prediction layers, both names: their mean; and what is said."""

    recipe: str
    layers: int
    of: tuple[str, ...]
    says: str


MERGES: Mapping[str, Case] = {
    "base and fine-tune": Case(_of("whole", "tuned"), 4, ("whole",), KEPT.format("whole")),
    "fine-tune first": Case(_of("tuned", "whole"), 4, (),
                            NONE.format("those of whole are left out, for tuned has none")),
    "two fine-tunes": Case(_of("tuned", "tuned"), 4, (), NONE.format("no model has any")),
    "over the base": Case(_of("tuned", more=TASKS), 4, ("whole",), KEPT.format("whole")),
    "all have them": Case(_of("whole", "whole-too"), 4, ("whole", "whole-too"),
                          "multi-token prediction: 1 behind the last layer, as whole has"),
    "a stack": Case(_stacked(("whole", 0, 3), ("whole-too", 2, 4)), 5, ("whole-too",),
                    "multi-token prediction: 1 behind the last layer, as whole-too has"),
    "a stack that ends in a fine-tune": Case(_stacked(("whole", 0, 3), ("tuned", 2, 4)), 5, ("whole",),
                                             KEPT.format("whole")),
    "fewer layers": Case(_stacked(("whole", 0, 3)), 3, ("whole",),
                         "multi-token prediction: 1 behind the last layer, as whole has"),
    "a tensor of another model": Case(
        _of("whole", "whole-too") + "tensors: [{filter: q_proj, model: ./tuned}]\n", 4, ("whole", "whole-too"),
        "multi-token prediction: the layers of whole are kept as they are, for not every model has such"),
    "under a name of their own": Case(_of("next", "next-tuned"), 4, ("next",), KEPT.format("next")),
}  # fmt: skip


@pytest.mark.parametrize("case", MERGES)
def test_they_are_kept_merged_or_left_out_and_the_config_says_what_is_there(
    case: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result loads without a missing or mismatched tensor; what is not the model's own lies behind its layers."""
    monkeypatch.chdir(models)
    wanted, out = MERGES[case], tmp_path / "out"
    (tmp_path / "recipe.yaml").write_text(wanted.recipe)
    for name in ("whole", "whole-too", "tuned", "next", "next-tuned"):
        (tmp_path / name).symlink_to(models / name)
    done = called(["run", str(tmp_path / "recipe.yaml"), "--to", str(out)])
    assert done.code == 0, done.err
    assert f"note    {wanted.says}\n" in done.err
    assert f"- {wanted.says.replace('_', chr(92) + '_')}" in (out / "README.md").read_text()
    config = json.loads((out / "config.json").read_text())
    key = "mtp_num_hidden_layers" if "next" in wanted.recipe else "num_nextn_predict_layers"
    assert (config["num_hidden_layers"], config[key]) == (wanted.layers, len(wanted.of[:1]))
    merged, parents = tiny.read(out), [tiny.read(models / name) for name in wanted.of]
    _check_prediction(merged, parents, wanted, case)
    kind = getattr(transformers, config["architectures"][0])
    _, found = kind.from_pretrained(out, output_loading_info=True)
    assert (list(found["missing_keys"]), list(found["mismatched_keys"])) == ([], [])
    assert all(f"layers.{wanted.layers}." in name for name in found["unexpected_keys"])


def _check_prediction(merged: Mapping[str, Tensor], parents: list[dict[str, Tensor]], wanted: Case, case: str) -> None:
    def mine(name: str, layer: int) -> bool:
        return name.startswith(("mtp.", f"model.layers.{layer}."))

    theirs = {name for parent in parents for name in parent if mine(name, 4)}
    names = {name: name.replace("model.layers.4.", f"model.layers.{wanted.layers}.") for name in theirs}
    assert {name for name in merged if mine(name, wanted.layers)} == set(names.values())
    for old, new in names.items():
        mean = torch.stack([parent[old].double() for parent in parents]).mean(dim=0)
        copied = case == "a tensor of another model" and "q_proj" in old
        assert torch.allclose(merged[new].double(), parents[0][old].double() if copied else mean, rtol=1e-6), new


REFUSED = {
    "a range beyond": (_stacked(("whole", 0, 5)), 2, "[0, 5] ends beyond whole, which has 4 layers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_they_are_no_layers_that_a_recipe_can_name(
    case: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config's number of layers rules."""
    recipe, code, says = REFUSED[case]
    monkeypatch.chdir(models)
    (models / "refused.yaml").write_text(recipe)
    done = called(["plan", "refused.yaml"])
    assert (done.code, says in done.err) == (code, True), done.err


def test_a_gradient_counts_the_layers_of_the_model(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last layer has the last value, and the layers behind it the first one, as all that is in no layer."""
    monkeypatch.chdir(models)
    recipe = "merge_method: slerp\nbase_model: ./whole\nmodels: [{model: ./whole}, {model: ./whole-too}]\n"
    (models / "gradient.yaml").write_text(f"{recipe}parameters: {{t: [0, 1]}}\n")
    done = called(["plan", "gradient.yaml", "--json"])
    jobs = {job["name"]: job for shard in json.loads(done.out)["shards"] for job in shard["jobs"]}
    found = [jobs[f"model.layers.{layer}.self_attn.q_proj.weight"]["settings"]["t"] for layer in range(5)]
    assert found == pytest.approx([0, 1 / 3, 2 / 3, 1, 0])
