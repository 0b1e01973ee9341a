"""Whatever strangers write, and wherever: no output moves a cursor, begins a line or commands a CI log because of it.

A table of ways in and of the commands that tell of them. Not here: the Action's log and comment (test_action), cards
and Markdown (card/test_injection), and the Space's pages (space/test_views).
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import tiny
import torch
import vocabularies
import yaml
from calls import Said, called
from hostile import AT_ONCE, HOSTILE, obeyed
from hypothesis import given
from hypothesis import strategies as st
from loopback import Client, LoopbackHub

from merger.errors import Problem, Span
from merger.safety import text

Commands = list[list[str]]
PLAN: Commands = [["check", "mine.yaml"], ["plan", "mine.yaml"], ["plan", "mine.yaml", "--json"]]
ALL: Commands = [*PLAN, ["plan", "mine.yaml", "--look"], ["run", "mine.yaml", "--to", "out"], ["status", "out"],
                 ["run", "mine.yaml", "--to", "out"], ["verify", "out"], 
                 ["card", "out"], ["card", "out", "--print"], ["diff", "out", "two"]]  # fmt: skip


def recipe(*models: str, **more: object) -> None:
    """mine.yaml, of these models."""
    content = {"merge_method": "linear", "models": [{"model": model} for model in models], "parameters": {"weight": 1}}
    Path("mine.yaml").write_text(yaml.safe_dump(content | more, allow_unicode=False))


def _models() -> Commands:
    name = f"a{HOSTILE}"
    shutil.copytree("one", name)
    recipe(f"./{name}", "./two")
    return [*ALL, ["verify", name], ["diff", name, "two"], ["status", f"./{name}"], ["status", f"./x{name}"]]


def _adapters() -> Commands:
    recipe(f"./one+./{HOSTILE}", "./two")
    return PLAN


def _revisions() -> Commands:
    recipe(f"./one@{HOSTILE}", "./two")
    return [*PLAN, ["verify", f"./one@{HOSTILE}"]]


def _files() -> Commands:
    recipe("./one", "./two")
    os.rename("mine.yaml", f"{HOSTILE}.yaml")
    return [["check", f"{HOSTILE}.yaml"], ["plan", f"{HOSTILE}.yaml"], ["plan", HOSTILE], ["check", HOSTILE]]


def _keys() -> Commands:
    recipe("./one", "./two", **{HOSTILE: HOSTILE, "publish": {HOSTILE: 1}})
    return PLAN


def _values() -> Commands:
    recipe("./one", "./two", merge_method=HOSTILE, dtype=HOSTILE, tokenizer={"source": HOSTILE}, name=HOSTILE)
    return PLAN


def _overrides() -> Commands:
    for name, licence in (("one", "cc-by-nc-4.0"), ("two", "gpl-3.0")):
        (Path(name) / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    recipe("./one", "./two", publish={"license": "mit", "license_override": HOSTILE})
    return PLAN


def _tensors(words: str) -> Callable[[], Commands]:
    def write() -> Commands:
        for seed, name in enumerate(("one", "two")):
            held = tiny.tensors(seed) | {f"::error::{words}.weight": torch.full((4, 4), float(seed))}
            shutil.rmtree(name)
            tiny.write(Path(name), held | {f"::error::{name}{words}": torch.ones(4)})
        recipe("./one", "./two")
        return [*PLAN, ["diff", "one", "two"], ["diff", "two", "one"]]

    return write


def _licences() -> Commands:
    for name in ("one", "two"):
        about = {"license": "other", "license_name": HOSTILE, "license_link": HOSTILE, "language": [HOSTILE]}
        (Path(name) / "README.md").write_text(f"---\n{yaml.safe_dump(about)}---\n{HOSTILE}")
    recipe("./one", "./two")
    return ALL


def _configs() -> Commands:
    path = Path("one/config.json")
    path.write_text(
        json.dumps(
            json.loads(path.read_text())
            | {"architectures": [HOSTILE], "quantization_config": {"quant_method": HOSTILE}}
        )
    )
    recipe("./one", "./two")
    return PLAN


def _headers() -> Commands:
    header = json.dumps({f"a{HOSTILE}": {"dtype": HOSTILE, "shape": [1], "data_offsets": [0, 4]}}).encode()
    Path("one/model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    recipe("./one", "./two")
    return [*PLAN, ["diff", "one", "two"]]


def _indexes() -> Commands:
    os.rename("one/model.safetensors", f"one/{HOSTILE}.safetensors")
    index = {"weight_map": dict.fromkeys(tiny.tensors(), f"{HOSTILE}.bin")}
    Path("one/model.safetensors.index.json").write_text(json.dumps(index))
    recipe("./one", "./two")
    return PLAN


def _tokens() -> Commands:
    for seed, name in enumerate(("one", "two")):
        vocabularies.model(Path(name), seed, [f"<{HOSTILE}>"])
    recipe("./one", "./two", tokenizer={"source": "union", "tokens": {f"x{HOSTILE}": {"source": "./one"}}})
    return PLAN


def _made() -> dict[str, object]:
    recipe("./one", "./two")
    assert called(["run", "mine.yaml", "--to", "out", "--quiet"]).code == 0
    held: dict[str, object] = yaml.safe_load(Path("out/merger.lock.yaml").read_text())
    return held


def _lock(**changed: object) -> Callable[[], Commands]:
    def write() -> Commands:
        Path("out/merger.lock.yaml").write_text(yaml.safe_dump(_made() | changed, sort_keys=False))
        return [["verify", "out"], ["card", "out"], ["plan", "out/merger.lock.yaml"]]

    return write


def _lock_of_others() -> Commands:
    held = _made()
    models, output = cast(list[dict[str, object]], held["models"]), cast(list[dict[str, object]], held["output"])
    models[0] |= {"model": HOSTILE, "files": [{"file": HOSTILE, "size": 1, "sha256": None}]}
    output.append({"file": HOSTILE, "size": 1, "sha256": None})
    Path("out/merger.lock.yaml").write_text(yaml.safe_dump(held))
    return [["verify", "out"], ["card", "out"], ["plan", "out/merger.lock.yaml"]]


def _beside() -> Commands:
    _made()
    for name in (HOSTILE, f"{HOSTILE}.md", f"deep/{HOSTILE}.bin"):
        Path("out", name).parent.mkdir(exist_ok=True)
        Path("out", name).write_text("x")
    Path(os.fsdecode(b"out/\xff\xfe.md")).write_text("no text in any encoding")
    return [["verify", "out"], ["verify", "out", "--json"]]


def _arguments() -> Commands:
    recipe("./one", "./two")
    return [["methods", HOSTILE], [HOSTILE], ["plan", "mine.yaml", "--max-memory", HOSTILE], ["verify", HOSTILE],
            ["run", "mine.yaml", "--part", HOSTILE], ["status", HOSTILE], ["diff", f"./{HOSTILE}", "two"]]  # fmt: skip


WAYS_IN: dict[str, Callable[[], Commands]] = {
    "a model's name": _models,
    "an adapter's name": _adapters,
    "a revision": _revisions,
    "a recipe's file": _files,
    "keys of a recipe": _keys,
    "values of a recipe": _values,
    "words about a licence": _overrides,
    "names of tensors": _tensors(HOSTILE),
    "names of tensors that are taken": _tensors("\x9b31m\u202e\u2028##[error]INJECTED"),
    "front matter of a card": _licences,
    "config.json": _configs,
    "a header": _headers,
    "an index": _indexes,
    "tokens": _tokens,
    "a lock's plan": _lock(plan=HOSTILE),
    "a lock's versions": _lock(made_with={"hub-merger": HOSTILE, "torch": HOSTILE}),
    "a lock's recipe": _lock(recipe=f"merge_method: linear\n{json.dumps(HOSTILE)}: 1\n"),
    "a lock's models and files": _lock_of_others,
    "files beside a merge": _beside,
    "arguments": _arguments,
}


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models."""
    root = tmp_path_factory.mktemp("parents")
    tiny.models(root, "one", "two")
    return root


@pytest.fixture
def here(parents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with a copy of them."""
    shutil.copytree(parents, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")


def said(arguments: list[str]) -> Said:
    """What a command says; arguments that cannot be read end it in argparse's way."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        from merger.cli.commands import main

        try:
            code = main(arguments)
        except SystemExit as ended:
            code = int(str(ended.code))
    return Said(code, out.getvalue(), err.getvalue())


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("way", WAYS_IN)
def test_what_strangers_write_is_shown_and_obeyed_by_nobody(way: str) -> None:
    """On both streams of each command, whether it does what it is asked or refuses."""
    told = ""
    for arguments in WAYS_IN[way]():
        answer = said(arguments)
        # a card has the lines of the recipe's text
        out = answer.out.replace("INJECTED", "") if "--print" in arguments else answer.out
        assert obeyed(out) == [], (arguments, out)
        assert obeyed(answer.err) == [], (arguments, answer.err)
        told += answer.out + answer.err
    assert r"\x1b" in told or r"\x9b" in told, "nobody told it: the case tests nothing"


def test_what_the_hub_says_is_shown_and_obeyed_by_nobody(
    served: LoopbackHub, client: Client, parents: Path, tmp_path: Path
) -> None:
    """Its refusals of a commit and of a read, in the header that its client shows."""
    (tmp_path / "mine.yaml").write_text(
        f"merge_method: linear\nmodels: [{{model: {parents}/one}}, {{model: {parents}/two}}]\n"
        "parameters: {weight: 1}\n"
    )
    told = ""
    for place in ("/preupload/", "/commit/", "/api/models", "/api/repos"):
        words = AT_ONCE.replace("\u202e", "")  # a header is latin-1
        served.fail(lambda asked, place=place: place in asked.path, 400, 9, {"X-Error-Message": words})
        answer = client(called, ["run", str(tmp_path / "mine.yaml"), "--to", f"hf://org/{place.strip('/')[:3]}"])
        served.clear_faults()
        assert answer.code == 6
        assert obeyed(answer.out) == obeyed(answer.err) == [], answer
        told += answer.err
    assert r"\x1b" in told


# The function


@given(st.text() | st.sampled_from([HOSTILE, "::error::x", "##[error]", "\ud800", "  :", "a\\b"]))
def test_any_text_is_one_line_that_commands_nothing_and_cleaning_it_twice_is_cleaning_it_once(words: str) -> None:
    """Nothing is lost in it: plain text is as it was."""
    shown = text.line(words)
    assert obeyed(shown) == []
    assert "\n" not in shown
    assert text.line(shown) == shown
    shown.encode()
    if words.isascii() and words.isprintable() and not words.strip().startswith(":") and "##[" not in words:
        assert shown == words


def test_a_very_long_text_is_cut_and_says_so() -> None:
    """Its beginning stays, with how much more there is, and stays so."""
    cut = text.line("a" * 10_000)
    assert cut == f"{'a' * text.LONGEST}… (6,000 characters more)"
    assert text.line(cut) == cut


def test_a_problem_is_clean_wherever_it_goes() -> None:
    """As a sentence, as data, and in the words of another."""
    problem = Problem(HOSTILE, Span(HOSTILE, 1, 2), HOSTILE, HOSTILE)
    assert (
        obeyed(str(problem)) == obeyed(problem.what) == obeyed(problem.hint or "") == obeyed(problem.where or "") == []
    )
    assert str(problem).count("\n") == 1
    assert Problem(problem.what).what == problem.what


# The streams


def _printed() -> None:
    print(AT_ONCE)
    print("a", end="")
    print("::b")
    print("  ", end="")
    print("::error::pieces")
    sys.stdout.writelines(["::error::lines\n", "\r::error::r\n"])


def _warned() -> None:
    sys.stderr.write(warnings.formatwarning(f"\n{AT_ONCE}".replace("INJECTED", ""), UserWarning, "hub.py", 1))


def _logged() -> None:
    handler = logging.StreamHandler()
    logging.getLogger("hostile").addHandler(handler)
    logging.getLogger("hostile").warning("\n%s", AT_ONCE.replace("INJECTED", ""))
    logging.getLogger("hostile").removeHandler(handler)


@pytest.mark.parametrize("tell", [_printed, _warned, _logged])
def test_what_libraries_print_is_guarded(tell: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> None:
    """Prints, warnings and logs, also in pieces; what follows on a line is none that begins one."""
    with text.guard_streams():
        tell()
    told = capsys.readouterr()
    assert obeyed(told.out) == obeyed(told.err) == []
    assert r"\x1b" in told.out + told.err
    if tell is _printed:
        assert "\na::b\n" in told.out


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_may_go_back_on_a_terminal_and_nowhere_else() -> None:
    """To the beginning of its own line, and up to another's."""
    pieces = ["\rmerging: 5%\x1b[2J", "\r  \r", "\x1b[A", "\x1b[Aa"]
    shown = ["\rmerging: 5%\\x1b[2J", "\r  \r", "\x1b[A", "\\x1b[Aa"]
    for stream, told in ((_Terminal(), shown), (io.StringIO(), list(map(text.line, pieces)))):
        text.Guarded(stream).writelines(pieces)
        assert stream.getvalue() == "".join(told)


def test_a_stream_of_few_letters_is_told_the_others_by_their_numbers() -> None:
    """As a pipe on Windows is."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, "cp1252")
    text.Guarded(stream).write("1 \u2192 2 \u00d7 \u00e9")
    stream.flush()
    assert raw.getvalue().decode("cp1252") == "1 \\u2192 2 \u00d7 \u00e9"


@pytest.mark.parametrize("command", [["merger.cli.commands", "parse_arguments"], ["merger.action.step", "_step"]])
def test_a_bugs_traceback_is_guarded(command: list[str]) -> None:
    """What it says may be a stranger's."""
    module, broken = command
    code = (f"import sys, {module} as shell\ndef bug(*_): raise KeyError(type('w', (), "
            f"{{'__repr__': lambda _: sys.argv[1]}})())\nshell.{broken} = bug\nsys.exit(shell.main())")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, HOSTILE], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert [each for each in obeyed(done.stderr) if "a line" not in each] == []
    assert r"\x1b" in done.stderr
