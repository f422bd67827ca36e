"""Floating-point operations of every kind of product, counted, in forward passes of a GPT.

`python benchmarks/counted_cost.py` prints the table of the README, in forward passes (F) of a
4-layer GPT; it comes out the same every time. The comparison row is the published script's way
(arXiv 2402.16788), written anew from its description: for each block, backward into all leaves of
one graph.
"""

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

import hessian_tools as ht
from hessian_tools.app.report import table
from hessian_tools.problem.networks import NanoGPT

LAYERS, WIDTH, HEADS, VOCABULARY, CONTEXT, SEQUENCES = 4, 128, 4, 256, 64, 4


def operations(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def problem() -> ht.Problem:
    torch.manual_seed(0)
    model = NanoGPT(VOCABULARY, CONTEXT, LAYERS, WIDTH, HEADS, tied=False)
    tokens = torch.randint(VOCABULARY, (SEQUENCES, CONTEXT + 1))
    return ht.Problem(model, ht.cross_entropy, [(tokens[:, :-1], tokens[:, 1:])])


Kind = type[ht.HessianOperator] | type[ht.GaussNewtonOperator]


def full_product(
    problem: ht.Problem,
    probes: int,
    record: bool,
    route: str = "double backward",
    kind: Kind = ht.HessianOperator,
) -> float:
    """Operations a probe of the whole matrix; a recorded graph's own recording is not counted."""
    hessian = kind(problem, record=record, route=route)
    vectors = torch.randn(probes, hessian.size)
    if record:
        hessian.matmat(vectors[:1])
    return operations(lambda: hessian.matmat(vectors)) / probes


def block_product(
    problem: ht.Problem,
    probes: int,
    route: str = "double backward",
    kind: Kind = ht.HessianOperator,
) -> float:
    """Operations a probe of one diagonal block, mean over all weight matrices."""
    hessian = kind(problem, record=True, route=route)
    hessian.matmat(torch.randn(1, hessian.size))
    costs = []
    for cut in ht.partition(problem.model, "weights").cuts:
        vectors = torch.randn(probes * cut.num_blocks, cut.block_size)
        stacked = hessian.stacked(cut)
        costs.append(operations(lambda s=stacked, v=vectors: s.matmat(v)) / len(vectors))
    return sum(costs) / len(costs)


def into_all_leaves(problem: ht.Problem) -> float:
    """The published script's block product: autograd is not told that only the block is wanted."""
    leaves = list(problem.parameters.values())
    costs = []
    with problem.evaluating():
        loss = problem.batch_loss(problem.batches[0])
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        if leaf.ndim > 1:
            vector = torch.randn_like(leaf)
            costs.append(
                operations(
                    lambda g=gradient, v=vector: torch.autograd.backward(g, v, retain_graph=True)
                )
            )
    for leaf in leaves:
        leaf.grad = None
    return sum(costs) / len(costs)


def main() -> None:
    case = problem()

    def forward() -> None:
        with case.evaluating(), torch.no_grad():
            case.batch_loss(case.batches[0])

    unit = operations(forward)
    rows = [
        ("whole Hessian, graph recorded, 8 probes", full_product(case, 8, True)),
        (
            "whole Hessian, tangent program, 8 probes",
            full_product(case, 8, True, "tangent program"),
        ),
        ("whole Hessian, graph rebuilt, 8 probes", full_product(case, 8, False)),
        ("whole Hessian, graph rebuilt, 1 probe", full_product(case, 1, False)),
        (
            "whole Gauss-Newton matrix, graph recorded, 8 probes",
            full_product(case, 8, True, kind=ht.GaussNewtonOperator),
        ),
        (
            "whole Gauss-Newton matrix, tangent program, 8 probes",
            full_product(case, 8, True, "tangent program", ht.GaussNewtonOperator),
        ),
        (
            "whole Gauss-Newton matrix, graph rebuilt, 1 probe",
            full_product(case, 1, False, kind=ht.GaussNewtonOperator),
        ),
        ("one weight block (mean), 4 probes", block_product(case, 4)),
        (
            "one weight block (mean), tangent program, 4 probes",
            block_product(case, 4, "tangent program"),
        ),
        (
            "one weight block (mean), Gauss-Newton, 4 probes",
            block_product(case, 4, kind=ht.GaussNewtonOperator),
        ),
        ("one weight block (mean), 1 probe", block_product(case, 1)),
        ("one weight block (mean), backward into all leaves, 1 probe", into_all_leaves(case)),
    ]
    print(table(("product", "F a probe"), [[name, f"{count / unit:.2f}"] for name, count in rows]))


if __name__ == "__main__":
    main()
