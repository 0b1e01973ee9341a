"""The Python API: its examples, its names, and that it leaves the caller's process as it was."""

from __future__ import annotations

import doctest
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

import merger
from merger.errors import RecipeError

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the examples in it."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_pages_examples_are_true(checkout: Path) -> None:
    """Word by word, in their order."""
    found = doctest.testfile(str(ROOT / "docs/python.md"), module_relative=False, optionflags=FLAGS)
    assert found.attempted > 15
    assert found.failed == 0


def test_each_function_has_an_example_that_is_true(checkout: Path) -> None:
    """In the order in which they build on each other."""
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    functions = [name for name in merger.__all__ if inspect.isfunction(getattr(merger, name))]
    for name in sorted(functions, key=("parse", "check", "plan", "merge", "search", "verify", "diff", "method").index):
        (test,) = doctest.DocTestFinder(recurse=False).find(getattr(merger, name), name, globs=vars(merger).copy())
        assert test.examples, name
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


IMPORTS_ALL = """
import importlib, json, pkgutil, types, merger
for found in pkgutil.walk_packages(merger.__path__, "merger."):
    if found.name != "merger.__main__":
        importlib.import_module(found.name)
print(json.dumps([name for name in merger.__all__ if isinstance(getattr(merger, name), types.ModuleType)]))
"""

CHANGES_NOTHING = """
import gc, json, logging, os, sys
import merger
assert not {"torch", "numpy", "yaml", "huggingface_hub"} & set(sys.modules), "importing costs nothing"
import torch
from huggingface_hub.utils import _http

torch.set_num_threads(3)
def settings():
    hub = logging.getLogger("huggingface_hub")
    return {
        "gc": gc.get_threshold(), "frozen": gc.get_freeze_count(), "threads": torch.get_num_threads(),
        "client": _http._GLOBAL_CLIENT_FACTORY.__module__, "environment": sorted(os.environ.items()),
        "filters": [len(each.filters) for each in (hub, *hub.handlers)],
        "signals": __import__("signal").getsignal(2).__name__, "excepthook": sys.excepthook.__name__,
        "streams": [type(sys.stdout).__name__, type(sys.stderr).__name__],
    }
before = settings()
result = merger.merge("examples/recipes/linear.yaml", to="./merged")
merger.verify("./merged", seed=1)
merger.diff("./merged", "./merged")
import merger.stores.hub.staging, merger.stores.hub.uploads
print(json.dumps([before, settings()]))
"""


def _run(script: str, cwd: Path) -> object:
    pytest.importorskip("torch")
    done = subprocess.run([sys.executable, "-c", script], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_wing_has_the_name_of_a_function(checkout: Path) -> None:
    """Once everything is imported, each public name still is what it says."""
    assert _run(IMPORTS_ALL, checkout) == []


def test_the_callers_process_stays_as_it_was(checkout: Path) -> None:
    """Garbage collection, threads, the Hub's client, logs, environment, signals, streams."""
    before, after = _run(CHANGES_NOTHING, checkout)  # type: ignore[misc]
    assert before == after


def test_a_recipe_is_a_path_a_mapping_or_itself(checkout: Path) -> None:
    """All three are planned alike."""
    path = checkout / "examples/recipes/linear.yaml"
    recipe = merger.parse(path.read_text())
    hashes = {merger.plan(each).hash for each in (path, str(path), recipe)}
    models = [{"model": f"./examples/zoo/{name}", "parameters": {"weight": 1}} for name in ("kjv", "python")]
    hashes.add(merger.plan({"merge_method": "linear", "models": models, "dtype": "bfloat16"}).hash)
    assert len(hashes) == 1


def test_a_name_that_is_not_there_is_told() -> None:
    """As of any module."""
    with pytest.raises(AttributeError, match="no attribute 'merg'"):
        merger.merg  # noqa: B018
    with pytest.raises(RecipeError, match="there is no method 'slrp'"):
        merger.method("slrp")
