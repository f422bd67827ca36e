"""Numbers and names as text: aligned columns, values with their errors, names made short."""

import math
from collections.abc import Sequence


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


def shortened(names: Sequence[str]) -> list[str]:
    """Names without ``.weight``, if they stay different, and without what all share at the
    front."""
    bare = [name.replace(".weight", "") for name in names]
    names = bare if len(set(bare)) == len(bare) else names
    if len(names) < 2:
        return list(names)
    pieces = names[0].split(".")
    while pieces:
        prefix = ".".join(pieces) + "."
        if all(name.startswith(prefix) for name in names):
            return [name[len(prefix) :] for name in names]
        pieces.pop()
    return list(names)
