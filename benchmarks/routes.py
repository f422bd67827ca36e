"""What each way of computing products brings: time in forward passes, in one process, taking turns.

`python benchmarks/routes.py [--models gpt resnet18] [--compile] [--rounds 5]` prints a table and
writes benchmarks/results/routes.json. Rows: double backward and tangent programs, one and eight
probes at once, with and without keeping freed memory
(`hessian_tools.curvature.engine.memory.keep_freed_memory`); `vmap(jvp(grad))` as functorch computes
it; and, with --compile (minutes, needs a C++ compiler), that pass traced, its constant part taken
out, and compiled by torch.compile: what fused elementwise kernels would bring beyond the tangent
program.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from contest.cases import Case, build, preload
from side_by_side import hardware
from torch import Tensor, fx
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import hessian_tools as ht
from hessian_tools.app.report import table
from hessian_tools.curvature.engine import engine, memory
from hessian_tools.results import write_atomically

PROBES = 8
RESULT = Path(__file__).parent / "results" / "routes.json"


def by_functorch(
    case: Case, vectors: Tensor
) -> tuple[Callable[[list[Tensor]], list[Tensor]], list[Tensor]]:
    """H v for all v at once, and v by parameter."""
    state = {name: p.detach() for name, p in case.parameters.items()}
    ((inputs, targets),) = case.batches

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        outputs = functional_call(case.model, parameters, (inputs,))
        return F.cross_entropy(
            getattr(outputs, "logits", outputs).flatten(0, -2), targets.flatten()
        )

    def product(tangents: list[Tensor]) -> list[Tensor]:
        return list(
            jvp(grad(loss), (state,), (dict(zip(state, tangents, strict=True)),))[1].values()
        )

    pieces = vectors.split([p.numel() for p in state.values()], dim=1)
    given = [
        piece.reshape(-1, *p.shape).contiguous()
        for piece, p in zip(pieces, state.values(), strict=True)
    ]

    def batched(tangents: list[Tensor]) -> list[Tensor]:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=".torch.jit.script. is deprecated"
            )  # torch's own, under jvp
            return vmap(product)(tangents)

    return batched, given


def compiled(
    product: Callable[[list[Tensor]], list[Tensor]], vectors: list[Tensor]
) -> Callable[[], Any]:
    """The traced pass with everything that does not depend on the vectors computed once, the rest
    compiled.
    """
    traced = make_fx(product)(vectors)
    graph = traced.graph
    moving = {node for node in graph.nodes if node.op == "placeholder"}
    for node in graph.nodes:
        if node.op == "call_function" and any(
            argument in moving for argument in node.all_input_nodes
        ):
            moving.add(node)
    values: dict[fx.Node, Any] = {}
    inner: dict[fx.Node, fx.Node] = {}
    moved, kept = fx.Graph(), []
    for node in graph.nodes:
        if node.op == "placeholder":
            inner[node] = moved.placeholder(node.name)
    for node in graph.nodes:
        if node.op == "get_attr":
            values[node] = getattr(traced, node.target)
        elif node.op == "call_function" and node not in moving:
            values[node] = node.target(
                *fx.map_arg(node.args, values.get), **fx.map_arg(node.kwargs, values.get)
            )
        elif node.op in ("call_function", "output"):
            for argument in node.all_input_nodes:
                if argument not in inner:
                    kept.append(values[argument])
                    inner[argument] = moved.placeholder(f"constant_{len(kept)}")
            inner[node] = moved.node_copy(node, inner.__getitem__)
    fast = torch.compile(fx.GraphModule({}, moved), fullgraph=True, dynamic=False)
    return lambda: fast(*vectors, *kept)


def ways(case: Case, with_compiled: bool) -> dict[str, tuple[int, Callable[[], Any]]]:
    """By name: products of one call, and the call."""
    problem = case.problem()
    vectors = torch.randn(
        PROBES, problem.num_parameters, generator=torch.Generator().manual_seed(0)
    )
    operators = {
        r: ht.HessianOperator(problem, route=r) for r in ("double backward", "tangent program")
    }

    def keeping(operator: ht.HessianOperator, rows: int, kept: bool) -> Callable[[], Tensor]:
        def call() -> Tensor:
            (memory.keep_freed_memory if kept else memory.return_freed_memory)()
            own, engine.keep_freed_memory = engine.keep_freed_memory, lambda: None
            try:
                return operator.matmat(vectors[:rows])
            finally:
                engine.keep_freed_memory = own

        return call

    found: dict[str, tuple[int, Callable[[], Any]]] = {}
    for route, operator in operators.items():
        for rows in (1, PROBES):
            found[f"{route}, {rows} at once"] = rows, keeping(operator, rows, True)
            found[f"{route}, {rows} at once, freed memory given back"] = (
                rows,
                keeping(operator, rows, False),
            )
    product, given = by_functorch(case, vectors)
    found[f"vmap(jvp(grad)), {PROBES} at once"] = PROBES, lambda: product(given)
    if with_compiled:
        fast = compiled(product, given)
        found[f"the same traced and compiled, {PROBES} at once"] = PROBES, fast
    return found


def forward(case: Case) -> None:
    with torch.no_grad():
        for inputs, _ in case.batches:
            case.model(inputs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", choices=("mlp", "resnet18", "gpt"), default=["gpt", "resnet18"]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="tiny networks; times mean nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    found = parser.parse_args()
    preload(found.models)
    ratios: dict[str, dict[str, Any]] = {}
    for name in found.models:
        case = build(name, "cpu", torch.float32, found.smoke)
        with case.problem().evaluating():
            calls = {"forward": (1, lambda case=case: forward(case)), **ways(case, found.compile)}
            seconds: dict[str, list[float]] = {way: [] for way in calls}
            for _ in range(found.rounds + 1):  # the first warms up
                for way, (products, call) in calls.items():
                    started = time.perf_counter()
                    call()
                    seconds[way].append((time.perf_counter() - started) / products)
        unit = statistics.median(seconds.pop("forward")[1:])
        ratios[name] = {"description": case.description, "forward_seconds": unit}
        ratios[name]["forward_passes"] = {
            way: [s / unit for s in taken[1:]] for way, taken in seconds.items()
        }
    found.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        found.out, json.dumps({"hardware": hardware(), "models": ratios}, indent=1).encode()
    )
    columns = [ratios[name]["forward_passes"] for name in ratios]
    rows = [[way, *(f"{statistics.median(c[way]):.2f}" for c in columns)] for way in columns[0]]
    print(table(("forward passes a product, median", *ratios), rows))


if __name__ == "__main__":
    main()
