"""Numbers as the page shows them, short and in columns; ``templates/report.js`` has their rule."""

import math

from hessian_tools import tables

MINUS = "−"
NOTHING = "–"


def shown(value: float | int | None) -> str:
    """Three digits: 0.0123, 12.3, 12,300, 1.23e−5; whole numbers below 100,000 in full."""
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return f"{MINUS if value < 0 else ''}∞"
    if isinstance(value, int):
        return f"{value:,}".replace("-", MINUS)
    return _float(value).replace("-", MINUS)


def _float(value: float) -> str:
    text = f"{value:.3g}"
    mantissa, e, exponent = text.partition("e")
    if not e:
        return text
    if abs(value) < 1e5 and int(exponent) > 0:
        return f"{float(text):,.0f}"
    return f"{mantissa}e{int(exponent)}"


def plus_minus(value: float, error: float) -> str:
    """A value to the digit that its error reaches, where that is known and not zero."""
    if math.isnan(error) or error == 0:
        return shown(value)
    return tables.plus_minus(value, error).replace("-", MINUS)


def sentence(text: str) -> str:
    """``text`` with a capital letter in front and a full stop behind."""
    return f"{text[:1].upper()}{text[1:].removesuffix('.')}."


def power_of_ten(exponent: int, negative: bool = False) -> str:
    """10⁻³, as a label of an axis."""
    if exponent in (0, 1):
        return f"{MINUS if negative else ''}{10**exponent}"
    digits = str(abs(exponent)).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    sign = "⁻" if exponent < 0 else ""
    return f"{MINUS if negative else ''}10{sign}{digits}"


def counted(count: int, what: str) -> str:
    """1 block, 2 blocks."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"
