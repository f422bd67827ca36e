"""From numbers to places in a drawing, and the ticks of axes.

Places are in the units of an SVG's viewBox.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hessian_tools.page.words import power_of_ten, shown
from hessian_tools.spectra.density import Axis
from hessian_tools.spectra.quadrature import Floats

_NICE = (1.0, 2.0, 5.0, 10.0)  # first digits of a linear axis' step
_WIDE = 3.0  # decades of a log axis from which on only powers of ten are labelled


class Tick(NamedTuple):
    """A place along an axis and its label; ``place`` is rounded to tenths."""

    place: float
    label: str


@dataclass(frozen=True)
class Scale:
    """Numbers from ``low`` to ``high`` laid out from ``start`` to ``stop``; on a log axis both are
    positive."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool = False

    def at(self, values: ArrayLike) -> Floats:
        """Places of ``values``; nan where a log axis has none."""
        low, high = self._laid(np.array([self.low, self.high]))
        width = (high - low) or 1.0
        share = (self._laid(np.asarray(values, dtype=np.float64)) - low) / width
        return self.start + share * (self.stop - self.start)

    def ticks(self, most: int = 6) -> list[Tick]:
        """At most about ``most`` ticks at round numbers."""
        values = self._log_values(most) if self.is_log else linear_values(self.low, self.high, most)
        places = self.at(values)
        pairs = zip(places.tolist(), values, strict=True)
        return [Tick(round(place, 1), self._label(value)) for place, value in pairs]

    def _laid(self, values: Floats) -> Floats:
        if not self.is_log:
            return values
        return np.log10(values, out=np.full(values.shape, np.nan), where=values > 0)

    def _log_values(self, most: int) -> list[float]:
        decades = math.log10(self.high / self.low)
        if decades < 0.5:
            return linear_values(self.low, self.high, most)
        step = max(1, math.ceil(decades / most))
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        digits = (1, 2, 5) if decades < _WIDE else (1,)
        values = [digit * 10.0**power for power in range(first, last + 1, step) for digit in digits]
        reach = 1 + 1e-9
        return [value for value in values if self.low / reach <= value <= self.high * reach]

    def _label(self, value: float) -> str:
        if self.is_log and math.log10(self.high / self.low) >= _WIDE and value != 1:
            return power_of_ten(round(math.log10(value)))
        return shown(round(value, 12))


def linear_values(low: float, high: float, most: int) -> list[float]:
    """Round numbers from ``low`` to ``high``, at most about ``most``."""
    span = high - low
    if not span > 0:
        return [low]
    rough = span / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(nice * power for nice in _NICE if nice * power >= 0.999 * rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def fitted(values: ArrayLike, start: float, stop: float, is_log: bool | None = None) -> Scale:
    """A scale that holds all finite ``values``, with some room.

    ``is_log`` None: logarithmic where all are positive and reach over most of a decade.
    """
    flat = np.asarray(values, dtype=np.float64).ravel()
    finite = flat[np.isfinite(flat)]
    if is_log:
        finite = finite[finite > 0]
    if not len(finite):
        return Scale(0.0, 1.0, start, stop)
    low, high = float(finite.min()), float(finite.max())
    if is_log is None:
        is_log = low > 0 and high > 8 * low
    if is_log:
        room = (high / low) ** 0.05 if high > low else 2.0
        return Scale(low / room, high * room, start, stop, True)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return Scale(low - room, high + room, start, stop)


def eigenvalue_ticks(axis: Axis, places: Scale, most: int = 9) -> list[Tick]:
    """Ticks at powers of ten on both sides of zero; ``places`` lays out positions on ``axis``."""
    step = max(1, math.ceil((places.high - places.low) / (most - 1)))
    highest = math.floor(math.log10(abs(axis.eigenvalue(max(places.high, -places.low)))))
    lowest = math.ceil(math.log10(axis.linthresh) + 0.7 * step)
    powers = range(highest, lowest - 1, -step)
    ticks = [(0.0, "0")]
    for power in powers:
        ticks += [(10.0**power, power_of_ten(power)), (-(10.0**power), power_of_ten(power, True))]
    positions = axis.position([value for value, _ in ticks])
    inside = (positions >= places.low) & (positions <= places.high)
    at = places.at(positions)
    kept = [
        Tick(round(float(place), 1), label)
        for place, (_, label), is_inside in zip(at, ticks, inside, strict=True)
        if is_inside
    ]
    return sorted(kept)
