"""How exact are products by differences of gradients, as the largest published spectra use them?

Where a model can't be differentiated twice (flash attention, FSDP2), or one graph does not fit, a
product may come from two gradients: H v ~ (g(w + t v) - g(w - t v)) / 2t. The difference has an
error of order t^2 from the third derivative on, and one of order 1 / t from rounding in the
gradients.

For networks of the zoo, whole and by blocks: the relative error |d - H v| / |H v| of that product d
at steps t |v| = 10^-7 ... 10^-1 times |w|, of the block's weights or of all, for two normal v;
gradients in float64, float32, and float32 with bfloat16 inside (autocast). H v is this package's,
in float64. Also told: the error of a block's rms eigenvalue from these products (|d| / |v|), at the
step that is best for most blocks, since nobody knows the best one of each.

`python experiments/finite_differences.py [--smoke]` writes results/finite_differences.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from script import Script
from torch import Tensor, nn

import hessian_tools as ht
from hessian_tools.app import report
from hessian_tools.problem import zoo
from hessian_tools.problem.batches import Batch
from hessian_tools.problem.gradient import mean_gradient

OUT = Path("results/finite_differences")
MODELS: dict[str, dict[str, int]] = {
    "gpt-nano": {"num_examples": 2},
    "resnet-nano": {"num_examples": 8},
}
SMOKE_MODELS = {"mlp": {"num_examples": 4}}
STEPS = tuple(10.0**power for power in range(-7, 0))  # relative to |w|
DIRECTIONS = 2
WHOLE = "whole"
FORMATS = ("float64", "float32", "bfloat16 inside")
HEADER = ("network", "gradients", "matrix", *(f"{step:.0e}" for step in STEPS))
RMS_HEADER = ("network", "gradients", "step", "error of rms eigenvalue, median", "worst")
Loss = Callable[[nn.Module, Batch], Tensor]


def problem_of(name: str, knobs: Mapping[str, int], dtype: torch.dtype) -> ht.Problem:
    made = zoo.load(name, seed=0, dtype=dtype, **knobs)
    return ht.Problem(made.model, made.loss_fn, made.batches, batch_stats=made.batch_stats)


def rounded(loss_fn: Loss) -> Loss:
    """``loss_fn`` with bfloat16 in its matrix products."""

    def inside(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_fn(model, batch)

    return inside


def problems(name: str, knobs: Mapping[str, int]) -> Iterator[tuple[str, ht.Problem]]:
    """The same network and data by the format of its gradients."""
    yield FORMATS[0], problem_of(name, knobs, torch.float64)
    single = problem_of(name, knobs, torch.float32)
    yield FORMATS[1], single
    inside = rounded(single.loss_fn)
    yield (
        FORMATS[2],
        ht.Problem(single.model, inside, single.batches, batch_stats=single.batch_stats),
    )


Tensors = dict[str, Tensor]  # by parameter


def difference(problem: ht.Problem, direction: Tensors, step: float) -> Tensors:
    """The product with ``direction``, whose step t is such that t |v| = step |w|."""
    moved = {name: problem.model.get_parameter(name) for name in direction}
    length = norm(moved) / norm(direction) * step
    ends = []
    saved = {name: parameter.detach().clone() for name, parameter in moved.items()}
    for sign in (1.0, -1.0):
        with torch.no_grad():
            for name, parameter in moved.items():
                parameter.copy_(saved[name] + sign * length * direction[name].to(parameter.dtype))
        found = mean_gradient(problem)
        ends.append({name: found[name].double() for name in direction})
    with torch.no_grad():
        for name, parameter in moved.items():
            parameter.copy_(saved[name])
    return {name: (ends[0][name] - ends[1][name]) / (2 * length) for name in direction}


def norm(tensors: Mapping[str, Tensor]) -> float:
    return float(sum(t.detach().double().square().sum() for t in tensors.values())) ** 0.5


def matrices(model: nn.Module) -> dict[str, list[str]]:
    """The whole, and the block of every trained matrix, by the names of their parameters."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    blocks = {name: [name] for name, p in named.items() if p.ndim > 1}
    return {WHOLE: list(named), **blocks}


def exact(problem: ht.Problem, direction: Tensors) -> Tensors:
    """By double backward."""
    wanted = [problem.model.get_parameter(name) for name in direction]
    total = [torch.zeros_like(p) for p in wanted]
    for weight, batch in zip(problem.weights, problem.batches, strict=True):
        with problem.evaluating():
            gradients = torch.autograd.grad(problem.batch_loss(batch), wanted, create_graph=True)
            products = torch.autograd.grad(gradients, wanted, list(direction.values()))
        total = [a + weight * b for a, b in zip(total, products, strict=True)]
    return dict(zip(direction, total, strict=True))


def directions(problem: ht.Problem, names: list[str]) -> list[Tensors]:
    generator = torch.Generator().manual_seed(0)
    shapes = {name: problem.model.get_parameter(name).shape for name in names}
    return [
        {
            name: torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in shapes.items()
        }
        for _ in range(DIRECTIONS)
    ]


def measured(name: str, knobs: Mapping[str, int]) -> dict[str, dict[str, np.ndarray]]:
    """By format and matrix: (directions, steps, 2) errors, of the product and its length."""
    formats = dict(problems(name, knobs))
    double = formats[FORMATS[0]]
    asked = matrices(double.model)
    wanted = {matrix: directions(double, names) for matrix, names in asked.items()}
    truth = {matrix: [exact(double, v) for v in some] for matrix, some in wanted.items()}
    return {
        kind: {
            matrix: np.array(
                [
                    [errors(difference(problem, v, step), product) for step in STEPS]
                    for v, product in zip(wanted[matrix], truth[matrix], strict=True)
                ]
            )
            for matrix in asked
        }
        for kind, problem in formats.items()
    }


def errors(found: Tensors, truth: Tensors) -> tuple[float, float]:
    """Of the product, and of its length."""
    apart = {name: found[name] - truth[name] for name in truth}
    size = norm(truth)
    return norm(apart) / size, abs(norm(found) / size - 1)


def rows_of(name: str, found: Mapping[str, Mapping[str, np.ndarray]]) -> list[list[str]]:
    rows = []
    for kind, by_matrix in found.items():
        blocks = np.stack([some for matrix, some in by_matrix.items() if matrix != WHOLE])
        whole = by_matrix[WHOLE][..., 0].max(0)
        middle = np.median(blocks[..., 0], axis=(0, 1))
        worst = blocks[..., 0].max((0, 1))
        for label, values in ((WHOLE, whole), ("blocks, median", middle), ("worst", worst)):
            rows.append([name, kind, label, *(f"{value:.0e}" for value in values)])
    return rows


def rms_row(name: str, kind: str, by_matrix: Mapping[str, np.ndarray]) -> list[str]:
    """At the step with the lowest median error of blocks."""
    blocks = np.stack([some for matrix, some in by_matrix.items() if matrix != WHOLE])
    best = int(np.median(blocks[..., 0], axis=(0, 1)).argmin())
    lengths = blocks[:, :, best, 1]
    return [
        name,
        kind,
        f"{STEPS[best]:.0e}",
        f"{np.median(lengths):.1e}",
        f"{lengths.max():.1e}",
    ]


def main() -> None:
    run = Script(__doc__, OUT, smoke="a small MLP: seconds").run()
    models = SMOKE_MODELS if run.smoke else MODELS
    found = {name: measured(name, knobs) for name, knobs in models.items()}
    rows = [row for name, some in found.items() for row in rows_of(name, some)]
    lengths = [rms_row(name, kind, m) for name, some in found.items() for kind, m in some.items()]
    run.save(found, {"models": models, "steps": STEPS})
    run.print_table(f"{report.table(HEADER, rows, left=3)}\n\n{report.table(RMS_HEADER, lengths)}")


if __name__ == "__main__":
    main()
