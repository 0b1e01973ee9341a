"""The line on systems without what only POSIX has: check, plan, merge, verify, adapters, GGUF, and on after a kill.

On Linux a machine is made that lacks all of it (elsewhere); on others this is how it is. Not here: the numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pytest
from calls import called
from elsewhere import elsewhere
from places import ROOT
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from merger import system
from merger.models.gguf.tokens import SPLITS
from merger.safety.apart import BeyondError, Bounds, call
from merger.stores.ports import in_folder
from merger.stores.scratch import Scratch, sweep

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "float32",
}  # fmt: skip
SHAPES = {
    "input_layernorm": (64,), "mlp.down_proj": (64, 96), "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64),
    "post_attention_layernorm": (64,), "self_attn.k_proj": (32, 64), "self_attn.o_proj": (64, 64),
    "self_attn.q_proj": (64, 64), "self_attn.v_proj": (32, 64),
}  # fmt: skip
RECIPE = """\
merge_method: ties
base_model: ./base
models: [{model: ./one, parameters: {weight: 0.6, density: 0.5}}, {model: ./two+./lora, parameters: {weight: 0.5}}]
publish: {license: apache-2.0}
"""
DIES = """
import os, sys
from elsewhere import elsewhere
from merger.cli.commands import main
from merger.engine import execute

left, real = 2, execute._shard
def dying(*arguments):
    global left
    for event in real(*arguments):
        if isinstance(event, execute.ShardDone):
            left -= 1
        elif left == 0:
            os._exit(9)
        yield event
execute._shard = dying
with elsewhere():
    main(sys.argv[1:])
"""
"""The command in a process that ends, without a word, in the midst of its third shard."""


def model(folder: Path, seed: int) -> None:
    """A small Llama with a tokenizer, without torch."""
    draw = np.random.default_rng(seed)
    shapes = {f"model.layers.{layer}.{role}.weight": shape for layer in range(2) for role, shape in SHAPES.items()}
    shapes |= {"model.embed_tokens.weight": (64, 64), "model.norm.weight": (64,), "lm_head.weight": (64, 64)}
    save(folder / "model.safetensors", draw, shapes)
    (folder / "config.json").write_text(json.dumps(CONFIG), "utf-8")
    tokens = ["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"]
    its = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    pattern = next(pattern for pattern, name in SPLITS.items() if name == "qwen2")
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    its.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    its.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}', "utf-8")


def adapter(folder: Path) -> None:
    """As PEFT saves one; an expression of its is tried in a process of its own."""
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {f"{module}.lora_A.weight": (4, 64), f"{module}.lora_B.weight": (64, 4)}
    save(folder / "adapter_model.safetensors", np.random.default_rng(9), shapes)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {"(q|k)_pro+j": 4}}
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")


def save(file: Path, draw: np.random.Generator, shapes: dict[str, tuple[int, ...]]) -> None:
    """Random tensors of these shapes."""
    file.parent.mkdir()
    save_file({name: draw.normal(0.02, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}, file)


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, two others, an adapter and a recipe."""
    root = tmp_path_factory.mktemp("elsewhere")
    for seed, name in enumerate(("base", "one", "two")):
        model(root / name, seed)
    adapter(root / "lora")
    (root / "mine.yaml").write_text(RECIPE, "utf-8")
    return root


@pytest.fixture(scope="module")
def undisturbed(parents: Path) -> dict[str, dict[str, str]]:
    """What is made where everything is there: the digests of the result and of its GGUF file."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(parents)
        return make("here", [])


@pytest.fixture
def there() -> Iterator[None]:
    """This test runs on such a machine."""
    with elsewhere():
        yield


def run(to: str) -> list[str]:
    """The line that merges into several files."""
    return ["run", "mine.yaml", "--to", to, "--shard-size", "60kB"]


def make(folder: str, before: list[list[str]]) -> dict[str, dict[str, str]]:
    """Merge, prove and convert, after some lines; the digests of what lies there, but of cards and locks with times."""
    lines = [*before, run(f"./{folder}/out"), ["verify", f"./{folder}/out"]]
    if find_spec("gguf"):
        lines.append(["convert", f"./{folder}/out", "--to", f"./{folder}/gguf", "--gguf", "Q8_0"])
    for line in lines:
        said = called(line)
        assert said.code == 0, said.err
    return {made.name: digests(made) for made in Path(folder).iterdir()}


def digests(folder: Path) -> dict[str, str]:
    """Of all files that hold no time."""
    files = sorted(file for pattern in ("*.safetensors", "*.gguf", "*.json") for file in folder.glob(pattern))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.usefixtures("there")
def test_the_whole_line_makes_the_same_bytes(
    parents: Path, undisturbed: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where everything is there; of a model with an adapter and, where gguf is installed, GGUF; nothing is left."""
    monkeypatch.chdir(parents)
    made = make("there", [["check", "mine.yaml"], ["plan", "mine.yaml"]])
    assert len(made["out"]) > 9
    assert made == undisturbed


def test_a_killed_run_goes_on_from_its_finished_shards(
    parents: Path, undisturbed: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it held went with its process."""
    monkeypatch.chdir(parents)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    line = [sys.executable, "-c", DIES, *run("./killed")]
    environment = {**os.environ, "PYTHONPATH": paths}
    if hasattr(os, "fork"):
        killed = forks.run(line, env=environment)
    else:
        killed = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == 9, killed.stderr
    with elsewhere():
        again = called(run("./killed"))
    assert (again.code, "2 of " in again.err) == (0, True), again.err
    assert digests(parents / "killed") == undisturbed["out"]


@pytest.mark.usefixtures("there")
def test_who_holds_a_file_alone_and_who_shares_it(tmp_path: Path) -> None:
    """As flock has it: nobody beside one who is alone, many who share; what is let go another may have."""
    first, second, third = (system.FileLock(tmp_path / "mark") for _ in range(3))
    assert (first.take(), second.take(), second.take(shared=True)) == (True, False, False)
    assert (first.take(shared=True), second.take(shared=True), third.take()) == (True, True, False)
    first.close()
    second.close()
    assert third.take()
    third.remove()
    assert not (tmp_path / "mark").exists()


@pytest.mark.usefixtures("there")
def test_folders_of_killed_runs_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And none of a run that lives."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "merger-dead.scratch").mkdir()
    (tmp_path / "merger-dead.scratch" / "half").write_bytes(b"a shard")
    own = Scratch()
    mine = own.folder()
    sweep()
    assert list(tmp_path.iterdir()) == [mine]
    own.close()
    assert list(tmp_path.iterdir()) == []


def asleep(argument: Any) -> None:
    """Work that never ends."""
    import time

    time.sleep(argument)


@pytest.mark.usefixtures("there")
def test_work_of_its_own_process_is_ended_by_the_clock() -> None:
    """The limit that every system has."""
    with pytest.raises(BeyondError, match="takes more than 3 s"):
        call(f"{__name__}:asleep", 1_000_000, Bounds(wait=0.3))


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize(
    ("name", "may"),
    [
        ("2_Dense/model.safetensors", True),
        ("con_fig.json", True),
        (r"..\..\evil.json", False),
        ("C:evil.json", False),
        ("a?.json", False),
        ("folder./x.json", False),
        ("a/NUL.txt", False),
        ("com1", False),
        ("trailing ", False),
    ],
)
@pytest.mark.skipif(sys.platform == "darwin", reason="macOS can call a file all of this")
def test_what_windows_calls_no_file_is_refused(name: str, may: bool, tmp_path: Path) -> None:
    """Before it leads out of the folder, or to a device."""
    if may:
        assert in_folder(tmp_path, name).parent.is_dir()
    else:
        with pytest.raises(OSError, match="here no file can be called"):
            in_folder(tmp_path, name)


def test_every_plain_form_is_told() -> None:
    """`merger doctor` says them."""
    with elsewhere():
        plain = list(system.plain_forms())
    assert len(plain) == (6 if sys.platform != "darwin" else 2)
    if sys.platform == "linux":
        assert list(system.plain_forms()) == []
