"""Which operations does PyTorch differentiate twice, and rightly?

About 220 operations that models and losses use (experiments/fused_operations.py), each in float64
with generic arguments, away from kinks. The check is torch.autograd.gradgradcheck: random
projections of the second derivative against differences of the first, and of probes taken as one
batch against probes one by one. It runs twice: with PyTorch as it is, and inside the context in
which the package evaluates and differentiates a model. An operation is "right", "wrong" (another
value) or it "refuses" (an error, quoted).

`python experiments/twice_differentiable.py [--smoke]` prints the table and writes
results/twice_differentiable: the versions, what was found for every operation, and table.txt. What
is wrong or missing stands as data in hessian_tools/problem/kernels.py; a test holds it against the
result.
"""

import contextlib
import platform
import warnings
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from fused_operations import OPERATIONS, Operation
from script import Script
from torch import nn
from torch.autograd import gradgradcheck
from torch.autograd.gradcheck import GradcheckError
from tqdm import tqdm

from hessian_tools.app import report
from hessian_tools.problem.evaluation import evaluating

OUT = Path("results/twice_differentiable")
SMOKE_STRIDE = 15  # of all operations, how many are left out between two
TOLERANCE = {"atol": 1e-5, "rtol": 1e-3}
REASON = 70  # characters of an error that are quoted
COUNTED = ("group", "operations", "PyTorch: right", "wrong", "refuses", "here: right", "not")
FAULTS = ("operation", "PyTorch", "here", "PyTorch's error")


def judged(operation: Operation, context: AbstractContextManager[None]) -> dict[str, str]:
    """The verdict of gradgradcheck inside ``context``, and the error of one that refuses."""
    torch.manual_seed(0)
    inputs = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in operation.shapes
    ]
    try:
        with warnings.catch_warnings(), context:
            warnings.simplefilter("ignore")
            gradgradcheck(
                operation.function, inputs, fast_mode=True, check_batched_grad=True, **TOLERANCE
            )
    except GradcheckError as error:
        return {"verdict": "wrong", "reason": first_line(error)}
    except (RuntimeError, AttributeError) as error:  # or an operation of newer versions
        return {"verdict": "refuses", "reason": first_line(error)}
    return {"verdict": "right", "reason": ""}


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def compared(operation: Operation) -> dict[str, dict[str, str]]:
    model = nn.Identity()  # the operation is called directly; no module needs care
    return {
        "pytorch": judged(operation, contextlib.nullcontext()),
        "here": judged(operation, evaluating(model, None)),
    }


def counted(groups: dict[str, dict[str, dict[str, dict[str, str]]]]) -> str:
    """Verdicts by group."""
    rows = []
    for group, found in groups.items():
        alone = Counter(row["pytorch"]["verdict"] for row in found.values())
        here = Counter(row["here"]["verdict"] for row in found.values())
        figures = len(found), alone["right"], alone["wrong"], alone["refuses"]
        rows.append([group, *map(str, (*figures, here["right"], len(found) - here["right"]))])
    return report.table(COUNTED, rows, left=1)


def faults(groups: dict[str, dict[str, dict[str, dict[str, str]]]]) -> str:
    """The operations that PyTorch alone does not get right."""
    rows = []
    for found in groups.values():
        for name, row in found.items():
            alone, here = row["pytorch"], row["here"]
            if alone["verdict"] == here["verdict"] == "right":
                continue
            quoted = alone["reason"][:REASON] if alone["verdict"] == "refuses" else ""
            rows.append([name, alone["verdict"], here["verdict"], quoted])
    return report.table(FAULTS, rows, left=4)


def main() -> None:
    script = Script(__doc__, OUT, smoke="every fifteenth operation: seconds")
    run = script.run()
    every = [(group, name) for group, found in OPERATIONS.items() for name in found]
    chosen = every[::SMOKE_STRIDE] if run.smoke else every
    groups: dict[str, dict[str, dict[str, dict[str, str]]]] = {group: {} for group in OPERATIONS}
    for group, name in tqdm(chosen, disable=None):
        groups[group][name] = compared(OPERATIONS[group][name])
    versions = {"torch": torch.__version__, "python": platform.python_version(), "device": "cpu"}
    run.save({"versions": versions, "groups": groups}, {"operations": len(chosen), **TOLERANCE})
    tables = counted(groups), faults(groups), f"PyTorch {torch.__version__}, CPU, float64"
    run.print_table("\n\n".join(tables))


if __name__ == "__main__":
    main()
