"""The command: quick to answer, plain in what it says, and exact in what it returns."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest
import tiny

from merger.cli.arguments import parse_arguments
from merger.cli.commands import main
from merger.methods.registry import START, methods

RECIPE = """\
merge_method: linear
models:
  - model: {one}
    parameters: {{weight: 0.5}}
  - model: {other}
    parameters: {{weight: 0.5, density: 0.5}}
publish: {{license: mit}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe over two small models, with one harmless slip in it."""
    root = tmp_path_factory.mktemp("command")
    path = root / "mine.yaml"
    path.write_text(RECIPE.format(one=tiny.model(root / "one", 1), other=tiny.model(root / "other", 2)))
    return path


HELP = """
import atexit, sys
before = set(sys.modules)
atexit.register(lambda: print(*{name.partition(".")[0] for name in set(sys.modules) - before}, file=sys.stderr))
from merger.cli.commands import main
main(["--help"])
"""


def test_help_imports_nothing_of_others() -> None:
    """So --help answers at once."""
    answer = subprocess.run([sys.executable, "-c", HELP], check=True, capture_output=True, text=True)
    assert set(answer.stderr.split()) <= {"merger", *sys.stdlib_module_names}


HEAVY = """
import json, sys
from merger.cli.commands import main
try:
    code = main(sys.argv[1:])
except SystemExit as done:
    code = done.code
heavy = [name for name in ("torch", "numba", "huggingface_hub", "transformers", "matplotlib") if name in sys.modules]
print(json.dumps([code, heavy]), file=sys.stderr)
"""


@pytest.mark.parametrize("command", [["--help"], ["check"], ["plan"], ["plan", "--json"], ["methods"], ["schema"]])
def test_no_torch_before_tensors(command: list[str], recipe: Path) -> None:
    """Checking and planning local models, help, methods and schema import none of what is slow to import."""
    arguments = [*command, str(recipe)] if command[0] in ("check", "plan") else command
    answer = subprocess.run([sys.executable, "-c", HEAVY, *arguments], check=True, capture_output=True, text=True)
    assert json.loads(answer.stderr.splitlines()[-1]) == [0, []]


def test_check_says_what_it_read(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """check names method and models, and warns of what has no effect, at its place."""
    assert main(["check", str(recipe)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{recipe}: well formed (linear; 2 models)\n"
    assert f"warning: {recipe}:6:31: " in said.err
    assert "density has no meaning for linear" in said.err


def test_check_looks_at_every_file(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bad recipe does not hide the next one, and its exit code counts."""
    bad = tmp_path / "bad.yaml"
    bad.write_text("merge_method: linaer\nmodels: [{model: org/a}]\n")
    assert main(["check", str(bad), str(recipe), str(tmp_path / "none.yaml")]) == 2
    said = capsys.readouterr()
    assert "well formed" in said.out
    assert "did you mean 'linear'?" in said.err
    assert "none.yaml: cannot be read" in said.err


def test_plan_accounts_for_everything(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """plan shows the models, what is made, what it reads and takes, without writing anything."""
    before = sorted(recipe.parent.iterdir())
    assert main(["plan", str(recipe)]) == 0
    said = capsys.readouterr().out
    for line in ("makes   21 tensors (linear 21)", "reads   ", "memory  ", "disk    ", "plan    "):
        assert line in said
    assert sorted(recipe.parent.iterdir()) == before


def test_plan_as_json_names_every_tensor(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """plan --json holds each job with its inputs and numbers."""
    assert main(["plan", str(recipe), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    jobs = {job["name"]: job for shard in planned["shards"] for job in shard["jobs"]}
    assert set(jobs) == set(tiny.tensors(0))
    assert [entry["settings"] for entry in jobs["lm_head.weight"]["inputs"]] == [{"weight": 0.5}, {"weight": 0.5}]


def test_run_as_json_tells_what_was_written(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """run --json ends with the place, the plan and each shard's checksum."""
    assert main(["run", str(recipe), "--to", str(tmp_path / "out"), "--json", "--quiet"]) == 0
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert told["where"] == str(tmp_path / "out")
    assert [shard["name"] for shard in told["shards"]] == ["model.safetensors"]
    assert said.err == ""


def test_a_refusal_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --json a refusal's problems are data on stdout, and its exit code is the command's."""
    bad = tmp_path / "bad.yaml"
    bad.write_text("merge_method: linaer\nmodels: [{model: org/a}]\n")
    assert main(["plan", str(bad), "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["exit_code"] == 2
    assert told["problems"][0]["at"] == {"path": str(bad), "line": 1, "column": 15}


def test_run_needs_a_destination(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --to and publish.repo the refusal says what to write."""
    assert main(["run", str(recipe)]) == 2
    assert "give --to FOLDER or --to hf://owner/name" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "4XB", "lots", "-1GB"])
def test_a_size_that_is_none(size: str, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A size that cannot be read is refused with an example."""
    assert main(["plan", str(recipe), f"--max-memory={size}"]) == 2
    assert "write for example 500MB, 4GB or 4GiB" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "meant"), [("4", "4GB"), ("16", "16GB"), ("512", "512MB"), ("1.5", "1.5GB")])
def test_so_few_bytes_are_no_size(size: str, meant: str, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A number without a unit that can be no number of bytes is asked about."""
    assert main(["plan", str(recipe), "--max-memory", size]) == 2
    assert f"{size} bytes? write {meant}" in capsys.readouterr().err


def test_a_size_may_be_written_as_a_refusal_tells_it(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With commas; and what it is needed for is told, the largest first."""
    assert main(["plan", str(recipe), "--max-memory", "1,000,000"]) == 5
    told = capsys.readouterr().err
    assert re.match(r"this merge needs [\d.]+ MB of memory, and 1.0 MB are allowed\n", told)
    assert re.search(r"small buffers: [\d.]+ MB for Python and its libraries, [\d.]+ \w+ for the work on \S+, ", told)
    needed = re.findall(r"raise --max-memory to (\S+), the least", told)[0]
    assert main(["plan", str(recipe), "--max-memory", needed]) == 0


COMMANDS = ("check", "plan", "run", "publish", "extract-lora", "status", "clean", "verify", "diff", "card", "methods",
            "schema")  # fmt: skip


def test_no_words_at_all_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    """And every command in it."""
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert [word for word in COMMANDS if not re.search(rf"^    {word}\b", told, re.MULTILINE)] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_each_help_has_a_sentence_and_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Examples that can be read as they stand."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    told = capsys.readouterr().out
    assert re.search(r"\n\n[A-Z][^\n]+\.\n\n", told)
    examples = re.findall(r"^  merger (.+?)(?:    .*)?$", told.split("example")[-1], re.MULTILINE)
    assert examples
    for example in examples:
        assert parse_arguments(shlex.split(example.partition(" > ")[0])).command == command


WORDS = {
    "chek x.yaml": "there is no command 'chek'\n    did you mean 'check'?",
    "merge x.yaml": "there is no command 'merge'\n    did you mean merger run?",
    "help": "there is no command 'help'\n    did you mean merger --help?",
    "x.yaml": "'x.yaml' is no command\n    write merger run x.yaml, or merger check x.yaml",
    "run x.yaml --cuda": "merger run has no option --cuda\n    write --device cuda",
    "run x.yaml --dry-run": "merger run has no option --dry-run\n    merger plan RECIPE shows what run would make",
    "run x.yaml --random-seed 5": "merger run has no option --random-seed\n    write --seed N",
    "run x.yaml --max-memry=4GB": "merger run has no option --max-memry\n    did you mean --max-memory?",
    "run x.yaml --allow-crimes": "merger run has no option --allow-crimes\n    leave it out: what can be made is made",
    "plan x.yaml --stream": "merger plan has no option --stream\n    it is an option of merger run",
    "--json plan x.yaml": "merger plan has no option --json\n    write it after the command: merger plan ... --json",
    "check x.yaml --zzz": "merger check has no option --zzz\n    merger check --help lists its options",
    "run x.yaml y.yaml": "merger run has no use for 'y.yaml'\n    it takes one recipe at a time; merger run --help",
    "run x.yaml ./a ./b": "merger run has no use for './a ./b'\n    it takes one recipe at a time; merger run --help",
    "run x.yaml ./a --to ./b": "merger run is given two destinations: './b' and './a'\n    name one, as --to DEST",
    "methods ties dare": "merger methods has no use for 'dare'\n    merger methods --help",
    "status you/merged": "'you/merged' may be a folder here or a repo on the Hub\n"
    "    write ./you/merged for the folder, hf://you/merged for the repo",
    "verify": "merger verify: the following arguments are required: MODEL\n    merger verify --help shows how",
}


@pytest.mark.parametrize("words", WORDS)
def test_words_that_are_not_known_are_answered_with_what_is_near(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sentence and a next step, exit code 2, and no usage over them."""
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    assert capsys.readouterr().err.startswith(WORDS[words])


def test_a_refused_word_is_data_with_json(capsys: pytest.CaptureFixture[str]) -> None:
    """As any other refusal is."""
    assert main(["plan", "x.yaml", "--json", "--cuda"]) == 2
    assert json.loads(capsys.readouterr().out)["problems"][0]["hint"] == "write --device cuda"


def test_run_takes_the_folder_where_mergekit_has_it(recipe: Path, tmp_path: Path) -> None:
    """Behind the recipe, as --to has it."""
    assert main(["run", str(recipe), "--quiet", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("form", ["merges", "merges/*.yaml", "merges/**/*.yaml", "~/merges", "~/merges/deep/b.yml"])
def test_check_takes_folders_patterns_and_home(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipes in them, but no lock files; a shell hands on what stands in quotes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.yaml", "deep/b.yml", "deep/c.yaml", "a.lock.yaml", "notes.txt"):
        (tmp_path / "merges" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "merges" / name).write_text("merge_method: passthrough\nmodels: [{model: org/a}]\n")
    assert main(["check", form]) == 0
    told = [Path(line.partition(":")[0]).name for line in capsys.readouterr().out.splitlines()]
    assert (
        told
        == {
            "merges": ["a.yaml", "b.yml", "c.yaml"],
            "merges/*.yaml": ["a.yaml"],
            "merges/**/*.yaml": ["a.yaml", "c.yaml"],
            "~/merges": ["a.yaml", "b.yml", "c.yaml"],
            "~/merges/deep/b.yml": ["b.yml"],
        }[form]
    )


def test_check_says_where_no_recipe_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder or a pattern that holds none is no success."""
    assert main(["check", str(tmp_path), str(tmp_path / "*.yaml")]) == 2
    assert capsys.readouterr().err.count("no recipe is there\n    recipes end with .yaml or .yml") == 2


def test_a_destination_is_refused_before_the_plan_is_shown(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The refusal is all that is said."""
    (tmp_path / "note.txt").write_text("mine")
    assert main(["run", str(recipe), "--to", str(tmp_path)]) == 6
    told = capsys.readouterr().err
    assert "exists and is not empty" in told
    assert "makes  " not in told


def test_a_folder_of_a_folder_that_is_there_is_none_of_the_hub(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where nothing tells what is meant, it is asked."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    assert main(["run", str(recipe), "--to", "results/merged", "--quiet"]) == 0
    assert main(["run", str(recipe), "--to", "you/merged", "--quiet"]) == 2
    assert not (tmp_path / "you").exists()


def test_methods_are_listed_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """methods has a line for each, those first with which to begin; methods NAME tells parameters and the paper."""
    assert main(["methods"]) == 0
    listed = capsys.readouterr().out.splitlines()
    starred = [line.split()[1] for line in listed if line.startswith("★ ")]
    assert starred == list(START)
    assert [line[2:].split()[0] for line in listed] == [*START, *(name for name in methods() if name not in START)]
    assert main(["methods", "ties"]) == 0
    told = capsys.readouterr().out
    assert "density (a number for each model, 0 to 1, default 1.0): share of entries kept" in told
    assert "https://arxiv.org/abs/2306.01708" in told
    assert main(["methods", "tie"]) == 2
    assert "did you mean 'ties'?" in capsys.readouterr().err


def test_a_terminal_shows_a_bar(recipe: Path, tmp_path: Path) -> None:
    """On a terminal run shows a bar with bytes; in a log it shows plain lines and no control characters."""
    command = [sys.executable, "-m", "merger", "run", str(recipe), "--to", str(tmp_path / "out"), "--force"]
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    held = b""
    with suppress(OSError):  # how Linux says that nobody writes there any more
        while part := os.read(ours, 1 << 16):
            held += part
    os.close(ours)
    shown = held.decode()
    logged = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert "\rmerging: 100%" in shown
    assert "\r" not in logged
    assert "made model.safetensors (" in logged
