"""The line over real HTTP: parents read from the loopback Hub, the merge published to it and loaded by transformers."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from calls import WRITER, Command
from loopback import Client, LoopbackHub, Request
from loopback.wire import Answer
from places import ZOO
from thorough import THOROUGH, thorough_only
from torch import Tensor

TASK_ARITHMETIC = """\
# what both fine-tunes learned
merge_method: task_arithmetic
base_model: zoo/base
models:
  - model: zoo/kjv
    parameters: {weight: 0.6}
  - model: zoo/python
    parameters: {weight: 0.5}
publish: {repo: org/both, license: apache-2.0}
"""


@dataclass(frozen=True)
class Run:
    """A command that has ended, and what the Hub saw of it."""

    done: subprocess.CompletedProcess[str]
    log: list[Request]


@pytest.fixture(scope="module")
def published(served: LoopbackHub, command: Command, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The merge of the zoo, published in shards of about a third of a model."""
    for name in ("base", "kjv", "python"):
        served.add_model(f"zoo/{name}", ZOO / name)
    folder = tmp_path_factory.mktemp("work")
    (folder / "mine.yaml").write_text(TASK_ARITHMETIC)
    served.clear_log()
    done = command("run", "mine.yaml", "--shard-size", "1MB", "--json", cwd=folder, hub=served)
    assert done.returncode == 0, done.stderr
    return Run(done, served.log)


def header_of(raw: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    found.pop("__metadata__", None)
    return found


def tensors_of(files: Mapping[str, bytes]) -> dict[str, Tensor]:
    """All tensors of a repo's files, read by the safetensors library."""
    from safetensors.torch import load

    return {
        key: tensor for name, raw in files.items() if name.endswith(".safetensors") for key, tensor in load(raw).items()
    }


# What the child runs


def loaded(repo: str) -> tuple[dict[str, Any], list[float]]:
    """What transformers says about loading the repo, and the logits of a few tokens."""
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(repo, output_loading_info=True)
    with torch.inference_mode():
        logits = model(torch.arange(24).reshape(2, 12)).logits
    return {key: sorted(map(str, value)) for key, value in told.items()}, logits.float().flatten().tolist()


# Line 3: the zoo


def test_only_ranges_of_safetensors_are_read_and_each_byte_once(published: Run, served: LoopbackHub) -> None:
    """No whole file travels: what is read are the headers, and the bytes of tensors, none of them twice."""
    reads = [r for r in published.log if r.host == "cdn" and r.method == "GET"]
    assert reads
    assert all(re.fullmatch(r"bytes=\d+-\d+", r.range or "") and r.status == 206 for r in reads)
    assert not [r for r in published.log if r.host == "hub" and r.method == "GET" and r.path.endswith(".safetensors")]
    headers = tensors = 0
    for name in ("base", "kjv", "python"):
        raw = served.read(f"zoo/{name}", "model.safetensors")
        header = 8 + int.from_bytes(raw[:8], "little")
        headers, tensors = headers + header, tensors + len(raw) - header
    assert sum(r.sent for r in reads) == headers + tensors
    assert not any(r.authorization for r in reads)


def test_neighbouring_tensors_share_requests(published: Run) -> None:
    """A model of 57 tensors is read in far fewer requests than tensors."""
    reads = [r for r in published.log if r.host == "cdn" and r.method == "GET"]
    assert len(reads) < 57


def test_main_has_one_commit_more_with_all_files(published: Run, served: LoopbackHub) -> None:
    """Shards, index, config, tokenizer, card, recipe and lock appear together; the staging branch is gone."""
    commits = served.commits("org/both")
    assert len(commits) == 2
    names = set(served.files("org/both")) - {".gitattributes"}
    shards = {name for name in names if name.endswith(".safetensors")}
    assert len(shards) >= 3
    assert names - shards == {
        "README.md", "config.json", "generation_config.json", "merger.lock.yaml", "merger.measured.json",
        "model.safetensors.index.json", "pictures/lineage.png", "pictures/lineage.svg", "pictures/movement.png",
        "recipe.yaml", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert set(commits[0].files) == names
    assert list(served.branches("org/both")) == ["main"]
    told = json.loads(published.done.stdout)
    assert (told["where"], told["commit"]) == (f"{served.url}/org/both", commits[0].sha)


def test_side_files_and_recipe_are_those_of_the_parents_and_the_author(published: Run, served: LoopbackHub) -> None:
    """The tokenizer comes from the base model byte by byte, the recipe from its file; the card names the parents."""
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert served.read("org/both", name) == (ZOO / "base" / name).read_bytes()
    assert served.read("org/both", "recipe.yaml").decode() == TASK_ARITHMETIC
    card, lock = (served.read("org/both", name).decode() for name in ("README.md", "merger.lock.yaml"))
    for name in ("base", "kjv", "python"):
        assert f"zoo/{name}" in card
        assert served.head(f"zoo/{name}") in lock
    assert "base_model_relation: merge" in card


def test_nothing_that_is_printed_or_published_holds_the_token(published: Run, served: LoopbackHub) -> None:
    """Nor a signed address, which is as good as one."""
    texts = [published.done.stdout, published.done.stderr]
    texts += [
        raw.decode("utf-8", "replace")
        for name, raw in served.files("org/both").items()
        if not name.endswith(".safetensors")
    ]
    assert not [text for text in texts if WRITER in text or "Signature=" in text]


def expected() -> dict[str, Tensor]:
    """Task arithmetic in float64."""
    base, kjv, python = (tiny.read(ZOO / name) for name in ("base", "kjv", "python"))
    made = {}
    for name, tensor in base.items():
        start = tensor.double()
        made[name] = start + 0.6 * (kjv[name].double() - start) + 0.5 * (python[name].double() - start)
    return made


def test_the_published_repo_loads_in_transformers_and_computes_the_merge(
    published: Run, served: LoopbackHub, client: Client, tmp_path: Path
) -> None:
    """No key is missing or unexpected, and its logits are those of the merge computed with torch alone."""
    told, logits = client(loaded, "org/both")
    assert {key: value for key, value in told.items() if value} == {}
    reference = tiny.write(tmp_path / "reference", {name: tensor.bfloat16() for name, tensor in expected().items()})
    (reference / "config.json").write_bytes((ZOO / "base/config.json").read_bytes())
    assert logits == pytest.approx(client(loaded, str(reference))[1], abs=0.06, rel=0.02)
    assert logits != pytest.approx(client(loaded, "zoo/kjv")[1], abs=0.06, rel=0.02)


def steps(found: Tensor, wanted: Tensor) -> Tensor:
    """For each entry, how many steps of the dtype lie between it and the float64 value, rounded here."""
    bits = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}[found.dtype]

    def order(tensor: Tensor) -> Tensor:
        """Bit patterns as integers that rise with the numbers."""
        raw = tensor.contiguous().view(bits).long()
        return torch.where(raw < 0, torch.iinfo(bits).min - raw, raw)

    return (order(found) - order(wanted.to(found.dtype))).abs()


def test_each_tensor_of_the_published_merge_is_exact_to_one_rounding(published: Run, served: LoopbackHub) -> None:
    """Each entry is the float64 result to within one step of bfloat16; where base and deltas cancel, of float32."""
    found, wanted = tensors_of(served.files("org/both")), expected()
    base = tiny.read(ZOO / "base")
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        off = (tensor.double() - wanted[name]).abs() > 2.0**-22 * base[name].double().abs()
        assert not ((steps(tensor, wanted[name]) > 1) & off).any(), name


def test_a_card_that_the_hub_refuses_is_told_before_a_tensor_is_read(
    served: LoopbackHub, published: Run, command: Command, tmp_path: Path
) -> None:
    """Not after hours of work: the Hub is asked about it first, and its own words are passed on."""
    served.fail(
        lambda request: request.path.endswith("/api/validate-yaml"),
        spoil=lambda _: Answer(400, {}, b'{"errors": [{"message": "no such card"}], "warnings": []}'),
    )
    (tmp_path / "mine.yaml").write_text(TASK_ARITHMETIC.replace("org/both", "org/carded"))
    served.clear_log()
    done = command("run", "mine.yaml", cwd=tmp_path, hub=served)
    assert (done.returncode, "the Hub refuses the card of org/carded: no such card" in done.stderr) == (6, True)
    assert bytes_read(served) == headers(served)


def test_a_template_that_breaks_is_told_before_a_tensor_is_read(
    served: LoopbackHub, published: Run, command: Command, tmp_path: Path
) -> None:
    """As soon as the models are planned, and before a repo is made for the result."""
    (tmp_path / "own.md.j2").write_text("\n{{ nobody }}")
    recipe = TASK_ARITHMETIC.replace("org/both", "org/uncarded").replace("licens", "template: own.md.j2, licens")
    (tmp_path / "mine.yaml").write_text(recipe)
    served.clear_log()
    done = command("run", "mine.yaml", cwd=tmp_path, hub=served)
    assert done.returncode == 2
    assert "own.md.j2:2: the card's template cannot be rendered: 'nobody' is undefined" in done.stderr
    assert bytes_read(served) == headers(served)
    assert not served.exists("org/uncarded")


# A parent's repo that was renamed


@pytest.fixture
def renamed(served: LoopbackHub, published: Run, tmp_path: Path) -> Iterator[Path]:
    """A folder with a recipe that calls a parent by its former name."""
    served.add_model("old/kjv", ZOO / "kjv")
    served.rename("old/kjv", "new/kjv")
    (tmp_path / "mine.yaml").write_text(TASK_ARITHMETIC.replace("zoo/kjv", "old/kjv").replace("org/both", "org/moved"))
    yield tmp_path
    for name in ("old/kjv", "new/kjv", "org/moved"):
        served.world.repos.pop(name, None)
    served.world.renamed.clear()


def test_a_renamed_parent_is_read_and_its_new_name_is_told(
    served: LoopbackHub, renamed: Path, command: Command
) -> None:
    """In plan, lock and card; the plan's hash is that of the recipe with the new name, for the commit is the same."""
    planned = command("plan", "mine.yaml", cwd=renamed, hub=served)
    assert (planned.returncode, "warning: old/kjv is now new/kjv" in planned.stdout) == (0, True), planned.stderr
    done = command("run", "mine.yaml", "--json", cwd=renamed, hub=served)
    assert done.returncode == 0, done.stderr
    lock, card = (served.read("org/moved", name).decode() for name in ("merger.lock.yaml", "README.md"))
    assert "- model: old/kjv\n  now: new/kjv\n" in lock
    assert "\n- new/kjv\n" in card.split("---\n")[1]
    assert tensors_of(served.files("org/moved")).keys() == expected().keys()
    (renamed / "new.yaml").write_text((renamed / "mine.yaml").read_text().replace("old/kjv", "new/kjv"))
    again = command("run", "new.yaml", "--json", cwd=renamed, hub=served)
    assert json.loads(again.stdout)["new"] is False, again.stderr


@thorough_only
@pytest.mark.parametrize("taken", [False, True] if THOROUGH else [False])
def test_a_lock_goes_on_working_when_the_former_name_does_not(
    taken: bool, served: LoopbackHub, renamed: Path, command: Command
) -> None:
    """The Hub sends on only until somebody takes the name; what lies there then is not the locked model."""
    done = command("run", "mine.yaml", cwd=renamed, hub=served)
    assert done.returncode == 0, done.stderr
    lock = served.read("org/moved", "merger.lock.yaml")
    served.world.renamed.clear()
    if taken:
        served.add_model("old/kjv", ZOO / "python")
    for name in ("mine.lock.yaml", "other.lock.yaml"):  # beside the recipe, and by itself
        (renamed / name).write_bytes(lock)
    for name in ("mine.yaml", "other.lock.yaml"):
        again = command("run", name, "--to", "hf://org/moved", "--json", cwd=renamed, hub=served)
        assert (again.returncode, json.loads(again.stdout)["new"]) == (0, False), again.stderr
    checked = command("verify", "org/moved", cwd=renamed, hub=served)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    (renamed / "alone.yaml").write_bytes((renamed / "mine.yaml").read_bytes())
    alone = command("plan", "alone.yaml", cwd=renamed, hub=served)
    assert (alone.returncode, "now new/kjv" in alone.stdout) == (0 if taken else 3, False)


# A pull request in somebody else's repo


def test_a_pull_request_in_a_strangers_repo_can_be_verified(
    served: LoopbackHub, published: Run, command: Command, tmp_path: Path
) -> None:
    """As its description says; and the same run, after it was merged, finds its result there."""
    served.add_model("carol/theirs", {"README.md": b"# mine\n"})
    recipe = TASK_ARITHMETIC.replace("repo: org/both", "repo: carol/theirs, create_pr: true")
    (tmp_path / "mine.yaml").write_text(recipe)
    done = command("run", "mine.yaml", "--shard-size", "1MB", cwd=tmp_path, hub=served)
    assert (done.returncode, f"{served.url}/carol/theirs/discussions/1" in done.stdout) == (0, True), done.stderr
    assert served.files("carol/theirs").keys() == {"README.md"}
    checked = command("verify", "hf://carol/theirs@refs/pr/1", cwd=tmp_path, hub=served)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    served.commit("carol/theirs", served.files("carol/theirs", "refs/pr/1"), "Their words (#1)")
    again = command("run", "mine.yaml", "--shard-size", "1MB", cwd=tmp_path, hub=served)
    assert (again.returncode, "nothing to do: it is already" in again.stdout) == (0, True), again.stderr


def bytes_read(served: LoopbackHub) -> int:
    """How many bytes of models were sent."""
    return sum(r.sent for r in served.log if r.host == "cdn")


def headers(served: LoopbackHub) -> int:
    """How many bytes the zoo's headers are."""
    raws = [served.read(f"zoo/{name}", "model.safetensors")[:8] for name in ("base", "kjv", "python")]
    return sum(8 + int.from_bytes(raw, "little") for raw in raws)


# Line 4: a recipe of the field, exactly as it stands

NEURAL_HERMES = """\
slices:
  - sources:
      - model: OpenPipe/mistral-ft-optimized-1218
        layer_range: [0, 32]
      - model: mlabonne/NeuralHermes-2.5-Mistral-7B
        layer_range: [0, 32]
    merge_method: slerp
    base_model: OpenPipe/mistral-ft-optimized-1218
    parameters:
      t:
        - filter: self_attn
          value: [0, 0.5, 0.3, 0.7, 1]
        - filter: mlp
          value: [1, 0.5, 0.7, 0.3, 0]
        - value: 0.5
"""
FIRST, SECOND = "OpenPipe/mistral-ft-optimized-1218", "mlabonne/NeuralHermes-2.5-Mistral-7B"
LAYERS = 32


@pytest.fixture(scope="module")
def field(served: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both parents on the Hub, one of them in several files, and a folder with the recipe."""
    root = tmp_path_factory.mktemp("field")
    served.add_model(FIRST, tiny.model(root / "first", seed=1, layers=LAYERS))
    served.add_model(SECOND, tiny.model(root / "second", seed=2, files=3, layers=LAYERS))
    (root / "neural.yaml").write_text(NEURAL_HERMES)
    return root


@pytest.fixture(scope="module")
def slerped(field: Path, served: LoopbackHub, command: Command) -> dict[str, Tensor]:
    """The tensors that the recipe makes."""
    done = command("run", "neural.yaml", "--to", "./out", cwd=field, hub=served)
    assert done.returncode == 0, done.stderr
    return tiny.read(field / "out")


def gradient(values: list[float], position: float) -> float:
    """The value between the two that stand before and after the position."""
    place = position * (len(values) - 1)
    before = min(int(place), len(values) - 2)
    return values[before] + (place - before) * (values[before + 1] - values[before])


def t_of(name: str) -> float:
    """The recipe's t for a tensor of the output."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    position = int(layer[1]) / (LAYERS - 1) if layer else 0.0
    if "self_attn" in name:
        return gradient([0, 0.5, 0.3, 0.7, 1], position)
    return gradient([1, 0.5, 0.7, 0.3, 0], position) if "mlp" in name else 0.5


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The definition, in float64."""
    a, b = a.double(), b.double()
    cosine = (a.flatten() @ b.flatten()) / (a.norm() * b.norm())
    assert abs(cosine) < 0.9995
    omega = torch.arccos(cosine)
    return (torch.sin((1 - t) * omega) * a + torch.sin(t * omega) * b) / torch.sin(omega)


@pytest.mark.parametrize("step", ["check", "plan"])
def test_the_recipe_of_the_field_is_well_formed_and_planned(
    step: str, field: Path, served: LoopbackHub, command: Command
) -> None:
    """`check` and `plan` agree to it without a word of complaint, and read no tensor."""
    served.clear_log()
    done = command(step, "neural.yaml", cwd=field, hub=served)
    assert (done.returncode, done.stderr) == (0, "")
    headers = sum(8 + int.from_bytes(raw[:8], "little") for raw in weights(served).values())
    assert sum(r.sent for r in served.log if r.host == "cdn") == (headers if step == "plan" else 0)


def weights(hub: LoopbackHub) -> dict[str, bytes]:
    """The safetensors files of both parents."""
    files = {f"{repo}/{name}": raw for repo in (FIRST, SECOND) for name, raw in hub.files(repo).items()}
    return {name: raw for name, raw in files.items() if name.endswith(".safetensors")}


def test_the_recipe_of_the_field_makes_slerp_to_one_rounding(slerped: dict[str, Tensor], field: Path) -> None:
    """Every output tensor is the float64 arc at its own t, to within one step of its dtype, for every entry."""
    first, second = tiny.read(field / "first"), tiny.read(field / "second")
    assert slerped.keys() == first.keys()
    off = {name: int(steps(slerped[name], slerp(first[name], second[name], t_of(name))).max()) for name in first}
    assert {name: count for name, count in off.items() if count > 1} == {}
    assert {slerped[name].dtype for name in slerped} == {torch.bfloat16}


def test_where_t_is_nought_or_one_a_parent_comes_out_bit_for_bit(slerped: dict[str, Tensor], field: Path) -> None:
    """The first layer's attention and the last one's MLP are the base model's; the other ends are the other model's."""
    first, second = tiny.read(field / "first"), tiny.read(field / "second")
    last = LAYERS - 1
    for model, layer, part in [
        (first, 0, "self_attn"),
        (second, last, "self_attn"),
        (second, 0, "mlp"),
        (first, last, "mlp"),
    ]:
        names = [name for name in slerped if name.startswith(f"model.layers.{layer}.{part}.")]
        assert len(names) >= 3
        assert all(torch.equal(slerped[name], model[name]) for name in names)
