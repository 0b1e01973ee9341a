"""What all pictures of the card share: colours that are legible on light and dark pages, and the making of files.

matplotlib is imported when something is drawn, not before. Not here: what is drawn (portrait, plots).
"""

from __future__ import annotations

import io
import logging
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from merger.models.side_files import PICTURES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#7a7f87"
"""Text and axes: a grey that has a contrast of 4 to 1 with white and with a page of nearly black."""

HUES = ("#3d7fc4", "#cf5b32", "#2b9a74", "#b0639f", "#a8801f", "#6f6ad0", "#3f97a5", "#8a8f98")
"""Lines: neighbours differ in lightness too, and each has a marker and a dash of its own for who sees no hue."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2, 1, 2)))

WIDTH = 8.0
"""Inches of a chart, which cards show at about a hundred dots each."""

_DOTS, _BYTES = (150, 100, 75), 60_000
"""Dots an inch: the most that keep the file as small as that."""

_COLOURS = 32
_FONTS = ["DejaVu Sans", "Verdana", "sans-serif"]
_STYLE: Any = {
    "font.family": _FONTS,
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "auto",
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar in a model's name is a dollar
    "text.usetex": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "merger",  # the same picture, the same bytes
}
_one_at_a_time = threading.Lock()
"""matplotlib's settings are the process's."""


@dataclass(frozen=True)
class Picture:
    """A picture of the card.

    Args:
        name: the file's name without its ending.
        alt: what it shows, for who does not see it.
        paint: what fills a figure with it.
        formats: endings of the files in which it is kept.
    """

    name: str
    alt: str
    paint: Callable[[Figure], None]
    formats: tuple[str, ...] = ("png",)

    @property
    def place(self) -> str:
        """The file that the card shows."""
        return f"{PICTURES}{self.name}.png"

    @cached_property
    def files(self) -> Mapping[str, bytes]:
        """The bytes of ``pictures/name.png`` and the like, nothing behind what is drawn.

        Drawn when asked for: it takes longer than the card's text, which alone is compared by `verify`.
        """
        with _one_at_a_time, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a letter that the font lacks is drawn as a box, and that will do
            logging.getLogger("matplotlib").setLevel(logging.ERROR)  # of fonts it looks for, and where it keeps them
            import_drawing()
            import matplotlib
            from matplotlib.figure import Figure

            with matplotlib.rc_context():
                matplotlib.rcdefaults()  # whatever the user set for figures of their own
                matplotlib.rcParams.update(_STYLE)
                figure = Figure()
                self.paint(figure)
                return {f"{PICTURES}{self.name}.{kind}": _save(figure, kind) for kind in self.formats}


def import_drawing() -> None:
    """Import what draws, without the descriptions of all that could be drawn, which take a quarter of that time."""
    from matplotlib import artist

    describe = artist.kwdoc
    artist.kwdoc = lambda artist: ""
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.backends.backend_svg
        import matplotlib.figure  # noqa: F401
    finally:
        artist.kwdoc = describe


def warm_fonts() -> None:
    """Find fonts and read them, which takes longer than a picture."""

    def paint(figure: Figure) -> None:
        figure.text(0, 0, "a")

    _ = Picture("", "", paint, ("png", "svg")).files


def _save(figure: Figure, kind: str) -> bytes:
    if kind == "svg":
        held = io.BytesIO()
        figure.savefig(held, format=kind, metadata={"Date": None, "Creator": None})
        return held.getvalue()
    for dots in _DOTS:
        if len(small := _draw_png(figure, dots)) <= _BYTES:
            break
    return small


def _draw_png(figure: Figure, dots: int) -> bytes:
    """As PNG, with few colours in a quarter of the bytes; `savefig` would lay it out and draw it twice."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    figure.set_dpi(dots)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    held = io.BytesIO()
    image = Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba()))
    image.quantize(_COLOURS, method=Image.Quantize.FASTOCTREE).save(held, "PNG", optimize=True)
    return held.getvalue()


def shorten_middle(text: str, length: int) -> str:
    """A text with its middle left out, if it is longer than that.

    >>> shorten_middle("abcdefghij", 7)
    'abc…hij'
    """
    if len(text) <= length:
        return text
    head = length // 2
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def legible(label: str) -> str:
    """A label that a legend shows: matplotlib takes one that begins with an underscore for none."""
    return f"\u200b{label}" if label.startswith("_") else label
