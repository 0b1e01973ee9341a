"""Statistics are those of the whole model, whatever is kept on the way; killed, the next run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from thorough import THOROUGH
from torch import Tensor

from merger.engine.execute import ShardDone
from merger.lock.statistics import read_statistics, statistic_name
from merger.methods.registry import Statistic
from merger.run.options import Options
from merger.statistics.measure import measure_statistics
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


def planned(folder: Path, kind: Statistic = "gram", **changed: Any) -> Any:
    """The plan for 24 tokens drawn by chance, in three sequences, and the store."""
    options = Options(to=str(folder.parent / kind), threads=2, **changed)
    return *plan_measurement(str(folder), kind, "random-tokens", 24, 8, options), options


def measured(folder: Path, kind: Statistic) -> tuple[Measurement, dict[str, Tensor]]:
    """What is measured so of a model."""
    plan, store, options = planned(folder, kind)
    measure_statistics(plan, store, options)
    return plan, held(folder.parent / kind)


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
    whole, folder = held(tmp_path / kind), tmp_path / kind
    lock = read_statistics((folder / "merger.lock.yaml").read_text())
    for last in range(len(plan.shards)):
        options = Options(to=str(tmp_path / f"{kind}-{last}"), threads=1)
        first, then = Stop(last), Stop(len(plan.shards))
        with pytest.raises(KeyboardInterrupt):
            measure_statistics(plan, store, options, first)
        measure_statistics(plan, store, options, then)
        assert len(first.made) == last + 1
        assert sorted(first.made + then.made) == sorted(lock.output)
        assert read_statistics((tmp_path / f"{kind}-{last}" / "merger.lock.yaml").read_text()) == lock
    assert not measure_statistics(plan, store, options).shards
    assert whole.keys() == held(tmp_path / f"{kind}-0").keys()
