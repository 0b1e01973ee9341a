"""Adapters merged with each other: the result is an adapter that PEFT loads, and changes its model as it should."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import adapters
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from merger.cli.commands import main
from merger.methods.registry import methods

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

Deltas = Mapping[str, Tensor]


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A model and two adapters of it: of ranks 4 and 3, the second one without the MLP, but with the embedding."""
    root = tmp_path_factory.mktemp("trio")
    base = adapters.base(root / "base")
    one = adapters.lora(root / "one", base, 1)
    other = adapters.lora(
        root / "other",
        base,
        2,
        r=3,
        lora_alpha=9,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "embed_tokens"],
    )
    return [base, one, other]


def deltas(base: Path, adapter: Path) -> Deltas:
    """What an adapter adds to the model's matrices, by PEFT: the tensors that it changes."""
    from peft import PeftModel

    plain = {name: tensor.clone() for name, tensor in adapters.load(base).state_dict().items()}
    found = PeftModel.from_pretrained(adapters.load(base), str(adapter)).merge_and_unload().state_dict()
    changed = {name: tensor - plain[name] for name, tensor in found.items()}
    return {name: tensor for name, tensor in changed.items() if tensor.abs().max() > 0}


def merge(folder: Path, method: str, ones: Sequence[Path], parameters: str = "{}", more: str = "") -> Path:
    """Merge adapters; where the result lies."""
    listed = "".join(f"  - model: {one}\n    parameters: {{weight: {0.7 - 0.4 * n}}}\n" for n, one in enumerate(ones))
    if "weight" not in [param.name for param in methods()[method].params]:
        listed = "".join(f"  - model: {one}\n" for one in ones)
    folder.mkdir(exist_ok=True)
    text = f"merge_method: {method}\nadapters:\n{listed}parameters: {parameters}\ndtype: float32\n{more}"
    (folder / "mine.yaml").write_text(text)
    assert main(["run", str(folder / "mine.yaml"), "--to", str(folder / "out"), "--quiet", "--force"]) == 0
    return folder / "out"


def zeros_for(found: Deltas, names: Sequence[str], like: Deltas) -> list[Tensor]:
    return [found.get(name, torch.zeros_like(like[name])) for name in names]


def close(found: Deltas, expected: Deltas, tolerance: float = 2e-6) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert (tensor - expected[name]).norm() <= tolerance * expected[name].norm() + 1e-6, name


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_a_sum_of_adapters_is_lossless(method: str, trio: list[Path], tmp_path: Path) -> None:
    """Without a rank the result has that of all together: it adds what they add, each times its weight."""
    base, *ones = trio
    parameters = "{normalize: false}"
    out = merge(tmp_path, method, ones, parameters)
    one, other = (deltas(base, path) for path in ones)
    expected = {name: 0.7 * one.get(name, 0.0) + 0.3 * other.get(name, torch.zeros(())) for name in {**one, **other}}
    close(deltas(base, out), expected)


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_peft_makes_the_same_sum(kind: str, trio: list[Path], tmp_path: Path) -> None:
    """Its add_weighted_adapter by "cat" is ours without a rank, by "svd" ours with one."""
    from peft import PeftModel

    base, one, _ = trio
    other = adapters.lora(tmp_path / "other", base, 3, r=5)
    model = PeftModel.from_pretrained(adapters.load(base), str(one), adapter_name="one")
    model.load_adapter(str(other), adapter_name="other")
    model.add_weighted_adapter(
        ["one", "other"], [0.7, 0.3], "both", combination_type=kind, **({"svd_rank": 6} if kind == "svd" else {})
    )
    model.set_adapter("both")
    merged, plain = model.merge_and_unload().state_dict(), adapters.load(base).state_dict()
    expected = {name: tensor - plain[name] for name, tensor in merged.items() if not torch.equal(tensor, plain[name])}
    more = "lora: {rank: 6}\n" if kind == "svd" else ""
    close(deltas(base, merge(tmp_path, "linear", [one, other], "{normalize: false}", more)), expected)


def test_peft_makes_the_same_of_ties_where_all_weigh_one(trio: list[Path], tmp_path: Path) -> None:
    """Its "ties_svd" elects by unweighted numbers and divides by how many agree: the same where each weighs 1."""
    from peft import PeftModel

    base, one, _ = trio
    other = adapters.lora(tmp_path / "other", base, 3)
    model = PeftModel.from_pretrained(adapters.load(base), str(one), adapter_name="one")
    model.load_adapter(str(other), adapter_name="other")
    model.add_weighted_adapter(
        ["one", "other"], [1.0, 1.0], "both", combination_type="ties_svd", svd_rank=8, density=0.4
    )
    model.set_adapter("both")
    merged, plain = model.merge_and_unload().state_dict(), adapters.load(base).state_dict()
    expected = {name: tensor - plain[name] for name, tensor in merged.items() if not torch.equal(tensor, plain[name])}
    (tmp_path / "mine.yaml").write_text(
        f"merge_method: ties\nadapters: [{{model: {one}}}, {{model: {other}}}]\nparameters: {{density: 0.4}}\n"
        "dtype: float32\nlora: {rank: 8}\n"
    )
    assert main(["run", str(tmp_path / "mine.yaml"), "--to", str(tmp_path / "out"), "--quiet"]) == 0
    close(deltas(base, tmp_path / "out"), expected, 5e-5)


METHODS = {
    "ties": "{density: 0.5}", "dare_ties": "{density: 0.5}", "dare_linear": "{density: 0.5}", "knots": "{density: 0.5}",
    "magmax": "{}", "tsvm": "{}", "model_stock": "{}", "breadcrumbs": "{density: 0.8}",
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_method_merges_what_the_adapters_add(method: str, trio: list[Path], tmp_path: Path) -> None:
    """At full rank the result adds what the method makes of the deltas as matrices."""
    base, *ones = trio
    found = deltas(base, merge(tmp_path, method, ones, METHODS[method], "lora: {rank: 999}\nseed: 5\n"))
    one, other = (deltas(base, path) for path in ones)
    table = methods()[method]
    given: dict[str, Any] = (
        {"density": float(METHODS[method].split(":")[1].strip(" }"))} if "density" in METHODS[method] else {}
    )
    if table.param("weight"):
        given["weight"] = [0.7, 0.3]
    for name in {**one, **other}:
        like = one.get(name, other.get(name))
        assert like is not None
        parts = [of.get(name, torch.zeros_like(like)) for of in (one, other)]
        if name == "model.embed_tokens.weight":
            parts = [part.T.contiguous() for part in parts]
        if table.random:
            from merger.methods.steps.random import Rng

            given["rng"] = Rng(5, name.removesuffix(".weight"))
        expected = table.function(parts, **given)
        if name == "model.embed_tokens.weight":
            expected = expected.T
        mine = found.get(name, torch.zeros_like(expected))
        if method in ("ties", "knots", "breadcrumbs"):  # an entry at the threshold may fall on either side of it
            assert (mine - expected).norm() < 0.1 * expected.norm() + 1e-6
        else:
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=2e-5)


def test_in_core_space_ties_loses_nothing_to_the_rank(trio: list[Path], tmp_path: Path) -> None:
    """The result has the rank of all adapters together, and is TIES of their cores."""
    _, *ones = trio
    out = merge(tmp_path, "ties", ones, "{density: 0.5}", "lora: {core: true}\n")
    config = json.loads((out / "adapter_config.json").read_text())
    held = load_file(out / "adapter_model.safetensors")
    assert config["r"] == 7
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    found = held[f"{name}.lora_B.weight"].double() @ held[f"{name}.lora_A.weight"].double()
    parts = [load_file(one / "adapter_model.safetensors") for one in ones]
    bs = [part[f"{name}.lora_B.weight"].double() * scale for part, scale in zip(parts, (1.5, 3.0), strict=True)]
    as_ = [part[f"{name}.lora_A.weight"].double() for part in parts]
    rows, columns = torch.linalg.svd(torch.cat(bs, 1))[0][:, :7], torch.linalg.svd(torch.cat(as_).T)[0][:, :7]
    rows, columns = (basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign() for basis in (rows, columns))
    cores = [(rows.T @ b @ a @ columns).float() for b, a in zip(bs, as_, strict=True)]
    expected = rows @ methods()["ties"].function(cores, weight=[0.7, 0.3], density=0.5).double() @ columns.T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_rank_is_as_asked_and_the_config_says_where_it_is_less(trio: list[Path], tmp_path: Path) -> None:
    """The config names modules by their last names, and scales so that B A counts once, or as alpha says."""
    base, *ones = trio
    config = json.loads(
        (merge(tmp_path, "linear", ones, "{}", "lora: {rank: 4, alpha: 2}\n") / "adapter_config.json").read_text()
    )
    assert (config["r"], config["lora_alpha"]) == (4, 2)
    assert set(config["target_modules"]) == {*adapters.ALL_LINEAR, "embed_tokens"}
    assert set(config["rank_pattern"].values()) <= {3}
    assert config["base_model_name_or_path"] == "base"
    one, other = (deltas(base, path) for path in ones)
    found = deltas(base, tmp_path / "out")
    assert found.keys() == {**one, **other}.keys()


def test_settings_may_follow_modules_and_layers(trio: list[Path], tmp_path: Path) -> None:
    """Filters see the tensor that a module adds to, gradients its layer."""
    base, one, _ = trio
    rules = "{normalize: false, weight: [{value: 0, filter: mlp}, {value: [1, 3]}]}"
    (tmp_path / "mine.yaml").write_text(
        f"merge_method: linear\nadapters: [{{model: {one}}}]\nparameters: {rules}\ndtype: float32\n"
    )
    assert main(["run", str(tmp_path / "mine.yaml"), "--to", str(tmp_path / "out"), "--quiet"]) == 0
    found, plain = deltas(base, tmp_path / "out"), deltas(base, one)
    close(
        found,
        {name: (3 if ".layers.1." in name else 1) * tensor for name, tensor in plain.items() if "mlp" not in name},
    )


def test_two_runs_make_the_same_bytes(trio: list[Path], tmp_path: Path) -> None:
    """With one thread and with several."""
    _, *ones = trio
    made = []
    for threads in ("1", "3"):
        folder = tmp_path / threads
        folder.mkdir()
        listed = ", ".join(f"{{model: {one}}}" for one in ones)
        (folder / "mine.yaml").write_text(
            f"merge_method: dare_ties\nadapters: [{listed}]\nparameters: {{density: 0.5}}\n"
        )
        assert (
            main(["run", str(folder / "mine.yaml"), "--to", str(folder / "out"), "--quiet", "--threads", threads]) == 0
        )
        made.append((folder / "out/adapter_model.safetensors").read_bytes())
    assert made[0] == made[1]


def test_model_and_card_files_are_an_adapters(trio: list[Path], tmp_path: Path) -> None:
    """No config.json, no tokenizer: the adapter's config, tensors, card, recipe and lock."""
    _, *ones = trio
    out = merge(tmp_path, "linear", ones)
    assert {path.name for path in out.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "merger.lock.yaml", "recipe.yaml",
        "merger.measured.json", "pictures",
    }  # fmt: skip
