"""The ten predictors, fixed in advance, of a pair as it starts; and the baselines.

Blocks are the trained tensors of two or more dimensions. A pair with one block has no differences
between blocks: those readings are 0. Predicted progress has a rate a block and one for all that is
in no block. A rate for every vector would ruin it: where the loss does not depend on one (a key's
bias under softmax), its gradient and curvature are rounding.

Letters: B blocks, n_b entries of a block, g_b its gradient.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

import hessian_tools as ht
from evidence.arms import LONG
from evidence.pair import BLOCKS, Pair
from hessian_tools.optimizers import make
from hessian_tools.results import JsonObject
from hessian_tools.training import train

NUM_BATCHES = 4
PROBES, STEPS = 2, 40
SIMULATED, KRYLOV = 300, 32  # steps of descent on the quadratic, and products for it
READINGS = ("curvature", "log", "wasserstein", "unnormalised")
PREDICTORS = (
    "js0",
    "log",
    "wasserstein",
    "scale",
    "curvature",
    "block_progress",
    "adam_progress",
    "gradient_range",
    "gradient_gini",
    "top_spread",
)
NOTHING = 1e-8  # of the largest gradient norm: blocks below have no gradient yet


def measured(
    pair: Pair,
    num_batches: int = NUM_BATCHES,
    num_steps: int = STEPS,
    simulated: int = SIMULATED,
    model: nn.Module | None = None,
) -> JsonObject:
    """Everything about one pair, JSON-able: ``predictors``, ``baselines``, and what is behind.

    ``model``: default as it starts.
    """
    problem = pair.problem(num_batches, model=model)
    blocks = ht.partition(problem.model, BLOCKS)
    spectra = ht.blockwise_slq(
        ht.HessianOperator(problem),
        blocks,
        num_probes=PROBES,
        num_steps=num_steps,
        progress=False,
    )
    tops = {name: float(np.abs(found.nodes).max()) for name, found in spectra.items()}
    gradients = gradient_norms(problem)
    readings, intervals = compared(spectra)
    progress = ht.predicted_progress(
        ht.GaussNewtonOperator(problem), blocks, steps=simulated, krylov=KRYLOV, progress=False
    )
    methods = {"block rates": progress.block_rates, "adam": progress.adam}
    found = {
        **readings,
        "block_progress": log10(progress.block_rates.ratio),
        "adam_progress": log10(progress.adam.ratio),
        "gradient_range": spread_in_decades(list(gradients.values()), np.ptp),
        "gradient_gini": gini(scaled(problem, gradients)),
        "top_spread": spread_in_decades(list(tops.values()), np.std),
    }
    return {
        "name": pair.name,
        "predictors": {name: finite(found[name]) for name in PREDICTORS},
        "baselines": baselines(pair, problem, gradients),
        "intervals": intervals,
        "simulated_block_progress": finite(log10(progress.block_rates.many_steps_ratio)),
        "simulated_adam_progress": finite(log10(progress.adam.many_steps_ratio)),
        "progress_errors": [
            finite(progress.block_rates.ratio_error),
            finite(progress.adam.ratio_error),
        ],
        "why": {name: [method.why, method.many_steps_why] for name, method in methods.items()},
        "gradient_norms": gradients,
        "top_eigenvalues": tops,
    }


def trained(pair: Pair, rate: float, num_steps: int, budget: int = LONG) -> nn.Module:
    """The network after the first steps of a run with Adam, seed 0, that would go on to ``budget``.

    Raises:
        ValueError: the run has diverged by then.
    """
    model = pair.make_model(0)
    run = train(
        model,
        pair.stream().with_seed(0),
        make("adam", model, rate),
        budget=budget,
        validate_every=0,
        give_up=lambda done, losses: done >= num_steps,
    )
    if run.diverged:
        raise ValueError(f"{pair.name} diverged within {num_steps} steps at a rate of {rate:g}")
    return model


def baselines(pair: Pair, problem: ht.Problem, gradients: Mapping[str, float]) -> JsonObject:
    """What each predictor has to beat, but for the 200-step race, which is a run."""
    whole = math.sqrt(sum(norm**2 for norm in gradients.values()))
    return {
        "num_blocks": pair.num_blocks,
        "num_parameters": problem.num_parameters,
        "is_transformer": pair.traits.is_transformer,
        "is_text": pair.traits.is_text,
        "gradient_norm": whole,
        "loss": problem.loss,
    }


def compared(spectra: ht.BlockSpectra) -> tuple[dict[str, float], dict[str, list[float | None]]]:
    """The readings of spectra by a predictor's name, and their intervals where they have any."""
    if len(spectra) < 2:
        return dict.fromkeys(PREDICTORS[:5], 0.0), {}
    heterogeneity = ht.js_heterogeneity(spectra, readings=READINGS)
    every = heterogeneity.every_reading
    named = {"js0" if name == "unnormalised" else name: found for name, found in every.items()}
    means = {name: found.mean for name, found in named.items()}
    return means, {n: [finite(found.low), finite(found.high)] for n, found in named.items()}


def gradient_norms(problem: ht.Problem) -> dict[str, float]:
    """|g_b| of the mean gradient, by block."""
    gradient = ht.problem.mean_gradient(problem)
    return {name: float(g.norm()) for name, g in gradient.items() if g.ndim > 1}


def scaled(problem: ht.Problem, norms: Mapping[str, float]) -> list[float]:
    """|g_b| / sqrt(n_b)."""
    return [norm / problem.parameters[name].numel() ** 0.5 for name, norm in norms.items()]


def spread_in_decades(values: Sequence[float], measure: np.ufunc) -> float:
    """``measure`` of log10 of the values, without those that are nothing beside the largest."""
    array = np.array(values)
    kept = array[array > NOTHING * array.max()]
    return float(measure(np.log10(kept))) if len(kept) else math.nan


def gini(values: Sequence[float]) -> float:
    """Gini's coefficient, 0 for equal values, as Tomihari & Sato (arXiv 2502.00213) have it."""
    ordered = torch.tensor(sorted(values), dtype=torch.float64)
    count = len(ordered)
    ranks = torch.arange(1, count + 1, dtype=torch.float64)
    share = float((ranks * ordered).sum() / (count * ordered.sum()))
    return 2 * share - (count + 1) / count


def log10(ratio: float) -> float:
    """nan where there is no ratio."""
    return math.log10(ratio) if ratio > 0 else math.nan


def finite(value: float) -> float | None:
    """None for nan and infinities, which JSON does not have."""
    return float(value) if math.isfinite(value) else None
