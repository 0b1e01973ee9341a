"""A model takes another's tokenizer: small models that were really trained keep what they know.

The model lacks 1,000 of the 2,048 tokens that its donor has, and the donor's embedding is turned, so that only how its
tokens lie to each other can tell anything. What the model had for them before they were cut off is the truth.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from places import ZOO
from safetensors.torch import save_file
from thorough import thorough_only
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from merger.run import pipeline as run
from merger.run.options import Options
from merger.run.prepare import plan, read_recipe

EMBEDDING = "model.embed_tokens.weight"
KEPT, ALL = 1048, 2048


def shorter(folder: Path) -> Path:
    """The zoo's base without its last 1,000 tokens: it splits their text into more pieces."""
    table = tiny.read(ZOO / "base")[EMBEDDING][:KEPT].clone()
    _written(folder, "base", table)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: number for token, number in ids.items() if number < KEPT}
    tokenizer["model"]["merges"] = [pair for pair in tokenizer["model"]["merges"] if ids["".join(pair)] < KEPT]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def turned(folder: Path) -> Path:
    """The zoo's fine-tune on the King James Bible in a space of its own."""
    square = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    return _written(folder, "kjv", tiny.read(ZOO / "kjv")[EMBEDDING].float() @ torch.linalg.qr(square)[0])


def _written(folder: Path, name: str, table: Tensor) -> Path:
    folder.mkdir()
    save_file({**tiny.read(ZOO / name), EMBEDDING: table}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((ZOO / name / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": len(table)}))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((ZOO / name / file).read_bytes())
    return folder


def loss(folder: Path) -> float:
    """Cross-entropy on a text that no training saw, in nats a character, so that tokenizers can be compared."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (ZOO / "kjv/heldout.txt").read_text("utf-8")[:12_000]
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
    windows = tokens[: len(tokens) // 128 * 128].view(-1, 128)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].flatten(0, 1)
    total = torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten(), reduction="sum")
    return float(total) / len(tokenizer.decode(windows.flatten()))


@pytest.fixture(scope="module")
def transplanted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shorter model with the donor's tokenizer, by each way to find the missing rows."""
    root = tmp_path_factory.mktemp("transplant")
    model, donor = shorter(root / "shorter"), turned(root / "donor")
    for way in ("omp", "subword", "mean", "zero"):
        path = root / f"{way}.yaml"
        block = f"tokenizer: {{source: {donor}, missing: {way}}}"
        path.write_text(f"merge_method: passthrough\nmodels: [{{model: {model}}}]\n{block}\n")
        options = Options(to=str(root / way), threads=2)
        planned, store = plan(read_recipe(path), options)
        run.merge(planned, store, options)
    return {way: root / way for way in ("omp", "subword", "mean", "zero")}


@thorough_only
def test_a_pursuit_keeps_the_loss_and_no_other_way_does(transplanted: dict[str, Path]) -> None:
    """After a pursuit the loss is the whole model's within 3 %; means, pieces and zeros cost more than 8 %."""
    whole = loss(ZOO / "base")
    found = {way: loss(folder) / whole for way, folder in transplanted.items()}
    assert found["omp"] < 1.03, found
    assert all(found[way] > 1.08 for way in ("subword", "mean", "zero")), found


def test_pursued_rows_are_near_those_that_training_had_made(transplanted: dict[str, Path]) -> None:
    """Cosines above 0.95 on average, and rows of about the same length; the kept rows are untouched."""
    truth, found = tiny.read(ZOO / "base")[EMBEDDING], tiny.read(transplanted["omp"])[EMBEDDING]
    assert torch.equal(found[:KEPT], truth[:KEPT])
    lost, made = truth[KEPT:], found[KEPT:]
    assert len(made) == ALL - KEPT
    assert float(torch.nn.functional.cosine_similarity(made, lost, dim=1).mean()) > 0.95
    assert 0.8 < float((made.norm(dim=1) / lost.norm(dim=1)).mean()) < 1.25


def test_rows_of_pieces_means_and_zeros_are_what_they_are_called(transplanted: dict[str, Path]) -> None:
    """By value: the mean of the rows of its pieces, the mean of all rows, zeros."""
    rows = {way: tiny.read(folder)[EMBEDDING] for way, folder in transplanted.items()}
    kept = rows["omp"][:KEPT]
    pieces = AutoTokenizer.from_pretrained(transplanted["omp"].parent / "shorter")
    tokens = AutoTokenizer.from_pretrained(ZOO / "base")
    checked = 0
    for number in range(KEPT, ALL, 7):
        text = tokens.decode([number])
        if "\ufffd" not in text:
            split = pieces(text, add_special_tokens=False).input_ids
            torch.testing.assert_close(rows["subword"][number], kept[split].mean(dim=0), rtol=1e-5, atol=1e-6)
            checked += 1
    assert checked > 100
    torch.testing.assert_close(rows["mean"][KEPT:], kept.mean(dim=0).expand(1000, -1), rtol=1e-5, atol=1e-6)
    assert not rows["zero"][KEPT:].any()
