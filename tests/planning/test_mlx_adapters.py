"""Adapters as MLX saves them: another spelling of what PEFT saves, and no other result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from merging import merged
from safetensors.torch import load_file, save_file

from merger.cli.commands import main

MLX = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4, "dropout": 0.0, "scale": 2.5}}
Q = "model.layers.0.self_attn.q_proj"


def as_mlx(lora: Path, folder: Path, **settings: Any) -> Path:
    """The adapter in MLX's spelling: A and B transposed, and the scale as it is."""
    held = {
        name.removeprefix("base_model.model.").removesuffix(".weight").replace("_embedding", "")[:-1]
        + name.removesuffix(".weight")[-1].lower(): tensor.T.contiguous()
        for name, tensor in load_file(lora / "adapter_model.safetensors").items()
    }
    folder.mkdir()
    save_file(held, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**MLX, "model": "base", **settings}))
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A model ./base, its adapter ./peft, whose scale is 2.5, and the same as ./mlx."""
    lora = tiny.lora(tmp_path / "peft", tiny.model(tmp_path / "base", hidden=16), rank=4)
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 10}))
    as_mlx(lora, tmp_path / "mlx")
    return tmp_path


def test_an_adapter_of_mlx_gives_what_the_same_of_peft_does(pair: Path) -> None:
    """Bit for bit, of square matrices, of embeddings and of the rest; x lora_a lora_b is added to x W, by the scale."""
    for name in ("peft", "mlx"):
        recipe = f"merge_method: passthrough\ndtype: float32\nmodels: [{{model: {pair}/base+{pair}/{name}}}]\n"
        merged(recipe, pair / f"out-{name}")
    base, found = tiny.read(pair / "base"), tiny.read(pair / "out-mlx")
    held = load_file(pair / "mlx/adapters.safetensors")
    assert (pair / "out-peft/model.safetensors").read_bytes() == (pair / "out-mlx/model.safetensors").read_bytes()
    x = torch.randn(3, 16)
    expected = x @ base[f"{Q}.weight"].float().T + 2.5 * x @ held[f"{Q}.lora_a"].float() @ held[f"{Q}.lora_b"].float()
    torch.testing.assert_close(x @ found[f"{Q}.weight"].T, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(found["model.embed_tokens.weight"], base["model.embed_tokens.weight"].float())


def test_adapters_of_mlx_become_one_of_peft(pair: Path) -> None:
    """The same as of PEFT's."""
    for name in ("peft", "mlx"):
        recipe = f"merge_method: linear\nadapters: [{{model: {pair}/{name}}}]\nparameters: {{weight: 1}}\n"
        merged(recipe, pair / f"one-{name}")
    one, other = (load_file(pair / f"one-{name}/adapter_model.safetensors") for name in ("peft", "mlx"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    config = json.loads((pair / "one-mlx/adapter_config.json").read_text())
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("LORA", "base")


REFUSED: Mapping[str, tuple[dict[str, Any], dict[str, torch.Tensor], str]] = {
    "all weights": ({"fine_tune_type": "full"}, {}, "is a fine-tune of MLX by 'full'; LoRA is the only kind"),
    "DoRA": ({"fine_tune_type": "dora"}, {}, "is a fine-tune of MLX by 'dora'; LoRA is the only kind"),
    "no scale": ({"lora_parameters": {"rank": 4}}, {}, "has no lora_parameters with a number as scale"),
    "half a pair": ({}, {"lm_head.lora_a": torch.ones(16, 4)}, "lm_head.lora_a is not one of a pair"),
    "two ranks": ({}, {f"{Q}.lora_b": torch.ones(3, 16)}, f"{Q}: lora_a is 16x4 and lora_b is 3x16"),
    "experts": ({}, {f"{Q}.lora_b": torch.ones(2, 4, 16)}, f"{Q}.lora_b is 2x4x16 of F32, and only matrices of floats"),
    "no such module": ({}, {"model.x.lora_a": torch.ones(1, 1), "model.x.lora_b": torch.ones(1, 1)},
                       "the model has no place for model.x.lora_a"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_lora_of_mlx_is_refused(case: str, pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its name."""
    settings, more, sentence = REFUSED[case]
    folder = as_mlx(pair / "peft", pair / "broken", **settings)
    save_file(load_file(folder / "adapters.safetensors") | more, folder / "adapters.safetensors")
    (pair / "mine.yaml").write_text(f"merge_method: passthrough\nmodels: [{{model: {pair}/base+{folder}}}]\n")
    assert main(["plan", str(pair / "mine.yaml")]) == 3
    assert sentence in capsys.readouterr().err
