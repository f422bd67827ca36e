"""What a run costs before its first result, counted in forward passes.

`python benchmarks/fixed_costs.py` counts the floating-point operations of making an operator, of
trials, which only doubt about the memory budget or a long run asks for, and of both levels of
verification, in forward passes over the data; beside them, one product of every weight block. It
writes results/fixed_costs and comes out the same every time.
"""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from counted_cost import operations

import hessian_tools as ht
from hessian_tools.app.report import table
from hessian_tools.problem import zoo
from hessian_tools.problem.networks import NanoGPT
from hessian_tools.results import write_atomically

TARGET = Path(__file__).parents[1] / "results" / "fixed_costs" / "table.txt"
MEMORY = "8GiB"
HEADER = ("network", "operator", "trials", "quick", "full", "a product of each block", "blocks")


def gpt() -> ht.Problem:
    """6 layers of width 192, one sequence of 64 tokens."""
    torch.manual_seed(0)
    tokens = torch.randint(256, (1, 65))
    model = NanoGPT(256, 64, layers=6, d=192, num_heads=6, tied=False)
    return ht.Problem(model, ht.cross_entropy, [(tokens[:, :-1], tokens[:, 1:])])


def of_zoo(name: str, **knobs: int) -> Callable[[], ht.Problem]:
    def made() -> ht.Problem:
        found = zoo.load(name, seed=0, **knobs)
        return ht.Problem(found.model, found.loss_fn, found.batches, batch_stats=found.batch_stats)

    return made


NETWORKS = {
    "GPT, 6 layers of 192, 1 sequence": gpt,
    "gpt-nano, 4 sequences": of_zoo("gpt-nano", num_examples=4),
    "resnet-nano, 4 images": of_zoo("resnet-nano", num_examples=4),
    "vgg-nano, 1 image": of_zoo("vgg-nano", num_examples=1),
}


def passes(make: Callable[[], ht.Problem]) -> Iterator[float]:
    """The numbers of a row, in forward passes over the data."""
    problem = make()

    def forward() -> None:
        with problem.evaluating():
            for batch in problem.batches:
                problem.batch_value(batch)

    unit = operations(forward)
    made: list[ht.HessianOperator] = []

    def make_operator() -> None:
        made.append(ht.HessianOperator(problem, memory=MEMORY, route="double backward"))

    yield operations(make_operator) / unit
    hessian = made[0]
    yield operations(lambda: hessian.plan) / unit
    for level in ("quick", "full"):
        hessian.release()
        yield operations(lambda level=level: hessian.verify(level=level)) / unit
    hessian.release()
    blocks = [hessian.block(block) for block in ht.partition(problem.model, "weights")]

    def products() -> None:
        for block in blocks:
            block @ torch.ones(block.size)

    yield operations(products) / unit
    yield len(blocks)


def main() -> None:
    warnings.filterwarnings("ignore", message=".*batching rule.*")
    rows = []
    for name, make in NETWORKS.items():
        *counted, blocks = passes(make)
        rows.append([name, *(f"{number:.0f} F" for number in counted), f"{blocks:.0f}"])
    found = table(HEADER, rows)
    print(found)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(TARGET, f"{found}\n".encode())


if __name__ == "__main__":
    main()
