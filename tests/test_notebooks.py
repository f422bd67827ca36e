"""The notebooks: their code runs without a kernel, and what is committed is what it shows."""

import ast
import contextlib
import io
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
AGAIN = "python docs/notebooks/execute.py"
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:e[+-]?\d+)?")
WITHIN = 0.02  # of a number: float32 on another machine rounds otherwise, and Lanczos amplifies it
MOST_BYTES = 300_000


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def shown(source, names):
    """What a cell prints, and the value of its last line unless a semicolon hides it."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    value = None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
    return printed.getvalue(), None if source.rstrip().endswith(";") else value


def assert_same_words(committed, found):
    """The same text, with numbers that are as good as the same."""
    assert NUMBER.sub("#", committed) == NUMBER.sub("#", found), AGAIN
    numbers = [
        [float(number.replace(",", "")) for number in NUMBER.findall(text)]
        for text in (committed, found)
    ]
    np.testing.assert_allclose(*numbers, rtol=WITHIN, atol=1e-3, err_msg=AGAIN)


def text_of(cell, kind):
    """The committed text of one kind: "stream", or a MIME type of a result; "" where none is."""
    if kind == "stream":
        return "".join(out.text for out in cell.outputs if out.output_type == "stream")
    results = [out for out in cell.outputs if out.output_type == "execute_result"]
    return "".join(out.data.get(kind, "") for out in results)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_code_shows_what_is_committed(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    pictures = 0
    plt.close("all")  # of other tests
    try:
        for cell in code_cells(path):
            printed, value = shown(cell.source, names)
            assert_same_words(text_of(cell, "stream"), printed)
            if hasattr(value, "_repr_html_"):
                assert_same_words(text_of(cell, "text/html"), value._repr_html_())
            else:
                text = "" if value is None else repr(value)
                assert_same_words(text_of(cell, "text/plain"), text)
            drawn = [out for out in cell.outputs if "image/png" in out.get("data", {})]
            assert len(drawn) == len(plt.get_fignums()), AGAIN  # the kernel closes them, too
            pictures += len(drawn)
            plt.close("all")
    finally:
        plt.close("all")
    assert pictures


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_was_executed_whole_and_in_order(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), AGAIN
    kinds = {out.output_type for cell in cells for out in cell.outputs}
    assert "error" not in kinds and {"stream", "execute_result", "display_data"} <= kinds
    streams = [out for cell in cells for out in cell.outputs if out.output_type == "stream"]
    assert all(out.name == "stdout" for out in streams)
    assert any("<table>" in text_of(cell, "text/html") for cell in cells)
    assert str(Path.home()) not in path.read_text() and str(ROOT) not in path.read_text()


def test_they_are_small_and_in_the_index():
    assert sum(path.stat().st_size for path in NOTEBOOKS) <= MOST_BYTES
    index = (ROOT / "docs" / "README.md").read_text()
    assert NOTEBOOKS and all(f"(notebooks/{path.name})" in index for path in NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_notebooks_exist(path):
    for cell in nbformat.read(path, as_version=4).cells:
        for target in re.findall(r"\]\(([^)#\s]+)", cell.source):
            assert cell.cell_type == "code" or (path.parent / target).exists(), target


def test_other_numbers_and_other_words_are_told_apart():
    assert_same_words("loss 2.299, 8,458 of them", "loss 2.30, 8,458 of them")
    with pytest.raises(AssertionError, match=r"execute.py"):
        assert_same_words("loss 2.299", "loss 2.4")
    with pytest.raises(AssertionError, match=r"execute.py"):
        assert_same_words("loss 2.299", "rate 2.299")
