"""Results as text: the tables that the command line prints."""

import math
import textwrap
from collections.abc import Mapping

from hessian_tools.heterogeneity.block_heterogeneity import JSHeterogeneity, Reading, ScaleSpread
from hessian_tools.heterogeneity.readings import READINGS
from hessian_tools.results import JsonObject
from hessian_tools.spectra.quadrature import BlockSpectra, Quadrature
from hessian_tools.tables import plus_minus, table

EXACT_OFFERED = 8  # times the products spent on a block, for which its exact spectrum is offered


def spectra_table(spectra: BlockSpectra) -> str:
    """A row a block: size, scale, extremes, trace with its 95 % interval, products spent."""
    header = (
        "block",
        "size",
        "rms eigenvalue",
        "smallest",
        "largest",
        "trace ± 95 %",
        "HVPs",
        "status",
    )
    return table(header, [_spectrum_row(name, quadrature) for name, quadrature in spectra.items()])


def exact_offer(spectra: BlockSpectra) -> str:
    """What it would take to have exact spectra where that is within reach; "" where it is not."""
    sizes = [
        block.size
        for block in spectra.values()
        if block.status != "exact" and block.size <= EXACT_OFFERED * block.num_matvecs
    ]
    if not sizes:
        return ""
    return (
        f"{len(sizes)} block(s) of at most {max(sizes):,} rows could be exact, for "
        f"{sum(sizes):,} products: --exact {max(sizes)}"
    )


def readings_table(compared: Mapping[str, JSHeterogeneity]) -> str:
    """A row a reading, a column a model: the reading, and the interval that covers it."""
    first = next(iter(compared.values()))
    rows = []
    for name, reading in first.every_reading.items():
        cells = [js.told(name) for js in compared.values()]
        rows.append([f"{READINGS[name].label} [{reading.unit}]", *cells])
    rows.append(["verdict", *(js.verdict.decision for js in compared.values())])
    return table(("reading (95 % interval)", *compared), rows)


def verdict_text(label: str, js: JSHeterogeneity, race: str) -> str:
    """The verdict and what to know about its numbers, in lines of 100 characters.

    ``race``: the command that decides, on a line of its own however long.
    """
    paragraphs = [f"{label}: {js.verdict}", *(f"note: {note}" for note in js.notes)]
    lines = [
        textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)
        for text in paragraphs
    ]
    if js.verdict.decision == "undecided":
        lines.append(f"to decide: {race}")
    return "\n".join(lines)


def summary(spectra: BlockSpectra, js: JSHeterogeneity | None) -> JsonObject:
    """The numbers of both tables, JSON-able (non-finite ones as words), for ``--json``."""
    numbers: JsonObject = {
        "blocks": [_block_numbers(name, quadrature) for name, quadrature in spectra.items()],
        "matvecs": spectra.num_matvecs,
        "route": spectra.route,
        "matrix": spectra.curvature,
    }
    notes = [*spectra.notes]
    if js is not None:
        readings = {
            name: _reading_numbers(name, reading) for name, reading in js.every_reading.items()
        }
        numbers["readings"] = readings
        numbers["verdict"] = {"decision": js.verdict.decision, "words": str(js.verdict)}
        notes += js.notes
    return {**numbers, "notes": notes}


def _block_numbers(name: str, quadrature: Quadrature) -> JsonObject:
    trace = quadrature.trace
    return {
        "name": name,
        "size": quadrature.size,
        "rms": json_number(quadrature.rms.value),
        "smallest": json_number(quadrature.smallest.value),
        "largest": json_number(quadrature.largest.value),
        "trace": json_number(trace.value),
        "trace_standard_error": json_number(trace.standard_error),
        "trace_half_width": json_number(trace.half_width),
        "matvecs": quadrature.num_matvecs,
        "status": quadrature.status,
    }


def _reading_numbers(name: str, reading: Reading | ScaleSpread) -> JsonObject:
    """Without an interval the reading is not resolved; the literature's have a floor instead."""
    numbers: JsonObject = {
        "mean": json_number(reading.mean),
        "standard_error": json_number(reading.standard_error),
        "unit": reading.unit,
    }
    if READINGS[name].tolerable:
        is_resolved = not math.isnan(reading.low)
        numbers["resolved"] = is_resolved
        numbers["low"] = json_number(reading.low) if is_resolved else None
        numbers["high"] = json_number(reading.high) if is_resolved else None
    else:
        numbers["floor"] = json_number(reading.floor)
    return numbers


def _spectrum_row(name: str, q: Quadrature) -> list[str]:
    trace = f"{q.trace.value:.3g} (1 probe)"
    if not math.isnan(q.trace.half_width):
        trace = plus_minus(q.trace.value, q.trace.half_width)
    numbers = (f"{value:.3g}" for value in (q.rms.value, q.smallest.value, q.largest.value))
    return [name, f"{q.size:,}", *numbers, trace, str(q.num_matvecs), q.status]


def json_number(value: float) -> float | str:
    """``value``, or its name where JSON has no such number (inf, nan)."""
    return value if math.isfinite(value) else str(value)
