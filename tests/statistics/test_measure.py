"""Statistics are those of the whole model, whatever is kept on the way; killed, the next run goes on."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import adapters
import pytest
import tiny
import torch
import transformers
import yaml
from calls import Command, called
from loopback import Client, LoopbackHub
from merging import merged
from places import ZOO
from safetensors.torch import load_file
from thorough import THOROUGH, thorough_only
from torch import Tensor

from merger.engine.execute import ShardDone
from merger.errors import MergerError, UploadError
from merger.lock.statistics import KINDS, read_statistics, statistic_name
from merger.methods.registry import Statistic
from merger.models.checkpoint import TensorInfo
from merger.models.formats.safetensors import header
from merger.run.options import Options
from merger.statistics.measure import disk_at_once, measure_statistics
from merger.statistics.plan import ARCHITECTURES, Measurement, plan_measurement

SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 3, "vocab_size": 50, "max_position_embeddings": 64, "head_dim": 4, "pad_token_id": None,
    "initializer_range": 0.3,
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "qwen3": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 5},
}
"""What a type is tried with besides."""


def write_model(folder: Path, kind: str = "llama", **changed: Any) -> Any:
    """A small model of this type, drawn; and the folder that holds it."""
    torch.manual_seed(5)
    config = transformers.CONFIG_MAPPING[kind](**{**SIZES, **OTHERS.get(kind, {}), **changed})
    model: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    return model


def planned(folder: Path, kind: Statistic = "gram", blocks: int | None = None, **changed: Any) -> Any:
    """The plan for 24 tokens drawn by chance, in three sequences, and the store."""
    options = Options(to=str(folder.parent / f"{kind}{blocks or ''}"), threads=2, **changed)
    return *plan_measurement(str(folder), kind, "random-tokens", 24, 8, options, blocks), options


def measured(folder: Path, kind: Statistic, blocks: int | None = None) -> tuple[Measurement, dict[str, Tensor]]:
    """What is measured so of a model."""
    plan, store, options = planned(folder, kind, blocks)
    measure_statistics(plan, store, options)
    return plan, held(Path(options.to))


def held(folder: Path) -> dict[str, Tensor]:
    """The numbers in a folder of statistics."""
    return {name: entries for file in sorted(folder.glob("*.safetensors")) for name, entries in load_file(file).items()}


def fed(model: Any, tokens: Tensor) -> dict[str, list[Tensor]]:
    """What each linear layer of the whole model is fed by each sequence, by its weight's name."""
    found: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            note = found.setdefault(f"{name}.weight", []).append
            module.register_forward_pre_hook(lambda _, given, note=note: note(given[0][0].double()))
    with torch.no_grad():
        for row in tokens:
            model(row[None])
    return found


def squares(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """The squared gradients of each sequence's log-likelihood by each weight, by autograd of the whole model."""
    total = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    for row in tokens:
        model.zero_grad()
        logits = model(row[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").backward()
        for name, weight in model.named_parameters():
            total[name] += weight.grad.double() ** 2
    return {name: square / tokens[:, 1:].numel() for name, square in total.items()}


@pytest.mark.parametrize("kind", ARCHITECTURES if THOROUGH else ["llama", "qwen3"])
def test_statistics_are_those_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    """Each type: Gram matrices and magnitudes by hooks on all linear layers, Fisher by autograd, in float64."""
    model = write_model(tmp_path / "model", kind).double()
    plan, grams = measured(tmp_path / "model", "gram")
    tokens = torch.from_numpy(plan.tokens).long()
    inputs = {name: torch.cat(rows) for name, rows in fed(model, tokens).items()}
    if model.config.tie_word_embeddings:
        del inputs["lm_head.weight"]
    assert {statistic_name("gram", name) for name in inputs} == grams.keys()
    _, magnitudes = measured(tmp_path / "model", "activations")
    for name, rows in inputs.items():
        place = statistic_name("gram", name)
        torch.testing.assert_close(grams[place], (rows.T @ rows / 24).float(), rtol=1e-4, atol=1e-5)
        assert torch.equal(grams[place], grams[place].T)
        torch.testing.assert_close(magnitudes[place], rows.abs().mean(0).float(), rtol=1e-4, atol=1e-5)
    for size in (1, 5, 16):
        _, reduced = measured(tmp_path / "model", "gram", size)
        for place, blocks in reduced.items():
            of, width = torch.arange(len(grams[place])) // size, len(grams[place])
            whole = blocks if blocks.dim() == 2 else torch.block_diag(*blocks)[:width, :width]
            expected = grams[place] * (of[:, None] == of if width > size else 1)
            torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-6)
    _, fisher = measured(tmp_path / "model", "fisher")
    expected = squares(model, tokens)
    assert fisher.keys() == expected.keys()
    for name, square in expected.items():
        torch.testing.assert_close(fisher[name], square.float(), rtol=2e-3, atol=1e-4 * float(square.max()))


class Stop:
    """Is told of each file, and kills the run after so many."""

    def __init__(self, after: int) -> None:
        self.made, self._after = list[str](), after

    def __call__(self, event: object) -> None:
        if isinstance(event, ShardDone):
            self.made.append(event.shard.name)
            if len(self.made) > self._after:
                raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["gram", "fisher"])
def test_a_run_that_is_killed_at_any_layer_goes_on(kind: Statistic, tmp_path: Path) -> None:
    """What is finished is not measured again; the files are those of a run that was not killed, with any threads."""
    write_model(tmp_path / "model")
    plan, store, options = planned(tmp_path / "model", kind, max_disk=10**9)
    measure_statistics(plan, store, options)
    lock = read_statistics((tmp_path / kind / "merger.lock.yaml").read_text())
    for last in range(len(plan.shards)) if THOROUGH else (1,):
        options = Options(to=str(tmp_path / f"{kind}-{last}"), threads=1)
        first, then = Stop(last), Stop(len(plan.shards))
        with pytest.raises(KeyboardInterrupt):
            measure_statistics(plan, store, options, first)
        measure_statistics(plan, store, options, then)
        assert len(first.made) == last + 1
        assert sorted(first.made + then.made) == sorted(lock.output)
        assert read_statistics((tmp_path / f"{kind}-{last}" / "merger.lock.yaml").read_text()) == lock
    assert not measure_statistics(plan, store, options).shards


def test_a_run_goes_on_with_the_same_tokens_alone(tmp_path: Path) -> None:
    """Files that were measured on other tokens, all of them or some, are neither taken for these nor replaced."""
    write_model(tmp_path / "model")
    options = Options(to=str(tmp_path / "out"), threads=1)
    first, other = (
        plan_measurement(str(tmp_path / "model"), "gram", "random-tokens", count, 8, options) for count in (24, 32)
    )
    with pytest.raises(KeyboardInterrupt):
        measure_statistics(*first, options, Stop(0))
    with pytest.raises(UploadError, match="finished files of another merge wait"):
        measure_statistics(*other, options)
    measure_statistics(*first, options)
    with pytest.raises(MergerError):
        measure_statistics(*other, options)
    assert read_statistics((tmp_path / "out" / "merger.lock.yaml").read_text()).tokens == 24


RUN = """
import json, os, sys
from merger.run.options import Options
from merger.statistics.measure import measure_statistics
from merger.statistics.plan import plan_measurement
model, kind, to, last = sys.argv[1:]
options = Options(to=to, threads=2)
plan, store = plan_measurement(model, kind, "random-tokens", 1024, 128, options)
made = []
def told(event):
    made.append(event)
    if len(made) > int(last):
        os.kill(os.getpid(), 9)
measure_statistics(plan, store, options, told)
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"peak": peak, "planned": plan.peak_memory}))
"""


@thorough_only
@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_planned_and_does_not_grow_with_layers(kind: Statistic, tmp_path: Path) -> None:
    """At two widths no more than the plan says, and with four times as many layers as much as before."""
    found = {}
    for width, layers in ((256, 2), (768, 2), (768, 8)):
        folder = tmp_path / f"{width}-{layers}"
        more = {"hidden_size": width, "intermediate_size": 3 * width, "head_dim": width // 4, "vocab_size": 8000}
        write_model(folder / "model", num_hidden_layers=layers, max_position_embeddings=512, **more)
        line = [sys.executable, "-c", RUN, str(folder / "model"), kind, str(folder / "out"), "99"]
        done = subprocess.run(line, check=True, capture_output=True, text=True)
        found[width, layers] = json.loads(done.stdout)
        shutil.rmtree(folder)
    assert all(each["peak"] <= each["planned"] for each in found.values()), found
    assert found[768, 8]["peak"] < 1.15 * found[768, 2]["peak"]
    assert found[768, 8]["planned"] < 1.02 * found[768, 2]["planned"]


@thorough_only
@pytest.mark.parametrize("kind", KINDS)
def test_a_process_that_is_killed_goes_on(kind: Statistic, tmp_path: Path) -> None:
    """By SIGKILL at every word that it says, one more each time: in the end the files are those of one run."""
    write_model(tmp_path / "model", max_position_embeddings=128)
    lines = [[sys.executable, "-c", RUN, str(tmp_path / "model"), kind, str(tmp_path / to)] for to in ("one", "two")]
    subprocess.run([*lines[0], "99"], check=True)
    codes = [subprocess.run([*lines[1], str(last)], check=False).returncode for last in range(8)]
    assert codes[0] == -9
    assert codes[-1] == 0
    one, two = (read_statistics((tmp_path / to / "merger.lock.yaml").read_text()) for to in ("one", "two"))
    assert one == two


REFUSED: dict[str, tuple[dict[str, Any], str, int, str]] = {
    "too few tokens": ({"data": "few.txt"}, "few.txt makes", 2, "give more text"),
    "sequences of one token": ({"length": 1}, "predict nothing", 2, "--length 2"),
    "no text": ({"data": "none.jsonl"}, "none.jsonl:2: no text is there", 2, '{"text": "..."}'),
    "no file": ({"data": "gone.txt"}, "gone.txt' is not there", 2, "relative"),
    "no UTF-8": ({"data": "odd.txt"}, "is not UTF-8 text", 2, "UTF-8"),
    "too little memory": ({"max_memory": 10**6}, "of memory with one thread", 5, "--length"),
    "too little disk": ({"max_disk": 10**3}, "of disk at once", 5, "--max-disk"),
    "another architecture": ({"model": "gpt"}, "is a model of type gpt2, which is not measured", 4, "llama"),
    "no model": ({"model": "words"}, "has no safetensors", 3, "transformers"),
}
"""What is asked for, what is said of it, the exit code and the next step."""


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_cannot_be_measured_is_refused(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a sentence, the exit code of its kind and a next step, before a tensor is read."""
    monkeypatch.chdir(tmp_path)
    changed, told, code, hint = REFUSED[wrong]
    write_model(tmp_path / "llama", vocab_size=2048)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ZOO / "base" / name, tmp_path / "llama")
    gpt = tiny.write(tmp_path / "gpt", {"h.0.attn.weight": torch.zeros(2, 2)})
    (gpt / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "words").mkdir()
    for name, held in (("few.txt", b"in the beginning"), ("none.jsonl", b'{"text": "a"}\n{}\n'), ("odd.txt", b"\xff")):
        (tmp_path / name).write_bytes(held)
    asked = {"model": "llama", "data": "random-tokens", **changed}
    options = Options(to="./out", **{key: asked.pop(key) for key in ("max_memory", "max_disk") if key in asked})
    with pytest.raises(MergerError) as caught:
        disk_at_once(
            plan_measurement(f"./{asked['model']}", "gram", asked["data"], 64, asked.get("length", 8), options)[0],
            options,
        )
    (problem,) = caught.value.problems
    assert (caught.value.exit_code, told in problem.what, hint in str(problem.hint)) == (code, True, True), problem


def test_the_command_measures_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of lines of JSON and of plain text the same tokens are the same data; --plan only says what it takes."""
    monkeypatch.chdir(tmp_path)
    text = (ZOO / "kjv" / "heldout.txt").read_text()[:4000]
    Path("texts.txt").write_text(text)
    Path("texts.jsonl").write_text(json.dumps({"text": text}) + "\n")
    words = ["measure", str(ZOO / "kjv"), "--kind", "activations", "--tokens", "256", "--length", "64"]
    said = called([*words, "--data", "texts.txt", "--to", "./out", "--plan"])
    assert (said.code, "256 tokens in 4 sequences of 64" in said.out) == (0, True), said
    assert not Path("out").exists()
    locks = []
    for name in ("texts.txt", "texts.jsonl"):
        assert called([*words, "--data", name, "--to", f"./{name}.out"]).code == 0
        locks.append(read_statistics(Path(f"{name}.out", "merger.lock.yaml").read_text()))
    assert locks[0].identity == locks[1].identity
    assert [(lock.data, lock.tokens, lock.models[0].model) for lock in locks] == [
        ("texts.txt", 256, "kjv"), ("texts.jsonl", 256, "kjv"),
    ]  # fmt: skip
    card = Path("texts.txt.out", "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "license": "apache-2.0", "tags": ["merger", "statistics", "activations"],
    }  # fmt: skip
    assert "| tokens | 256, in sequences of 64 |" in card


@thorough_only
def test_statistics_on_the_hub(served: LoopbackHub, command: Command, tmp_path: Path) -> None:
    """Measured of a model there, published beside it, and named by a recipe at a commit."""
    for name in ("kjv", "python"):
        served.add_model(f"zoo/{name}", ZOO / name)
        words = ("measure", f"zoo/{name}", "--kind", "gram", "--data", "random-tokens", "--tokens", "512")
        made = command(*words, "--length", "64", "--to", f"hf://org/{name}-gram", cwd=tmp_path, hub=served)
        assert made.returncode == 0, made.stderr
    rows = "".join(f"  - {{model: zoo/{name}, statistics: org/{name}-gram}}\n" for name in ("kjv", "python"))
    (tmp_path / "mine.yaml").write_text(f"merge_method: regmean\nmodels:\n{rows}publish: {{license: mit}}\n")
    done = command("run", "mine.yaml", "--to", "hf://org/merged", cwd=tmp_path, hub=served)
    assert done.returncode == 0, done.stderr
    assert "gram of zoo/kjv, measured on 512 tokens of random-tokens" in done.stderr
    again = command("verify", "org/merged", "--all", cwd=tmp_path, hub=served)
    assert again.returncode == 0, again.stdout + again.stderr


def test_a_model_is_measured_with_its_adapter(tmp_path: Path) -> None:
    """As PEFT merges both; and that is what a recipe's model with the adapter is merged by."""
    model, adapter = adapters.base(tmp_path / "model"), adapters.lora(tmp_path / "lora", tmp_path / "model")
    whole = adapters.load(model)
    whole.load_state_dict(adapters.merged(model, adapter))
    options = Options(to=str(tmp_path / "both"), threads=1)
    plan, store = plan_measurement(f"{model}+{adapter}", "fisher", "random-tokens", 24, 8, options)
    measure_statistics(plan, store, options)
    found = held(tmp_path / "both")
    for name, square in squares(whole.double(), torch.from_numpy(plan.tokens).long()).items():
        torch.testing.assert_close(found[name], square.float(), rtol=2e-3, atol=1e-4 * float(square.max()))
    rows = f"[{{model: {model}+{adapter}, statistics: {tmp_path}/both}}]"
    merged(f"merge_method: fisher\nmodels: {rows}\n", tmp_path / "out")
    for name, tensor in adapters.merged(model, adapter).items():
        torch.testing.assert_close(load_file(tmp_path / "out" / "model.safetensors")[name], tensor)
    with pytest.raises(MergerError, match=r"both is of model \+ lora, not of model"):
        merged(f"merge_method: fisher\nmodels: {rows.replace(f'+{adapter}', '')}\n", tmp_path / "other")


LARGE: dict[int | None, tuple[float, float, float]] = {None: (32.8, 4.5, 3.1), 512: (1.8, 3.5, 1.2), 1: (0.0, 3.5, 1.1)}
"""Blocks of an 8B model's Gram matrices: all files, memory with two threads, and disk on the way to the Hub, in GB."""


def large_model(folder: Path) -> Path:
    """The header of a model of 8 B parameters in bfloat16, and holes where its numbers would be."""
    shapes = {"model.embed_tokens": (128_256, 4096), "lm_head": (128_256, 4096), "model.norm": (4096,)}
    layer = {
        "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
        "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14_336, 4096), "mlp.up_proj": (14_336, 4096),
        "mlp.down_proj": (4096, 14_336), "input_layernorm": (4096,), "post_attention_layernorm": (4096,),
    }  # fmt: skip
    shapes |= {f"model.layers.{number}.{name}": shape for number in range(32) for name, shape in layer.items()}
    infos = [TensorInfo(f"{name}.weight", "BF16", shape, "", 0, 2 * math.prod(shape)) for name, shape in shapes.items()]
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        start = file.write(header(infos))
        file.truncate(start + sum(info.nbytes for info in infos))
    config = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256,
              "max_position_embeddings": 8192, "architectures": ["LlamaForCausalLM"]}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_model_of_8_billion_parameters_is_measured_in_16_gb(tmp_path: Path) -> None:
    """By the plan, with whole Gram matrices, with blocks of them and with diagonals; as docs/statistics.md has it."""
    model = large_model(tmp_path / "large")
    for blocks, told in LARGE.items():
        options = Options(to="hf://org/large-gram", threads=2, max_memory=16 * 10**9)
        plan, _ = plan_measurement(str(model), "gram", "random-tokens", 65_536, 512, options, blocks)
        takes = plan.size, plan.peak_memory, disk_at_once(plan, options) + plan.spool
        assert tuple(round(nbytes / 1e9, 1) for nbytes in takes) == told


def send(model: str, temporary: str) -> tuple[int, int, int]:
    """Measure a model onto the Hub: the most bytes of files that lay on this disk meanwhile, as planned, and all."""
    seen, tempfile.tempdir = [0], temporary

    def look(_: object) -> None:
        files = Path(temporary).glob("**/*.safetensors")
        seen.append(sum(path.stat().st_size for path in files if path.exists()))

    options = Options(to="hf://org/gram", threads=2)
    plan, store = plan_measurement(model, "gram", "random-tokens", 24, 8, options)
    measure_statistics(plan, store, options, look)
    return max(seen), disk_at_once(plan, options), plan.size


@thorough_only
def test_statistics_reach_the_hub_a_file_at_a_time(served: LoopbackHub, client: Client, tmp_path: Path) -> None:
    """At no time more of them lie on this disk than the plan says: two of ten; what comes is what a folder has."""
    write_model(tmp_path / "model", num_hidden_layers=9)
    measured(tmp_path / "model", "gram")
    (tmp_path / "temporary").mkdir()
    most, disk, size = client(send, str(tmp_path / "model"), str(tmp_path / "temporary"))
    assert 0 < most <= disk < size / 4
    sent = served.files("org/gram")
    for file in (tmp_path / "gram").glob("*.safetensors"):
        assert sent[file.name] == file.read_bytes()
