"""Whatever recipe, options and model a stranger brings: an exit code of the table and a sentence, never a traceback.

What is drawn stands in drawn.py. A few hundred trials here; thousands with RELIABILITY=all (`make reliability`).
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path

import drawn
import pytest
from hypothesis import HealthCheck, given, settings
from loopback import Client, LoopbackHub
from safetensors import deserialize
from thorough import THOROUGH

from merger.errors import ModelError, RecipeError
from merger.methods.registry import Method, methods
from merger.models.checkpoint import header_length, read_header
from merger.recipe.model import Rule
from merger.recipe.parse import parse

TRIALS, PROCESSES = (2000, 50) if THOROUGH else (80, 3)
ENDS = {0, 2, 3, 4, 5, 6, 7, 8, 9}
MAX_MEMORY = 700_000_000
CALL = """
import sys
from merger.cli.commands import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(code)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which commands are called."""
    return tmp_path_factory.mktemp("drawn")


def laid(root: Path, files: Mapping[str, bytes]) -> None:
    """Put the files there, in place of those of the trial before."""
    for old in root.iterdir():
        if old.name not in ("a", "b"):
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    for name, content in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)


def tried(root: str, arguments: tuple[str, ...]) -> tuple[int | None, str, str]:
    """Call the command there: its exit code, what it said, and how it broke."""
    from merger.cli.commands import main

    os.chdir(root)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return main(list(arguments)), out.getvalue() + err.getvalue(), ""
        except SystemExit as end:
            return int(str(end.code)), err.getvalue(), ""
        except BaseException:
            return None, out.getvalue() + err.getvalue(), traceback.format_exc()


def not_finite(folder: Path) -> list[str]:
    """The tensors of a result that hold NaN or an infinity."""
    import tiny

    return [
        name for name, tensor in tiny.read(folder).items() if tensor.is_floating_point() and not tensor.isfinite().all()
    ]


@pytest.mark.filterwarnings("ignore:Generating overly large repr")  # a trial holds whole files
def test_whatever_is_drawn_ends_in_a_sentence(root: Path, client: Client) -> None:
    """An exit code of the table, without a traceback; what fails says why; what is made is finite, or was allowed."""

    @settings(
        max_examples=TRIALS,
        deadline=None,
        derandomize=not THOROUGH,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(drawn.trials(drawn.sound(root)))
    def trial(drawn_trial: drawn.Trial) -> None:
        laid(root, drawn_trial.files)
        code, said, broken = client(tried, str(root), drawn_trial.arguments, timeout=300)
        assert not broken, broken
        assert code in ENDS, said
        assert code == 0 or said.strip() or "--quiet" in drawn_trial.arguments
        if code == 0 and (root / "out").is_dir() and b"allow_non_finite" not in drawn_trial.files["r.yaml"]:
            assert not_finite(root / "out") == []

    trial()


@pytest.mark.parametrize(
    "method", sorted(methods().values(), key=lambda found: found.name), ids=lambda found: found.name
)
def test_every_parameter_is_in_its_range_or_refused_at_its_place(method: Method) -> None:
    """Whatever stands there, at the top or beside a model: each number that is taken lies in the range that is told."""
    base = "base_model: a\n" if method.takes_base else ""
    beside = ", statistics: s" if method.statistics else ""
    needed = {param.name: "0" for param in method.params if param.required}
    for param in method.params:
        for odd in (*drawn.ODD, *drawn.YAML_ONLY):
            given = ", ".join(f"{name}: {value}" for name, value in {**needed, param.name: drawn.text(odd)}.items())
            listed = f"[{{model: a{beside}}}, {{model: b{beside}}}]"
            text = f"merge_method: {method.name}\n{base}parameters: {{{given}}}\nmodels: {listed}\n"
            for rule in rules_of(text, param.name):
                assert all(param.range.holds(value) for value in rule.values)


def rules_of(text: str, name: str) -> tuple[Rule, ...]:
    """What a recipe says of a parameter; nothing where it is refused, which must be at a place of it."""
    try:
        recipe = parse(text, "r.yaml", methods())
    except RecipeError as error:
        lost = [problem for problem in error.problems if not problem.at or problem.at.line > text.count("\n") + 1]
        if lost:
            raise
        return ()
    return recipe.parameters[name].rules if name in recipe.parameters else ()


def test_a_file_that_safetensors_refuses_is_refused_here(root: Path) -> None:
    """Of drawn headers, lengths and data: what its own library does not open is not read."""
    whole = drawn.sound(root)["l/adapter_model.safetensors"]

    @settings(max_examples=TRIALS * 4, deadline=None, derandomize=not THOROUGH, suppress_health_check=list(HealthCheck))
    @given(drawn.checkpoints(whole))
    def trial(content: bytes) -> None:
        try:
            read_header(content[8 : 8 + header_length(content[:8], "f", len(content))], "f", len(content))
        except ModelError:
            return
        deserialize(content)

    trial()


def test_no_process_takes_more_than_it_was_given(root: Path, served: LoopbackHub, tmp_path: Path) -> None:
    """Of processes that may take some memory, none takes more, and each ends as the table says."""

    @settings(max_examples=PROCESSES, deadline=None, derandomize=not THOROUGH, suppress_health_check=list(HealthCheck))
    @given(drawn.trials(drawn.sound(root)))
    def trial(drawn_trial: drawn.Trial) -> None:
        laid(root, drawn_trial.files)
        arguments = drawn_trial.arguments
        if arguments[0] in ("run", "plan", "verify", "extract-lora"):
            arguments = (*arguments, f"--max-memory={MAX_MEMORY}")
        environment = {**os.environ, **served.env(tmp_path, "none")}
        line = [sys.executable, "-c", CALL, *arguments]
        done = subprocess.run(line, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode in ENDS, done.stderr
        assert "Traceback" not in done.stderr
        assert int(done.stdout.split()[-1]) <= MAX_MEMORY

    trial()
