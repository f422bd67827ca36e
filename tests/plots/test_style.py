"""The style for print: files are read back, by a PDF reader and an XML parser of others."""

import math
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.figure import Figure
from pypdf import PdfReader

from hessian_tools.plots import COLUMN, TEXT_WIDTH, printed
from hessian_tools.plots.spectra import written
from hessian_tools.plots.style import COLOURS, DASHES, line_style
from hessian_tools.shown import Drawable

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_results import SAMPLES

NAMES = [name for name, result in SAMPLES.items() if isinstance(result, Drawable)]
WIDE = {"PartitionReport"}  # a word beside every row: as wide as a page's text
SVG = "{http://www.w3.org/2000/svg}"
POINTS = 72  # an inch


def labelled():
    figure = Figure(layout="constrained")
    figure.suptitle("A spectrum")
    figure.subplots().set_xlabel("eigenvalue of the Hessian")
    return figure


def words_of_svg(path):
    root = ElementTree.parse(path).getroot()
    return root, [node.text for node in root.iter(f"{SVG}text")]


def test_an_svg_has_the_width_of_a_column_and_its_text(tmp_path):
    with printed(height=2):
        SAMPLES["Eigenpairs"].plot().figure.savefig(tmp_path / "a.svg")
    root, words = words_of_svg(tmp_path / "a.svg")
    assert root.get("width") == f"{COLUMN * POINTS:g}pt" and root.get("height") == "144pt"
    assert "eigenvalue" in words and "number" in words


def test_a_pdf_has_the_width_of_the_text_and_its_words(tmp_path):
    with printed(TEXT_WIDTH):
        SAMPLES["Eigenpairs"].plot().figure.savefig(tmp_path / "a.pdf")
    (page,) = PdfReader(tmp_path / "a.pdf").pages
    width, height = float(page.mediabox.width), float(page.mediabox.height)
    assert width == pytest.approx(TEXT_WIDTH * POINTS)
    assert height == pytest.approx(0.62 * TEXT_WIDTH * POINTS)
    assert "eigenvalue" in page.extract_text()
    assert subtypes(page) <= {"/Type0", "/TrueType"}


def subtypes(page):
    return {font.get_object()["/Subtype"] for font in page["/Resources"]["/Font"].values()}


def test_without_the_style_matplotlib_writes_outlines(tmp_path):
    """What the tests above would see if the settings had no effect."""
    labelled().savefig(tmp_path / "a.svg")
    assert words_of_svg(tmp_path / "a.svg")[1] == []
    labelled().savefig(tmp_path / "a.pdf")
    (page,) = PdfReader(tmp_path / "a.pdf").pages
    assert subtypes(page) == {"/Type3"}


def test_pictures_of_commands_keep_text_as_text_too(tmp_path):
    _, words = words_of_svg(written(labelled(), tmp_path / "a.svg"))
    assert "eigenvalue of the Hessian" in words and "A spectrum" in words
    (page,) = PdfReader(written(labelled(), tmp_path / "a.pdf")).pages
    assert "eigenvalue of the Hessian" in page.extract_text()
    assert "/Type3" not in subtypes(page)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_reaches_beyond_the_page(name):
    with printed(TEXT_WIDTH if name in WIDE else COLUMN):
        figure = SAMPLES[name].plot().figure
        figure.draw_without_rendering()
        box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    slack = 0.05
    assert box.x0 >= -slack and box.y0 >= -slack
    assert box.x1 <= width + slack and box.y1 <= height + slack


def test_lines_differ_by_their_dash_alone():
    styles = [line_style(number) for number in range(len(COLOURS) * len(DASHES))]
    assert len(set(styles)) == len(styles)
    assert len({dash for _, dash in styles[:4]}) == 4


def test_afterwards_all_is_as_it_was():
    before = dict(matplotlib.rcParams)
    with printed():
        assert dict(matplotlib.rcParams) != before
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("size", [0, -1, math.nan, math.inf])
def test_sizes_that_are_none_are_refused(size):
    with pytest.raises(ValueError, match="width must be a positive number of inches"):
        printed(size)
    with pytest.raises(ValueError, match="height must be a positive number of inches"):
        printed(3, size)
