"""What all pictures share: lines that can be told apart, text that stays text, a style for print.

matplotlib reads most of its settings when a picture is drawn, and those of fonts when it is saved.
"""

import math
import textwrap
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.text import Text

Settings = dict[Any, Any]  # matplotlib's, by its names

# Okabe & Ito's colours, which are distinct in every kind of colour vision
COLOURS = ("#1f4e79", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#777777")
# one after the other as well, so that lines are told apart without any colour
DASHES = ("-", "--", ":", "-.")

# Text of a PDF or SVG as text, which is searched, copied and edited, and not as outlines; Type 42
# also is what publishers accept, where matplotlib's default of Type 3 is refused.
TEXT_AS_TEXT: Settings = {
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.fonttype": "none",
}
# inches: of a column on a page with two of them (ICML), and of the text of one (NeurIPS, ICLR)
COLUMN = 3.25
TEXT_WIDTH = 5.5
GOLDEN = 0.62  # height over width
# points
BODY = 8
SMALL = 7
POINTS = 72  # an inch
LETTER = 0.6  # of the font's size, the mean width of a letter
ROOM = 0.7  # of a figure's side, for a label: it is centred on its axes, which is off the middle


def line_style(number: int) -> tuple[str, str]:
    """The colour and the dash of line ``number``, from 0; 28 pairs before one comes again."""
    return COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]


def printed(width: float = COLUMN, height: float | None = None) -> AbstractContextManager[None]:
    """A context in which pictures are drawn and saved as a paper prints them.

    New figures have this size, fonts have 7 and 8 points, lines are thin, and PDF and SVG keep text
    as text. Save inside it as well: fonts are chosen then. Afterwards all is as it was. Figures
    that exist, and axes of yours, keep their size.

    Args:
        width: inches; COLUMN (3.25) by default, or TEXT_WIDTH (5.5).
        height: inches; by default 0.62 of the width.
    Raises:
        ValueError: a size that is not positive and finite.
    """
    size = (width, GOLDEN * width if height is None else height)
    for name, value in zip(("width", "height"), size, strict=True):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(
                f"{name} must be a positive number of inches, got {value}; a column of a paper "
                f"is about {COLUMN} wide"
            )
    return matplotlib.rc_context({**TEXT_AS_TEXT, **_print(size)})


def wrap_labels(figure: Figure) -> None:
    """Breaks titles and labels of axes that would reach beyond a small figure into lines."""
    width, height = figure.get_size_inches()
    for axes in figure.get_axes():
        _wrap(axes.title, ROOM * width)
        _wrap(axes.xaxis.label, ROOM * width)
        _wrap(axes.yaxis.label, ROOM * height)


def _wrap(text: Text, inches: float) -> None:
    letters = int(inches * POINTS / (LETTER * float(text.get_fontsize())))
    lines = text.get_text().split("\n")
    text.set_text("\n".join(textwrap.fill(line, max(letters, 1)) for line in lines))


def _print(size: tuple[float, float]) -> Settings:
    return {
        "figure.figsize": size,
        "figure.constrained_layout.use": True,
        "font.size": BODY,
        "axes.titlesize": BODY,
        "axes.labelsize": BODY,
        "xtick.labelsize": SMALL,
        "ytick.labelsize": SMALL,
        "legend.fontsize": SMALL,
        "axes.linewidth": 0.6,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "xtick.minor.width": 0.4,
        "ytick.minor.width": 0.4,
        "lines.linewidth": 1.0,
        "savefig.dpi": 300,
        "savefig.bbox": "standard",  # a tight box would be of another width than the column
    }
