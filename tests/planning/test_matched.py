"""Models of one structure under other names: what is matched to what, what is merged, and what is not clear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from architectures.cases import SMALL
from architectures.pairs import PAIRS, save
from architectures.trial import load, merge
from merging import merged
from thorough import thorough_only
from torch import Tensor, nn
from transformers.utils import logging

from merger.errors import MismatchError

from .models import Tensors, llama, planned, sources, write

logging.disable_progress_bar()

# ---- as their own library saves them --------------------------------------------------------------------------------


def language(model: nn.Module) -> nn.Module:
    inner: Any = model.model
    found: nn.Module = inner.text_model if hasattr(inner, "text_model") else inner.language_model
    return found


HEAD = "lm_head.weight"


def linear(*models: Path | str, more: str = "") -> str:
    return f"merge_method: linear\n{more}models: [{', '.join(f'{{model: {model}}}' for model in models)}]\n"


SOME = ("Gemma 3", "LLaVA", "Qwen3.5")


@pytest.mark.parametrize(
    "name", [*SOME, *(pytest.param(name, marks=thorough_only) for name in PAIRS if name not in SOME)]
)
@pytest.mark.filterwarnings("ignore")
def test_a_language_model_is_merged_into_a_model_that_sees(name: str, tmp_path: Path) -> None:
    """Its tensors and the head are the means of both, by transformers' own names; all else is the whole's."""
    pair = PAIRS[name]
    whole, alone = pair.whole(tmp_path / "whole"), pair.spoken(tmp_path / "alone")
    made = merge(linear(tmp_path / "whole", tmp_path / "alone"), tmp_path / "out")
    assert made.keys() == tiny.read(tmp_path / "whole").keys()
    found = load(pair.of, tmp_path / "out")
    plain, theirs = dict(language(whole).state_dict()), dict(alone.model.state_dict())  # type: ignore[union-attr]
    means = {key: (of + theirs[key]) / 2 for key, of in plain.items()}
    assert plain.keys() == theirs.keys()
    torch.testing.assert_close(dict(language(found).state_dict()), means)
    spoken = {id(parameter) for parameter in language(whole).parameters()}
    others = {key for key, parameter in whole.named_parameters() if id(parameter) not in spoken}
    assert others - {HEAD}
    for key in others:
        mine, ours = whole.get_parameter(key).data, found.get_parameter(key).data
        torch.testing.assert_close(ours, (mine + alone.get_parameter(key).data) / 2 if key == HEAD else mine)


@pytest.mark.parametrize("first", ["BertForMaskedLM", "BertModel"])
def test_bert_is_merged_with_and_without_its_prefix(first: str, tmp_path: Path) -> None:
    """The body is the mean of both; the head is kept where the first has one, and left out where it has none."""
    kinds = [first, *({"BertForMaskedLM", "BertModel"} - {first})]
    config = transformers.BertConfig(**SMALL)
    one, other = (save(getattr(transformers, kind), config, tmp_path / kind, seed) for seed, kind in enumerate(kinds))
    planned = merged(linear(*(tmp_path / kind for kind in kinds)), tmp_path / "out")
    found = getattr(transformers, first).from_pretrained(tmp_path / "out")
    mine, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    theirs = {key.removeprefix("bert."): of for key, of in theirs.items()}
    for key, of in found.named_parameters():
        plain = key.removeprefix("bert.")
        torch.testing.assert_close(of, (mine[key] + theirs[plain]) / 2 if plain in theirs else mine[key])
    gone = {left.tensor for left in planned.left_out}
    assert gone == {key for key in tiny.read(tmp_path / kinds[1]) if key.removeprefix("bert.") not in
                    {key.removeprefix("bert.") for key in tiny.read(tmp_path / first)}}  # fmt: skip


# ---- by their headers -----------------------------------------------------------------------------------------------


def under(prefix: str, held: Tensors | None = None, **changed: Any) -> Tensors:
    """The tensors of a model with a prefix before each name."""
    return {f"{prefix}{name}": value for name, value in (held or llama(**changed)).items()}


def tower(name: str, **changed: Any) -> Tensors:
    """A stack of another kind, and what leads from it to the language model."""
    return {f"{name}.{key.replace('self_attn', 'attn')}": of for key, of in llama(head=False, **changed).items()
            if "layers" in key} | {f"{name}.merger.weight": ("BF16", (8, 8))}  # fmt: skip


@dataclass(frozen=True)
class Match:
    """Two models that are one in part.

    Args:
        base: the tensors of the first; `other`: of the second, whose language model is a Llama's without a prefix.
        said: what the first one's config says.
        note: what the plan says that it matched; `kept`: which stacks it says only the first has.
        merged: what is before the names of the merged tensors in the first.
    """

    base: Tensors
    other: Tensors
    note: str
    kept: str | None = None
    merged: str = ""
    said: Mapping[str, Any] = field(default_factory=dict)


EYES = tower("visual")
FOR = "matched by structure: of other "
MATCHES: Mapping[str, Match] = {
    "InternVL, whose config has llm_config": Match(
        {**under("language_model."), **EYES}, llama(),
        f"{FOR}model.layers.N as language_model.model.layers.N, model.embed_tokens.weight as "
        "language_model.model.embed_tokens.weight, model.norm.weight as language_model.model.norm.weight, "
        "lm_head.weight as language_model.lm_head.weight",
        "visual.model.layers", "language_model.",
        said={"llm_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 2}},
    ),
    "MiniCPM-V": Match(
        {**under("llm."), **tower("vpm")}, llama(),
        f"{FOR}model.layers.N as llm.model.layers.N, model.embed_tokens.weight as llm.model.embed_tokens.weight, "
        "model.norm.weight as llm.model.norm.weight, lm_head.weight as llm.lm_head.weight",
        "vpm.model.layers", "llm.",
    ),
    "under one name": Match({**EYES, **llama()}, llama(), "", "visual.model.layers"),
    "the language model first": Match(llama(), under("language_model."), f"{FOR}language_model.model.layers.N as "
        "model.layers.N, language_model.model.embed_tokens.weight as model.embed_tokens.weight, "
        "language_model.model.norm.weight as model.norm.weight, language_model.lm_head.weight as lm_head.weight"),
    "one of two has the sizes": Match(
        {**under("thinker."), **under("talker.", hidden=16)}, llama(),
        f"{FOR}model.layers.N as thinker.model.layers.N, model.embed_tokens.weight as "
        "thinker.model.embed_tokens.weight, model.norm.weight as thinker.model.norm.weight, "
        "lm_head.weight as thinker.lm_head.weight", "talker.model.layers", "thinker.",
    ),
}  # fmt: skip


def test_a_quantised_language_model_is_matched_with_its_scales(tmp_path: Path) -> None:
    """Numbers and scales are read for the tensor that is called otherwise, and nothing is left out."""
    up, held = "model.layers.0.mlp.up_proj.weight", llama()
    stored = {**held, up: ("F8_E4M3", held[up][1]), f"{up}_scale_inv": ("F32", (1, 1))}
    base = write(tmp_path / "base", under("language_model."))
    other = write(tmp_path / "other", stored, torch_dtype="bfloat16",
                  quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})  # fmt: skip
    found = planned(linear(base, other))
    assert found.left_out == ()
    (job,) = (job for job in found.jobs if job.name == f"language_model.{up}")
    assert sources(job) == [(0, job.name), (1, job.name), (1, f"{up}_scale_inv")]


@pytest.mark.parametrize("case", MATCHES)
def test_the_plan_says_what_was_matched_to_what(case: str, tmp_path: Path) -> None:
    """Each tensor of the language model is made of both, all others are the first one's; nothing is left out."""
    of = MATCHES[case]
    base, other = write(tmp_path / "base", of.base, **of.said), write(tmp_path / "other", of.other)
    found = planned(linear(base, other))
    kept = f"kept as base has it, for no other model has such layers: {of.kept}"
    assert found.notes == tuple(note for note in (of.note, kept if of.kept else "") if note)
    assert found.left_out == ()
    assert {job.name for job in found.jobs} == of.base.keys()
    for job in found.jobs:
        both = job.name.removeprefix(of.merged) in {name.removeprefix("language_model.") for name in of.other}
        assert [number for number, _ in sources(job)] == ([0, 1] if both else [0]), job.name
        assert job.why == (None if both else "only base has it")


OMNI = {**under("thinker."), **under("talker.")}
ALONE = "by roles and shapes both fit: save the one that is meant by itself, and merge that"
MODULES = "modules: with model.layers and default alone merges what both have, and copies the rest"
UNLIKE: Mapping[str, tuple[Sequence[Tensors], str, str]] = {
    "two that it may be": (
        (OMNI, llama()),
        "the layers model.layers.N of other may be thinker.model.layers.N or talker.model.layers.N of one", ALONE,
    ),
    "two that may be it": (
        (llama(), OMNI),
        "the layers model.layers.N of one may be thinker.model.layers.N or talker.model.layers.N of other", ALONE,
    ),
    "other layers": (
        (llama(), under("language_", hidden=16)),
        "other has no layers model.layers.N (its stacks of layers: language_model.layers)",
        "only models of one architecture can be merged",
    ),
    "other eyes": (
        ({**llama(), **EYES}, {**llama(), **tower("eyes", hidden=16)}),
        "other has no layers visual.model.layers.N (its stacks of layers: model.layers, eyes.model.layers)", MODULES,
    ),
    "eyes that one of three lacks": (
        ({**llama(), **EYES}, {**llama(), **EYES}, llama()),
        "third has no layers visual.model.layers.N (its stacks of layers: model.layers)", MODULES,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNLIKE)
def test_layers_that_are_not_clear_or_not_there_are_refused(case: str, tmp_path: Path) -> None:
    """With both that it may be, and what to do; once."""
    models, what, hint = UNLIKE[case]
    places = [write(tmp_path / name, of) for name, of in zip(("one", "other", "third"), models, strict=False)]
    with pytest.raises(MismatchError) as caught:
        planned(linear(*places))
    assert [(problem.what, problem.hint) for problem in caught.value.problems] == [(what, hint)]


# ---- names make no difference ---------------------------------------------------------------------------------------

RECIPES: Mapping[str, str] = {
    "ties": "merge_method: ties\nbase_model: %base\nmodels: [{model: %one, parameters: {weight: 1, density: 0.5}}]\n",
    "the last one has other names": "merge_method: linear\nmodels: [{model: %one}, {model: %two}, {model: %base}]\n",
    "an adapter": "merge_method: linear\nmodels: [{model: %base}, {model: %one+%lora}]\n",
    "layers of both": "merge_method: passthrough\nslices: [{sources: [{model: %base, layer_range: [0, 1]}]}, "
                      "{sources: [{model: %one, layer_range: [0, 2]}]}]\n",
    "by a filter": "merge_method: linear\nmodels: [{model: %base}, {model: %one}]\n"
                   "tensors: [{filter: self_attn, model: %two}]\n",
    "a stage": "name: half\nmerge_method: linear\nmodels: [{model: %one}, {model: %two}]\n---\n"
               "merge_method: linear\nmodels: [{model: %base}, {model: half}]\n",
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_gives_the_same_numbers_whatever_the_names(case: str, tmp_path: Path) -> None:
    """Of models that are named alike, and of a base or of others with a prefix; the result is named as the first."""
    plain = tiny.models(tmp_path, "base", "one", "two")
    plain["lora"] = tiny.lora(tmp_path / "lora", plain["one"])

    def made(out: str, **other: Path) -> dict[str, Tensor]:
        text = RECIPES[case]
        for name, folder in {**plain, **other}.items():
            text = text.replace(f"%{name}", str(folder))
        return merge(text, tmp_path / out)

    prefixed = {f"language_model.{name}": of for name, of in tiny.read(plain["base"]).items()}
    base = tiny.write(tmp_path / "prefixed", prefixed, num_hidden_layers=2)
    expected, found = made("expected"), made("found", base=base)
    prefix = "" if case == "the last one has other names" else "language_model."
    assert found.keys() == {f"{prefix}{name}" for name in expected}
    for name, of in expected.items():
        assert torch.equal(found[f"{prefix}{name}"], of), name
