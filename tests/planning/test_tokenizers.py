"""Models with tokenizers of their own become one: each token's row is the right one, and transformers loads it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tiny
import torch
import transformers
from loopback import LoopbackHub
from transformers import AutoModelForCausalLM, AutoTokenizer
from vocabularies import BASE, model, rows, sentencepiece

from merger.card.facts import PlanSummary
from merger.cli.markdown import plan_section
from merger.cli.text import plan_text
from merger.errors import MismatchError, RecipeError
from merger.planning.plan import Plan
from merger.run import pipeline as run
from merger.run.options import Options
from merger.run.prepare import plan, read_recipe

if TYPE_CHECKING:
    from conftest import Command

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def planned(recipe: str, out: Path) -> Plan:
    path = out.with_suffix(".yaml")
    path.write_text(recipe)
    return plan(read_recipe(path), Options(to=str(out), threads=1))[0]


def merge(recipe: str, out: Path) -> Plan:
    path = out.with_suffix(".yaml")
    path.write_text(recipe)
    options = Options(to=str(out), threads=2)
    made, store = plan(read_recipe(path), options)
    run.merge(made, store, options)
    return made


def linear(*models: Path, more: str = "") -> str:
    listed = "".join(f"  - {{model: {path}, parameters: {{weight: 1}}}}\n" for path in models)
    return f"merge_method: linear\nmodels:\n{listed}{more}\n"


def config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text())
    return found


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two models of one base: one with <a> and <both>, the other with <b>, <both> and <c>, under other ids."""
    one = model(tmp_path / "one", 1, ["<a>", "<both>"])
    return one, model(tmp_path / "other", 2, ["<b>", "<c>", "<both>"])


# ---- union ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_a_union_knows_every_token_of_both_by_its_row(pair: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    """A token of both has the mean of their rows, a token of one has that model's; ids of the first model stay."""
    out = tmp_path / "out"
    merge(linear(*pair, more="tokenizer_source: union"), out)
    first, second, found = (rows(folder, name) for folder in (*pair, out))
    assert set(found) == {*first, *second} == {*BASE, "<a>", "<b>", "<c>", "<both>"}
    for token, row in found.items():
        parts = [of[token] for of in (first, second) if token in of]
        torch.testing.assert_close(row, torch.stack(parts).mean(dim=0), rtol=1e-6, atol=1e-8)


def test_transformers_loads_the_union_and_encodes_every_token(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Tokens of both models are one token each in its tokenizer, other text is split as before; the model computes."""
    merge(linear(*pair, more="tokenizer: {}"), tmp_path / "out")
    tokenizer, before = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", pair[0]))
    text = "the<a> and<b>the<both><c>"
    found = tokenizer(text).input_ids
    assert [tokenizer.convert_ids_to_tokens(each) for each in found] == [
        "the", "<a>", "Ġ", "and", "<b>", "the", "<both>", "<c>",
    ]  # fmt: skip
    assert tokenizer.decode(found) == text
    assert tokenizer("in the end").input_ids == before("in the end").input_ids
    assert config(tmp_path / "out")["vocab_size"] == len(tokenizer) == len(BASE) + 4
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        logits = loaded(torch.tensor([found])).logits
    assert logits.shape == (1, 8, len(BASE) + 4)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_chatml_fine_tune_is_merged_with_its_base(tmp_path: Path, tied: bool) -> None:
    """The base lacks two tokens: their rows come from the fine-tune alone; its deltas are added everywhere else."""
    base = model(tmp_path / "base", 1, tied=tied)
    tuned = model(tmp_path / "tuned", 2, ["<|im_start|>", "<|im_end|>"], tied=tied, eos_token_id=len(BASE) + 1)
    recipe = f"merge_method: task_arithmetic\nbase_model: {base}\nmodels: [{{model: {tuned}}}]\n"
    recipe += "parameters: {weight: 0.5}\n"
    made = merge(recipe + "tokenizer: {source: union}\nchat_template: chatml\n", tmp_path / "out")
    for name in (EMBEDDING,) if tied else (EMBEDDING, HEAD):
        before, after, found = (rows(folder, name) for folder in (base, tuned, tmp_path / "out"))
        for token in BASE:
            torch.testing.assert_close(found[token], (before[token] + after[token]) / 2, rtol=1e-5, atol=1e-7)
        assert all(torch.equal(found[token], after[token]) for token in ("<|im_start|>", "<|im_end|>"))
    assert (HEAD in tiny.read(tmp_path / "out")) is not tied
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert chat == "<|im_start|>user\nthe<|im_end|>\n"
    assert tokenizer(chat).input_ids[0] == len(BASE)
    assert made.config["eos_token_id"] == 1


def test_a_tied_and_an_untied_model_are_united(tmp_path: Path) -> None:
    """The head of the tied one is its embedding, by token as well."""
    one, other = model(tmp_path / "one", 1, ["<a>"], tied=True), model(tmp_path / "other", 2, ["<b>"])
    merge(linear(one, other, more="tokenizer: {}"), tmp_path / "out")
    found, head = rows(tmp_path / "out", HEAD), rows(other, HEAD)
    torch.testing.assert_close(found["<a>"], rows(one)["<a>"])
    torch.testing.assert_close(found["<b>"], head["<b>"])
    torch.testing.assert_close(found["the"], (rows(one)["the"] + head["the"]) / 2)


def test_a_known_token_without_a_row_is_one_that_the_model_lacks(tmp_path: Path) -> None:
    """A tokenizer that knows <x> beyond its embedding's rows: the row comes from the model that has one."""
    one = model(tmp_path / "one", 1, ["<x>"], rows=len(BASE))
    other = model(tmp_path / "other", 2, ["<x>"])
    merge(linear(one, other, more="tokenizer: {}"), tmp_path / "out")
    assert torch.equal(rows(tmp_path / "out")["<x>"], rows(other)["<x>"])


def test_rows_that_no_tokenizer_knows_are_dropped_and_the_rest_is_padded(tmp_path: Path) -> None:
    """Rows beyond the tokenizer go; those that fill up a multiple are the mean of the model's rows, in each model."""
    one, other = model(tmp_path / "one", 1, rows=48), model(tmp_path / "other", 2, rows=50)
    merge(linear(one, other, more="tokenizer: {pad_to_multiple_of: 8}"), tmp_path / "out")
    found = tiny.read(tmp_path / "out")[EMBEDDING]
    tables = [tiny.read(folder)[EMBEDDING] for folder in (one, other)]
    assert found.shape == (40, 16)
    assert config(tmp_path / "out")["vocab_size"] == 40
    mean = (tables[0].mean(dim=0) + tables[1].mean(dim=0)) / 2
    torch.testing.assert_close(found[len(BASE) :], mean.expand(4, -1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found[: len(BASE)], (tables[0][: len(BASE)] + tables[1][: len(BASE)]) / 2)


def padded(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Two models with rows behind their last token, and one without."""
    sizes = {"padded": 48, "too": 48, "trimmed": len(BASE)}
    one, too, trimmed = (model(tmp_path / name, seed, rows=of) for seed, (name, of) in enumerate(sizes.items()))
    return one, too, trimmed


CUT = f"; {48 - len(BASE)} rows of padded behind its last token are left out (rows: base keeps them)"
PADDED: dict[str, tuple[int, str, int, str]] = {
    "source: base": (2, "", len(BASE), CUT),
    "source: union": (1, "", len(BASE), CUT),
    "rows: tokens, source: base": (2, "", len(BASE), CUT),
    "source: base, pad_to_multiple_of: 16": (2, "", 48, CUT),
    "source: base, rows: base": (2, "own", 48, ""),
    "source: union, rows: base": (1, "own", 48, ""),
    "rows: base, pad_to_multiple_of: 32": (2, "own", 64, ""),
    "rows: base, tokens: {<new>: }": (2, "own but one", 48, " and 1 tokens more"),
}
"""A block; which model is merged with the padded one; whose the rows behind the tokens are; how many; what is said."""


@pytest.mark.parametrize("block", PADDED)
def test_rows_behind_the_tokens_are_kept_or_said_to_be_cut(block: str, tmp_path: Path) -> None:
    """In plan, run and card how many are cut; kept they are the base's own numbers, whatever others have there."""
    other, whose, count, says = PADDED[block]
    models = padded(tmp_path)
    recipe = linear(models[0], models[other], more=f"tokenizer: {{{block}}}")
    made = merge(recipe, tmp_path / "out")
    told = f"{count} rows: the tokenizer of padded{says}"
    assert f"tokens  {told}" in plan_text(PlanSummary(made)).splitlines()
    assert visible(told) in visible(plan_section(PlanSummary(made)))
    assert f"Embedding and head: {visible(told)}." in visible((tmp_path / "out/README.md").read_text())
    assert config(tmp_path / "out")["vocab_size"] == count
    for name in (EMBEDDING, HEAD):
        own, found = (tiny.read(folder)[name] for folder in (models[0], tmp_path / "out"))
        assert len(found) == count
        if whose:
            first = len(BASE) + (whose != "own")
            assert torch.equal(found[first:48], own[first:48])


def visible(text: str) -> str:
    """Without what Markdown puts before signs."""
    return text.replace("\\", "")


def test_the_refusal_of_padded_rows_says_how_they_stay(tmp_path: Path) -> None:
    """At the model whose embedding has other rows."""
    one, _, trimmed = padded(tmp_path)
    with pytest.raises(MismatchError) as caught:
        planned(linear(one, trimmed), tmp_path / "plain")
    hints = {problem.hint for problem in caught.value.problems}
    assert {str(hint).rpartition("; ")[2] for hint in hints} == {
        "tokenizer: {source: base, rows: base} has as many rows as the base"
    }


def test_rows_of_the_base_go_with_its_tokenizer(tmp_path: Path) -> None:
    """Behind the tokens of another model's tokenizer the base's rows would stand for nothing."""
    one, _, trimmed = padded(tmp_path)
    with pytest.raises(RecipeError) as caught:
        planned(linear(one, trimmed, more=f"tokenizer: {{source: {trimmed}, rows: base}}"), tmp_path / "out")
    (problem,) = caught.value.problems
    assert problem.what == "the base model is padded, and the tokenizer that of trimmed"
    assert problem.where == "tokenizer.rows"


SPECIAL: dict[str, tuple[str, bool]] = {"source: union": ("an<|x|>the", True), "source: base": ("an<|x|>the", False)}


@pytest.mark.parametrize("block", SPECIAL)
def test_a_token_that_is_special_in_one_model_is_so_in_a_union(block: str, tmp_path: Path) -> None:
    """Though it is plain in the base's tokenizer, where it is not found in a text as one token; its id stays."""
    text, special = SPECIAL[block]
    tokens = [*BASE, "<|x|>"]
    one, other = model(tmp_path / "one", 1, tokens=tokens), model(tmp_path / "other", 2, ["<|x|>"], tokens=BASE)
    made = merge(linear(one, other, more=f"tokenizer: {{{block}}}"), tmp_path / "out")
    assert made.tokens is not None
    assert made.tokens.new == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (len(BASE) in tokenizer(text).input_ids) is special
    assert tokenizer.convert_tokens_to_ids("<|x|>") == len(BASE)
    told = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    assert ("<|x|>" in told) is special
    assert torch.equal(rows(tmp_path / "out")["<|x|>"], (rows(one)["<|x|>"] + rows(other)["<|x|>"]) / 2)


def test_three_models_fill_each_others_gaps_by_their_mean(tmp_path: Path) -> None:
    """Without a base model a token that two of three have is in the third the mean of the two."""
    folders = [model(tmp_path / str(n), n, added) for n, added in enumerate([["<x>"], ["<x>"], ["<y>"]])]
    merge(linear(*folders, more="tokenizer: {}"), tmp_path / "out")
    one, two = (rows(folder)["<x>"] for folder in folders[:2])
    torch.testing.assert_close(rows(tmp_path / "out")["<x>"], (one + two) / 2)


# ---- base, a model's, single tokens ---------------------------------------------------------------------------------


def test_the_bases_tokenizer_in_another_order(tmp_path: Path) -> None:
    """`source: base` keeps the base's ids; the other model's rows follow by token, and its own tokens are left out."""
    turned = [*BASE[:2], *reversed(BASE[2:])]
    base, other = model(tmp_path / "base", 1), model(tmp_path / "other", 2, ["<x>"], tokens=turned)
    recipe = f"merge_method: task_arithmetic\nbase_model: {base}\nmodels: [{{model: {other}}}]\n"
    made = merge(recipe + "tokenizer_source: base", tmp_path / "out")
    found = rows(tmp_path / "out")
    assert sorted(found) == sorted(BASE)
    for token in BASE:
        torch.testing.assert_close(found[token], rows(other)[token], rtol=1e-5, atol=1e-7)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert made.texts.added is None


def test_another_models_tokenizer_brings_its_special_ids(tmp_path: Path) -> None:
    """Config and generation_config take bos, eos and pad from that model; other ids follow their tokens."""
    base = model(tmp_path / "base", 1, ["<img>"], image_token_id=len(BASE), eos_token_id=[1, 5], sep_token_id=7)
    other = model(tmp_path / "other", 2, ["<|end|>", "<img>"], eos_token_id=len(BASE), pad_token_id=1)
    (base / "generation_config.json").write_text('{"eos_token_id": 1, "temperature": 0.7, "suppress_tokens": [5, 36]}')
    (other / "generation_config.json").write_text(f'{{"eos_token_id": [{len(BASE)}, 1]}}')
    recipe = f"merge_method: task_arithmetic\nbase_model: {base}\nmodels: [{{model: {other}}}]\n"
    merge(recipe + f"tokenizer: {{source: {other}}}", tmp_path / "out")
    found = config(tmp_path / "out")
    assert {key: found.get(key) for key in ("eos_token_id", "image_token_id", "sep_token_id", "vocab_size")} == {
        "eos_token_id": len(BASE), "image_token_id": len(BASE) + 1, "sep_token_id": 7, "vocab_size": len(BASE) + 2,
    }  # fmt: skip
    assert config(tmp_path / "out", "generation_config.json") == {
        "eos_token_id": [len(BASE), 1], "temperature": 0.7, "suppress_tokens": [5, 37],
    }  # fmt: skip
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()


def test_the_recipe_says_where_single_rows_come_from(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A model's same token, its other token by text or id, zeros; forced where a model has the token; a new token."""
    one, other = pair
    block = f"""
tokenizer:
  tokens:
    <a>: {{source: {{kind: model_token, model: {other}, token: <c>}}}}
    <b>: {{source: {{kind: zero}}}}
    <both>: {{source: {other}, force: true}}
    <c>: {{source: {{kind: model_token, model: {one}, token_id: 3}}, force: true}}
    <new>: {{source: {{kind: model_token, model: {one}, token: the}}}}
    <mean>:
"""
    merge(linear(one, other, more=block), tmp_path / "out")
    first, second, found = (rows(folder) for folder in (one, other, tmp_path / "out"))
    tables = [tiny.read(folder)[EMBEDDING] for folder in pair]
    expected = {
        "<a>": (first["<a>"] + second["<c>"]) / 2,
        "<b>": second["<b>"] / 2,
        "<both>": second["<both>"],
        "<c>": tables[0][3],
        "<new>": first["the"],
        "<mean>": (tables[0].mean(dim=0) + tables[1].mean(dim=0)) / 2,
    }
    for token, row in expected.items():
        torch.testing.assert_close(found[token], row, rtol=1e-5, atol=1e-7)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("<new>").input_ids == [len(BASE) + 4]


@pytest.mark.parametrize(("way", "expected"), [("mean", None), ("zero", 0.0)])
def test_tokens_of_a_tokenizer_from_outside(tmp_path: Path, way: str, expected: float | None) -> None:
    """A merge may take the tokenizer of a model that is not merged: tokens of no merged model are means, or zeros."""
    one, other = model(tmp_path / "one", 1), model(tmp_path / "other", 2, ["<x>"])
    merge(linear(one, more=f"tokenizer: {{source: {other}, missing: {way}}}"), tmp_path / "out")
    table = tiny.read(one)[EMBEDDING]
    row = table.mean(dim=0) if expected is None else torch.zeros(16)
    torch.testing.assert_close(rows(tmp_path / "out")["<x>"], row, rtol=1e-5, atol=1e-7)
    assert torch.equal(rows(tmp_path / "out")["the"], rows(one)["the"])


# ---- the same models, otherwise -------------------------------------------------------------------------------------


def test_equal_vocabularies_make_the_merge_that_no_block_makes(tmp_path: Path) -> None:
    """Byte for byte, and passthrough still copies."""
    one, other = model(tmp_path / "one", 1, ["<a>"]), model(tmp_path / "other", 2, ["<a>"])
    merge(linear(one, other), tmp_path / "plain")
    merge(linear(one, other, more="tokenizer: {}"), tmp_path / "united")
    assert (tmp_path / "plain/model.safetensors").read_bytes() == (tmp_path / "united/model.safetensors").read_bytes()
    stack = f"merge_method: passthrough\nslices: [{{sources: [{{model: {one}, layer_range: [0, 2]}}]}}]\n"
    assert all(job.is_copy for job in planned(stack + "tokenizer: {}", tmp_path / "stack").jobs)


def test_wide_rows_over_many_blocks(tmp_path: Path) -> None:
    """Rows that no block's end falls on: 1,100 of 720 numbers, in another order, by a method that measures first."""
    tokens = [*BASE, *(f"word{number}" for number in range(1064))]
    turned = [*BASE, *reversed(tokens[len(BASE) :])]
    base = model(tmp_path / "base", 1, tokens=tokens)
    wide = {name: tiny.tensors(seed, hidden=720, middle=8, vocab=1100, layers=1, dtype=torch.float32)
            for name, seed in (("base", 1), ("other", 2))}  # fmt: skip
    other = model(tmp_path / "other", 2, tokens=turned)
    for folder in (base, other):
        tiny.write(folder, wide[folder.name], hidden_size=720, head_dim=180, intermediate_size=8, vocab_size=1100)
    recipe = (
        f"merge_method: {{}}\nbase_model: {base}\nmodels: [{{{{model: {other}}}}}]\nparameters: {{{{density: 1}}}}\n"
    )
    merge(recipe.format("task_arithmetic") + "tokenizer_source: base", tmp_path / "one")
    merge(recipe.format("ties") + "tokenizer_source: base", tmp_path / "two")
    theirs = rows(other)
    for folder in (tmp_path / "one", tmp_path / "two"):
        found = rows(folder)
        assert len(found) == 1100
        assert all(torch.allclose(found[token], theirs[token], atol=1e-6) for token in tokens)


UNITED = """\
merge_method: linear
models: [{model: org/one, parameters: {weight: 1}}, {model: org/other, parameters: {weight: 1}}]
tokenizer: {source: union, pad_to_multiple_of: 8}
chat_template: auto
"""


def test_models_on_the_hub_are_united_like_folders(
    pair: tuple[Path, Path], tmp_path: Path, hub: LoopbackHub, command: Command
) -> None:
    """Rows are read in any order: what comes from the Hub waits in memory, or on disk, as the plan says."""
    for name, folder in zip(("one", "other"), pair, strict=True):
        (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
        hub.add_model(f"org/{name}", {file.name: file.read_bytes() for file in folder.iterdir()})
    local = merge(UNITED.replace("org/one", str(pair[0])).replace("org/other", str(pair[1])), tmp_path / "local")
    (tmp_path / "recipe.yaml").write_text(UNITED)
    done = command("run", "recipe.yaml", "--to", "afar", cwd=tmp_path, hub=hub)
    assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"):
        assert (tmp_path / "afar" / name).read_bytes() == (tmp_path / "local" / name).read_bytes(), name
    line = ("plan", "recipe.yaml", "--json")
    plan = json.loads(command(*line, cwd=tmp_path, hub=hub).stdout)
    tight = json.loads(command(*line, "--max-memory", str(plan["peak_memory"] - 1), cwd=tmp_path, hub=hub).stdout)
    tables = sum(tiny.read(folder)[name].nbytes for folder in pair for name in (EMBEDDING, HEAD))
    assert (plan["disk"]["folder"], tight["disk"]["folder"]) == (local.size, local.size + tables)
    assert (tight["peak_memory"], tight["threads"]) == (plan["peak_memory"] - tables, plan["threads"])


def test_a_published_recipe_with_a_union_and_a_chat_template(tmp_path: Path) -> None:
    """The recipe of the field on four small models, of which two know ChatML: the result loads and chats."""
    text = (Path(__file__).parents[1] / "recipe/wild/13-della-linear-filters-union-chatml.yaml").read_text()
    chatml = ["<|im_start|>", "<|im_end|>"]
    for seed, name in enumerate(re.findall(r"model: (\S+)", text)):
        model(tmp_path / name, seed, chatml if seed % 2 else [])
    merge(re.sub(r"(model: )(\S+)", rf"\1{tmp_path}/\2", text), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], add_generation_prompt=True).input_ids
    assert [tokenizer.convert_ids_to_tokens(ids).count(token) for token in chatml] == [2, 1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert torch.isfinite(loaded(torch.tensor([ids])).logits).all()


def pieces_alone(folder: Path) -> Path:
    """The model with its tokenizer as an old program wrote it."""
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(sentencepiece())
    return folder


def test_a_sentencepiece_model_tells_its_tokens(tmp_path: Path) -> None:
    """Of a model without tokenizer.json rows follow by piece; the result's tokenizer is the other one's."""
    turned = [*BASE[:2], *reversed(BASE[2:])]
    one = model(tmp_path / "one", 1, ["<a>"], tokens=turned)
    other = model(tmp_path / "other", 2)
    theirs = rows(other)
    pieces_alone(other)
    merge(linear(one, other, more="tokenizer: {}"), tmp_path / "out")
    found, first = rows(tmp_path / "out"), rows(one)
    for token in BASE:
        torch.testing.assert_close(found[token], (first[token] + theirs[token]) / 2)
    assert torch.equal(found["<a>"], first["<a>"])
    assert not (tmp_path / "out/tokenizer.model").exists()


def test_a_sentencepiece_model_is_compared(tmp_path: Path) -> None:
    """Without a block other pieces are told; one that lies beside tokenizer.json for old programs is not looked at."""
    one, other, third = (model(tmp_path / name, seed) for seed, name in enumerate(("one", "other", "third")))
    (one / "tokenizer.model").write_bytes(sentencepiece())
    assert "tokenizer.model" not in planned(linear(one, third), tmp_path / "beside").locked.models[0].texts
    pieces_alone(one)
    planned(linear(one, pieces_alone(other)), tmp_path / "same")
    (other / "tokenizer.model").write_bytes(sentencepiece([*BASE[:2], *reversed(BASE[2:])]))
    with pytest.raises(MismatchError, match="row 2 is 'a' in one and 'and' in other"):
        planned(linear(one, other), tmp_path / "different")


def test_tokenizers_that_the_hub_knows_to_be_equal_are_not_fetched(
    pair: tuple[Path, Path], tmp_path: Path, hub: LoopbackHub, command: Command
) -> None:
    """The Hub tells the names of contents: a plan of fine-tunes with one tokenizer asks for no file of it."""
    for name, seed in (("same", 1), ("equal", 2)):
        folder = model(tmp_path / name, seed, ["<a>"])
        hub.add_model(f"org/{name}", {file.name: file.read_bytes() for file in folder.iterdir()})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("merge_method: linear\nmodels: [{model: org/same}, {model: org/equal}]\n")
    assert command("plan", "recipe.yaml", cwd=tmp_path, hub=hub).returncode == 0
    assert not [entry for entry in hub.log if "tokenizer" in entry.path]
    recipe.write_text(recipe.read_text() + "tokenizer: {}\n")
    assert command("plan", "recipe.yaml", cwd=tmp_path, hub=hub).returncode == 0
    assert len([entry for entry in hub.log if "tokenizer.json" in entry.path and entry.method == "GET"]) == 1


CLASSES = {
    "BertForMaskedLM": ({"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
                         "model_type": "bert"}, "cls.predictions.bias"),
    "GPT2LMHeadModel": ({"n_embd": 16, "n_layer": 2, "n_head": 4, "model_type": "gpt2"}, "transformer.wte.weight"),
    "T5ForConditionalGeneration": ({"d_model": 16, "d_ff": 24, "d_kv": 4, "num_layers": 2, "num_heads": 4,
                                    "model_type": "t5"}, "shared.weight"),
}  # fmt: skip
"""Classes of transformers, their shapes, and a tensor of theirs that has a row for each token."""


@pytest.mark.parametrize("name", CLASSES)
def test_other_classes_follow_their_tokens_too(name: str, tmp_path: Path) -> None:
    """An embedding that several parts share, and a bias with a number a token: all loaded, and each in its place."""
    shape, tensor = CLASSES[name]
    for seed, (folder, added) in enumerate((("one", ["<a>"]), ("other", ["<b>", "<c>"]))):
        model(tmp_path / folder, seed, added)
        (tmp_path / folder / "model.safetensors").unlink()
        torch.manual_seed(seed)
        its = transformers.AutoConfig.for_model(**shape, vocab_size=len(BASE) + len(added))
        made = getattr(transformers, name)(its)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn_like(parameter))
        made.save_pretrained(tmp_path / folder)
    merge(linear(tmp_path / "one", tmp_path / "other", more="tokenizer: {}"), tmp_path / "out")
    loaded, told = getattr(transformers, name).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {what: names for what, names in told.items() if names} == {}
    assert loaded.get_input_embeddings().weight.shape == (len(BASE) + 3, 16)
    first, second, found = (rows(tmp_path / folder, tensor) for folder in ("one", "other", "out"))
    torch.testing.assert_close(found["<a>"], first["<a>"])
    torch.testing.assert_close(found["<c>"], second["<c>"])
    torch.testing.assert_close(found["the"], (first["the"] + second["the"]) / 2)
