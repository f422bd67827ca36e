"""Numbers as text: aligned columns, and values with their errors."""

import math
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Aligned columns, the first ``left`` of them to the left."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            c.ljust(w) if i < left else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(aligned).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])


def plus_minus(value: float, error: float) -> str:
    """``value`` to the digit that its ``error``, given to one digit, reaches: 12.3 ± 0.4, -100 ± 30."""
    if not 1e-6 < error < 1e6:
        return f"{value:.3g} ± {error:.1g}"
    digit = -math.floor(math.log10(float(f"{error:.0e}")))  # 0.96 becomes 1
    return (
        f"{round(value, digit) + 0.0:.{max(digit, 0)}f} ± {round(error, digit):.{max(digit, 0)}f}"
    )
