"""The scan for tokens in use: what it finds, what it leaves alone, and that nothing with one in it leaves."""

from __future__ import annotations

import base64
import gc
import html
import io
import json
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
import tiny
from calls import WRITER, Command
from hypothesis import given
from hypothesis import strategies as st
from loopback import LoopbackHub

from merger.action import github
from merger.action.github import GitHubApi, Log
from merger.card.escape import escape_text
from merger.run.options import Options
from merger.safety import secrets
from merger.safety.secrets import LeakError, Sieve, leaks, refuse_tokens

TOKEN = "hf_a-b/c_d&e@f<1"
"""The token of the commands that the fixture `command` runs."""
RECIPE = """\
merge_method: linear
models:
  - model: ./one
  - model: ./two
parameters: {weight: 0.5}
publish: {license: apache-2.0}
"""


@pytest.fixture(autouse=True)
def in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """The token is the environment's; what other tests have left behind is not looked for."""
    monkeypatch.setattr(secrets, "_kept", set())
    monkeypatch.setenv("HF_TOKEN", TOKEN)


# What is found

SPELT: dict[str, Callable[[str], str | bytes]] = {
    "as it stands": str,
    "bytes": str.encode,
    "between other letters": lambda token: f"x{token}y",
    "Markdown of a card": escape_text,
    "HTML": html.escape,
    "an address": lambda token: quote(token, safe=""),
    "an address in small letters": lambda token: quote(token, safe="").lower(),
    "entities in hexadecimal": lambda token: "".join(f"&#x{ord(letter):02x};" for letter in token),
    "JSON": lambda token: json.dumps({"token": token}),
    "JSON that escapes more": lambda token: token.replace("/", "\\/").replace("&", "\\u0026").replace("<", "\\u003c"),
    "base64": lambda token: base64.b64encode(token.encode()),
    "base64, one byte on": lambda token: base64.b64encode(b"x" + token.encode() + b"y"),
    "base64, two bytes on": lambda token: base64.b64encode(b"xy" + token.encode() + b"yz"),
    "base64 of addresses": lambda token: base64.urlsafe_b64encode(b"user:" + token.encode()),
    "hexadecimal": lambda token: token.encode().hex(),
    "a large file": lambda token: b"\\" * (5 << 20) + token.encode(),
}


@pytest.mark.parametrize("spelling", SPELT)
def test_a_token_is_found_however_it_is_spelt(spelling: str) -> None:
    """The same text with another token in it is not taken for it."""
    assert leaks(SPELT[spelling](TOKEN))
    assert not leaks(SPELT[spelling](TOKEN.replace("c_d", "c_x")))


@given(st.text(min_size=8), st.text(), st.text(), st.sampled_from(["utf-8", "base64"]))
def test_any_text_that_is_long_enough_is_found_between_any_others(
    token: str, before: str, after: str, how: str
) -> None:
    """Also where it holds what would be read as an escape."""
    content = f"{before}{token}{after}".encode()
    owner = Options(write_token=token)
    assert leaks(content if how == "utf-8" else base64.b64encode(content))
    assert owner.write_token == token


@pytest.mark.parametrize("text", ["", TOKEN[:-1], TOKEN[1:], TOKEN.upper(), "hf_"])
def test_less_than_a_token_is_none(text: str) -> None:
    """A part of one, or none."""
    assert not leaks(f"see {text} there")


def test_what_is_shorter_than_eight_letters_is_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be found in texts that have nothing to do with it."""
    monkeypatch.setenv("HF_TOKEN", "a" * 7)
    secrets.watch_for("b" * 7, None, True, "")
    assert not leaks("a" * 7 + "b" * 7)
    secrets.watch_for("b" * 8)
    assert leaks("b" * 8)


def test_a_token_is_looked_for_as_long_as_somebody_holds_it() -> None:
    """What a visitor of the Space brought is not remembered for longer than his job."""
    options = [Options(read_token="hf_of_a_visitor"), Options(read_token="hf_of_a_visitor")]
    assert leaks("hf_of_a_visitor")
    options.pop()
    gc.collect()
    assert leaks("hf_of_a_visitor")
    options.pop()
    gc.collect()
    assert not leaks("hf_of_a_visitor")
    assert "hf_of_a_visitor" not in repr(secrets.__dict__)


def test_secrets_that_were_taken_out_of_the_environment_are_still_looked_for() -> None:
    """And no other variable is touched."""
    environment = {"MERGER_BOT_SECRET": "known to the Hub", "OAUTH_CLIENT_ID": "merger-space"}
    secrets.take_out(environment)
    assert environment == {"OAUTH_CLIENT_ID": "merger-space"}
    assert leaks("it is known to the Hub alone")


# What is refused


def test_a_refusal_names_the_files_and_not_the_token() -> None:
    """Each of them; a token in a name is not told by it either."""
    with pytest.raises(LeakError) as refused:
        refuse_tokens(
            {"README.md": f"see {TOKEN}", "LICENSE": b"free", f"{TOKEN}.txt": b"", "config.json": TOKEN.encode()}
        )
    assert [problem.what for problem in refused.value.problems] == [
        "README.md holds a token in use: it does not leave",
        "a file's name holds a token in use: it does not leave",
        "config.json holds a token in use: it does not leave",
    ]
    assert refused.value.exit_code == 6
    assert TOKEN not in str(refused.value)


@pytest.fixture
def work(served: LoopbackHub, tmp_path: Path) -> Path:
    """A folder with two models and a recipe of them; they are on the Hub, too."""
    tiny.models(tmp_path, "one", "two", hub=None if served.exists("org/one") else served)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    return tmp_path


def _template(work: Path) -> str:
    (work / "own.md").write_text(f"{{% raw %}}{WRITER}{{% endraw %}}")
    (work / "mine.yaml").write_text(RECIPE.replace("{license", "{template: own.md, license"))
    return "README.md"


def _licence(work: Path) -> str:
    (work / "one" / "LICENSE").write_text(f"You may: {WRITER}")
    (work / "two" / "LICENSE").write_text(f"You may: {WRITER}")
    return "LICENSE"


def _comment(work: Path) -> str:
    (work / "mine.yaml").write_text(f"# {WRITER}\n{RECIPE}")
    return "README.md"  # the recipe stands in it


def _chat(work: Path) -> str:
    for name in ("one", "two"):
        (work / name / "chat_template.jinja").write_text(f"{{# {WRITER} #}}")
    return "chat_template.jinja"


def _settings(work: Path) -> str:
    for name in ("one", "two"):
        config = work / name / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "note": f"user:{WRITER}"}))
    return "config.json"


WAYS = [_template, _licence, _comment, _chat, _settings]


@pytest.mark.parametrize("way", WAYS, ids=[way.__name__.strip("_") for way in WAYS])
@pytest.mark.parametrize("to", ["./out", "hf://org/out"])
def test_nothing_is_published_with_the_writers_token_in_it(
    way: Callable[[Path], str], to: str, work: Path, served: LoopbackHub, command: Command
) -> None:
    """Whatever brought it there: the file is named, exit code 6, and the destination is as it was."""
    file = way(work)
    ran = command("run", "mine.yaml", "--to", to, cwd=work, hub=served)
    assert (ran.returncode, f"{file} holds a token in use: it does not leave" in ran.stderr) == (6, True), ran.stderr
    assert WRITER not in ran.stdout + ran.stderr
    assert not (work / "out").exists()
    assert not [name for name in (served.files("org/out") if to.startswith("hf") else ()) if name != ".gitattributes"]


@pytest.mark.parametrize("to", ["./out", "hf://org/carded"])
def test_no_card_is_rendered_anew_with_a_token_in_it(
    to: str, work: Path, served: LoopbackHub, command: Command
) -> None:
    """It is not written over the old one, and `--print` does not show its line."""
    (work / "mine.yaml").write_text(RECIPE.replace("./", "org/"))
    assert command("run", "mine.yaml", "--to", to, cwd=work, hub=served).returncode == 0
    (work / "own.md").write_text(f"\n{WRITER}\n")
    ran = command("card", to, "--template", "own.md", cwd=work, hub=served)
    assert (ran.returncode, "README.md holds a token in use" in ran.stderr) == (6, True), ran.stderr
    card = (work / "out" / "README.md").read_bytes() if to == "./out" else served.files("org/carded")["README.md"]
    assert WRITER.encode() not in card
    shown = command("card", to, "--template", "own.md", "--print", cwd=work, hub=served)
    assert (shown.returncode, WRITER in shown.stdout + shown.stderr) == (6, False)


# What is dropped


def test_a_line_of_a_log_with_a_token_is_dropped_and_ends_the_run() -> None:
    """The lines around it stay."""
    stream = io.StringIO()
    log = Sieve(stream)
    with pytest.raises(LeakError):
        print(f"one\nsee {TOKEN}\ntwo", file=log)
    with pytest.raises(LeakError):
        print(TOKEN, file=log)
    print("three", file=log)
    assert stream.getvalue() == "one\ntwo\nthree\n"
    assert log.has_dropped


def test_a_token_that_is_written_in_two_pieces_does_not_come_out_whole() -> None:
    """Nor does the rest of its line."""
    stream = io.StringIO()
    log = Sieve(stream, ends=False)
    for piece in ("see ", TOKEN[:5], TOKEN[5:], " there", "\n", "next\n"):
        log.write(piece)
    assert stream.getvalue() == f"see {TOKEN[:5]}\nnext\n"


@pytest.mark.parametrize(
    ("line", "recipe"),
    [
        (("check", "mine.yaml"), RECIPE.replace("models:", f"{WRITER}: 1\nmodels:")),
        (("plan", "mine.yaml"), RECIPE.replace("./two", f"./{WRITER}")),
        (("plan", "mine.yaml", "--json"), RECIPE.replace("./two", f"./{WRITER}")),
        (("run", "mine.yaml", "--to", "./out"), RECIPE.replace("./two", f"./{WRITER}")),
        (("check", f"{WRITER}.yaml"), RECIPE),
        (("run", "mine.yaml", f"--{WRITER}"), RECIPE),
        (("methods", WRITER), RECIPE),
    ],
)
def test_no_command_prints_a_token(
    line: tuple[str, ...], recipe: str, work: Path, served: LoopbackHub, command: Command
) -> None:
    """Not in an error either: the line is dropped, and the exit code is that of a refused upload."""
    (work / "mine.yaml").write_text(recipe)
    ran = command(*line, cwd=work, hub=served)
    assert (ran.returncode, WRITER in ran.stdout + ran.stderr) == (6, False), ran.stdout + ran.stderr
    assert "a line of the log held a token that is in use here: it was dropped" in ran.stderr


def test_a_bugs_traceback_goes_without_its_token(capsys: pytest.CaptureFixture[str]) -> None:
    """The rest of it is there, as of any bug."""

    def bug() -> int:
        raise ZeroDivisionError(TOKEN)

    assert secrets.watch(bug) == 6
    told = capsys.readouterr().err
    assert "in bug" in told
    assert TOKEN not in told


# What GitHub is told


def test_github_is_told_no_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not in outputs, summary, comment, commit or a command of the log; to be masked it has to be told."""
    api = GitHubApi("http://127.0.0.1:9", "org/recipes", TOKEN)
    place = str(tmp_path / "told")
    for leave in (
        lambda: github.write_outputs(place, {"to": TOKEN}),
        lambda: github.write_summary(place, escape_text(TOKEN)),
        lambda: api.keep_comment(7, "<!-- -->", TOKEN),
        lambda: api.commit_file("mine.lock.yaml", f"x{TOKEN}", "Lock", "main"),
        lambda: api.commit_file("mine.lock.yaml", "", f"Lock {TOKEN}", "main"),
        lambda: Log(io.StringIO()).command("error", TOKEN),
    ):
        with pytest.raises((LeakError, github.GitHubError)):
            leave()
    assert not Path(place).exists()
