"""What is trained for each claim: a list of tasks, each a sweep of rates that a process does alone.

Claims, by the letters of the protocol (experiments/decoder_sweeps.py): a, loss against rate; b,
momenta; c, adaptivity by layer; e, Adam-mini's blocks.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import hessian_tools as ht
from decoders.networks import SIZES, VARIANTS, decoder, stream
from decoders.optimizers import RESTING
from hessian_tools.optimizers.named import make
from hessian_tools.results import Journal
from hessian_tools.training import RateSweep, cosine, sweep, train
from hessian_tools.training.runs import Runs, Setting

Floats = NDArray[np.float64]
LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)  # of quantiles
MOMENTA = (0.9, 0.0, 0.98, 0.5, 0.99, 0.95, 0.8)  # in the order in which they are run
RATE_OF_ADAM = 3.16e-3
SEEDS = (1, 2, 3)  # besides 0


@dataclass(frozen=True)
class Task:
    """One sweep. ``rates`` is where it begins; it goes on beyond an end that is best."""

    claim: str
    size: str
    variant: str
    optimizer: str
    rates: tuple[float, ...]
    momentum: float | None = None

    @property
    def name(self) -> str:
        words = [self.claim, self.size, self.variant, self.optimizer]
        if self.momentum is not None:
            words.append(f"{100 * self.momentum:.0f}")  # without a dot, as it becomes a file
        return "-".join(words)

    @property
    def resting(self) -> int:
        """Steps before the schedule begins."""
        return RESTING if self.optimizer == "frozen_adalayer_short" else 0


@dataclass(frozen=True)
class Place:
    """Where tasks run, on what, and how long; ``steps`` None: as the sizes have it."""

    out: Path
    batch_size: int
    device: str
    steps: int | None


def around(rate: float, below: int, above: int) -> tuple[float, ...]:
    """Half decades."""
    return tuple(rate * 10 ** (half / 2) for half in range(-below, above + 1))


ADAM = around(RATE_OF_ADAM, 2, 3)
SIGN = around(3.16e-4, 2, 2)
SGD = around(1.0, 2, 2)
GRIDS = {
    "sgd": SGD,
    "adamw": ADAM,
    "adafactor": ADAM,
    "lion": SIGN,
    "signum": SIGN,
    "muon": ADAM,
    "soap": ADAM,
    "shampoo2_short_sides": around(RATE_OF_ADAM, 1, 2),
}
MOMENTUM_GRIDS = {
    "sgd": around(1.0, 1, 2),
    "adamw": around(RATE_OF_ADAM, 1, 1),
    "signum": around(3.16e-4, 1, 1),
    "adam_equal_betas": around(RATE_OF_ADAM, 1, 1),
}
LAYERWISE = {
    "adalayer": ADAM,
    "adalayer_star": ADAM,
    "sgd_adalayer": SGD,
    "sgd_adalayer_last": SGD,
    "frozen_adalayer_short": ADAM,
}
MINIS = ("adam_mini_algorithm_3", "adam_mini_suggested", "adam_mini_by_tensor")


def tasks(claims: str, sizes: list[str]) -> list[Task]:
    """Those of the claims, the ones that matter most first."""
    by_claim = {
        "a": [(GRIDS, "standard"), (GRIDS, "plain")],
        "c": [(LAYERWISE, "standard")],
        "e": [(dict.fromkeys(MINIS, ADAM[1:5]), "standard")],
    }
    found = [
        Task(claim, size, variant, optimizer, rates)
        for size in sizes
        for claim in claims
        for grids, variant in by_claim.get(claim, [])
        for optimizer, rates in grids.items()
    ]
    if "b" in claims:
        found += [
            Task("b", sizes[0], "standard", name, grid, momentum)
            for momentum in MOMENTA
            for name, grid in MOMENTUM_GRIDS.items()
            if not (momentum == 0.0 and name == "adam_equal_betas")  # its v would be g^2 alone
        ]
    return sorted(found, key=lambda task: (sizes.index(task.size), task.variant == "plain"))


def steps_of(task: Task, place: Place) -> int:
    if place.steps is not None:
        return place.steps
    size = SIZES[task.size]
    return size.momentum_steps if task.claim == "b" else size.steps


def swept(task: Task, tokens: Tensor, place: Place) -> RateSweep:
    """The sweep of a task, or what an earlier run has left of it; runs are kept in a journal."""
    path = place.out / "parts" / task.name
    if path.with_suffix(".json").exists():
        found: RateSweep = ht.load(path)
        if all(np.isclose(found.rates, rate).any() for rate in task.rates):
            return found
    path.parent.mkdir(parents=True, exist_ok=True)
    steps = steps_of(task, place)
    resting = min(task.resting, steps)
    (found,) = sweep(
        functools.partial(fresh, task, place.device),
        stream(tokens, place.batch_size, place.device),
        [task.optimizer],
        budget=steps + resting,
        rates={task.optimizer: task.rates},
        momenta=[task.momentum],
        stop_hopeless=not resting,  # while it rests, a run has no progress to show
        schedule=functools.partial(rested, resting),
        z_loss=VARIANTS[task.variant].z_loss,
        journal=Journal(path.with_suffix(".jsonl")),
    )
    ht.save(found, path)
    return found


def repeated(
    task: Task,
    rate: float,
    tokens: Tensor,
    place: Place,
) -> Floats:
    """(S,) final losses at one rate with other seeds."""
    steps = steps_of(task, place)
    journal = Journal(place.out / "parts" / f"seeds-{task.name}.jsonl")
    runs = Runs(
        functools.partial(fresh, task, place.device),
        stream(tokens, place.batch_size, place.device),
        z_loss=VARIANTS[task.variant].z_loss,
        journal=journal,
    )
    settings = [Setting(task.optimizer, rate, seed, steps) for seed in SEEDS]
    return np.array([runs.run(setting).final for setting in settings])


def fresh(task: Task, device: str, seed: int) -> nn.Module:
    return decoder(task.size, task.variant, seed).to(device)


def rested(resting: int, step: int, num_steps: int) -> float:
    """The cosine schedule after ``resting`` steps, in which nothing moves whatever the rate."""
    return cosine(max(0, step - resting), num_steps - resting)


# -------------------------------------------------------------------------------- effective rates


def measured_rates(
    size: str,
    rate: float,
    tokens: Tensor,
    place: Place,
) -> dict[str, Any]:
    """How Adam's rates spread over the entries of each tensor, and over logits, along training.

    Returns: ``steps`` (T,); by tensor (T, 5) quantiles of lr / (sqrt(v) + eps), v corrected;
    "by logit": those of lr / sqrt(mean of v over the logit's row).
    """
    path = place.out / "parts" / f"effective-{size}"
    if path.with_suffix(".json").exists():
        kept: dict[str, Any] = ht.load(path)
        return kept
    model = decoder(size, "standard", 0).to(place.device)
    optimizer = make("adamw", model, rate)
    steps = steps_of(Task("c", size, "standard", "adamw", ()), place)
    looked_at = {max(1, int(share * steps)) for share in (0.02, 0.1, 0.25, 0.5, 0.75, 1.0)}
    rows: list[dict[str, Floats]] = []
    taken: list[int] = []

    def look(done: int, losses: list[float]) -> bool:
        if done in looked_at:
            taken.append(done)
            rows.append(rates_by_tensor(model, optimizer))
        return False

    data = stream(tokens, place.batch_size, place.device)
    z_loss = VARIANTS["standard"].z_loss
    train(model, data, optimizer, budget=steps, z_loss=z_loss, validate_every=0, give_up=look)
    found = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    result = {"steps": np.array(taken), "rates": found}
    path.parent.mkdir(parents=True, exist_ok=True)
    ht.save(result, path)
    return result


def rates_by_tensor(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Floats]:
    """(5,) quantiles by tensor; the schedule's factor is left out."""
    group = optimizer.param_groups[0]
    found = {}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        second = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
        found[name] = quantiles(group["initial_lr"] / (second.sqrt() + group["eps"]))
        if name == "head.weight":
            by_row = second.mean(1).sqrt() + group["eps"]
            found["by logit"] = quantiles(group["initial_lr"] / by_row)
    return found


def quantiles(values: Tensor) -> Floats:
    found: Floats = np.quantile(values.double().cpu().numpy(), LEVELS)
    return found
