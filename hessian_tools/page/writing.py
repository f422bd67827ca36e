"""Writes the page: one HTML file that asks nothing of any network.

Everything is inlined. A content security policy allows the page's own style and script, by their
checksums, and pictures that are part of it; so a name that a user has made up cannot become code,
even if it escaped the escaping.
"""

import base64
import hashlib
import math
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from hessian_tools.page.found import FoundRun, find_runs
from hessian_tools.page.sections import num_maps, num_spectra, run_page
from hessian_tools.page.views import Limits
from hessian_tools.page.words import shown
from hessian_tools.results import write_atomically

FILE = "report.html"
_PLACE = "hessian_tools.page"
_TEMPLATES = "templates"
MOST_ROWS = 800  # of blocks, on the whole page
MOST_CELLS = 4 * 400**2  # of heat maps, on the whole page
MOST_TENSORS = 600


def write_report(
    folder: str | os.PathLike[str],
    target: str | os.PathLike[str] | None = None,
) -> Path:
    """One HTML page of all that ``folder`` and the folders in it hold; returns the file's path.

    It shows what ``js0``, ``spectrum``, ``partition``, ``race`` and ``quadratic`` leave in
    ``--out``, what :func:`hessian_tools.save` has written, and journals of a Tracker, with the
    losses of transformers' ``trainer_state.json`` beside them. A run that was interrupted is shown
    as far as it came. Nothing in the folder is changed but ``target``.

    Args:
        folder: of runs.
        target: the file to write, by default report.html in the folder.
    Raises:
        FileNotFoundError: no such folder, or none for ``target``.
        ValueError: a folder without any run, or a file in it that is not as it was written or is
            of another version.
    """
    folder = Path(folder)
    runs = find_runs(folder)
    target = folder / FILE if target is None else Path(target)
    if target.is_dir():
        raise ValueError(f"{target} is a folder; name the file to write, such as {target / FILE}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent} to write {target.name} to")
    return write_atomically(target, report_html(folder.resolve().name, runs).encode())


def report_html(title: str, runs: Sequence[FoundRun]) -> str:
    """The page as text."""
    limits = _limits(runs)
    pages = [run_page(run, f"run-{place}", limits) for place, run in enumerate(runs, start=1)]
    environment = Environment(
        loader=PackageLoader(_PLACE, _TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": shown, "breakable": breakable}
    style, script = _asset("report.css"), _asset("report.js")
    html: str = environment.get_template("report.html").render(
        title=title,
        pages=pages,
        style=Markup(style),
        script=Markup(script),
        policy=_policy(style, script),
    )
    return html


def breakable(name: str) -> Markup:
    """A name of dotted parts that may be broken between them."""
    return escape(name).replace(".", Markup(".<wbr>"))


def _limits(runs: Sequence[FoundRun]) -> Limits:
    """How much each table and map may hold, so that the page stays small."""
    spectra = max(1, sum(map(num_spectra, runs)))
    maps = max(4, sum(map(num_maps, runs)))
    side = int(math.sqrt(MOST_CELLS / maps))
    return Limits(MOST_ROWS // spectra, side, MOST_TENSORS)


def _asset(name: str) -> str:
    """A file of ours that goes into the page as it is."""
    return (resources.files(_PLACE) / _TEMPLATES / name).read_text("utf-8")


def _policy(style: str, script: str) -> str:
    return (
        f"default-src 'none'; img-src data:; style-src {_checksum(style)}; "
        f"script-src {_checksum(script)}; base-uri 'none'; form-action 'none'"
    )


def _checksum(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
