"""Everything that is measured on a GPU: `python benchmarks/gpu.py` (or `make bench-gpu`).

Parts, in this order (`--only` chooses):
    rates     matrix products of each precision, the yardstick of the next part
    products  full and block Hessian products of three networks: operations, time, share of that
              rate, peak memory
    launches  kernels of a product of small networks, and its time as a replayed CUDA graph
    gpt2      JS0 of GPT-2 124M, 8 sequences of 1024 tokens, the 25 official blocks
    llama     JS0 by block of Llama-2-7B's shapes at initialisation

Every part keeps what it has finished, so the same command goes on where it stopped; `--minutes`
stops it in time. `--plan-only` counts what gpt2 and llama will cost and needs no GPU; `--table`
prints what has been measured; `--device cpu --smoke` runs all of it at small size.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_js0
import gpu_throughput
import torch
from gpu_measure import ResultFile, named, precisions

from hessian_tools.app.report import table
from hessian_tools.curvature.engine.memory import format_bytes

# Assumptions of the plan about an H200-class card, until `rates` has measured them: operations and
# bytes a second
ASSUMED_RATES = {"float32": 50e12, "tf32": 400e12, "bfloat16": 790e12}
BANDWIDTH = 4.3e12
# of that rate that the matrix products alone are taken to reach; the rest is counted as traffic
SHARE = 0.5
GPT2_PRECISIONS = ("tf32", "bfloat16", "float32")
RESULTS = Path(__file__).parent / "results"
PARTS = ("rates", "products", "launches", "gpt2", "llama")
NOT_MEASURED = "not measured"


def main(arguments: list[str] | None = None) -> int:
    args = parsed(arguments)
    out = args.out or (Path(tempfile.mkdtemp(prefix="gpu-smoke-")) if args.smoke else RESULTS)
    if args.plan_only:
        print_plans(args, out)
        return 0
    if not args.table:
        device = torch.device(args.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            print(
                "no CUDA device here: use --device cpu --smoke, --plan-only or --table",
                file=sys.stderr,
            )
            return 2
        if device.type == "cpu" and not args.smoke:
            print("the full size needs a GPU: use --device cpu only with --smoke", file=sys.stderr)
            return 2
        try:
            measure(args, device, out)
        except gpu_js0.Stopped as stopped:
            print(
                f"stopped after --minutes {args.minutes:g} with {stopped} finished; the same "
                f"command goes on"
            )
    print(tables(out, args.smoke))
    return 0


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the results (benchmarks/results; with --smoke a new one)",
    )
    parser.add_argument("--precision", nargs="+", choices=GPT2_PRECISIONS, help="of the JS0 runs")
    parser.add_argument(
        "--minutes", type=float, help="stop a JS0 run after the block that exceeds them"
    )
    parser.add_argument(
        "--share",
        type=float,
        default=SHARE,
        help="of the matrix-product rate, for the plan (%(default)s)",
    )
    for flag, help in (
        ("--smoke", "small sizes"),
        ("--plan-only", "count, do not run"),
        ("--table", "print results"),
    ):
        parser.add_argument(flag, action="store_true", help=help)
    return parser.parse_args(arguments)


def measure(args: argparse.Namespace, device: torch.device, out: Path) -> None:
    settings = gpu_throughput.SMOKE if args.smoke else gpu_throughput.Settings()
    header = gpu_throughput.header(settings, device)
    rates, products, launches = (ResultFile(out / f"gpu_{part}.json", header) for part in PARTS[:3])
    if {"rates", "products"} & set(args.only):
        gpu_throughput.measure_rates(rates, settings, device)
    if "products" in args.only:
        gpu_throughput.measure_products(
            products, settings, device, gpu_throughput.best_rates(rates)
        )
    if "launches" in args.only:
        gpu_throughput.measure_launches(launches, settings, device)
    for run in js0_runs(args, precisions(device)):
        print(f"\n{titled(run)}\n{report(args, run, out)}", flush=True)
        found = gpu_js0.run(run, device, out, args.minutes)
        print(gpu_js0.described(found), flush=True)


def js0_runs(args: argparse.Namespace, available: tuple[str, ...]) -> list[gpu_js0.Settings]:
    """The runs asked for, a precision at a time."""
    gpt2, llama = (
        (gpu_js0.GPT2_SMOKE, gpu_js0.LLAMA_SMOKE) if args.smoke else (gpu_js0.GPT2, gpu_js0.LLAMA)
    )
    chosen = [(gpt2, args.precision or GPT2_PRECISIONS)] if "gpt2" in args.only else []
    chosen += [(llama, args.precision or (llama.precision,))] if "llama" in args.only else []
    return [replace(run, precision=p) for run, wanted in chosen for p in wanted if p in available]


def print_plans(args: argparse.Namespace, out: Path) -> None:
    for run in js0_runs(args, tuple(ASSUMED_RATES)):
        print(f"{titled(run)}\n{report(args, run, out)}\n", flush=True)


def titled(run: gpu_js0.Settings) -> str:
    return f"{run.model} in {run.precision}, {run.sequences} sequences of {run.context} tokens"


def report(args: argparse.Namespace, run: gpu_js0.Settings, out: Path) -> str:
    """The plan of a run, at the device's own rate where that has been measured."""
    path = out / "gpu_rates.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    measured = [row["rate"] for row in rows if row["precision"] == run.precision]
    note = "" if measured else "; rate and bandwidth are assumptions about an H200-class card"
    rate = max(measured, default=ASSUMED_RATES[run.precision])
    # TF32 moves as many bytes as float32
    counted = replace(run, precision="float32") if run.precision == "tf32" else run
    plan = gpu_js0.plan(counted)
    needed = plan.operations / (60 * run.goal_minutes) / rate
    goal = (
        f"the goal of {run.goal_minutes:g} minutes asks for {needed:.2%} of that rate, everything "
        f"included{note}"
    )
    return f"{plan.report(rate, args.share, BANDWIDTH)}\n{goal}"


def tables(out: Path, smoke: bool) -> str:
    """All results in ``out`` as text, and which there are none of."""
    found = {
        part: json.loads(path.read_text()) if (path := out / f"gpu_{part}.json").exists() else None
        for part in PARTS[:3]
    }
    pieces = [_throughput(found), _launches(found["launches"]), _js0(out, smoke)]
    return "\n\n".join(pieces)


def _throughput(found: Mapping[str, Any]) -> str:
    rows = []
    for row in (found["rates"] or {"rows": []})["rows"]:
        size = f"{row['size']} x {row['size']}"
        rows.append(
            ["matrix product", row["precision"], size, "", f"{row['rate'] / 1e12:.4g}", "", ""]
        )
    for row in (found["products"] or {"rows": []})["rows"]:
        name = [row["model"], row["precision"], f"{row['product']}, k = {row['probes']}"]
        if "error" in row:
            rows.append([*name, "", "out of memory", "", ""])
            continue
        unit = f"{row['operations'] / row['forward_operations']:.2f}"
        rows.append(
            [
                *name,
                unit,
                f"{row['rate'] / 1e12:.4g}",
                f"{row['share']:.1%}",
                format_bytes(row["peak_bytes"]),
            ]
        )
    for part in ("rates", "products"):
        if not found[part]:
            rows.append([part, "", "", "", NOT_MEASURED, "", ""])
    device = next((named(f["hardware"]) for f in found.values() if f), "no device")
    columns = (
        f"on {device}",
        "precision",
        "",
        "F a probe",
        "TFLOP/s",
        "share of rate",
        "peak memory",
    )
    return table(columns, rows, left=3)


def _launches(found: Mapping[str, Any] | None) -> str:
    rows = [[NOT_MEASURED, "", "", "", "", "", ""]] if not found else []
    for row in (found or {"rows": []})["rows"]:
        replay = (
            f"{1e3 * row['replayed']['median']:.3g}"
            if row["replayed"]
            else row["not_captured"][:60]
        )
        busy = (
            NOT_MEASURED if row["device_seconds"] is None else f"{1e3 * row['device_seconds']:.3g}"
        )
        kernels = NOT_MEASURED if row["kernels"] is None else str(row["kernels"])
        taken = f"{1e3 * row['seconds']['median']:.3g}"
        rows.append(
            [row["model"], row["call"], str(row["operators"]), kernels, taken, busy, replay]
        )
    columns = (
        "launches",
        "call",
        "operators",
        "kernels",
        "ms",
        "ms in kernels",
        "ms as CUDA graph",
    )
    return table(columns, rows, left=2)


def _js0(out: Path, smoke: bool) -> str:
    rows = []
    every = argparse.Namespace(smoke=smoke, only=PARTS, precision=None)
    for run in js0_runs(every, tuple(ASSUMED_RATES)):
        name = [
            f"JS0 of {run.model}",
            run.precision,
            f"{run.sequences} x {run.context}",
            f"{run.goal_minutes:g}",
        ]
        path = gpu_js0.folder(out, run) / "run.json"
        if not path.exists():
            rows.append([*name, NOT_MEASURED, "", "", ""])
            continue
        found = json.loads(path.read_text())
        share = found["seconds"]["products"] / found["total"]
        rows.append(
            [
                *name,
                f"{found['total'] / 60:.3g}",
                f"{share:.0%}",
                format_bytes(found["peak_bytes"]),
                named(found["hardware"]),
            ]
        )
    columns = (
        "run",
        "precision",
        "tokens",
        "goal, minutes",
        "minutes",
        "in products",
        "peak memory",
        "on",
    )
    return table(columns, rows, left=3)


if __name__ == "__main__":
    sys.exit(main())
