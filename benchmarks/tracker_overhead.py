"""What following curvature costs: seconds of a Tracker's measurement against steps of training.

A decoder of 5 million parameters trains on packaged text with AdamW, in batches of 8, 32 and 128
windows of 128 tokens; the tracker reads `scale` and `largest` on 2 windows of 32 tokens of its own.
Measured every 5 steps, told for a measurement every 50: its share of the time once the first one,
which plans as well, is done.

`python benchmarks/tracker_overhead.py [--smoke]`: three minutes on two cores. --out FILE writes the
numbers as JSON.
"""

import argparse
import json
import time
from pathlib import Path

import torch

import hessian_tools as ht
from hessian_tools.problem.data import language_batches, text_tokens
from hessian_tools.problem.networks import NanoGPT

EVERY, MEASURED_EVERY = 50, 5
STEPS = 15
VOCABULARY, CONTEXT = 256, 128
READINGS = ("scale", "largest")
SIZES = (8, 32, 128)  # windows in a batch of training


def network(smoke: bool) -> NanoGPT:
    torch.manual_seed(0)
    layers, width, heads = (1, 16, 2) if smoke else (6, 256, 8)
    return NanoGPT(VOCABULARY, CONTEXT, layers, width, heads)


def batches(count: int, size: int, context: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found = language_batches(
        text_tokens("byte"),
        num_examples=count * size,
        batch_size=size,
        context=context,
    )
    return list(found)


def run(size: int, smoke: bool) -> dict[str, float]:
    """Seconds of a step and of a measurement, medians, in batches of ``size`` windows."""
    model = network(smoke)
    problem = ht.Problem(model, ht.cross_entropy, batches(1, 2, 32))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    data = batches(4, size, CONTEXT)
    tracker = ht.Tracker(problem, every=MEASURED_EVERY, readings=READINGS).attach(optimizer)
    seconds = []
    for step in range(STEPS):
        start = time.perf_counter()
        optimizer.zero_grad()
        ht.cross_entropy(model, data[step % len(data)]).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    of_steps = [took for place, took in enumerate(seconds, 1) if place % MEASURED_EVERY]
    step = float(torch.tensor(of_steps).median())
    measurement = float(torch.tensor(tracker.track.seconds[1:]).median())
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "windows": size,
        "step": step,
        "first_measurement": float(tracker.track.seconds[0]),
        "measurement": measurement,
        "share": measurement / (measurement + EVERY * step),
    }


def told(found: dict[str, float]) -> str:
    return (
        f"{found['parameters']:,} parameters, batches of {found['windows']} windows: a measurement "
        f"takes {found['measurement'] / found['step']:.1f} steps, every {EVERY} steps "
        f"{found['share']:.1%} of the time; the first takes "
        f"{found['first_measurement'] / found['step']:.0f} steps"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny network: seconds")
    parser.add_argument("--out", type=Path, metavar="FILE")
    options = parser.parse_args()
    found = [run(size, options.smoke) for size in SIZES[: 1 if options.smoke else None]]
    for numbers in found:
        print(told(numbers))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
