"""What the templates draw: verdicts, facts, tables that are sorted and filtered, sections."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hessian_tools.page.words import shown

Value = str | float | int | None
NUMBERS = "number"  # the kind of a column


@dataclass(frozen=True)
class Limits:
    """How much a run's part of the page may hold: rows of blocks, a heat map's side, tensors."""

    blocks: int
    side: int
    tensors: int


@dataclass(frozen=True)
class Headline:
    """What a run comes to, which the page begins with.

    Attributes:
        tone: "good", "bad", "open" or "plain"; each has a sign of its own.
        label: a few words.
        reason: a sentence.
        details: what else belongs to it; ``more`` is folded away at first.
        command: what to type next, with ``why``; "": nothing.
    """

    tone: str
    label: str
    reason: str
    details: tuple[str, ...] = ()
    more: str = ""
    command: str = ""
    why: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a run's page.

    Attributes:
        key: unique on the page.
        template: the file that draws ``view``.
    """

    key: str
    title: str
    template: str
    view: object


class Fact(NamedTuple):
    """A number beside its name."""

    term: str
    value: str


@dataclass(frozen=True)
class Column:
    """``kind``: "text", "prose", "number", or the name of the macro that draws its cells.

    ``explained``: beside the title, under the pointer. ``is_ratio``: two rows of it are compared by
    their ratio.
    """

    title: str
    kind: str = "text"
    explained: str = ""
    is_sortable: bool = True
    is_ratio: bool = False


@dataclass(frozen=True)
class Cell:
    """``value`` is what the column is sorted by; ``drawn`` what its macro needs."""

    text: str
    value: Value = None
    drawn: object = None


@dataclass(frozen=True)
class Row:
    """A row, and what it unfolds to.

    Attributes:
        words: what a filter finds.
        number: among its siblings.
        kind: what the buttons beside the filter choose by.
        below: None: there is nothing to unfold.
    """

    cells: tuple[Cell, ...]
    words: str = ""
    number: int = 0
    kind: str = ""
    below: "Unfolded | None" = None


@dataclass(frozen=True)
class Unfolded:
    """A sentence, and the numbers that it rests on."""

    reason: str
    cuts: "Table"


@dataclass(frozen=True)
class Table:
    """A table, its first column of names.

    Attributes:
        caption: what the rows are.
        filtered: what the filter's label says; "": there is none.
        kinds: of its rows, a button each, with the number of them.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    filtered: str = ""
    kinds: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class TableView:
    """A section that is a table and no more."""

    table: Table
    notes: tuple[str, ...] = ()


def evenly_spread(count: int, most: int) -> list[int]:
    """At most ``most`` places of ``count``, both ends among them."""
    spaced = np.linspace(0, count - 1, min(count, most))
    places: list[int] = np.unique(spaced.astype(int)).tolist()
    return places


def number(value: float | int, text: str | None = None) -> Cell:
    """A cell of a number."""
    return Cell(shown(value) if text is None else text, value)


def plain_table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of texts, the first column of names; what reads as a number is sorted as one."""
    cells = [tuple(Cell(text, _as_number(text)) for text in row) for row in rows]
    columns = [Column(header[0])]
    for place, title in enumerate(header[1:], start=1):
        is_number = any(isinstance(row[place].value, float) for row in cells)
        columns.append(Column(title, NUMBERS if is_number else "text"))
    return Table(caption, tuple(columns), tuple(Row(row) for row in cells))


def _as_number(text: str) -> Value:
    words = text.split()
    first = words[0].replace(",", "").rstrip("%") if words else ""
    try:
        return float(first)
    except ValueError:
        return text
