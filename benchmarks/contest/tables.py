"""The benchmark's JSON as Markdown tables.

Ratios only: seconds are in the JSON and belong to one machine.
"""

from collections.abc import Sequence
from statistics import quantiles
from typing import Any

OF_OUTPUTS = "Gauss-Newton: "  # how the referee's names of such products begin


def summarise(result: dict[str, Any]) -> None:
    """Adds to every entry its ratio to ours (median and quartiles over rounds) and whether it may
    be believed.
    """
    for model in result["models"].values():
        for name, job in model["jobs"].items():
            ours = _whole_seconds(job["contenders"].get("ours", {}))
            for contender, entry in job["contenders"].items():
                error = _error(model["correctness"].get(contender, {}), name)
                entry["relative_error"] = error
                entry["right"] = (
                    error is not None and error <= model["bound"] and "error" not in entry
                )
                seconds = _whole_seconds(entry)
                if seconds and ours:
                    entry["ratio"] = spread(
                        [mine / base for mine, base in zip(seconds, ours, strict=True)]
                    )
            job["best_other"] = _best_other(job["contenders"])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles; with fewer than three values, their ends."""
    low, median, high = (
        quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * [values[0]]
    )
    return {"median": median, "low": low, "high": high}


def markdown(result: dict[str, Any]) -> str:
    """Everything that the README shows."""
    hardware = result["hardware"]
    place = hardware["gpu"] or f"{hardware['cpu']}, {hardware['cores']} cores"
    versions = ", ".join(f"{name} {version}" for name, version in result["packages"].items())
    rounds = ", ".join(f"{job} {count}" for job, count in _rounds(result).items())
    parts = [
        f"{place}, {hardware['threads']} threads, {result['settings']['dtype']}; {versions}; "
        f"rounds: {rounds}.",
        "Time as a multiple of ours, median over rounds (quartiles). ~ extrapolated, see below.",
        _table(result, _ratio, best=True),
        "Peak memory above the model's, in MiB (fresh process, job from nothing, the part "
        "measured where ~).",
        _table(
            result,
            lambda entry: (
                f"{entry['peak_bytes'] / 2**20:,.0f}" if "peak_bytes" in entry else _missing(entry)
            ),
        ),
        "Counted operations in forward passes (F) a product.",
        _table(result, _operations, jobs=("a1", "a8", "b", "g1", "g8", "h")),
        "Relative error against a float64 finite difference of the gradient: whole Hessian "
        "(the worse of a random "
        "vector and one on norms and biases alone) / worst of three blocks; then the same of the "
        "Gauss-Newton matrix, where offered, against differences of the logits.",
        _correctness(result),
        *_remarks(result),
    ]
    return "\n\n".join(parts) + "\n"


def _rounds(result: dict[str, Any]) -> dict[str, str]:
    """How often each job was timed, over all models and contenders."""
    counts: dict[str, set[int]] = {}
    for model in result["models"].values():
        for letter, job in model["jobs"].items():
            made = [
                len(entry["repetitions"])
                for entry in job["contenders"].values()
                if "repetitions" in entry
            ]
            counts.setdefault(letter, set()).update(made)
    return {
        j: str(max(c)) if min(c) == max(c) else f"{min(c)} to {max(c)}"
        for j, c in sorted(counts.items())
        if c
    }


def _whole_seconds(entry: dict[str, Any]) -> list[float]:
    return [r["seconds"] * r["scale"] for r in entry.get("repetitions", [])]


def _error(checked: dict[str, Any], job: str) -> float | None:
    errors = checked.get("errors")
    if errors is None:
        return None
    prefix = OF_OUTPUTS if job in ("g1", "g8", "h") else ""
    kinds = [name for name in errors if name.startswith(OF_OUTPUTS) == bool(prefix)]
    of_blocks = job in ("b", "d", "h")
    chosen = [name for name in kinds if name.startswith(f"{prefix}block ") == of_blocks]
    found = [errors[name] for name in chosen]
    return max(found, key=lambda e: (e != e, e)) if found else None  # NaN is the worst


def _best_other(entries: dict[str, Any]) -> dict[str, Any] | None:
    right = {
        name: e["ratio"]["median"]
        for name, e in entries.items()
        if name != "ours" and e["right"] and "ratio" in e
    }
    return {"contender": min(right, key=right.get), "ratio": min(right.values())} if right else None


def _missing(entry: dict[str, Any]) -> str:
    return f"failed: {entry['error']}" if "error" in entry else "not measured"


def _ratio(entry: dict[str, Any]) -> str:
    if "ratio" not in entry:
        return _missing(entry)
    ratio = entry["ratio"]
    mark = "~" if entry["repetitions"][0]["scale"] > 1 else ""
    text = f"{mark}{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"
    return text if entry["right"] else f"WRONG ({_number(entry['relative_error'])}): {text}"


def _operations(entry: dict[str, Any]) -> str:
    return f"{entry['F_a_product']:.2f}" if "F_a_product" in entry else _missing(entry)


def _table(result: dict[str, Any], cell: Any, jobs: Sequence[str] = (), best: bool = False) -> str:
    contenders = result["contenders"]
    header = [
        "model",
        "job",
        *(c["label"] for c in contenders.values()),
        *(["best correct other"] if best else []),
    ]
    rows = []
    for name, model in result["models"].items():
        for letter, job in model["jobs"].items():
            if jobs and letter not in jobs:
                continue
            cells = [
                cell(job["contenders"][c]) if c in job["contenders"] else "not measured"
                for c in contenders
            ]
            rows.append([name, f"({letter}) {job['text']}", *cells])
            if best:
                found = job["best_other"]
                label = contenders[found["contender"]]["label"] if found else ""
                rows[-1].append(f"{label} {found['ratio']:.2f}" if found else "none")
    return _lines(header, rows)


def _correctness(result: dict[str, Any]) -> str:
    contenders = result["contenders"]
    rows = []
    for name, model in {**result["models"], **result["special"]}.items():
        cells = [_verdict(model, c) for c in contenders]
        rows.append([name, model["description"], _number(model["uncertainty"]), *cells])
    return _lines(
        ["case", "what", "referee's own", *(c["label"] for c in contenders.values())], rows
    )


def _verdict(model: dict[str, Any], contender: str) -> str:
    checked = model["correctness"].get(contender, {})
    if "errors" not in checked:
        return _missing(checked)
    errors = [_error(checked, job) for job in ("a1", "b", "g1", "h")]
    text = " / ".join(_number(e) for e in errors if e is not None)
    return text if all(e is None or e <= model["bound"] for e in errors) else f"WRONG {text}"


def _remarks(result: dict[str, Any]) -> list[str]:
    lines = []
    for contender in result["contenders"].values():
        lines.append(f"- {contender['label']}: {contender['how']}")
    for name, model in result["models"].items():
        firsts = {
            result["contenders"][contender]["label"]: entry["repetitions"][0]
            for contender, entry in model["jobs"].get("d", {}).get("contenders", {}).items()
            if entry.get("repetitions")
        }
        if parts := {
            label: first["facts"] for label, first in firsts.items() if first["scale"] > 1
        }:
            facts = next(iter(parts.values()))
            part = f"probes {facts['probes']} x steps {facts['steps']} of every block"
            lines.append(f"- {name} (d): {', '.join(parts)}: extrapolated from {part}, JS once")
        for contender, checked in model["correctness"].items():
            lines += [
                f"- {name}, {result['contenders'][contender]['label']}: {n}"
                for n in checked.get("notes", [])
            ]
    if not result["hardware"]["gpu"]:
        lines.append("- GPU: not measured")
    return ["\n".join(lines)]


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(header)
    return "\n".join(
        "| " + " | ".join(c.replace("|", "/") for c in row) + " |" for row in [header, rule, *rows]
    )


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0e}"
