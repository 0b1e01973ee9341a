"""A card is rendered again without merging: in a folder, and on the Hub in one commit."""

from __future__ import annotations

from pathlib import Path

import pytest
from calls import Said, called
from loopback import Client, LoopbackHub
from loopback.wire import Answer
from places import ZOO

import merger
from merger.errors import RecipeError, VerificationError
from merger.run.options import Options
from merger.verification.rerender import recard, write_card

RECIPE = """\
merge_method: linear
models:
  - model: {0}/kjv
  - model: {0}/python
parameters: {{weight: 0.5}}
publish: {{template: own}}
"""
OURS = Options()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a template and a merge in out/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own/parts").mkdir(parents=True)
    (tmp_path / "own/parts/citation.md.j2").write_text("\n")
    (tmp_path / "mine.yaml").write_text(RECIPE.format(ZOO))
    merger.merge("mine.yaml", "out")
    return tmp_path


def test_a_card_is_the_same_until_its_template_is_another(folder: Path) -> None:
    """Also the tables of what was measured are; with another template the card alone is written."""
    before = {path.name: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()}
    made = recard("./out", OURS, "own")
    assert made.text.encode() == before["README.md"]
    assert "layer 3" in made.text
    assert write_card(made, OURS) is None
    (folder / "own/parts/citation.md.j2").unlink()
    (folder / "own/card.md.j2").write_text("# {{ title }}, {{ related.layers | length }} rows\n")
    kept = write_card(recard("out", OURS, "own"), OURS)
    assert kept is not None
    assert kept.where == str(folder / "out")
    after = {path.name: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()}
    assert after.pop("README.md").endswith(b"---\n# out, 7 rows\n")
    assert after == {name: content for name, content in before.items() if name != "README.md"}


def test_without_a_template_given_it_is_ours_and_that_is_said(folder: Path) -> None:
    """What the lock names of a machine is not looked for on this one; the recipe in the card does not tell where."""
    lock = folder / "out/merger.lock.yaml"
    lock.write_text(lock.read_text().replace("template: own", "template: /home/somebody/own"))
    made = recard("out", OURS)
    assert "<summary>The recipe" in made.text
    assert "template: ./own" in made.text
    assert [str(note).split(": ", 1)[1] for note in made.merge.recipe.warnings] == [
        "publish.template: '/home/somebody/own' is left out: a lock names nothing of the machine but the folders of "
        "its models\n    run the recipe in place of its lock; merger card is given templates by --template"
    ]


def test_a_template_may_be_given_in_place_of_the_recipes(folder: Path) -> None:
    """Nothing is written by rendering; a template that cannot be rendered is refused."""
    before = (folder / "out/README.md").read_bytes()
    (folder / "other.md").write_text("{{ title }}")
    assert recard("out", OURS, "other.md").text.endswith("---\nout\n")
    (folder / "other.md").write_text("{{ nobody }}")
    with pytest.raises(RecipeError, match="template cannot be rendered"):
        recard("out", OURS, "other.md")
    assert (folder / "out/README.md").read_bytes() == before


def test_without_what_was_measured_there_are_no_tables(folder: Path) -> None:
    """The file may be removed; a damaged one is told."""
    measured = folder / "out/merger.measured.json"
    measured.write_text("[1")
    with pytest.raises(VerificationError, match=r"merger\.measured\.json is damaged"):
        recard("out", OURS)
    measured.unlink()
    assert "layer 3" not in recard("out", OURS).text


def test_a_changed_lock_gets_no_card(folder: Path) -> None:
    """It would say of these tensors what is not so."""
    lock = folder / "out/merger.lock.yaml"
    lock.write_text(lock.read_text().replace("weight: 0.5", "weight: 0.6"))
    with pytest.raises(VerificationError, match="the lock names the plan"):
        recard("out", OURS)


def test_on_the_hub_it_is_one_commit_of_the_card_alone(served: LoopbackHub, client: Client, tmp_path: Path) -> None:
    """The parents are looked up at their locked commits; a later run still finds its merge there."""
    for name in ("kjv", "python"):
        served.add_model(f"cards/{name}", ZOO / name)
    recipe, template = tmp_path / "mine.yaml", tmp_path / "card.md.j2"
    template.write_text("# one\n")
    recipe.write_text(RECIPE.format("cards").replace("own", str(template)))
    line = ["run", str(recipe), "--to", "hf://org/carded", "--quiet"]
    assert client(called, line).code == 0
    before, commits = served.tree("org/carded"), served.commits("org/carded")
    mine = ["card", "org/carded", "--template", str(template)]
    said: Said = client(called, mine)
    assert (said.code, said.out) == (0, "nothing to do: the card of org/carded is the same\n"), said.err
    assert served.commits("org/carded") == commits

    template.write_text("# two\n")
    served.commit("cards/kjv", {"README.md": b"moved on"})
    printed = client(called, [*mine, "--print"])
    assert (printed.out.split("---\n")[2], served.commits("org/carded")) == ("# two\n", commits)
    said = client(called, mine)
    head = served.head("org/carded")
    assert said.out == f"wrote the card of {served.url}/org/carded at commit {head[:12]}\n", said.err
    assert served.read("org/carded", "README.md").decode() == printed.out
    newest = served.commits("org/carded")[0]
    assert (newest.parent, list(newest.files)) == (commits[0].sha, ["README.md"])
    assert newest.title == f"Render the card again [{commits[0].sha[:16]}]"
    after = served.tree("org/carded")
    assert {name for name in before if before[name] != after[name]} == {"README.md"}
    assert client(called, ["verify", "org/carded"]).code == 0

    recipe.with_name("mine.lock.yaml").write_bytes(served.read("org/carded", "merger.lock.yaml"))
    again = client(called, line[:-1])
    assert (again.code, served.head("org/carded")) == (0, head), again.err
    assert again.out == f"nothing to do: it is already {served.url}/org/carded at commit {commits[0].sha[:12]}\n"

    pointed = client(called, [*mine, "--new-version", "org/next"])
    assert pointed.code == 0, pointed.err
    assert "\nnew_version: org/next\n" in client(called, [*mine, "--print"]).out
    assert client(called, [*mine, "--new-version", "../next"]).code == 2
    head = served.head("org/carded")

    template.write_text("# three\n")
    served.fail(
        lambda request: request.path.endswith("/api/validate-yaml"),
        spoil=lambda _: Answer(400, {}, b'{"errors": [{"message": "no such card"}], "warnings": []}'),
    )
    refused = client(called, mine)
    assert refused.code == 6
    assert "the Hub refuses the card" in refused.err
    assert client(called, ["card", "org/carded@main"]).code == 2
    assert served.head("org/carded") == head


def crossed(repo: str, template: str) -> str:
    """What is said when somebody else commits while the card is rendered."""
    from huggingface_hub import HfApi

    from merger.errors import UploadError

    made = recard(repo, Options(), template)
    HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=repo)
    try:
        write_card(made, Options())
    except UploadError as error:
        return str(error)
    return ""


def test_a_repo_that_moved_on_meanwhile_is_left_alone(served: LoopbackHub, client: Client, tmp_path: Path) -> None:
    """Somebody may have written a card of their own."""
    for name in ("kjv", "python"):
        served.add_model(f"crossed/{name}", ZOO / name)
    (tmp_path / "mine.yaml").write_text(RECIPE.format("crossed").replace("publish: {template: own}\n", ""))
    assert client(called, ["run", str(tmp_path / "mine.yaml"), "--to", "hf://org/crossed", "--quiet"]).code == 0
    card = served.read("org/crossed", "README.md")
    (tmp_path / "card.md").write_text("# another\n")
    assert "main of org/crossed moved" in client(crossed, "org/crossed", str(tmp_path / "card.md"))
    assert served.read("org/crossed", "README.md") == card
