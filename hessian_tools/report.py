"""Results as text: the tables that the command line prints."""

from collections.abc import Mapping, Sequence
from typing import Any

from hessian_tools.heterogeneity import JSHeterogeneity
from hessian_tools.quadrature import BlockSpectra, Quadrature


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Aligned columns, the first ``left`` of them to the left."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = (c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "  ".join(aligned).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])


def spectra_table(spectra: BlockSpectra) -> str:
    """A row a block: size, scale, extremes, trace with standard error, products spent."""
    header = ("block", "size", "rms eigenvalue", "smallest", "largest", "trace", "HVPs", "status")
    return table(header, [_spectrum_row(name, quadrature) for name, quadrature in spectra.items()])


def readings_table(found: Mapping[str, JSHeterogeneity]) -> str:
    """A row a reading, a column a model: mean over pairs of blocks, with its standard error."""
    first = next(iter(found.values()))
    labels = {
        "unnormalised": "JS0 (literature, unnormalised)",
        "bounded": "JS bounded",
        "log": "JS log",
        "wasserstein": "Wasserstein",
    }
    rows = [
        [
            f"{labels[name]} [{reading.unit}]",
            *(_pm(js.readings[name].mean, js.readings[name].standard_error) for js in found.values()),
        ]
        for name, reading in first.readings.items()
    ]
    spreads = (_pm(js.scale_spread.value, js.scale_spread.standard_error) for js in found.values())
    rows.append([f"spread of block scales [{first.scale_spread.unit}]", *spreads])
    rows.append(["verdict", *(js.verdict.decision for js in found.values())])
    return table(("reading (mean over pairs ± standard error)", *found), rows)


def summary(spectra: BlockSpectra, js: JSHeterogeneity | None) -> dict[str, Any]:
    """The numbers of both tables, JSON-able (non-finite ones as words), for ``--json``."""
    blocks = [
        {"name": name, "size": q.size, "rms": _number(q.rms.value), "smallest": _number(q.smallest.value),
         "largest": _number(q.largest.value), "trace": _number(q.trace.value), "trace_standard_error": _number(q.trace.standard_error),
         "matvecs": q.num_matvecs, "status": q.status}
        for name, q in spectra.items()
    ]  # fmt: skip
    found: dict[str, Any] = {
        "blocks": blocks,
        "matvecs": spectra.num_matvecs,
        "route": spectra.route,
        "notes": list(spectra.notes),
    }
    if js is not None:
        readings = {**js.readings, "scale_spread": js.scale_spread}
        found["readings"] = {
            name: {"mean": _number(r.mean), "standard_error": _number(r.standard_error), "unit": r.unit}
            for name, r in readings.items()
        }
        found["verdict"] = {"decision": js.verdict.decision, "words": str(js.verdict)}
        found["notes"] += js.notes
    return found


def _spectrum_row(name: str, q: Quadrature) -> list[str]:
    return [
        name, f"{q.size:,}", f"{q.rms.value:.3g}", f"{q.smallest.value:.3g}", f"{q.largest.value:.3g}",
        _pm(q.trace.value, q.trace.standard_error), str(q.num_matvecs), q.status,
    ]  # fmt: skip


def _pm(value: float, error: float) -> str:
    return f"{value:.3g} ± {error:.1g}"


def _number(value: float) -> float | str:
    return value if abs(value) < float("inf") else str(value)
