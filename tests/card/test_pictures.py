"""The card's pictures are small, the same each time, and hold every name as it is."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest
import tiny
from matplotlib.figure import Figure
from PIL import Image

import merger
from merger.card.ancestors import Family, Member
from merger.card.pictures import movement as plots
from merger.card.pictures.canvas import Picture
from merger.card.pictures.lineage import columns, portrait
from merger.card.pictures.movement import movement_plot, settings_plot
from merger.card.relations import OUTSIDE, Apart, Line, Parameter, Track

COMMIT = "0123456789" * 4
KIN = Family(
    (
        Member("org/merge", made="merge by ties", parents=(1, 2, 3)),
        Member("org/one", COMMIT, "mit", "fine-tune", parents=(3,)),
        Member("org/two", COMMIT, "mit", "merge by slerp", parents=(4, 3)),
        Member("org/base", COMMIT, "mit"),
        Member("org/gone", note="deleted, renamed or private"),
    )
)


def texts(drawn: Picture) -> list[str]:
    """All words of the SVG."""
    (svg,) = (content for name, content in drawn.files.items() if name.endswith(".svg"))
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def track(name: str, layers: int) -> Track:
    """A parent with the distances of a small wave."""
    found = {OUTSIDE: Apart(0.1, 10.0, 0.5, 1.0, 1.0, 1, 10)}
    found |= {("layers", layer): Apart(0.1 + layer % 7, 10.0, 0.5, 1.0, 1.0, layer % 9, 10) for layer in range(layers)}
    return Track(name, found)


def one_line(name: str, owner: str = "") -> Parameter:
    """A parameter with a gradient."""
    return Parameter(name, (Line(owner, "", {("layers", layer): layer / 10 for layer in range(10)}),), None)


def drawn_all() -> Mapping[str, bytes]:
    """Every picture of an ordinary merge."""
    pictures = (portrait(KIN), movement_plot([track("one", 32), track("two", 32)]), settings_plot([one_line("t")]))
    return {name: content for found in pictures if found is not None for name, content in found.files.items()}


def test_files_are_small_and_without_ground() -> None:
    """Less than 60 kB each; what lies behind a picture shows through, so that it fits a light page and a dark one."""
    files = drawn_all()
    assert list(files) == [
        "pictures/lineage.png", "pictures/lineage.svg", "pictures/movement.png", "pictures/settings.png",
    ]  # fmt: skip
    assert all(len(content) < 60_000 for content in files.values())
    for name, content in files.items():
        if name.endswith(".png"):
            assert Image.open(io.BytesIO(content)).convert("RGBA").getpixel((1, 1))[3] == 0  # type: ignore[index]


def test_the_same_picture_has_the_same_bytes() -> None:
    """So that a merge that is made again, or resumed, or in parts, leaves the same files."""
    assert drawn_all() == drawn_all()


def test_the_extremes_stay_small() -> None:
    """Twenty parents of a hundred layers, and a family of a hundred."""
    crowd = tuple(Member(f"org/a-model-with-quite-a-name-{n}", COMMIT, "mit", "fine-tune") for n in range(100))
    family = Family((Member("org/merge", parents=tuple(range(1, 101))), *crowd))
    chart = movement_plot([track(f"org/a-model-with-quite-a-name-{n}", 100) for n in range(20)])
    assert chart is not None
    drawn = portrait(family)
    assert all(len(content) < 60_000 for found in (chart, drawn) for content in found.files.values())
    assert "61 more are in the text only" in drawn.alt


def test_a_family_stands_in_columns() -> None:
    """Each model farther left than all that were made of it, whichever way it is reached; a circle is no way."""
    assert columns(KIN) == [0, 1, 1, 2, 2]
    circle = Family((Member("m", parents=(1,)), Member("a", parents=(2,)), Member("b", parents=(1,))))
    assert columns(circle) == [0, 1, 2]
    assert texts(portrait(circle))


def test_names_are_drawn_as_they_are() -> None:
    """A dollar begins no formula, an underscore hides nothing, an angle is no tag; unknown letters do no harm."""
    family = Family((Member("$x^2$", parents=(1,)), Member("<b>_y_ & 名", licence="$z$")))
    assert texts(portrait(family)) == ["$x^2$", "<b>_y_ & 名", "$z$"]
    chart = Picture("x", "", partial(plots._paint_movement, found=[track("_one", 3), track("$two$", 3)]), ("svg",))
    assert texts(chart)[-2:] == ["\u200b_one", "$two$"]


def test_the_layers_of_a_stack_are_joined_by_a_line() -> None:
    """One line for each stack, and a mark without one for what lies outside of them."""
    apart = Apart(0.1, 10.0, 0.5, 1.0, 1.0, 1, 10)
    layers = {
        OUTSIDE: apart,
        **{(stack, at): apart for stack, most in (("encoder", 3), ("decoder", 5)) for at in range(most)},
    }
    figure = Figure()
    plots._paint_movement(figure, [Track("one", layers)])
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [5, 3, 1, 0]  # the last is the legend's


def test_every_picture_of_a_card_lies_beside_it(tmp_path: Path) -> None:
    """With words for who does not see it; and none that the card does not show."""
    one, two = tiny.model(tmp_path / "one", 1), tiny.model(tmp_path / "two", 2)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"merge_method: slerp\nbase_model: {one}\nmodels: [{{model: {one}}}, {{model: {two}}}]\n"
                      "parameters: {t: [0.1, 0.9]}\n")  # fmt: skip
    merger.merge(recipe, str(tmp_path / "out"))
    shown = re.findall(r"!\[(.+)\]\((pictures/\w+\.png)\)", (tmp_path / "out/README.md").read_text())
    assert [alt for alt, _ in shown] == [
        "By layer and kind of tensor: t",
        "Lineage of out: 2 models, 2 of them its parents",
        "By layer, how far the merge is from one, two: relative distance, cosine, sign conflicts",
    ]
    there = {f"pictures/{item.name}" for item in (tmp_path / "out/pictures").iterdir()}
    assert there == {place for _, place in shown} | {"pictures/lineage.svg"}


def test_nothing_to_draw() -> None:
    """Without a gradient or a measurement there is no picture."""
    assert settings_plot([Parameter("t", (Line("", "", {("layers", 0): 0.5}),), "0.5")]) is None
    assert movement_plot([]) is None


def test_many_lines_get_panels_of_their_own() -> None:
    """One for each parent; what is too much even so is said."""
    lines = tuple(Line(f"org/{n}", kind, {("layers", 0): n}) for n in range(15) for kind in ("mlp", "attn"))
    found = settings_plot([Parameter("density", lines, None)])
    assert found is not None
    assert found.alt == "By layer and kind of tensor: density; 3 more panels are not drawn"


def test_settings_of_the_user_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what a matplotlibrc says, nor is anything changed for figures of the program's own."""
    import matplotlib

    before = drawn_all()
    monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", "red")
    assert drawn_all() == before
    assert matplotlib.rcParams["axes.facecolor"] == "red"


def test_no_window_and_no_pyplot() -> None:
    """A run on a server draws without a display."""
    code = (
        "import sys; from merger.card.pictures.canvas import Picture; assert 'matplotlib' not in sys.modules; "
        "Picture('x', '', lambda figure: None).files; print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("False\n", "")
    assert Picture("x", "", lambda figure: None).place == "pictures/x.png"
