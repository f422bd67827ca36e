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
BLOCKS = [
    pytest.param(code, id=f"{page.relative_to(ROOT)}:{number}")
    for page in PAGES
    for number, code in enumerate(
        re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    )
]
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


@pytest.mark.parametrize("code", BLOCKS)
def test_code_blocks_run(code, tmp_path):
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
