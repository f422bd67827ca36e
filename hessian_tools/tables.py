"""Numbers as text: aligned columns, values with their errors; and results that are tables."""

import html
import importlib
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas

Record = dict[str, str | int | float | bool | None]
MOST_SHOWN = 200  # rows of a table in a notebook


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Aligned columns, the first ``left`` of them to the left."""
    columns = zip(header, *rows, strict=True)
    widths = [max(map(len, column)) for column in columns]

    def line(cells: Sequence[str]) -> str:
        pairs = list(zip(cells, widths, strict=True))
        aligned = [cell.ljust(width) for cell, width in pairs[:left]]
        aligned += [cell.rjust(width) for cell, width in pairs[left:]]
        return "  ".join(aligned).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(header), rule, *map(line, rows)])


def plus_minus(value: float, error: float) -> str:
    """``value`` to the digit that its ``error``, given to one digit, reaches: 12.3 ± 0.4."""
    if not 1e-6 < error < 1e6:
        return f"{value:.3g} ± {error:.1g}"
    digit = -math.floor(math.log10(float(f"{error:.0e}")))  # 0.96 becomes 1
    places = max(digit, 0)
    rounded = round(value, digit) + 0.0  # which makes -0.0 of it 0.0
    return f"{rounded:.{places}f} ± {round(error, digit):.{places}f}"


def interval(value: float, low: float, high: float) -> str:
    """``value`` and the ends of its interval, to two digits of the half width: 1.23 (1.1 to 1.4).

    What cannot be negative and is estimated below zero is given as 0.
    """
    value, low = max(value, 0.0), max(low, 0.0)
    half = (high - low) / 2
    if half <= 1e-12 * abs(value):
        return f"{value:.3g} (exact)"
    if not 1e-6 < half < 1e6:
        return f"{value:.3g} ({low:.3g} to {high:.3g})"
    places = max(1 - math.floor(math.log10(half)), 0)
    return f"{value:.{places}f} ({low:.{places}f} to {high:.{places}f})"


class Tabular:
    """A result that is a table: a DataFrame where pandas is installed, and HTML in notebooks."""

    @abstractmethod
    def records(self) -> list[Record]:
        """Its rows, long form, all with the same keys."""

    def to_dataframe(self) -> "pandas.DataFrame":
        """The rows as a DataFrame.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            found = importlib.import_module("pandas")
        except ImportError as error:
            raise ImportError(
                "a DataFrame needs pandas, which is not installed: pip install pandas; records() "
                "gives the same rows as dicts"
            ) from error
        frame: pandas.DataFrame = found.DataFrame(self.records())
        return frame

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        rows = self.records()
        if not rows:
            return f"<p>{type(self).__name__} without rows</p>"
        head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
        body = "".join(_html_row(row) for row in rows[:MOST_SHOWN])
        left_out = len(rows) - MOST_SHOWN
        more = f"<p>{left_out} more rows: records()</p>" if left_out > 0 else ""
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"


def _html_row(row: Record) -> str:
    cells = "".join(f"<td>{html.escape(_shown(value))}</td>" for value in row.values())
    return f"<tr>{cells}</tr>"


def _shown(value: str | int | float | bool | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
