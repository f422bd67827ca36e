"""What an optimizer's step costs, and what its state takes, beside AdamW's.

`python benchmarks/optimizer_steps.py [--smoke]` steps each optimizer by turns with
torch.optim.AdamW(foreach=True) on the same gradients, and gives the median over rounds of the
ratio of their times, with its quartiles, and the bytes of state that each really holds. It writes
results/optimizer_steps/table.txt.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import quantiles

import torch
from torch import nn
from torch.optim import Optimizer

import hessian_tools as ht
from hessian_tools.app.report import table
from hessian_tools.optimizers import BlockwiseAdam, make, state_bytes
from hessian_tools.problem.networks import NanoGPT
from hessian_tools.problem.vision import repair

OUT = Path("results/optimizer_steps")
ROUNDS = 15
HEADER = ("network", "optimizer", "step over AdamW's", "state, % of Adam's")
Build = Callable[[nn.Module], Optimizer]


def over(preset: str) -> Build:
    return lambda model: BlockwiseAdam(model, ht.partition(model, preset))


def named(name: str) -> Build:
    return lambda model: make(name, model)


BUILDS: dict[str, Build] = {
    "Adam, a block an entry": over("element"),
    "Adam-mini": over("adam_mini"),
    "Adalayer": over("adalayer"),
    "Adalayer*": over("adalayer_star"),
    "SGD + Adalayer": named("sgd_adalayer"),
    "Adafactor": named("adafactor"),
}


def gpt2() -> nn.Module:
    import transformers

    return transformers.GPT2LMHeadModel(transformers.GPT2Config())


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "GPT, 6 layers of 256": lambda: NanoGPT(8192, 128, 6, 256, 4),
    "GPT-2": gpt2,
}


def ready(make_model: Callable[[], nn.Module], build: Build) -> Optimizer:
    """On a model with gradients, after a step, which makes its state."""
    torch.manual_seed(0)
    model = make_model()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer = build(model)
    optimizer.step()
    return optimizer


def seconds(optimizer: Optimizer) -> float:
    started = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - started


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), foreach=True)


def rows(networks: list[str], rounds: int) -> Iterator[list[str]]:
    for network in networks:
        base = ready(NETWORKS[network], adamw)
        for name, build in BUILDS.items():
            optimizer = ready(NETWORKS[network], build)
            ratios = [seconds(optimizer) / seconds(base) for _ in range(rounds)]
            low, median, high = quantiles(ratios, n=4, method="inclusive")
            held = state_bytes(optimizer).percent
            yield [network, name, f"{median:.2f} ({low:.2f} to {high:.2f})", f"{held:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="the small network, three rounds")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the table (%(default)s)")
    options = parser.parse_args()
    repair()  # beside a CPU-only torch, the registry's torchvision breaks transformers
    networks = list(NETWORKS)[:1] if options.smoke else list(NETWORKS)
    found = table(HEADER, list(rows(networks, 3 if options.smoke else ROUNDS)), left=2)
    text = f"{found}\n{torch.get_num_threads()} threads, float32, CPU"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "table.txt").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
