"""Results as text: the tables that the command line prints."""

import math
import textwrap
from collections.abc import Mapping

from hessian_tools.heterogeneity.block_heterogeneity import JSHeterogeneity, Reading, ScaleSpread
from hessian_tools.heterogeneity.readings import READINGS
from hessian_tools.results import JsonObject
from hessian_tools.spectra.quadrature import BlockSpectra, Quadrature
from hessian_tools.tables import plus_minus, table


def spectra_table(spectra: BlockSpectra) -> str:
    """A row a block: size, scale, extremes, trace with standard error, products spent."""
    header = ("block", "size", "rms eigenvalue", "smallest", "largest", "trace", "HVPs", "status")
    return table(header, [_spectrum_row(name, quadrature) for name, quadrature in spectra.items()])


def readings_table(compared: Mapping[str, JSHeterogeneity]) -> str:
    """A row a reading, a column a model: mean over pairs of blocks, with its standard error."""
    first = next(iter(compared.values()))
    rows = []
    for name, reading in first.every_reading.items():
        results = [js.every_reading[name] for js in compared.values()]
        values = [plus_minus(result.mean, result.standard_error) for result in results]
        rows.append([f"{READINGS[name].label} [{reading.unit}]", *values])
    rows.append(["verdict", *(js.verdict.decision for js in compared.values())])
    return table(("reading (mean over pairs ± standard error)", *compared), rows)


def verdict_text(label: str, js: JSHeterogeneity) -> str:
    """The verdict and what to know about its numbers, in lines of 100 characters."""
    paragraphs = [f"{label}: {js.verdict}", *(f"note: {note}" for note in js.notes)]
    wrapped = (
        textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)
        for text in paragraphs
    )
    return "\n".join(wrapped)


def summary(spectra: BlockSpectra, js: JSHeterogeneity | None) -> JsonObject:
    """The numbers of both tables, JSON-able (non-finite ones as words), for ``--json``."""
    numbers: JsonObject = {
        "blocks": [_block_numbers(name, quadrature) for name, quadrature in spectra.items()],
        "matvecs": spectra.num_matvecs,
        "route": spectra.route,
    }
    notes = [*spectra.notes]
    if js is not None:
        readings = {name: _reading_numbers(reading) for name, reading in js.readings.items()}
        readings["scale_spread"] = _reading_numbers(js.scale_spread)
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
        "matvecs": quadrature.num_matvecs,
        "status": quadrature.status,
    }


def _reading_numbers(reading: Reading | ScaleSpread) -> JsonObject:
    return {
        "mean": json_number(reading.mean),
        "standard_error": json_number(reading.standard_error),
        "unit": reading.unit,
    }


def _spectrum_row(name: str, q: Quadrature) -> list[str]:
    trace = plus_minus(q.trace.value, q.trace.standard_error)
    numbers = (f"{value:.3g}" for value in (q.rms.value, q.smallest.value, q.largest.value))
    return [name, f"{q.size:,}", *numbers, trace, str(q.num_matvecs), q.status]


def json_number(value: float) -> float | str:
    """``value``, or its name where JSON has no such number (inf, nan)."""
    return value if math.isfinite(value) else str(value)
