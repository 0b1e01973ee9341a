"""What a mixture of experts is planned to be made of, and which models make none. No tensor is read here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from merger.errors import MergerError, MismatchError
from merger.methods.registry import methods
from merger.planning.budget import router_memory
from merger.planning.inputs.base import Stored
from merger.planning.inputs.derived import Constant, Drawn, Noised, Routed
from merger.planning.plan import Plan

from .models import llama, planned, write

HERE = "▸"
"""Stands in a recipe of a case where the refusal must point; not part of the recipe."""

Tensors = dict[str, tuple[str, tuple[int, ...]]]
Change = Callable[[Tensors], Any]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def model(name: str, change: Change = lambda held: None, tokenizer: bool = True, layers: int = 2, **said: Any) -> None:
    """A small Llama, or what `change` makes of its tensors and `said` of its config."""
    held = llama(layers)
    change(held)
    config = {"model_type": "llama", "num_hidden_layers": layers, "hidden_size": 8, "num_attention_heads": 2, **said}
    write(Path(name), held, **config)
    if tokenizer:
        Path(name, "tokenizer.json").write_text("{}")


def wider(held: Tensors) -> None:
    for name, (dtype, shape) in held.items():
        if ".mlp." in name:
            held[name] = (dtype, tuple(2 * length if length == 16 else length for length in shape))


def plan_of(**changed: Any) -> Plan:
    """The plan of a mixture of ./one and ./two over ./base."""
    experts = [{"source_model": "./one"}, {"source_model": "./two"}]
    return planned(json.dumps({"base_model": "./base", "gate_mode": "random", "experts": experts, **changed}))


@pytest.fixture
def models() -> None:
    for name in ("base", "one", "two"):
        model(name)


def by_name(found: Plan) -> Mapping[str, Any]:
    return {job.name: job for job in found.jobs}


@pytest.mark.usefixtures("models")
def test_what_is_unchanged_is_copied() -> None:
    """Everything but routers is a copy of stored bytes."""
    found = plan_of()
    drawn = [job.name for job in found.jobs if not job.is_copy]
    assert drawn == [f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(2)]
    assert len(by_name(found)) == len(found.jobs) == 3 + 2 * (6 + 1 + 2 * 3)


@pytest.mark.usefixtures("models")
def test_dtype_and_scales_make_jobs_of_copies() -> None:
    """Another dtype, a residual_scale or noise is arithmetic; of a scale only down_proj, of noise all three."""
    experts = [{"source_model": "./one", "residual_scale": 0.5}, {"source_model": "./two", "noise_scale": 0.1}]
    jobs = by_name(plan_of(experts=experts))
    here = "model.layers.0.block_sparse_moe.experts"
    assert [jobs[f"{here}.0.{name}.weight"].is_copy for name in ("w1", "w2", "w3")] == [True, False, True]
    assert jobs[f"{here}.0.w2.weight"].inputs[0].settings == {"scale": 0.5}
    for name in ("w1", "w2", "w3"):
        source = jobs[f"{here}.1.{name}.weight"].inputs[0].source
        assert isinstance(source, Noised)
        assert source.noise == Drawn(source.shape, "normal", 0.1, 0, f"{here}.1.{name}.weight")
    assert {job.dtype for job in plan_of(dtype="float32").jobs} == {"F32"}


@pytest.mark.usefixtures("models")
def test_the_layout_follows_the_shared_expert_and_its_prompts() -> None:
    """Llamas become a Mixtral; with a shared expert DeepSeek's layout, and Qwen's where that expert has prompts."""
    prompts = [{"source_model": f"./{name}", "positive_prompts": [name]} for name in ("one", "two")]
    shared = [{"source_model": "./base"}]
    asked = [{"source_model": "./base", "positive_prompts": ["all"]}]
    found = {
        "mixtral": plan_of(),
        "deepseek": plan_of(experts=prompts, gate_mode="hidden", shared_experts=shared),
        "qwen2_moe": plan_of(experts=prompts, gate_mode="hidden", shared_experts=asked),
    }
    assert [plan.config["model_type"] for plan in found.values()] == list(found)
    jobs = by_name(found["qwen2_moe"])
    assert jobs["model.layers.0.self_attn.k_proj.bias"].inputs[0].source == Constant((8,), "BF16")
    rows = jobs["model.layers.1.mlp.shared_expert_gate.weight"].inputs[0].source
    assert rows == Routed("hidden", 1, 8, ((("all",), ()),))


@pytest.mark.usefixtures("models")
def test_the_config_counts_experts() -> None:
    """How many experts, how many a token goes through, how wide: in the keys of each layout."""
    mixtral = plan_of(experts_per_token=1).config
    assert (mixtral["num_local_experts"], mixtral["num_experts_per_tok"], mixtral["intermediate_size"]) == (2, 1, 16)
    assert mixtral["architectures"] == ["MixtralForCausalLM"]
    deepseek = plan_of(shared_experts=[{"source_model": "./base"}]).config
    assert (deepseek["n_routed_experts"], deepseek["n_shared_experts"], deepseek["num_experts_per_tok"]) == (2, 1, 1)
    qwen = plan_of(shared_experts=[{"source_model": "./base"}], architecture="qwen", dtype="float32").config
    assert (qwen["num_experts"], qwen["moe_intermediate_size"], qwen["shared_expert_intermediate_size"]) == (2, 16, 16)
    assert qwen["dtype"] == "float32"


def test_experts_may_be_wider_than_the_base_model() -> None:
    """Only experts need MLPs of one shape: the base model's own are left out, each with its reason."""
    model("base")
    for name in ("one", "two"):
        model(name, wider)
    found = plan_of()
    assert found.config["intermediate_size"] == 32
    left = {item.tensor for item in found.left_out if found.locked.models[item.model].name == "base"}
    assert left == {f"model.layers.{n}.mlp.{name}_proj.weight" for n in range(2) for name in ("gate", "up", "down")}


def test_a_shared_expert_may_be_several_times_as_wide() -> None:
    """DeepSeek counts its shared experts by width: one that is twice as wide as the others counts as two."""
    for name in ("base", "one", "two"):
        model(name)
    model("wide", wider)
    found = plan_of(shared_experts=[{"source_model": "./wide"}])
    assert (found.config["n_shared_experts"], found.config["moe_intermediate_size"]) == (2, 16)


def test_a_model_that_is_expert_and_shared_expert_has_the_experts_width() -> None:
    """A wider model may be the shared expert, but not one of the others, also where it is both; and is told of once."""
    for name in ("base", "one"):
        model(name)
    model("wide", wider)
    experts = [{"source_model": f"./{name}"} for name in ("one", "wide", "wide")]
    with pytest.raises(MismatchError) as caught:
        plan_of(experts=experts, shared_experts=[{"source_model": "./wide"}])
    assert [problem.where for problem in caught.value.problems] == ["experts[./wide]"]


def test_a_tied_head_stays_tied() -> None:
    """No head is written where the base model's is its embedding; one that lies there all the same is left out."""
    for name in ("one", "two"):
        model(name)
    model("base", tie_word_embeddings=True)
    found = plan_of()
    assert "lm_head.weight" not in by_name(found)
    assert found.config["tie_word_embeddings"] is True
    (left,) = [item for item in found.left_out if item.tensor == "lm_head.weight" and item.model == 2]
    assert left.why == "the head is the embedding, as the model's config says"


def with_buffer(held: Tensors) -> None:
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = ("F32", (2,))


def test_constants_are_left_out() -> None:
    """Old checkpoints carry along what is computed from the config: no mixture's class wants it."""
    for name in ("one", "two"):
        model(name)
    model("base", with_buffer)
    left = [item.why for item in plan_of().left_out if item.tensor.endswith("inv_freq")]
    assert left == ["a constant, not a trained tensor"]


@pytest.mark.usefixtures("models")
def test_the_hash_tells_prompts_and_modes_apart() -> None:
    """Another prompt, mode, noise, scale or seed is another plan; the same recipe is the same."""

    def experts(prompt: str = "a", **more: Any) -> list[dict[str, Any]]:
        return [
            {"source_model": "./one", "positive_prompts": [prompt], **more},
            {"source_model": "./two", "positive_prompts": ["b"]},
        ]

    told: list[dict[str, Any]] = [
        {"experts": experts(), "gate_mode": "hidden"},
        {"experts": experts("c"), "gate_mode": "hidden"},
        {"experts": experts(negative_prompts=["b"]), "gate_mode": "hidden"},
        {"experts": experts(), "gate_mode": "hidden_avg"},
        {"experts": experts(), "gate_mode": "cheap_embed"},
        {"experts": experts(noise_scale=0.1), "gate_mode": "hidden"},
        {"experts": experts(residual_scale=2), "gate_mode": "hidden"},
        {"experts": experts(), "gate_mode": "hidden", "experts_per_token": 1},
        {},
        {"gate_mode": "uniform_random"},
        {"seed": 1},
    ]
    hashes = [plan_of(**one).hash for one in told]
    assert len(set(hashes)) == len(hashes)
    assert [plan_of(**one).hash for one in told] == hashes


@pytest.mark.usefixtures("models")
def test_prompts_cost_what_running_them_reads_and_holds() -> None:
    """Hidden states read all layers but the last and hold one of them; embeddings a few rows; chance nothing."""
    experts = [{"source_model": f"./{name}", "positive_prompts": [name]} for name in ("one", "two")]
    chance = plan_of()
    hidden = plan_of(experts=experts, gate_mode="hidden")
    cheap = plan_of(experts=experts, gate_mode="cheap_embed")
    layer = sum(tensor.nbytes for tensor in hidden.locked.config_model.layer("model.layers", 0))
    rows = 2 * 4 * 8 * 2  # two prompts of three bytes and a token before them, eight entries of two bytes
    assert cheap.read_bytes - chance.read_bytes == rows
    assert hidden.read_bytes - cheap.read_bytes == layer
    assert chance.peak_memory < cheap.peak_memory < hidden.peak_memory
    assert all(isinstance(job.inputs[0].source, Stored | Routed) for job in hidden.jobs)
    texts = [{**expert, "positive_prompts": [letter * 5_000]} for letter, expert in zip("xy", experts, strict=True)]
    longer = plan_of(experts=texts, gate_mode="cheap_embed")
    more = (
        router_memory(longer.locked, longer.jobs, methods(), 1)[0]
        - router_memory(cheap.locked, cheap.jobs, methods(), 1)[0]
    )
    assert more == 2 * (5_000 - 3) * 8 * 2 * 4  # a byte is a token of eight numbers, each held twice in float32


# ---- refusals -------------------------------------------------------------------------------------------------------

PLAIN = """\
base_model: {base}
gate_mode: random
experts:
  - source_model: {one}
  - source_model: {two}
"""


def recipe(base: str = "./base", one: str = "./one", two: str = "./two", more: str = "") -> str:
    return PLAIN.format(base=base, one=one, two=two) + more


def bias(held: Tensors) -> None:
    held["model.layers.0.self_attn.q_proj.bias"] = ("BF16", (8,))
    held["model.layers.1.self_attn.q_proj.bias"] = ("BF16", (8,))


def in_fp8(held: Tensors) -> None:
    held["model.layers.1.mlp.up_proj.weight"] = ("F8_E4M3", (16, 8))


def without_norm(held: Tensors) -> None:
    del held["model.norm.weight"]


MIXED = "architecture: ▸mixtral\nshared_experts: [{source_model: ./base}]\n"
REFUSALS: Mapping[str, tuple[Mapping[str, Mapping[str, Any]], str, str]] = {
    "an expert of another kind": (
        {"two": {"model_type": "gemma2"}},
        recipe().replace("experts:", HERE + "experts:"),
        "experts: no layout fits these models (llama, gemma2): a layout is made of models that are all of one kind, "
        "Mixtral of llama or mistral, DeepSeek MoE of llama or mistral, Qwen MoE of llama or mistral or qwen2, Qwen3 "
        "MoE of qwen3, Granite MoE of granite, FlexOlmo of olmo2, Gemma 4 MoE of gemma4_text\n"
        "    take models of one architecture, with or without a shared expert as the layout asks",
    ),
    "a shared expert in a layout that has none": (
        {},
        recipe(more=MIXED),
        "experts: no layout fits these models (llama): Mixtral has no shared expert\n"
        "    leave architecture: out, or change what it asks for",
    ),
    "experts in one tensor with factors of their own": (
        {name: {"model_type": "granite"} for name in ("base", "one", "two")},
        recipe().replace("experts:", HERE + "experts:").replace("./two", "./two\n    residual_scale: 0.5"),
        "experts: Granite MoE has all experts in one tensor, and these have several residual_scale\n"
        "    give all experts one residual_scale, or scale a model by passthrough in a document before this",
    ),
    "hidden states of a model that is not run here": (
        {name: {"model_type": "gemma4_text"} for name in ("base", "one", "two")},
        "base_model: ./base\n▸experts:\n  - {source_model: ./one, positive_prompts: [a]}\n"
        "  - {source_model: ./two, positive_prompts: [b]}\n",
        "experts: no layout fits these models (gemma4_text): Gemma 4 MoE has no router from hidden states: write "
        "gate_mode: cheap_embed or random\n"
        "    take models of one architecture, with or without a shared expert as the layout asks",
    ),
    "biases that the layout lacks": (
        {"base": {"change": bias}},
        recipe(base="▸./base"),
        "base_model: base has the tensor model.layers.0.self_attn.q_proj.bias and 1 more, for which Mixtral has no "
        "place\n    take a plain model of its kind as base_model",
    ),
    "a base model that is incomplete": (
        {"base": {"change": without_norm}},
        recipe(base="▸./base"),
        "base_model: base has no tensor model.norm.weight, which Mixtral needs\n"
        "    take a plain model of its kind as base_model",
    ),
    "prompts without a tokenizer": (
        {"base": {"tokenizer": False}},
        "base_model: ▸./base\nexperts:\n  - {source_model: ./one, positive_prompts: [a]}\n"
        "  - {source_model: ./two, positive_prompts: [b]}\n",
        "base_model: base has no tokenizer.json, by which prompts become tokens\n    write gate_mode: random",
    ),
    "a deeper expert": (
        {"two": {"layers": 3}},
        recipe(two="▸./two"),
        "experts[./two]: two has 3 layers model.layers, and the base model 2\n"
        "    experts have as many layers as the base model",
    ),
    "a wider expert": (
        {"two": {"change": wider}},
        recipe(two="▸./two"),
        "experts[./two]: two has model.layers.0.mlp.gate_proj.weight of 32x8, not 16x8\n"
        "    experts have MLPs of one shape and the base model's hidden size",
    ),
    "an expert in eight bits": (
        {"one": {"change": in_fp8}},
        recipe(one="▸./one"),
        "experts[./one]: one stores model.layers.1.mlp.up_proj.weight as F8_E4M3\n"
        "    use the model's bfloat16, float16 or float32 version",
    ),
    "an expert of another activation": (
        {"one": {"hidden_act": "gelu"}},
        recipe(one="▸./one"),
        "experts[./one]: one has the hidden_act gelu, and the base model silu\n"
        "    experts have the base model's hidden_act",
    ),
    "a window that the layout lacks": (
        {name: {"model_type": "mistral", "sliding_window": 4096} for name in ("base", "one", "two")},
        recipe(base="▸./base", more="architecture: deepseek\n"),
        "base_model: base does not fit DeepSeek MoE: its config has a sliding_window of 4096, and DeepSeek MoE has "
        "none\n    take another base model, or another layout by architecture:",
    ),
    "positions that the layout lacks": (
        {"base": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}},
        recipe(base="▸./base", more="architecture: deepseek\n"),
        "base_model: base does not fit DeepSeek MoE: its positions are turned by llama3, and DeepSeek MoE knows "
        "default, linear, dynamic\n    take another base model, or another layout by architecture:",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_models_that_make_no_mixture_are_refused(name: str) -> None:
    """Word for word: where it stands, what does not fit, what to do; before any tensor is read."""
    changed, text, told = REFUSALS[name]
    for folder in ("base", "one", "two"):
        model(folder, **changed.get(folder, {}))
    line = next(number for number, line in enumerate(text.split("\n"), 1) if HERE in line)
    column = text.split("\n")[line - 1].index(HERE) + 1
    with pytest.raises(MismatchError) as caught:
        planned(text.replace(HERE, ""))
    assert str(caught.value) == f"recipe.yaml:{line}:{column}: {told}"


def test_all_that_does_not_fit_is_told_at_once() -> None:
    """The base model's faults and each expert's, in the recipe's order."""
    model("base", bias)
    model("one", layers=3)
    model("two", wider)
    with pytest.raises(MergerError) as caught:
        plan_of()
    assert [problem.where for problem in caught.value.problems] == ["base_model", "experts[./one]", "experts[./two]"]
