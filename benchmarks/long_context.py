"""A block's product of GPT-2 124M at a long context in a memory budget: plan and real peak.

`python benchmarks/long_context.py --context 1024 --memory 8GB` prints both and writes
benchmarks/results/long_context.json. Random weights, one sequence of the packaged plays, the query
matrix of layer 0 (the most expensive block: everything lies downstream of it), one probe.
"""

import argparse
import json
import resource
from pathlib import Path

import torch
from side_by_side import hardware

import hessian_tools as ht
from hessian_tools.problem import zoo
from hessian_tools.results import write_atomically

BLOCK = "transformer.h.0.attn.c_attn.weight[q]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="gpt2", help="a GPT-2 of `hessian-tools models`")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--memory", default="8GB")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "long_context.json"
    )
    found = parser.parse_args()
    made = zoo.load(found.model, num_examples=1, context=found.context)
    problem = ht.Problem(made.model, made.loss_fn, made.batches)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    hessian = ht.HessianOperator(problem, memory=found.memory)
    block = ht.partition(problem.model, "semantic")[BLOCK]
    vector = torch.randn(block.numel, generator=torch.Generator().manual_seed(0))
    product = hessian.block(block) @ vector
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    facts = {
        "model": found.model,
        "context": found.context,
        "memory": found.memory,
        "block": BLOCK,
        "route": hessian.route,
        "product_norm": float(product.norm()),
        "process_GiB_before": before,
        "process_GiB_peak": peak,
    }
    found.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(found.out, json.dumps({"hardware": hardware(), **facts}, indent=1).encode())
    print(
        f"{hessian.route}\nprocess: {before:.2f} GiB with model and data, {peak:.2f} GiB at "
        f"its peak"
    )


if __name__ == "__main__":
    main()
