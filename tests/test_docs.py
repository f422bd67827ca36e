"""The documents: code blocks run, links and pictures exist, tables and the reference are
current."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# a block, and where a block of text follows at once, what the page says that it prints
BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)
BLOCKS = [
    pytest.param(code, printed, id=f"{page.relative_to(ROOT)}:{number}")
    for page in PAGES
    for number, (code, printed) in enumerate(BLOCK.findall(page.read_text()))
]
OPTIONAL = {"peft": "families"}  # what some blocks import, and the extra that installs it
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
LINKS = [
    pytest.param(page.parent / target, id=f"{page.relative_to(ROOT)} -> {target}")
    for page in PAGES
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text())
    if "://" not in target
]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_printed(output: str, stated: str) -> None:
    """The same words, and numbers within a quarter: they are rounded, and versions differ."""
    assert NUMBER.sub("#", output).split() == NUMBER.sub("#", stated).split()
    found, expected = (list(map(float, NUMBER.findall(text))) for text in (output, stated))
    assert found == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize("code, printed", BLOCKS)
def test_code_blocks_run(code, printed, tmp_path):
    for package, extra in OPTIONAL.items():
        is_asked_for = re.search(rf"^import {package}$", code, re.MULTILINE)
        if is_asked_for and importlib.util.find_spec(package) is None:
            pytest.skip(f"pip install 'hessian_tools[{extra}]'")
    path = tmp_path / "block.py"
    path.write_text(code)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "error::UserWarning:hessian_tools",
    }
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout  # of a verification
    if printed:
        assert_printed(done.stdout, printed)


def test_what_a_page_says_that_is_wrong_is_found():
    assert_printed("rate 0.051, 3 blocks\n", "rate 0.05, 3 blocks\n")
    with pytest.raises(AssertionError):
        assert_printed("rate 0.08, 3 blocks\n", "rate 0.05, 3 blocks\n")
    with pytest.raises(AssertionError):
        assert_printed("rate 0.05, 3 layers\n", "rate 0.05, 3 blocks\n")


@pytest.mark.parametrize("target", LINKS)
def test_links_and_pictures_exist(target):
    assert target.exists()


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in PAGES[1:]:
        name = str(page.relative_to(ROOT / "docs"))
        assert name == "README.md" or f"({name})" in index, name


def test_tables_are_those_of_the_results():
    tables = script("tables")
    for page in PAGES[1:]:
        for _, kind, source, content, _ in tables.MARKED.findall(page.read_text()):
            if kind == "table":
                assert content == tables.table(source), f"{page}: python docs/tables.py"
            else:
                assert content.strip(), f"{page}: python docs/tables.py"


def test_the_reference_is_current():
    reference = script("reference")
    assert reference.PAGE.read_text() == reference.page(), "python docs/reference.py"


def test_every_public_name_is_explained():
    for line in script("reference").page().splitlines():
        assert not line.endswith("`: "), line


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 8192
