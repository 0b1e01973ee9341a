"""merger extract-lora: what a fine-tune changed in its base comes out as an adapter that PEFT loads."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters
import pytest
import tiny
import torch
import vocabularies
import yaml
from loopback import LoopbackHub
from safetensors.torch import load_file, save_file
from torch import Tensor

from merger.cli.commands import main

PeftModel = pytest.importorskip("peft").PeftModel
pytestmark = pytest.mark.filterwarnings("ignore")

QWEN2 = {
    "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40, "tie_word_embeddings": False,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 40}


def tuned(folder: Path, base: Path, rank: int | None = 3, seed: int = 9) -> Path:
    """The base with a change of this rank in each matrix, or of full rank, and a small one in all that is none."""
    shutil.copytree(base, folder)
    held = load_file(folder / "model.safetensors")
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in held.items():
        if tensor.dim() == 2 and rank is not None:
            rows, columns = tensor.shape
            change = torch.randn(rows, rank, generator=draw) @ torch.randn(rank, columns, generator=draw)
        else:
            change = torch.randn(tensor.shape, generator=draw)
        held[name] = tensor + 0.02 * change
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def extract(folder: Path, one: Path | str, base: Path | str, *options: str) -> dict[str, Any]:
    """Run the command; what it says as JSON."""
    to = ["--to", str(folder / "out"), "--json", "--quiet"]
    assert main(["extract-lora", str(one), str(base), *to, *options]) == 0
    return json.loads((folder / "out/adapter_config.json").read_text())


def applied(base: Path, adapter: Path) -> dict[str, Tensor]:
    return dict(adapters.merged(base, adapter))


@pytest.mark.parametrize("config", [{}, QWEN2, GPT2], ids=["mistral", "qwen2", "gpt2"])
@pytest.mark.parametrize(
    "options", [[], ["--embed", "--distribute-scale", "--alpha", "2"]], ids=["plain", "all options"]
)
def test_a_low_rank_change_comes_back(
    config: dict[str, Any], options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With biases, norms and embeddings: base and adapter together are the fine-tune, but for rounding."""
    base = adapters.base(tmp_path / "base", **config)
    one = tuned(tmp_path / "one", base)
    found = extract(tmp_path, one, base, "--rank", "4", *options)
    told = json.loads(capsys.readouterr().out)
    assert max(told["losses"].values()) < 1e-5
    assert set(told["losses"]) == {"all", "layer 0", "layer 1", "outside of the layers"} or not options
    expected, made = tiny.read(one), applied(base, tmp_path / "out")
    if "transformer.wte.weight" in expected and "lm_head.weight" in made:  # of a tied model it may be saved or not
        expected["lm_head.weight"] = expected["transformer.wte.weight"]
    assert made.keys() == expected.keys()
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, expected[name], rtol=2e-6, atol=2e-6, msg=name)
    recipe = f"merge_method: passthrough\nmodels: [{{model: {base}+{tmp_path / 'out'}}}]\n"
    (tmp_path / "again.yaml").write_text(recipe)
    assert main(["run", str(tmp_path / "again.yaml"), "--to", str(tmp_path / "again"), "--quiet"]) == 0
    for name, tensor in tiny.read(tmp_path / "again").items():
        torch.testing.assert_close(tensor, expected[name], rtol=2e-6, atol=2e-6, msg=name)
    assert found["r"] == 4
    assert found["lora_alpha"] == (2 if options else 4)
    assert found["bias"] == ("none" if config == {} else "all")


def test_a_change_of_full_rank_is_cut_to_the_best_of_its_rank_and_the_loss_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the singular value decomposition has it, to a thousandth; the rest by layer, in the output and in the card."""
    base = adapters.base(tmp_path / "base")
    one = tuned(tmp_path / "one", base, rank=None)
    extract(tmp_path, one, base, "--rank", "8", "--include", r"layers\.")
    told = json.loads(capsys.readouterr().out)["losses"]
    held, plain, change = load_file(tmp_path / "out/adapter_model.safetensors"), tiny.read(base), tiny.read(one)
    by_layer: dict[str, list[float]] = {}
    for name in [name for name in plain if ".layers." in name and plain[name].dim() == 2]:
        key = f"base_model.model.{name.removesuffix('.weight')}"
        delta = (change[name] - plain[name]).double()
        product = held[f"{key}.lora_B.weight"].double() @ held[f"{key}.lora_A.weight"].double()
        best = torch.linalg.svdvals(delta)[8:].square().sum()
        error = (delta - product).square().sum()
        assert best <= error * 1.0000001
        assert error <= 1.002 * best
        sums = by_layer.setdefault(f"layer {name.split('.')[2]}", [0.0, 0.0])
        sums[0] += float(error)
        sums[1] += float(delta.square().sum())
    assert told.keys() == {"all", *by_layer}
    card = (tmp_path / "out/README.md").read_text()
    for layer, (error, whole) in by_layer.items():
        assert told[layer] == pytest.approx((error / whole) ** 0.5, rel=1e-4)
        assert f"| {layer} | {100 * told[layer]:.2f} % |" in card


@pytest.mark.parametrize("tied", [False, True])
def test_a_fine_tune_with_more_tokens_comes_back(tied: bool, tmp_path: Path) -> None:
    """Embedding and head are held whole, beside the tokenizer: base and adapter are the fine-tune, by PEFT and here."""
    base = vocabularies.model(tmp_path / "base", 1, tied=tied)
    one = vocabularies.model(tmp_path / "one", 2, ["<|im_start|>", "<|im_end|>"], tied=tied)
    extract(tmp_path, one, base, "--rank", "16", "--skip-rest")
    recipe = f"merge_method: passthrough\nmodels: [{{model: {base}+{tmp_path / 'out'}}}]\n"
    (tmp_path / "again.yaml").write_text(recipe)
    assert main(["run", str(tmp_path / "again.yaml"), "--to", str(tmp_path / "again"), "--quiet"]) == 0
    found, expected, plain = tiny.read(tmp_path / "again"), tiny.read(one), tiny.read(base)
    norms = {name for name in plain if "norm" in name}  # left out by --skip-rest
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (plain if name in norms else expected)[name], rtol=2e-6, atol=2e-6)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (one / name).read_bytes()
    resized = adapters.load(base)
    resized.resize_token_embeddings(len(expected["model.embed_tokens.weight"]))
    by_peft = PeftModel.from_pretrained(resized, str(tmp_path / "out")).merge_and_unload().state_dict()
    for name in found:
        torch.testing.assert_close(by_peft[name], found[name], rtol=2e-6, atol=2e-6)


def test_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By exclude and by skip_rest; nothing else is missing from the adapter."""
    base = adapters.base(tmp_path / "base")
    one = tuned(tmp_path / "one", base)
    recipe = {"model": str(one), "base_model": str(base), "rank": 2, "exclude": "embed|lm_head", "skip_rest": True}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"extract_lora": recipe}))
    assert main(["plan", str(tmp_path / "mine.yaml")]) == 0
    said = capsys.readouterr().out
    assert "no matrix, and left out by skip_rest" in said
    assert "left out by include or exclude" in said
    config = extract(tmp_path, one, base, "--rank", "2", "--exclude", "embed|lm_head", "--skip-rest")
    assert config["modules_to_save"] is None
    assert sorted(config["target_modules"]) == sorted(adapters.ALL_LINEAR)
    held = load_file(tmp_path / "out/adapter_model.safetensors")
    assert len(held) == 2 * 2 * 7
    assert all(".lora_" in name for name in held)


def test_modules_are_named_in_full_where_their_last_names_would_mean_others(tmp_path: Path) -> None:
    """So that PEFT adapts just those."""
    base = adapters.base(tmp_path / "base")
    one = tuned(tmp_path / "one", base)
    config = extract(tmp_path, one, base, "--rank", "2", "--include", r"layers\.0\.self_attn\.[qk]", "--skip-rest")
    assert config["target_modules"] == ["model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.q_proj"]
    made, expected = applied(base, tmp_path / "out"), tiny.read(one)
    changed = {name for name, tensor in tiny.read(base).items() if not torch.equal(made[name], tensor)}
    assert changed == {f"{name}.weight" for name in config["target_modules"]}
    assert expected.keys() == made.keys()


def of_eight_bits(folder: Path, like: Path) -> Path:
    """A model one of whose matrices is stored in whole numbers."""
    shutil.copytree(like, folder)
    held = load_file(folder / "model.safetensors")
    save_file({**held, "lm_head.weight": held["lm_head.weight"].to(torch.int8)}, folder / "model.safetensors")
    return folder


REFUSALS = {
    "whole numbers": (
        lambda root: of_eight_bits(root / "base2", root / "base"), "lm_head.weight is stored as I8",
    ),
    "another model": (
        lambda root: adapters.base(root / "base2", hidden_size=16, intermediate_size=24),
        "lm_head.weight is 40x32 in one, but 40x16 in base2",
    ),
    "fewer layers": (
        lambda root: adapters.base(root / "base2", num_hidden_layers=1), "base2 has no tensor model.layers.1.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_models_that_do_not_belong_together_are_refused(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the tensor and both shapes, and what to do; nothing is written."""
    make, sentence = REFUSALS[case]
    one = tuned(tmp_path / "one", adapters.base(tmp_path / "base"))
    code = main(["extract-lora", str(one), str(make(tmp_path)), "--rank", "2", "--to", str(tmp_path / "out")])
    told = capsys.readouterr().err
    assert code == 4
    assert sentence in told
    assert "leave it out by exclude (--exclude)" in told
    assert not (tmp_path / "out").exists()


def test_a_tied_model_with_a_whole_embedding(tmp_path: Path) -> None:
    """The head follows the embedding, as in the model."""
    base = adapters.base(tmp_path / "base", **QWEN2 | {"tie_word_embeddings": True})
    one = tuned(tmp_path / "one", base)
    extract(tmp_path, one, base, "--rank", "3")
    made, expected = applied(base, tmp_path / "out"), tiny.read(one)
    expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    for name in made:
        torch.testing.assert_close(made[name], expected[name], rtol=2e-6, atol=2e-6)


def test_from_the_hub_to_the_hub(
    served: LoopbackHub, command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """By ranges, each tensor once; the card names the base, and the recipe beside it makes the same bytes again."""
    base = adapters.base(tmp_path / "base")
    served.add_model("org/x-base", base)
    served.add_model("org/x-tuned", tuned(tmp_path / "tuned", base))
    served.clear_log()
    line = ["extract-lora", "org/x-tuned", "org/x-base", "--rank", "4", "--to", "hf://org/x-lora", "--license", "mit"]
    done = command(*line, cwd=tmp_path, hub=served)
    assert done.returncode == 0, done.stderr
    assert "left out of the matrices" in done.stdout
    reads = [r for r in served.log if r.host == "cdn" and r.method == "GET"]
    assert all(re.fullmatch(r"bytes=\d+-\d+", r.range or "") for r in reads)
    sizes = [len(served.read(f"org/x-{name}", "model.safetensors")) for name in ("base", "tuned")]
    assert sum(r.sent for r in reads) <= sum(sizes)
    card = served.read("org/x-lora", "README.md").decode()
    metadata = yaml.safe_load(card.split("---")[1])
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("org/x-base", "adapter")
    assert (metadata["library_name"], metadata["license"]) == ("peft", "mit")
    (tmp_path / "again.yaml").write_bytes(served.read("org/x-lora", "recipe.yaml"))
    again = command("run", "again.yaml", "--to", "again", cwd=tmp_path, hub=served)
    assert again.returncode == 0, again.stderr
    mine = (tmp_path / "again/adapter_model.safetensors").read_bytes()
    assert mine == served.read("org/x-lora", "adapter_model.safetensors")
