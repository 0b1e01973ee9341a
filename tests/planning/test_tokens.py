"""What a plan says of tokens: what is refused, word for word; the maps' part in hash, memory and disk."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from vocabularies import BASE, model, sentencepiece, tokenizer

from merger.errors import MergerError
from merger.planning.inputs.base import Stored
from merger.planning.inputs.rows import Rows
from merger.planning.plan import Plan

from .models import planned

GOLDEN = Path(__file__).with_name("tokens-refused.txt")
Make = Callable[[Path], object]


@dataclass(frozen=True)
class Refused:
    """A recipe's end, and what is made of the two models `one` and `other` of which it speaks."""

    more: str
    change: Make = lambda root: None
    code: int = 3


def write(name: str, text: str) -> Make:
    return lambda root: (root / name).write_text(text)


def only(*names: str) -> Make:
    """The model `other` with no files of a tokenizer but these."""

    def change(root: Path) -> None:
        for name in {"tokenizer.json", "tokenizer_config.json"} - set(names):
            (root / "other" / name).unlink()
        if "vocab.json" in names:
            (root / "other/vocab.json").write_text(json.dumps({token: n for n, token in enumerate(BASE)}))
        if "tokenizer.model" in names:
            (root / "other/tokenizer.model").write_text("dGhl 0\naW4= 1\n")

    return change


def pieces_only(root: Path) -> None:
    only()(root)
    (root / "other/tokenizer.model").write_bytes(sentencepiece(BASE))


def cut_short(root: Path) -> None:
    only()(root)
    (root / "other/tokenizer.model").write_bytes(sentencepiece(BASE)[:-20])


def gaps(root: Path) -> None:
    content = json.loads((root / "one/tokenizer.json").read_text())
    content["model"]["vocab"] |= {"Ċ": 35}
    content["model"]["vocab"] = {t: n for t, n in content["model"]["vocab"].items() if t != "and"}
    content["model"]["merges"].pop()
    content["added_tokens"] = content["added_tokens"][:2]
    (root / "one/tokenizer.json").write_text(json.dumps(content))


def strange(root: Path) -> None:
    its = tokenizer([], ["<pad>", "z9", "y9"])
    held = json.loads(its.to_str())
    held["added_tokens"] = []
    (root / "other/tokenizer.json").write_text(json.dumps(held))


def changed(name: str, tensor: str, *shape: int) -> Make:
    """A model of which one tensor has another shape; of no numbers: it is not there."""

    def change(root: Path) -> None:
        held = tiny.read(root / name)
        held.pop(tensor, None)
        if shape:
            held[tensor] = torch.zeros(shape)
        tiny.write(root / name, held)

    return change


BOTH = "models: [{model: one}, {model: other}]\nmerge_method: linear\n"
ONE = "models: [{model: one}]\nmerge_method: passthrough\n"
REFUSED = {
    "no block": Refused(BOTH, code=4),
    "no block, and a damaged tokenizer": Refused(BOTH, write("other/tokenizer.json", "{}")),
    "a damaged tokenizer": Refused(BOTH + "tokenizer: {}", write("one/tokenizer.json", '{"model": {"vocab": [7]}}')),
    "damaged settings": Refused(BOTH + "tokenizer: {}", write("one/tokenizer_config.json", "[]")),
    "a tiktoken file alone": Refused(BOTH + "tokenizer: {}", only("tokenizer.model")),
    "half a SentencePiece model": Refused(BOTH + "tokenizer: {}", cut_short),
    "a SentencePiece model that is to know more": Refused(
        "models: [{model: other}, {model: one}]\nmerge_method: linear\ntokenizer: {}", pieces_only
    ),
    "no tokenizer": Refused(BOTH + "tokenizer: {}", only()),
    "nothing to write new tokens into": Refused(
        BOTH + "tokenizer: {source: other, tokens: {<new>: }}", only("vocab.json")
    ),
    "ids with gaps": Refused(BOTH + "tokenizer: {source: union}", gaps, 2),
    "tokens that are not there": Refused(
        BOTH + "tokenizer:\n"
        "  tokens:\n"
        "    <a>: {source: {kind: model_token, model: other, token: <nowhere>}, force: true}\n"
        "    <b>: {source: {kind: model_token, model: other, token_id: 38}}\n"
        "    <new>: {source: other}\n",
        code=2,
    ),
    "no embedding": Refused(BOTH + "tokenizer: {}", changed("other", "model.embed_tokens.weight"), 4),
    "a head with other rows": Refused(BOTH + "tokenizer: {}", changed("other", "lm_head.weight", 30, 16), 4),
    "a row across all tokens": Refused(BOTH + "tokenizer: {}", changed("one", "final_logits_bias", 1, 37), 4),
    "a lender of another width": Refused(
        ONE + "tokenizer: {tokens: {<new>: {source: {kind: model_token, model: other, token: the}}}}",
        lambda root: tiny.write(root / "other", tiny.tensors(2, hidden=8, vocab=38)),
        4,
    ),
    "config names what the tokenizer lacks": Refused(
        ONE + "tokenizer_source: other",
        lambda root: model(root / "one", 1, ["<a>"], image_token_id=36, boi_token_index=2),
        2,
    ),
    "a damaged generation_config": Refused(ONE + "tokenizer_source: other", write("one/generation_config.json", "{")),
    "nothing in common": Refused(ONE + "tokenizer: {source: other, missing: omp}", strange, 2),
    "pieces by no tokenizer.json": Refused(
        "models: [{model: other}]\nmerge_method: passthrough\ntokenizer: {source: one, missing: subword}",
        only("vocab.json"),
    ),
}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The models `one`, which knows <a>, and `other`, which knows <b> and <c>."""
    model(tmp_path / "one", 1, ["<a>"])
    model(tmp_path / "other", 2, ["<b>", "<c>"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answer(case: Refused, root: Path) -> str:
    case.change(root)
    with pytest.raises(MergerError) as caught:
        planned(case.more)
    assert caught.value.exit_code == case.code
    assert all(problem.at and problem.hint for problem in caught.value.problems)
    return str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_word_for_word(name: str, folders: Path) -> None:
    """At its place in the recipe, in a sentence, with the next step."""
    expected = dict(part.split("\n", 1) for part in GOLDEN.read_text().removeprefix("# ").split("\n\n# "))
    assert answer(REFUSED[name], folders) == expected[name].rstrip("\n")
    assert list(expected) == list(REFUSED)


def rows(found: Plan, name: str = "model.embed_tokens.weight") -> list[Rows | Stored]:
    job = next(job for job in found.jobs if job.name == name)
    return [source for source in job.sources if isinstance(source, Rows | Stored)]


def test_maps_are_part_of_the_plans_hash(folders: Path) -> None:
    """Another token's row, another template or another added token makes another plan; the same recipe the same one."""
    block = BOTH + "tokenizer: {tokens: {<a>: {source: {kind: model_token, model: other, token: %s}}}}"
    texts = [block % "the", block % "in", BOTH + "tokenizer: {tokens: {<new>: }}", BOTH + "tokenizer: {}",
             BOTH + "tokenizer: {}\nchat_template: chatml", BOTH + "tokenizer: {pad_to_multiple_of: 64}"]  # fmt: skip
    hashes = [planned(text).hash for text in texts]
    assert len(set(hashes)) == len(texts)
    assert hashes == [planned(text).hash for text in texts]


def test_a_plan_with_maps_prints_as_json(folders: Path) -> None:
    """A map is told by its digest: as long as it is, the text stays short."""
    found = json.loads(json.dumps(planned(BOTH + "tokenizer: {}").as_json()))
    job = next(job for shard in found["shards"] for job in shard["jobs"] if job["name"] == "lm_head.weight")
    assert len(job["inputs"][0]["source"]["map"]) == 64
    assert [leaf["model"] for leaf in job["inputs"][0]["source"]["parts"]] == [0, 1]
    assert job["shape"] == [39, 16]
    assert found["tokens"] == {"rows": 39, "new": 2, "cut": 0, "source": 0}


def test_a_model_that_only_lends_tokens_gives_nothing_else(folders: Path) -> None:
    """Its other tensors are left out with that reason, and its rows are read where they are named."""
    found = planned(ONE + "tokenizer: {tokens: {<new>: {source: {kind: model_token, model: other, token: the}}}}")
    assert [stored.model for stored in rows(found)[0].stored_tensors] == [0, 1]
    reasons = {item.why for item in found.left_out if item.model == 1}
    assert reasons == {"the recipe takes only tokens of this model"}


def test_memory_and_disk_of_maps_are_counted(folders: Path) -> None:
    """The maps of two tensors and two models, and reading the tokenizers, cost memory; folders cost no disk."""
    plain, united = planned(ONE), planned(ONE + "tokenizer: {source: other}")
    (source,) = rows(united)
    assert isinstance(source, Rows)
    texts = sum(len(text) for model in united.locked.models for text in model.texts.values())
    assert united.peak_memory - plain.peak_memory >= 2 * source.map.nbytes + source.workspace_bytes + texts
    assert united.spool == 0
    pursued = planned(ONE + "tokenizer: {source: other, missing: omp, k: 4}")
    assert pursued.peak_memory > united.peak_memory


def test_a_large_union_is_planned_without_torch(tmp_path: Path) -> None:
    """Three models of 128,000 tokens each, two of them with tokens of their own."""
    tokens = [*BASE, *(f"word{number}" for number in range(128_000 - len(BASE)))]
    content = json.loads(tokenizer([], BASE).to_str())
    content["model"]["vocab"] = {token: number for number, token in enumerate(tokens)}
    for name, added in (("base", []), ("one", ["<a>"]), ("other", ["<b>", "<c>"])):
        held = {**tiny.tensors(1, vocab=len(tokens) + len(added), layers=1)}
        tiny.write(tmp_path / name, held, vocab_size=len(tokens) + len(added))
        more = [
            {**content["added_tokens"][0], "id": len(tokens) + n, "content": token} for n, token in enumerate(added)
        ]
        text = json.dumps({**content, "added_tokens": [*content["added_tokens"], *more]})
        (tmp_path / name / "tokenizer.json").write_text(text)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("merge_method: ties\nbase_model: base\nmodels: [{model: one}, {model: other}]\ntokenizer: {}\n")
    code = (
        "import sys; from merger.cli.commands import main; code = main(['plan', 'recipe.yaml']); "
        "sys.exit(code or ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\ntokens  128,003 rows: the tokenizer of base and 3 tokens more\n" in done.stdout
