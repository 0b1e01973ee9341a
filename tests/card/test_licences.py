"""What licence a merge may have: proposed, stated, refused; and what the parents' licences ask."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

import merger
from merger.card.facts import PlanSummary
from merger.card.licences import Judgement, _find_licence, judge, keys, propose_licences, stated_licences
from merger.card.render import render
from merger.card.terms import ALIASES, HUB_NAMES, TERMS, Kind
from merger.cli import markdown
from merger.cli import text as console
from merger.errors import MergerError, MismatchError, RecipeError
from merger.methods.registry import methods
from merger.planning.plan import Plan
from merger.recipe.model import Publish

Planned = Callable[..., Plan]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small models, in a folder of their own."""
    folder = tmp_path_factory.mktemp("models")
    tiny.models(folder, "one", "two")
    return folder


@pytest.fixture
def planned(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planned:
    """The plan of a merge of models whose cards state these licences, with this publish: block."""
    monkeypatch.chdir(tmp_path)

    def make(licences: Sequence[Any], publish: dict[str, Any] | None = None, to: str | None = None) -> Plan:
        for name, licence in zip(("one", "two"), licences, strict=True):
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            for file in (models / name).iterdir():
                (folder / file.name).exists() or os.link(file, folder / file.name)
            card = licence if isinstance(licence, dict) else {"license": licence} if licence else {}
            (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
        recipe = {"merge_method": "linear", "models": [{"model": "./one"}, {"model": "./two"}],
                  "parameters": {"weight": 1}, **({"publish": publish} if publish else {})}  # fmt: skip
        Path("mine.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        return merger.plan("mine.yaml", to)

    return make


def names(*licences: str) -> list[str]:
    """What is proposed for parents of these licences."""
    return [licence.name for licence in propose_licences([_find_licence(licence) for licence in licences])]


@pytest.mark.parametrize(
    ("parents", "result"),
    [
        (["mit", "mit"], ["mit"]),
        (["mit", "apache-2.0"], ["apache-2.0"]),
        (["cc0-1.0", "mit", "bsd-3-clause"], ["bsd-3-clause"]),
        (["apache-2.0", "llama3.1"], ["llama3.1"]),
        (["llama3", "llama3.1"], ["llama3.1", "llama3"]),
        (["mit", "cc-by-nc-4.0"], ["cc-by-nc-4.0"]),
        (["cc-by-nc-4.0", "cc-by-nc-sa-4.0"], ["cc-by-nc-sa-4.0"]),
        (["llama3", "cc-by-nc-4.0"], ["cc-by-nc-4.0", "llama3"]),
        (["cc-by-nc-4.0", "mrl"], ["mrl"]),
        (["gpl-3.0", "cc-by-sa-4.0", "mit"], ["gpl-3.0"]),
        (["agpl-3.0", "gpl-3.0"], ["agpl-3.0"]),
        (["gemma", "gemma"], ["gemma"]),
        (["qwen", "apache-2.0"], ["qwen"]),
        (["Apache 2.0", "Apache-2.0"], ["apache-2.0"]),
        (["MIT OR GPL-3.0-only", "mit"], ["mit"]),
        (["mit AND llama3", "mit"], ["llama3"]),
        (["not stated", "mit"], []),
        (["some-licence", "some-licence"], ["some-licence"]),
        (["some-licence", "mit"], []),
        (["other", "other"], []),
        (["cc-by-nc-nd-4.0", "mit"], []),
        (["cc-by-nd-4.0", "cc-by-nd-4.0"], []),
    ],
)
def test_the_strictest_that_fits_is_proposed(parents: list[str], result: list[str]) -> None:
    """And beside it whatever else has to be passed on; nothing where a parent's terms are not known."""
    assert names(*parents) == result
    assert names(*reversed(parents)) == result


def test_what_is_proposed_fits(planned: Planned) -> None:
    """No parent's licence of the table speaks against what is proposed for it with any other, or a conflict says so."""
    for one in TERMS:
        for other in TERMS:
            result = propose_licences([_find_licence(one), _find_licence(other)])
            kinds = {kind for terms in (TERMS[one], TERMS[other]) for kind in terms.asks}
            if Kind.NO_DERIVATIVES in kinds:
                assert not result
            elif Kind.NON_COMMERCIAL in kinds:
                assert any(licence.asks(Kind.NON_COMMERCIAL) for licence in result)
            elif Kind.SAME_TERMS in kinds or Kind.SHARE_ALIKE in kinds:
                assert any(licence.asks(Kind.SAME_TERMS, Kind.SHARE_ALIKE) for licence in result)


@pytest.mark.parametrize(
    ("parents", "licence", "said"),
    [
        (("cc-by-nc-4.0", "mit"), "apache-2.0",
         "one (cc-by-nc-4.0) allows no commercial use, and apache-2.0 does\n    leave it out, for cc-by-nc-4.0 fits;"),
        (("mit", "llama3.1"), "mit", "two (llama3.1) asks that its terms are passed on, and mit does not"),
        (("cc-by-sa-4.0", "mit"), "mit", "one (cc-by-sa-4.0) is to be passed on under its own licence, and mit is"),
        (("cc-by-sa-4.0", "llama3"), "llama3 AND cc-by-sa-4.0",
         "one (cc-by-sa-4.0) allows no further restrictions, and llama3 adds some\n    leave the model out; or say"),
        (("mit", "cc-by-nd-4.0"), "mit", "two (cc-by-nd-4.0) does not allow to publish what is made of it"),
        (("mit", "qwen-research"), "other", "two (qwen-research) asks that its terms are passed on, and other does"),
        (("mrl", "mit"), "some words of mine", "one (mrl) asks that its terms are passed on, and some words of mine"),
    ],
)  # fmt: skip
def test_a_licence_that_a_parent_does_not_allow_is_refused(
    parents: tuple[str, str], licence: str, said: str, planned: Planned
) -> None:
    """Where the recipe states it, whatever the destination, with what would fit."""
    with pytest.raises(RecipeError) as refused:
        planned(parents, {"license": licence})
    (problem,) = refused.value.problems
    assert str(problem.at) == "mine.yaml:8:12"
    assert said in str(problem)


@pytest.mark.parametrize(
    ("parents", "said"),
    [
        (("mit", "cc-by-nc-nd-4.0"), ["two (cc-by-nc-nd-4.0) does not allow to publish what is made of it"]),
        (("cc-by-sa-4.0", "llama3"), ["one (cc-by-sa-4.0) allows no further restrictions, and llama3 adds some"]),
        (("gpl-3.0", "cc-by-nc-sa-4.0"), ["one (gpl-3.0) allows no further restrictions, and cc-by-nc-sa-4.0 adds some",
                                          "two (cc-by-nc-sa-4.0) allows no further restrictions, and gpl-3.0 adds"]),
    ],
)  # fmt: skip
def test_what_no_licence_fits_is_not_published(parents: tuple[str, str], said: list[str], planned: Planned) -> None:
    """It is refused at the model; in a folder of one's own it may lie, and the plan tells."""
    with pytest.raises(MismatchError) as refused:
        planned(parents, to="hf://org/x")
    assert len(refused.value.problems) == len(said)
    for problem, what in zip(refused.value.problems, said, strict=True):
        line = 3 if what.startswith("one") else 4
        assert str(problem).startswith(f"mine.yaml:{line}:10: models[./{what[:3]}]: {what}")
    told = console.plan_text(PlanSummary(planned(parents)))
    assert all(f"warning: {what}" in told for what in said)


def test_the_recipe_may_say_why(planned: Planned) -> None:
    """Its words stand in plan, comment and card, beside what they override."""
    made = planned(("cc-by-nc-4.0", "mit"), {"license": "mit", "license_override": "*I* made it"}, to="hf://org/x")
    card = render(made, methods(), "org/x")
    assert "> **Conflict:** one (cc-by-nc-4.0) allows no commercial use, and mit does." in card
    assert "The publisher says why it is published all the same: \\*I\\* made it" in card
    assert "published all the same: *I* made it" in console.plan_text(PlanSummary(made))
    assert "**Published all the same:** \\*I\\* made it" in markdown.plan_section(PlanSummary(made))


def judged(planned: Planned, *licences: Any, **publish: Any) -> Judgement:
    return judge(planned(licences, publish or None))


def test_the_plan_tells_of_licences(planned: Planned) -> None:
    """As text, as Markdown and as JSON: what is proposed, and what the parents' licences ask."""
    made = planned(("llama3.1", "apache-2.0"))
    assert "licence llama3.1 (proposed)\n  apache-2.0  credit, notice\n  llama3.1    credit," in console.plan_text(
        PlanSummary(made)
    )
    row = "| licence | `llama3.1` (proposed, as the strictest that fits); the parents' licences ask: credit, notice, "
    assert row in markdown.plan_section(PlanSummary(made))
    told = json.loads(json.dumps(console.plan_json(PlanSummary(made))))["licence"]
    assert told["license"] == "llama3.1"
    assert not told["stated"]
    assert told["asks"]["apache-2.0"] == ["credit", "notice"]
    assert told["conflicts"] == told["notes"] == []


def test_names_that_a_licence_asks_for(planned: Planned) -> None:
    """What has to stand beside the model stands in the card; a name that does not begin as it has to is told."""
    made = planned(("llama3.1", "llama3.1"), {"repo": "org/mine"})
    card = render(made, methods(), "org/mine")
    assert "**Built with Llama**" in card
    assert "Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright © Meta Platforms, Inc." in card
    note = "the Llama 3.1 Community License asks that the result's name begins with Llama: mine does not"
    assert judge(made).notes == (note,)
    assert f"warning: {note}" in console.plan_text(PlanSummary(made))
    assert PlanSummary(made, "hf://org/Llama-3.1-mine").licence.notes == ()
    assert judge(planned(("llama3", "mit")), "org/llama3-x").notes == ()


@pytest.mark.parametrize(
    ("publish", "data"),
    [
        ({"license": "MIT"}, {"license": "mit"}),
        ({"license": "llama3 and llama3.1"}, {"license": ["llama3", "llama3.1"]}),
        ({"license": "qwen"}, {"license": "other", "license_name": "qwen", "license_link": TERMS["qwen"].url}),
        ({"license": "Some Licence 1.0"}, {"license": "other", "license_name": "some-licence-1.0"}),
        ({"license": "other", "license_name": "mine-1.0", "license_link": "LICENSE"},
         {"license": "other", "license_name": "mine-1.0", "license_link": "LICENSE"}),
        ({"license": "other", "license_name": "mine", "license_link": "javascript:alert(1)"},
         {"license": "other", "license_name": "mine"}),
        ({"license": "<script>"}, {"license": "other", "license_name": "script"}),
        ({"license": "mit\ntags: [evil]\n---\n"}, {"license": "other", "license_name": "mit-tags-evil"}),
        ({"license": "\U0001f600"}, {"license": "other", "license_name": "unnamed"}),
        ({}, {}),
    ],
)  # fmt: skip
def test_what_the_hub_is_told(publish: dict[str, str], data: dict[str, Any]) -> None:
    """Its own identifiers where it has one, all of several; else other with a name and a link that are fit for it."""
    assert keys(stated_licences(Publish(**publish))) == data  # type: ignore[arg-type]


def test_a_parents_own_name_and_link_are_carried_over(planned: Planned) -> None:
    """A licence that the Hub has no identifier for is named as the parents name it."""
    card = {"license": "other", "license_name": "some-licence", "license_link": "https://example.org/it"}
    found = judged(planned, card, card)
    assert keys(found.licences) == card


def test_a_licence_file_tells_where_a_card_does_not(planned: Planned, tmp_path: Path) -> None:
    """It is known by its words; and passed on beside the result."""
    planned((None, "mit"))
    (tmp_path / "one" / "LICENSE.txt").write_text("            Apache License\n        Version 2.0, January 2004")
    made = planned((None, "mit"))
    assert [model.licence for model in made.locked.models] == ["apache-2.0", "mit"]
    assert judge(made).name == "apache-2.0"
    assert "LICENSE.txt" in made.texts.taken


def test_parents_of_unknown_licence(planned: Planned) -> None:
    """They leave the licence open, or, where the recipe states it, are named all the same."""
    found = judged(planned, "some-licence", None)
    assert (found.name, found.licences) == ("", ())
    assert found.notes == ("the licence is not settled: what one (some-licence), two (not stated) asks is not known "
                           "here; state the result's with publish: {license: ...}",)  # fmt: skip
    found = judged(planned, "some-licence", "mit", license="mit")
    assert found.notes == ("what one (some-licence) asks is not known here: see for yourself",)


def test_the_table_is_sound() -> None:
    """Names are in lower case, the Hub's or told otherwise; aliases and covers name licences of the table."""
    assert set(ALIASES.values()) <= TERMS.keys()
    assert not ALIASES.keys() & TERMS.keys()
    for name, terms in TERMS.items():
        assert name == name.lower()
        assert set(terms.covers) <= TERMS.keys()
        assert terms.url.startswith("https://")
        assert (terms.built_with is not None) == (Kind.NAME in terms.asks)
        assert not terms.notice or Kind.NOTICE in terms.asks
    assert TERMS.keys() - HUB_NAMES == {"qwen", "qwen-research", "deepseek", "falcon", "mrl", "mnpl"}


def test_a_refusal_names_every_parent(planned: Planned) -> None:
    """All at once."""
    with pytest.raises(MergerError) as refused:
        planned(("cc-by-nc-4.0", "llama3"), {"license": "mit"})
    assert [problem.what.split()[0] for problem in refused.value.problems] == ["one", "two"]


def test_files_that_licences_ask_to_be_passed_on(planned: Planned, tmp_path: Path) -> None:
    """The donor's licence lies beside the result, the others' in a folder; NOTICE holds all sentences."""
    planned(("llama3.1", "apache-2.0"))
    for name, files in {
        "one": {"LICENSE": "of one", "NOTICE": "made by one\n", "USE_POLICY.md": "be good"},
        "two": {"LICENSE": "of two", "NOTICE.txt": "made by two\n", "USE_POLICY.md": "be good",
                "licences/org--x.LICENSE": "of x"},
    }.items():  # fmt: skip
        for file, text in files.items():
            (tmp_path / name / file).parent.mkdir(exist_ok=True)
            (tmp_path / name / file).write_text(text)
    merger.merge("mine.yaml", str(tmp_path / "out"))
    out = tmp_path / "out"
    assert (out / "LICENSE").read_text() == "of one"
    assert (out / "USE_POLICY.md").read_text() == "be good"
    assert {path.name: path.read_text() for path in (out / "licences").iterdir()} == {
        "two.LICENSE": "of two",
        "org--x.LICENSE": "of x",
    }
    assert (out / "NOTICE").read_text() == f"made by one\n\nmade by two\n\n{TERMS['llama3.1'].notice}\n"
    lock = yaml.safe_load((out / "merger.lock.yaml").read_text())
    assert {"LICENSE", "NOTICE", "licences/two.LICENSE"} <= {file["file"] for file in lock["output"]}
    assert "LICENSE" in {file["file"] for file in lock["models"][1]["files"]}
