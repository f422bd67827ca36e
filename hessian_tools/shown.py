"""Results that show themselves: as rows, a DataFrame, HTML in notebooks, a picture on given axes.

pandas and matplotlib are imported only when they are asked for.
"""

import html
import importlib
from abc import abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

Record = dict[str, str | int | float | bool | None]
MOST_SHOWN = 200  # rows of a table in a notebook
PLOTS = "hessian_tools.plots.on_axes"


class Drawable:
    """A result that has a picture."""

    def plot(self, axes: "Axes | None" = None) -> "Axes":
        """Draws it on ``axes``, by default those of a new figure, and returns them.

        Nothing is shown or saved: ``axes.figure.savefig("figure.pdf")`` does that.
        """
        draw = importlib.import_module(PLOTS).draw
        drawn: Axes = draw(self, axes)
        return drawn


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
