"""The committed pictures are what is drawn from the committed results."""

import importlib.util
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from PIL import Image

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "figures").glob("*.py"))
SCRIPTS.remove("runs")


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "figures" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_same(committed, drawn):
    """But for the rounding of single pixels."""
    one, other = (image.imread(path)[..., :3] for path in (committed, drawn))
    assert one.shape == other.shape, f"draw {committed.name} again"
    differing = (np.abs(one - other).max(axis=-1) > 0.1).mean()
    assert differing < 1e-5, f"draw {committed.name} again: {differing:.2%} of it differs"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_figure_is_that_of_its_result(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    target = tmp_path / "drawn.png"
    module = script(name)
    module.main(target=str(target))
    assert_same(ROOT / "figures" / f"{name}.png", target)


def test_the_pictures_of_runs_are_those_of_their_results(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    script("runs").main(str(tmp_path))
    drawn = sorted(tmp_path.glob("*/*.png"))
    assert len(drawn) > 3
    for path in drawn:
        assert_same(ROOT / "results" / path.relative_to(tmp_path), path)


SCREENSHOTS = {Path("docs/how-to/report.png"), Path("docs/how-to/followed.png")}  # of a browser


def linked_pictures():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+\.png)\)", page.read_text()):
            yield (page.parent / target).resolve().relative_to(ROOT)


def test_every_picture_of_a_page_is_drawn_by_a_script():
    linked = set(linked_pictures())
    of_scripts = {Path("figures") / f"{name}.png" for name in SCRIPTS}
    of_runs = {Path("results") / run / picture for run, picture in script("runs").RUNS.items()}
    assert len(linked) > 10
    assert linked <= of_scripts | of_runs | SCREENSHOTS


def test_another_result_is_another_picture(tmp_path):
    """A ten thousandth of a picture is more than the comparison lets pass."""
    committed = ROOT / "figures" / "precision.png"
    changed = tmp_path / "precision.png"
    shutil.copy(committed, changed)
    assert_same(committed, changed)
    with Image.open(committed) as opened:
        picture = opened.convert("RGB")
    side = int((1e-4 * picture.width * picture.height) ** 0.5) + 1
    box = (picture.width // 2, picture.height // 2)
    middle = picture.getpixel(box)
    inverse = tuple(255 - value for value in middle)
    picture.paste(inverse, (*box, box[0] + side, box[1] + side))
    picture.save(changed)
    with pytest.raises(AssertionError, match=r"draw precision.png again"):
        assert_same(committed, changed)
