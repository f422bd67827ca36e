"""Writes docs/reference.md: every public name with the first line of its docstring.

    python docs/reference.py

A test holds the page to be current.
"""

import importlib
import inspect
from pathlib import Path
from types import ModuleType

FOLDERS = (
    "problem blocks curvature spectra heterogeneity structure descent quadratic optimizers "
    "training tracking page"
).split()
PAGE = Path(__file__).with_name("reference.md")


def main() -> None:
    PAGE.write_text(page())


def page() -> str:
    """The whole page."""
    top = importlib.import_module("hessian_tools")
    parts = [
        "# Reference",
        "Made by `python docs/reference.py` from the docstrings; `help(name)` shows them whole.",
        "## `ht`: `import hessian_tools as ht`",
        listing(top, "ht"),
    ]
    for folder in FOLDERS:
        module = importlib.import_module(f"hessian_tools.{folder}")
        parts += [f"## `ht.{folder}`", first_line(module), listing(module, f"ht.{folder}")]
    return "\n\n".join(parts) + "\n"


def listing(module: ModuleType, prefix: str) -> str:
    lines = []
    for name in module.__all__:
        value = getattr(module, name)
        lines.append(f"- `{prefix}.{name}`: {first_line(value)}")
    return "\n".join(lines)


def first_line(value: object) -> str:
    """The first paragraph of a docstring in one line; of plain data, what type it is."""
    is_data = not (inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value))
    if is_data and type(value).__module__ in ("builtins", "mappingproxy"):
        size = f" of {len(value)}" if hasattr(value, "__len__") else ""
        return f"a {type(value).__name__}{size}."
    documented = value if not is_data else type(value)
    text = inspect.getdoc(documented) or ""
    return " ".join(text.split("\n\n")[0].split())


if __name__ == "__main__":
    main()
