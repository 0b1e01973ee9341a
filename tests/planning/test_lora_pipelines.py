"""Adapters of diffusion pipelines: what diffusers makes of the same file when it fuses it, for each way to write one.

Not here: adapters that PEFT saves with a config (test_lora_sources).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import Command
from loopback import LoopbackHub
from merging import merged
from safetensors.torch import load_file, save_file
from thorough import thorough_only
from torch import Tensor

from merger.errors import MergerError

FLUX = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "in_channels": 4,
        "joint_attention_dim": 12, "pooled_projection_dim": 10, "axes_dims_rope": (2, 2, 4)}  # fmt: skip
SD3 = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12,
       "caption_projection_dim": 16, "pooled_projection_dim": 10, "in_channels": 4, "sample_size": 8}  # fmt: skip
UNET = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 2, "cross_attention_dim": 12,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "norm_num_groups": 4, "attention_head_dim": 4,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 20, "use_linear_projection": True}  # fmt: skip
MODELS: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "transformer": ("FluxTransformer2DModel", FLUX, "FluxLoraLoaderMixin"),
    "sd3": ("SD3Transformer2DModel", SD3, "SD3LoraLoaderMixin"),
    "unet": ("UNet2DConditionModel", UNET, "StableDiffusionXLLoraLoaderMixin"),
}


def of_diffusers(module: str, name: str) -> Any:
    """A class of diffusers."""
    why = "diffusers is an oracle that need not be installed"
    return getattr(pytest.importorskip(module, reason=why), name)


def model(folder: Path, of: str) -> Any:
    kind, sizes, _ = MODELS[of]
    torch.manual_seed(0)
    made = of_diffusers("diffusers", kind)(**sizes)
    made.save_pretrained(folder)
    return made


Shapes = Mapping[str, tuple[int, ...]]


def pair(shape: tuple[int, ...], rank: int) -> tuple[Tensor, Tensor]:
    """A and B for a matrix, or for a kernel."""
    a, b = torch.randn(rank, *shape[1:]), torch.randn(shape[0], rank, *[1] * (len(shape) - 2))
    return a * 0.1, b * 0.1


def in_peft(shapes: Shapes, start: str, down: str = "lora_A", up: str = "lora_B", rank: int = 0) -> dict[str, Tensor]:
    """As diffusers writes it, with ranks that differ unless one is given."""
    held = {}
    for number, (name, shape) in enumerate(shapes.items()):
        a, b = pair(shape, rank or 2 + number % 3)
        held |= {f"{start}.{name}.{down}.weight": a, f"{start}.{name}.{up}.weight": b}
    return held


def in_kohya(shapes: Shapes, others: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """As kohya's scripts write it, with an alpha each; of UNets diffusers reads no more than one for all attention."""
    held = {}
    for number, (name, shape) in enumerate(shapes.items()):
        a, b = pair(shape, 4)
        name = f"lora_unet_{name.replace('.', '_')}"
        held |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b,
                 f"{name}.alpha": torch.tensor(1.0 + number % others, dtype=dtype)}  # fmt: skip
    return held


def modules(made: Any, *ends: str) -> dict[str, tuple[int, ...]]:
    """The weights of modules whose names end so."""
    held = {name.removesuffix(".weight"): tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    return {name: shape for name, shape in held.items() if len(shape) > 1 and name.endswith(ends)}


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def sgm(made: Any) -> dict[str, tuple[int, ...]]:
    """Modules of a UNet by the names that Stable Diffusion XL was published with, levels of two layers each."""
    attention = "transformer_blocks.0.attn1.to_q"
    names = {
        "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
        "input_blocks.2.0.out_layers.3": "down_blocks.0.resnets.1.conv2",
        "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks.4.0.skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
        f"input_blocks.4.1.{attention}": f"down_blocks.1.attentions.0.{attention}",
        "input_blocks.5.1.proj_in": "down_blocks.1.attentions.1.proj_in",
        "middle_block.0.emb_layers.1": "mid_block.resnets.0.time_emb_proj",
        f"middle_block.1.{attention}": f"mid_block.attentions.0.{attention}",
        "middle_block.2.in_layers.2": "mid_block.resnets.1.conv1",
        f"output_blocks.1.1.{attention}": f"up_blocks.0.attentions.1.{attention}",
        "output_blocks.4.0.out_layers.3": "up_blocks.1.resnets.1.conv2",
    }
    return {name: tuple(made.get_submodule(of).weight.shape) for name, of in names.items()}


def bfl(made: Any) -> dict[str, tuple[int, ...]]:
    """Modules of Flux by the names that it was published with; q, k and v are one."""
    shapes = {}
    for number in range(2):
        for side, of in (("img", "attn.to_q"), ("txt", "attn.add_q_proj")):
            rows, columns = made.get_submodule(f"transformer_blocks.{number}.{of}").weight.shape
            shapes[f"double_blocks.{number}.{side}_attn.qkv"] = (3 * rows, columns)
            shapes[f"double_blocks.{number}.{side}_attn.proj"] = (rows, columns)
        shapes[f"double_blocks.{number}.img_mlp.0"] = (64, 16)
        shapes[f"double_blocks.{number}.txt_mlp.2"] = (16, 64)
        shapes[f"double_blocks.{number}.img_mod.lin"] = (96, 16)
        shapes[f"single_blocks.{number}.linear2"] = (16, 80)
        shapes[f"single_blocks.{number}.modulation.lin"] = (48, 16)
    return shapes


Way = Callable[[Any], dict[str, Tensor]]
WAYS: Mapping[str, tuple[str, Way]] = {
    "Flux, PEFT's names": ("transformer", lambda made: in_peft(modules(made, *ATTENTION, "proj_mlp"), "transformer")),
    "Flux, with what diffusers says in the header": (
        "transformer",
        lambda made: in_peft(modules(made, *ATTENTION), "transformer", rank=4),
    ),
    "Flux, kohya's": ("transformer", lambda made: in_kohya(bfl(made), 2, torch.bfloat16)),
    "SD3, PEFT's names": ("sd3", lambda made: in_peft(modules(made, *ATTENTION, "ff.net.2"), "transformer")),
    "UNet, PEFT's names, kernels too": ("unet", lambda made: in_peft(modules(made, *ATTENTION, "conv1"), "unet")),
    "UNet, diffusers' own": ("unet", lambda made: in_peft(modules(made, *ATTENTION), "unet", "lora.down", "lora.up")),
    "UNet, kohya's of diffusers": ("unet", lambda made: in_kohya(modules(made, *ATTENTION, "conv_shortcut"))),
    "UNet, kohya's of what was published": ("unet", lambda made: in_kohya(sgm(made), dtype=torch.float16)),
}


SAID = {
    "Flux, with what diffusers says in the header": {
        "lora_adapter_metadata": json.dumps({
            "transformer.r": 4, "transformer.lora_alpha": 6, "transformer.target_modules": list(ATTENTION),
            "transformer.alpha_pattern": {"transformer_blocks.1.attn.to_q": 3}, "transformer.rank_pattern": {},
            "transformer.use_rslora": True,
        }),
    },
}  # fmt: skip


def fused(made: Any, of: str, file: Path) -> dict[str, Tensor]:
    """The model's tensors once diffusers has fused the file into it."""
    more: dict[str, Any] = {"unet_config": made.config} if of == "unet" else {}
    if of != "sd3":
        more["return_alphas"] = True
    loader = of_diffusers("diffusers.loaders", MODELS[of][2])
    state, *alphas, said = loader.lora_state_dict(file, return_lora_metadata=True, **more)
    prefix = "unet" if of == "unet" else "transformer"
    made.load_lora_adapter(state, network_alphas=alphas[0] if alphas else None, metadata=said, prefix=prefix)
    made.fuse_lora()
    made.unload_lora()
    found: dict[str, Tensor] = made.state_dict()
    return found


QUICK = ("Flux, kohya's", "Flux, with what diffusers says in the header", "UNet, kohya's of what was published")


@pytest.mark.parametrize("way", [pytest.param(way, marks=() if way in QUICK else thorough_only) for way in WAYS])
def test_a_model_with_an_adapter_is_what_diffusers_fuses(tmp_path: Path, way: str) -> None:
    """All that the file changes, to float32's rounding; of kernels, and of what was one matrix when published, too."""
    of, write = WAYS[way]
    made = model(tmp_path / of, of)
    torch.manual_seed(1)
    held = write(made)
    save_file(held, tmp_path / "painter.safetensors", SAID.get(way))
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    expected = fused(made, of, tmp_path / "painter.safetensors")
    text = f"merge_method: passthrough\nmodels: [{{model: {tmp_path / of}+{tmp_path / 'painter.safetensors'}}}]\n"
    merged(text, tmp_path / "out")
    found = type(made).from_pretrained(tmp_path / "out").state_dict()
    changed = {name for name in before if not torch.equal(before[name], expected[name])}
    assert len(changed) >= len(held) // 3
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-6, atol=2e-7, msg=name)
        assert torch.equal(found[name], before[name]) == (name not in changed), name


# ---- without diffusers ----------------------------------------------------------------------------------------------

SHAPES = {"single_transformer_blocks.0.attn.to_q": (6, 5), "single_transformer_blocks.0.attn.to_k": (6, 5),
          "single_transformer_blocks.0.attn.to_v": (6, 5), "single_transformer_blocks.0.proj_mlp": (8, 5)}  # fmt: skip
FUSED = "single_transformer_blocks.0"


def small(folder: Path, config: dict[str, str]) -> dict[str, Tensor]:
    """A model of a few tensors, in a folder of that name."""
    folder.mkdir()
    torch.manual_seed(0)
    held = {f"{name}.weight": torch.randn(shape) for name, shape in SHAPES.items()}
    save_file(held, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return held


def recipe(folder: Path, name: str) -> str:
    return f"merge_method: passthrough\nmodels: [{{model: {folder / name}+{folder / 'lora.safetensors'}}}]\n"


def test_what_was_one_matrix_gets_its_rows(tmp_path: Path) -> None:
    """Of Flux as published q, k, v and the MLP of a block are one, whose B is cut by the rows that each has."""
    before = small(tmp_path / "transformer", {"_class_name": "FluxTransformer2DModel"})
    held = in_kohya({"single_blocks.0.linear1": (26, 5)})
    save_file(held, tmp_path / "lora.safetensors")
    merged(recipe(tmp_path, "transformer"), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    a, b, alpha = held.values()
    delta = alpha / 4 * b @ a
    for name, rows in zip(SHAPES, delta.split([6, 6, 6, 8]), strict=True):
        torch.testing.assert_close(found[f"{name}.weight"], before[f"{name}.weight"] + rows, msg=name)


@pytest.mark.parametrize(
    ("name", "config", "mine", "others"),
    [
        ("transformer", {"_class_name": "X"}, "unet", "text_encoder_2"),
        ("text_encoder_2", {"model_type": "clip_text_model"}, "te2", "unet"),
    ],
)
def test_a_model_of_the_pipeline_gets_its_own_parts(
    tmp_path: Path, name: str, config: dict[str, str], mine: str, others: str
) -> None:
    """The others are left out, and the plan says whose each is."""
    before = small(tmp_path / name, config)
    held = in_kohya({f"{FUSED}.attn.to_q": (6, 5)})
    text = {key.replace("lora_unet", "lora_te2"): tensor.clone() for key, tensor in held.items()}
    save_file(held | text, tmp_path / "lora.safetensors")
    planned = merged(recipe(tmp_path, name), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert [key for key in before if not torch.equal(found[key], before[key])] == [f"{FUSED}.attn.to_q.weight"]
    told = {each.tensor: each.why for each in planned.left_out}
    assert {why for key, why in told.items() if key.endswith("weight")} == {f"it changes the pipeline's {others}"}
    assert {why for key, why in told.items() if key.endswith("alpha")} == {"a number by which a product is multiplied"}
    assert all((mine in key) != key.endswith("weight") or key.endswith("alpha") for key in told)


@thorough_only
def test_both_may_be_on_the_hub(hub: LoopbackHub, command: Command, tmp_path: Path) -> None:
    """The pipeline's folder and the adapter's file, whose alphas are read there; the bits are those of a disk's."""
    folder = tmp_path / "text_encoder_2"
    small(folder, {"model_type": "clip_text_model"})
    held = in_kohya({f"{FUSED}.attn.to_q": (6, 5)}, dtype=torch.bfloat16)
    save_file(
        held | {key.replace("unet", "te2"): one.clone() for key, one in held.items()}, tmp_path / "lora.safetensors"
    )
    merged(recipe(tmp_path, folder.name), tmp_path / "here")
    hub.add_model("org/pipe", {f"{folder.name}/{file.name}": file.read_bytes() for file in folder.iterdir()})
    hub.add_model("org/painter", {"painter.safetensors": (tmp_path / "lora.safetensors").read_bytes()})
    text = f"merge_method: passthrough\nmodels: [{{model: org/pipe/{folder.name}+org/painter}}]\n"
    (tmp_path / "hub.yaml").write_text(text)
    made = command("run", "hub.yaml", "--to", "there", cwd=tmp_path, hub=hub)
    assert made.returncode == 0, made.stderr
    there, here = ((tmp_path / of / "model.safetensors").read_bytes() for of in ("there", "here"))
    assert there == here


Q = f"transformer.{FUSED}.attn.to_q"
PAIR = {f"{Q}.lora_A.weight": torch.ones(2, 5), f"{Q}.lora_B.weight": torch.ones(6, 2)}
REFUSED: Mapping[str, tuple[dict[str, Tensor], str]] = {
    "LoKr": ({f"{Q}.lokr_w1": torch.ones(2)}, "is an adapter by LoKr; LoRA is the only kind that is built"),
    "LoHa": ({"lora_unet_x.hada_w1_a": torch.ones(2)}, "is an adapter by LoHa"),
    "kohya's DoRA": ({**PAIR, f"{Q}.dora_scale": torch.ones(6)}, "is an adapter by DoRA"),
    "PEFT's DoRA": ({**PAIR, f"{Q}.lora_magnitude_vector": torch.ones(6)}, "is an adapter by DoRA"),
    "a core tensor": ({**PAIR, "lora_unet_x.lora_mid.weight": torch.ones(2, 2)}, "core tensor (lora_mid)"),
    "something else": ({**PAIR, f"{Q}.scale": torch.ones(1)}, f"holds {Q}.scale"),
    "half a pair": ({f"{Q}.lora_A.weight": torch.ones(2, 5)}, f"{Q}.lora_A.weight is one of a pair"),
    "an alpha of no number": ({**PAIR, f"{Q}.alpha": torch.tensor(torch.nan)}, f"{Q}.alpha holds no number"),
    "two ranks": ({**PAIR, f"{Q}.lora_B.weight": torch.ones(6, 3)}, "lora_B 6x3, where the rank should be 2"),
    "no place": ({"unet.mid.to_q.lora_A.weight": torch.ones(2, 5), "unet.mid.to_q.lora_B.weight": torch.ones(6, 2)},
                 "the model has no place for unet.mid.to_q.lora_A.weight"),
    "rows of another model": ({"lora_unet_single_blocks_0_linear1.lora_down.weight": torch.ones(2, 5),
                               "lora_unet_single_blocks_0_linear1.lora_up.weight": torch.ones(30, 2)}, "has 30 rows"),
    "the same twice": ({**PAIR, f"lora_unet_{FUSED.replace('.', '_')}_attn_to_q.lora_down.weight": torch.ones(2, 5),
                        f"lora_unet_{FUSED.replace('.', '_')}_attn_to_q.lora_up.weight": torch.ones(6, 2)},
                       f"two parts of the adapter change {FUSED}.attn.to_q"),
    "another model's": ({key.replace("transformer.", "text_encoder.", 1): one for key, one in PAIR.items()},
                        "the adapter is of a pipeline's text_encoder, and this is transformer"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_by_name(tmp_path: Path, case: str) -> None:
    """Nothing of it is dropped without a word."""
    small(tmp_path / "transformer", {"_class_name": "FluxTransformer2DModel"})
    held, what = REFUSED[case]
    save_file(held, tmp_path / "lora.safetensors")
    with pytest.raises(MergerError) as raised:
        merged(recipe(tmp_path, "transformer"), tmp_path / "out")
    assert what in raised.value.problems[0].what
    assert raised.value.exit_code == 3
