"""What a recipe has measured on the way is planned with it, measured once, reused, and never for a stranger."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from calls import called
from places import ZOO
from safetensors.torch import load_file
from test_measure import Stop, fed, planned, write_model
from thorough import THOROUGH, thorough_only
from torch import Tensor

import merger
from merger.errors import MergerError
from merger.run.options import Options
from merger.run.prepare import plan
from merger.statistics import plan as measuring
from merger.statistics.kept import find_kept, measure_awaited
from merger.statistics.measure import measure_statistics
from merger.statistics.plan import plan_measurement
from space.work.admission import check

ROW = "{{model: ./{name}, statistics: {{measure: {data}, tokens: 24, length: 8{more}}}}}"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two small models in a folder that is worked in, and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, seed in (("one", 0.3), ("two", 0.2)):
        write_model(tmp_path / name, initializer_range=seed, num_hidden_layers=2)
    return tmp_path


def recipe(data: str = "random-tokens", method: str = "regmean", more: str = "") -> str:
    """A merge of both, each measured on the way."""
    rows = "".join(f"  - {ROW.format(name=name, data=data, more=more)}\n" for name in ("one", "two"))
    return f"merge_method: {method}\nmodels:\n{rows}publish: {{license: mit}}\n"


def kept(here: Path) -> dict[str, int]:
    """The files that are kept, with the times of their writing."""
    return {path.parent.name + path.name: path.stat().st_mtime_ns for path in here.glob("cache/merger/statistics/*/*")}


def contents(here: Path) -> dict[str, bytes]:
    """The files that are kept, and what they hold."""
    return {str(path): path.read_bytes() for path in here.glob("cache/merger/statistics/*/*")}


@pytest.mark.parametrize(("method", "kind"), [("regmean", "gram"), *([("fisher", "fisher")] if THOROUGH else [])])
def test_what_is_measured_on_the_way_is_what_measure_makes(method: str, kind: Any, here: Path) -> None:
    """The plan says it beforehand and writes nothing; the merge has the bytes of one by statistics in folders."""
    Path("mine.yaml").write_text(recipe(method=method))
    said = called(["plan", "mine.yaml"])
    assert (said.code, said.out.count(f"makes   {kind}, "), kept(here)) == (0, 2, {}), said
    before = merger.plan("mine.yaml").hash
    assert f"plan    {before[:16]}" in said.out
    made = called(["run", "mine.yaml", "--to", "./out"])
    assert made.code == 0, made
    written = kept(here)
    assert (merger.merge("mine.yaml", "./again").plan, kept(here)) == (before, written)
    rows = ""
    for name in ("one", "two"):
        each, store, means = planned(here / name, kind)
        measure_statistics(each, store, means)
        (here / kind).rename(here / f"{name}-{kind}")
        rows += f"  - {{model: ./{name}, statistics: ./{name}-{kind}}}\n"
    Path("named.yaml").write_text(f"merge_method: {method}\nmodels:\n{rows}publish: {{license: mit}}\n")
    merger.merge("named.yaml", "./named")
    found = [load_file(Path(to, "model.safetensors")) for to in ("out", "again", "named")]
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in found[0])


def test_lock_and_card_say_what_was_measured_on_and_it_can_be_verified(here: Path) -> None:
    """By the merge's own folder, and by its lock; where the statistics are gone, that is said with a next step."""
    Path("mine.yaml").write_text(recipe())
    merger.merge("mine.yaml", "./out")
    said = yaml.safe_load(Path("out/merger.lock.yaml").read_text())["models"]
    names = [parent["model"] for parent in said if "measured" in parent]
    assert [parent["measured"]["data"] for parent in said[2:]] == ["random-tokens"] * 2
    assert all(file["sha256"] for parent in said[2:] for file in parent["files"])
    assert "measured on 24 tokens of random-tokens" in Path("out/README.md").read_text()
    assert str(here) not in Path("out/merger.lock.yaml").read_text()
    assert merger.verify("./out", everything=True).passed
    Path("mine.lock.yaml").write_bytes(Path("out/merger.lock.yaml").read_bytes())
    assert called(["run", "mine.lock.yaml", "--to", "./locked"]).code == 0
    assert called(["card", "./out", "--print"]).code == 0
    (here / "cache" / "merger" / "statistics" / names[0]).rename(here / "gone")
    gone = called(["verify", "./out"])
    assert (gone.code, "is not kept here" in gone.err, "run its recipe" in gone.err) == (3, True, True), gone


def through(models: list[Any], tokens: list[Tensor], alpha: float) -> dict[str, Tensor]:
    """RegMean++ in float64, by whole models: all tensors' means, but the linear ones, layer by layer."""
    merged = copy.deepcopy(models[0])
    state = merged.state_dict()
    for name, tensor in state.items():
        tensor.copy_(sum(model.state_dict()[name] for model in models) / len(models))
    parts = [f"model.layers.{layer}." for layer in range(len(merged.model.layers))]
    parts += [] if merged.config.tie_word_embeddings else ["lm_head."]
    for number, part in enumerate(parts):
        known = []
        for model, ids in zip(models, tokens, strict=True):
            mixed = copy.deepcopy(merged)
            if part == "lm_head.":
                mixed.model.norm = model.model.norm
            else:
                mixed.model.layers[number] = copy.deepcopy(model.model.layers[number])
            known.append({name: torch.cat(rows) for name, rows in fed(mixed, ids).items() if name.startswith(part)})
        for name in known[0]:
            grams = [rows[name].T @ rows[name] / len(rows[name]) for rows in known]
            grams = [alpha * gram + (1 - alpha) * gram.diag().diag() for gram in grams]
            total = sum(model.state_dict()[name] @ gram for model, gram in zip(models, grams, strict=True))
            state[name].copy_(torch.linalg.solve(sum(grams), total.T).T)
    return state


@pytest.mark.parametrize("kind", ["llama", *(["qwen3", "granite"] if THOROUGH else [])])
def test_fed_by_the_merges_own_layers_it_is_regmean_plus_plus(kind: str, here: Path) -> None:
    """In float64 by whole models, each on tokens of its own; killed at any file it goes on, and nothing is other."""
    models = [write_model(here / name, kind, initializer_range=seed, num_hidden_layers=3).double()
              for name, seed in (("one", 0.3), ("two", 0.2))]  # fmt: skip
    text = recipe(more=", merged: true").replace("8, merged", "8, seed: 7, merged", 1)
    found = merger.parse(text)
    awaited = find_kept(found, Options())[1]
    tokens = [torch.from_numpy(each.planned.tokens).long() for each in awaited]
    assert not torch.equal(*tokens)
    measure_awaited(awaited)
    written = contents(here)
    merger.merge(found, "./out")
    assert "of random-tokens, fed by the merge's own layers" in Path("out/README.md").read_text()
    assert merger.verify("./out", everything=True).passed
    made = load_file("out/model.safetensors")
    for name, expected in through(models, tokens, 0.9).items():
        if name in made:
            torch.testing.assert_close(made[name], expected.float(), rtol=1e-3, atol=1e-4)
    for last in range(1, 2 * len(awaited[0].planned.shards) - 1, 1 if THOROUGH else 3):
        for each in awaited:
            shutil.rmtree(each.options.to)
        with pytest.raises(KeyboardInterrupt):
            measure_awaited(find_kept(found, Options())[1], Stop(last))
        measure_awaited(find_kept(found, Options())[1])
        assert contents(here) == written
    merger.merge(merger.parse(recipe().replace("8}", "8, seed: 7}", 1)), "./plain")
    plain, first = load_file("plain/model.safetensors"), "model.layers.{}.mlp.up_proj.weight"
    assert [torch.equal(plain[first.format(layer)], made[first.format(layer)]) for layer in range(3)] == [False] * 3


RUN = """
import json, sys
import merger
from merger.run.options import Options
from merger.statistics.kept import find_kept, measure_awaited
_, awaited = find_kept(merger.parse(sys.argv[1]), Options(threads=2))
measure_awaited(awaited)
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([peak, max(each.planned.peak_memory for each in awaited)]))
"""


@thorough_only
def test_memory_is_planned_where_the_merge_feeds_its_layers(here: Path) -> None:
    """Of two models as of one no more than the plan says, and with four times as many layers as much as before."""
    found = {}
    for layers in (2, 8):
        for name in ("one", "two"):
            more: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 2304, "head_dim": 192, "vocab_size": 8000}
            write_model(here / name, num_hidden_layers=layers, max_position_embeddings=512, **more)
        asked = recipe(more=", merged: true").replace("24, length: 8", "1024, length: 128")
        done = subprocess.run([sys.executable, "-c", RUN, asked], check=True, capture_output=True, text=True)
        found[layers] = json.loads(done.stdout)
    assert all(peak <= told for peak, told in found.values()), found
    assert found[8][0] < 1.15 * found[2][0], found


def test_a_killed_measurement_on_the_way_goes_on(here: Path) -> None:
    """What is finished is not measured again."""
    found = merger.parse(recipe())
    _, awaited = find_kept(found, Options())
    first, then = Stop(1), Stop(99)
    with pytest.raises(KeyboardInterrupt):
        measure_awaited(awaited, first)
    measure_awaited(find_kept(found, Options())[1], then)
    assert len(first.made) == 2
    assert len(then.made) == sum(len(each.planned.shards) for each in awaited) - len(first.made)
    assert find_kept(found, Options())[1] == ()


@thorough_only
def test_a_search_measures_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each candidate, and the merge in the end, reads what was planned and measured before the first."""
    for name in ("one", "two"):
        write_model(here / name, vocab_size=2048)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (here / name / file).write_bytes((ZOO / "base" / file).read_bytes())
    searched = recipe().replace("publish:", "parameters: {alpha: {search: [0.1, 0.9]}}\npublish:")
    Path("mine.yaml").write_text(f"{searched}search: {{objectives: [{{function: 'judge:score'}}], trials: 2}}\n")
    Path("judge.py").write_text("def score(model, tokenizer):\n    return 1.0\n")
    assert called(["plan", "mine.yaml"]).code == 0
    done = called(["search", "mine.yaml"])
    assert (done.code, done.err.count("random-tokens: 24 tokens")) == (0, 2), done
    plans: list[str] = []
    monkeypatch.setattr(measuring, "plan_measurement", lambda *of: plans.append(of[0]) or plan_measurement(*of))
    again = called(["search", "mine.yaml", "--trials", "3", "--to", "./out"])
    assert (again.code, again.err.count("random-tokens: 24 tokens")) == (0, 0), again
    assert plans == ["./one", "./two"]


ROWS = [ROW.format(name=name, data="random-tokens", more=", merged: true") for name in ("one", "two")]
SEARCHED = "parameters: {alpha: {search: [0, 1]}}\nsearch: {objectives: [{function: 'judge:score'}], trials: 2}\n"
SLICED = "merge_method: regmean\nslices:\n" + "".join(
    f"  - sources: [{', '.join(row[:-1] + f', layer_range: [{at}, {at + 1}]}}' for row in ROWS)}]\n" for at in range(2)
)
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "a recipe that nobody vouches for": (
        lambda: plan(merger.parse(recipe()), Options(to="./out")), "is measured on the way where somebody runs",
    ),
    "texts outside of the checkout": (
        lambda: find_kept(merger.parse(recipe("../texts.txt")), Options(root=Path.cwd())), "is outside of",
    ),
    "too few tokens": (lambda: find_kept(merger.parse(recipe("few.txt")), Options()), "few.txt makes"),
    "too little disk": (lambda: find_kept(merger.parse(recipe()), Options(max_disk=10)), "of disk at once"),
    "blocks of Fisher": (
        lambda: merger.parse(recipe(method="fisher", more=", blocks: 4")), "blocks is for Gram matrices, and fisher",
    ),
    "Fisher by the merge's layers": (
        lambda: merger.parse(recipe(method="fisher", more=", merged: true")), "merged is for Gram matrices",
    ),
    "one by the merge's layers": (
        lambda: find_kept(merger.parse(recipe(more=", merged: true").replace(", merged: true", "", 1)), Options()),
        "stands beside some models alone",
    ),
    "numbers that are searched": (
        lambda: find_kept(merger.parse(recipe(more=", merged: true") + SEARCHED), Options()), "other for other numbers",
    ),
    "slices": (
        lambda: find_kept(merger.parse(SLICED), Options()), "one is not merged layer by layer, tensor by tensor",
    ),
    "too little disk for all at once": (
        lambda: find_kept(merger.parse(recipe(more=", merged: true")), Options(max_disk=20_000)), "at once this takes",
    ),
    "an unknown key": (lambda: merger.parse(recipe(more=", token: 4")), "unknown key 'token'"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_cannot_be_measured_on_the_way_is_refused(wrong: str, here: Path) -> None:
    """At its place in the recipe, before anything is measured."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        for model in ("one", "two"):
            (here / model / name).write_bytes((ZOO / "base" / name).read_bytes())
    Path("few.txt").write_text("in the beginning")
    tried, told = REFUSED[wrong]
    with pytest.raises(MergerError, match=told) as caught:
        tried()
    assert all(problem.at is not None for problem in caught.value.problems)
    assert not kept(here)


def test_the_space_measures_nothing(here: Path) -> None:
    """Of a recipe there the statistics lie on the Hub, too."""
    told = [(problem.what, problem.at is not None) for problem in check(recipe().replace("./", "org/")).problems]
    assert told == [("the Space measures nothing", True)] * 2
