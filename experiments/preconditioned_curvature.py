"""Does what adaptive optimizers do show in the curvature that they meet?

Protocol, fixed before any result.

Three pairs of the evidence's suite (a decoder, a ResNet with GroupNorm, a deep MLP) are trained
with Adam (0.9, 0.95) for 300 steps, seed 0, at a rate of 3.16e-3, warm-up and cosine as in `race`.
Four more optimizers follow the same gradients at a rate of 0, so that all have state at the same
weights: Adam-mini (Algorithm 3's blocks), Adalayer (a tensor a block), and Shampoo
with power 1/4 and, with the trace, 1/2.

After 1, 5, 25 and 100 % of the steps: P^-1/2 H P^-1/2 for the Hessian H of 4 batches of 32 and the
P that each optimizer's next step divides by, and H itself. Blocks are the trained tensors of two or
more dimensions; 2 probes, 40 Lanczos steps; float64.

Told of each:
- spread: standard deviation of log10 of the blocks' rms eigenvalues (decades);
- tops: log10 of the largest block's largest |Ritz value| over the smallest block's;
- curvature: the distance of the distributions of squared curvature (decades);
- peak: log10 of the largest |Ritz value| of the whole over its rms eigenvalue: how far one rate for
  all directions falls short.

A preconditioner *evens out* blocks where its spread lies below H's by more than both 95 % intervals
together at the last two times, and *makes them differ* where it lies above so.

`python experiments/preconditioned_curvature.py [--smoke]` writes results/preconditioned_curvature;
what was measured is kept in journal.jsonl, and the same command goes on.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from evidence import SUITE, Pair
from script import Run, Script
from torch import nn
from torch.utils._pytree import tree_map

import hessian_tools as ht
from hessian_tools.app import report
from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.optimizers import Shampoo, make
from hessian_tools.results import Journal
from hessian_tools.training import train

OUT = Path("results/preconditioned_curvature")
PAIRS = ("decoder-pre-norm/bytes", "resnet-groupnorm/three-blocks", "mlp/tanh-deep")
RATE = 3.16e-3
ITSELF = "Hessian"
LEADER = "adam"
READINGS = ("curvature",)  # the spread of scales comes with any
HEADER = ("pair", "steps", "preconditioner", "loss", "spread", "tops", "curvature", "peak")
Optimizer = torch.optim.Optimizer


class Size(NamedTuple):
    """How much is done."""

    steps: int
    shares: tuple[float, ...]  # of the steps, after which is measured
    batches: int
    probes: int
    lanczos_steps: int


FULL = Size(300, (0.01, 0.05, 0.25, 1.0), 4, 2, 40)
SMOKE = Size(2, (1.0,), 1, 2, 5)


@dataclass(frozen=True)
class Measured:
    """One preconditioner at one time.

    Attributes:
        spread, spread_low, spread_high: decades, with a 95 % interval.
        tops, curvature, peak: decades.
    """

    loss: float
    spread: float
    spread_low: float
    spread_high: float
    tops: float
    curvature: float
    peak: float


def followers(model: nn.Module) -> dict[str, Optimizer]:
    """Optimizers that see every gradient and move nothing, by what they are called."""
    parameters = list(model.parameters())
    return {
        "Adam-mini": make("adam_mini", model, 0.0),
        "Adalayer": make("adalayer", model, 0.0),
        "Shampoo": Shampoo(parameters, 0.0),
        "Shampoo^2": Shampoo(parameters, 0.0, power=0.5, trace=True),
    }


def led(leader: Optimizer, others: Mapping[str, Optimizer]) -> dict[str, Optimizer]:
    """All of them; the others take their step on the leader's gradients, before it does."""

    def follow(*_: object) -> None:
        for optimizer in others.values():
            optimizer.step()

    leader.register_step_pre_hook(follow)
    return {"Adam": leader, **others}


def in_float64(problem: ht.Problem) -> ht.Problem:
    """A copy in which 1 / d = 1e8 of an entry without gradient blows up no rounding."""
    return ht.Problem(
        copy.deepcopy(problem.model).double(),
        problem.loss_fn,
        tree_map(widened, list(problem.batches)),
        batch_stats=problem.batch_stats,
    )


def widened(value: object) -> object:
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if is_float else value


def operators(
    problem: ht.Problem,
    optimizers: Mapping[str, Optimizer],
) -> Iterator[tuple[str, CurvatureOperator]]:
    """The Hessian, and what it is to each optimizer."""
    hessian = ht.HessianOperator(in_float64(problem))
    yield ITSELF, hessian
    for name, optimizer in optimizers.items():
        yield name, ht.PreconditionedOperator(hessian, ht.preconditioner_of(optimizer, problem))


def measured(operator: CurvatureOperator, size: Size) -> Measured:
    problem = operator.problem
    blocks = ht.partition(problem.model, "weights")
    probes, steps = size.probes, size.lanczos_steps
    spectra = ht.blockwise_slq(
        operator,
        blocks,
        num_probes=probes,
        num_steps=steps,
        progress=False,
    )
    whole = ht.slq(operator, num_probes=probes, num_steps=steps)
    found = ht.js_heterogeneity(spectra, readings=READINGS).every_reading
    tops = [float(np.abs(spectrum.nodes).max()) for spectrum in spectra.values()]
    largest = float(np.abs(whole.nodes).max())
    return Measured(
        loss=problem.loss,
        spread=found["scale"].mean,
        spread_low=found["scale"].low,
        spread_high=found["scale"].high,
        tops=math.log10(max(tops) / min(tops)),
        curvature=found["curvature"].mean,
        peak=math.log10(largest / whole.rms.value),
    )


def followed(pair: Pair, size: Size, journal: Journal) -> None:
    """Trains a pair once, and measures what the journal does not have."""
    model = pair.make_model(0)
    leader = make(LEADER, model, RATE)
    optimizers = led(leader, followers(model))
    stream = pair.stream()
    batches = [stream.batch(step) for step in range(size.batches)]
    problem = ht.Problem(model, stream.loss_fn, batches, batch_stats=stream.batch_stats)
    looked_at = {max(1, round(share * size.steps)) for share in size.shares}

    def look(done: int, losses: list[float]) -> bool:
        if done in looked_at:
            for name, operator in operators(problem, optimizers):
                key = f"{pair.name}|{done}|{name}"
                if key not in journal.finished:
                    journal.append(key, asdict(measured(operator, size)))
                    print(f"{pair.name}, {done} steps, {name}", flush=True)
        return False

    train(model, stream, leader, budget=size.steps, validate_every=0, give_up=look)


def table(found: Mapping[str, Measured]) -> str:
    rows = []
    for key, line in found.items():
        pair, steps, name = key.split("|")
        spread = f"{line.spread:.2f} ({line.spread_low:.2f} to {line.spread_high:.2f})"
        rest = [f"{value:.2f}" for value in (line.tops, line.curvature, line.peak)]
        rows.append([pair, steps, name, f"{line.loss:.3f}", spread, *rest])
    return report.table(HEADER, rows, left=3)


def judgements(found: Mapping[str, Measured]) -> list[str]:
    """A line a pair and preconditioner, by the protocol's rule."""
    lines = []
    times = sorted({int(key.split("|")[1]) for key in found})[-2:]
    for pair in dict.fromkeys(key.split("|")[0] for key in found):
        names = dict.fromkeys(key.split("|")[2] for key in found if key.startswith(f"{pair}|"))
        for name in names:
            if name == ITSELF:
                continue
            pairs = [
                (found.get(f"{pair}|{time}|{name}"), found.get(f"{pair}|{time}|{ITSELF}"))
                for time in times
            ]
            lines.append(f"{pair}: {name} {judged(pairs)}")
    return lines


def judged(pairs: list[tuple[Measured | None, Measured | None]]) -> str:
    """Of (preconditioned, Hessian) at each time."""
    whole = [(one, other) for one, other in pairs if one is not None and other is not None]
    if whole and all(one.spread_high < other.spread_low for one, other in whole):
        return "evens out the blocks"
    if whole and all(one.spread_low > other.spread_high for one, other in whole):
        return "makes the blocks differ"
    return "changes the blocks' spread by no more than is resolved, or not at both times"


def main() -> None:
    script = Script(__doc__, OUT, smoke="one pair, two steps: seconds")
    run: Run = script.run()
    run.out.mkdir(parents=True, exist_ok=True)
    size = SMOKE if run.smoke else FULL
    journal = Journal(run.out / "journal.jsonl", run=str(size))
    for name in PAIRS[-1:] if run.smoke else PAIRS:
        followed(SUITE[name], size, journal)
    lines = Journal(run.out / "journal.jsonl").finished
    run.save(lines, size._asdict())
    found = {key: Measured(**line) for key, line in lines.items()}
    run.print_table("\n".join([table(found), "", *judgements(found)]))


if __name__ == "__main__":
    main()
