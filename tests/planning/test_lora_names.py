"""Adapters whose names are not those of the published files: what PEFT makes of both, for classes that see and read."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from architectures.cases import CASES as CLASSES
from architectures.cases import GROUPS, Case
from architectures.pairs import QWEN_3_5
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from merger.cli.commands import main
from merger.models.lora.counterparts import counterparts

pytest.importorskip("peft")

Part = Callable[[PreTrainedModel], PreTrainedModel]


@dataclass(frozen=True)
class Trained:
    """What an adapter is trained on, and what of it.

    Args:
        of: the class whose files are published.
        targets: PEFT's `target_modules`.
        within: what is named otherwise in the published files than transformers saves it, and how.
        kind: the class that loads the files for training; empty: that which saved them.
        part: what of it is trained.
        saved: PEFT's `modules_to_save`.
    """

    of: Case
    targets: list[str] | str
    within: tuple[str, str] = ("", "")
    kind: str = ""
    part: Part = lambda model: model
    saved: tuple[str, ...] = ()

    def load(self, folder: Path) -> PreTrainedModel:
        found: PreTrainedModel = getattr(transformers, self.kind or self.of.model).from_pretrained(folder)
        return found


def sight(model: PreTrainedModel) -> PreTrainedModel:
    found: PreTrainedModel = model.model.vision_tower
    return found


def language(model: PreTrainedModel) -> PreTrainedModel:
    found: PreTrainedModel = model.model.language_model
    return found


QV = ["q_proj", "v_proj", "down_proj"]
SIGHT = ("vision_tower.", "vision_tower.vision_model.")
CASES: Mapping[str, Trained] = {
    "Qwen2.5-VL": Trained(CLASSES["Qwen 2.5 VL"], [*QV, "qkv"], saved=("lm_head",)),
    "Gemma 3": Trained(CLASSES["Gemma 3"], [*QV, "embed_tokens"], SIGHT),
    "Gemma 3, its language model": Trained(CLASSES["Gemma 3"], QV, SIGHT, part=language),
    "Gemma 3, its vision tower": Trained(CLASSES["Gemma 3"], ["q_proj", "v_proj"], SIGHT, part=sight),
    "LLaVA": Trained(CLASSES["LLaVA"], [*QV, "linear_1", "lm_head"]),
    "LLaVA, its vision tower": Trained(CLASSES["LLaVA"], ["q_proj", "v_proj"], part=sight),
    "Mistral 3": Trained(CLASSES["Mistral 3"], [*QV, "merging_layer"]),
    "Qwen3.5": Trained(QWEN_3_5, [*QV, "in_proj_qkv", "linear_fc1"]),
    "Qwen3.5 through its text class": Trained(QWEN_3_5, [*QV, "in_proj_qkv"], kind="Qwen3_5ForCausalLM",
                                             saved=("lm_head",)),
}  # fmt: skip


def published(of: Trained, folder: Path) -> Path:
    """A model, its files under the names in which the family was published."""
    of.of.make(seed=1).save_pretrained(folder)
    before, after = of.within
    tensors = {name.replace(before, after) if before else name: tensor for name, tensor in tiny.read(folder).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def trained(of: Trained, folder: Path, adapter: Path) -> dict[str, Tensor]:
    """Save an adapter as PEFT does; what PEFT's own merge makes of the model."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = of.load(folder)
        config = LoraConfig(r=2, lora_alpha=3, target_modules=of.targets, modules_to_save=list(of.saved) or None)
        torch.manual_seed(2)
        peft = get_peft_model(of.part(model), config)
        for name, tensor in peft.state_dict().items():
            if "lora_" in name or "modules_to_save" in name:
                tensor.copy_(0.1 * torch.randn(tensor.shape))
        peft.save_pretrained(adapter)
        peft.merge_and_unload()
    return dict(model.state_dict())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_by_other_names_gives_what_peft_makes_of_it(case: str, tmp_path: Path) -> None:
    """To the rounding of float32; the result has the names and shapes of the files, and loads as they do."""
    of = CASES[case]
    base = published(of, tmp_path / "base")
    expected = trained(of, base, tmp_path / "lora")
    recipe = f"merge_method: passthrough\ndtype: float32\nmodels:\n  - model: {base}+{tmp_path}/lora\n"
    (tmp_path / "mine.yaml").write_text(recipe)
    assert main(["run", str(tmp_path / "mine.yaml"), "--to", str(tmp_path / "out"), "--quiet"]) == 0
    plain, found = tiny.read(base), tiny.read(tmp_path / "out")
    assert {name: tensor.shape for name, tensor in found.items()} == {name: of.shape for name, of in plain.items()}
    before, after = of.load(base).state_dict(), of.load(tmp_path / "out").state_dict()
    touched = {name for name, tensor in expected.items() if not torch.equal(tensor, before[name])}
    assert len(touched) > 4
    for name, tensor in expected.items():
        torch.testing.assert_close(after[name], tensor, rtol=4e-7, atol=4e-8)
        assert torch.equal(after[name], before[name]) == (name not in touched), name


@pytest.mark.parametrize("name", GROUPS["Vision and language"])
def test_each_name_in_memory_finds_its_tensor_in_the_files(name: str, tmp_path: Path) -> None:
    """Of every class that sees and reads: one tensor, which holds the same numbers."""
    model = CLASSES[name].make(seed=1)
    model.save_pretrained(tmp_path)
    files, named = tiny.read(tmp_path), dict(model.named_parameters())
    shapes: list[dict[str, tuple[int, ...]]] = [
        {of: tuple(t.shape) for of, t in held.items()} for held in (named, files)
    ]
    found = counterparts(*shapes)
    assert all(len(places) == 1 for places in found.values()), found
    assert all(torch.equal(tensor, files[found[of][0]]) for of, tensor in named.items())
