"""The peak that a plan announces against the measured one, for each way to compute products.

`python benchmarks/peaks.py` prints the table and writes benchmarks/results/peaks_DEVICE.json. Every
measurement is a process of its own, on networks of the side-by-side benchmark. Measured is resident
memory (on CUDA what the allocator gave) besides model and data, in products that make what they
need anew: graphs and constants are freed before, trials' memory is given back.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from contest.cases import build, preload
from contest.jobs import peak_bytes
from side_by_side import hardware
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import hessian_tools as ht
from hessian_tools.curvature.engine.memory import format_bytes
from hessian_tools.curvature.segments.recompute import LAYERED, STREAMED
from hessian_tools.results import write_atomically
from hessian_tools.tables import table

WAYS = {
    "recorded": {"route": "double backward", "record": True},
    "rebuilt": {"route": "double backward", "record": False},
    "recorded, streamed": {"route": "double backward", "record": True, "segments": STREAMED},
    "recorded, layers recomputed": {
        "route": "double backward",
        "record": True,
        "segments": LAYERED,
    },
    "tangent program": {"route": "tangent program"},
}
MODELS = ("resnet18", "gpt")
PROBES = (1, 8)


def measured(model: str, way: str, probes: int, device: str, smoke: bool) -> dict[str, object]:
    """Bytes planned for and taken by ``probes`` products of the whole Hessian that go together."""
    preload([model])
    case = build(model, device, torch.float32, smoke)
    with sdpa_kernel(SDPBackend.MATH):
        operator = ht.HessianOperator(case.problem(), memory="12GiB", **WAYS[way])
        vectors = torch.randn(probes, operator.size, generator=torch.Generator().manual_seed(0)).to(
            operator.device
        )
        operator.matmat(
            vectors
        )  # with a tangent program's trace, its comparison and whatever libraries load once
        operator.release()
        taken = peak_bytes(operator.device, lambda: operator.matmat(vectors)) + vectors.nbytes
    return {
        "planned": operator.plan.peak_bytes(min(probes, operator.plan.rows)),
        "taken": taken,
        "plan": operator.route,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny networks: what is loaded once outweighs products"
    )
    parser.add_argument("--out", type=Path, help="JSON file (default results/peaks_DEVICE.json)")
    parser.add_argument(
        "--one", nargs=3, metavar=("MODEL", "WAY", "PROBES"), help=argparse.SUPPRESS
    )
    found = parser.parse_args()
    if found.one:
        model, way, probes = found.one
        print(json.dumps(measured(model, way, int(probes), found.device, found.smoke)))
        return
    out = (
        found.out
        or Path(__file__).parent / "results" / f"peaks_{found.device.partition(':')[0]}.json"
    )
    rows = []
    todo = [(model, way, probes) for model in found.models for way in WAYS for probes in PROBES]
    for model, way, probes in tqdm(todo, file=sys.stderr, disable=None):
        own = [sys.executable, __file__, "--one", model, way, str(probes), "--device", found.device]
        done = subprocess.run(
            [*own, *["--smoke"] * found.smoke], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(
                f"{model}, {way}, {probes} probes: {done.stderr.strip().splitlines()[-1]}"
            )
        rows.append(
            {
                "model": model,
                "way": way,
                "probes": probes,
                **json.loads(done.stdout.splitlines()[-1]),
            }
        )
        write_atomically(
            out, json.dumps({"hardware": hardware(), "peaks": rows}, indent=1).encode()
        )
    lines = [
        (
            r["model"],
            r["way"],
            str(r["probes"]),
            format_bytes(r["planned"]),
            format_bytes(r["taken"]),
            f"{r['taken'] / r['planned'] - 1:+.0%}",
        )
        for r in rows
    ]
    print(table(("model", "way", "probes", "planned", "taken", "off by"), lines))


if __name__ == "__main__":
    main()
