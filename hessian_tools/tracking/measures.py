"""What can be followed: an entry each of MEASURES, with its cost.

A measure takes a :class:`Moment` and gives numbers by name. Costs are in forward passes F over the
Problem's own batches, which may be far smaller than those of training.

To follow something else, add an entry: ``MEASURES["name"] = TrackedMeasure(...)``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.curvature.optimizer_state import preconditioner_of
from hessian_tools.curvature.preconditioned import PreconditionedOperator
from hessian_tools.errors import NumericalError
from hessian_tools.heterogeneity.block_heterogeneity import js_heterogeneity
from hessian_tools.spectra.lanczos import lanczos
from hessian_tools.spectra.slq import blockwise_slq
from hessian_tools.spectra.traces import trace
from hessian_tools.tracking.moment import Line, Moment

Values = dict[str, float]
FIRST_STEPS, STEPS = 12, 5  # of Lanczos: from a random vector, and from the last eigenvector
FRESH = 0.2  # of a random vector in what Lanczos starts from, so that another may take over
DOUBLINGS = 24  # of the update, at most, in search of a loss that rises
HALVINGS = 10  # after which it is taken to rise at once: the update goes uphill on these batches
BISECTIONS = 4  # to 2^(1/16), 4 %


@dataclass(frozen=True)
class TrackedMeasure:
    """One entry of MEASURES.

    Attributes:
        description: with unit and source.
        take: the numbers, by name.
        passes: about how many forward passes, as words.
        needs_update: the weights before the last step as well.
        needs_optimizer: its state.
        moves_weights: and puts them back; it comes after all others, as their graphs are spoilt.
    """

    description: str
    take: Callable[[Moment], Values]
    passes: str
    needs_update: bool = False
    needs_optimizer: bool = False
    moves_weights: bool = False


def loss(moment: Moment) -> Values:
    return {"loss": moment.loss()}


def largest(moment: Moment) -> Values:
    return _outermost(moment, "largest", 1.0)


def smallest(moment: Moment) -> Values:
    return _outermost(moment, "smallest", -1.0)


def _outermost(moment: Moment, name: str, sign: float) -> Values:
    """The Ritz value at one end, and its residual |A v - value v|: an eigenvalue is that near."""
    operator = moment.operator
    random = torch.randn(
        operator.size, generator=moment.generator(), dtype=operator.dtype, device=operator.device
    )
    known = moment.vectors.get(name)
    start = random / random.norm()
    if known is not None:
        start = known + FRESH * start
    found = lanczos(
        operator,
        start[None],
        FIRST_STEPS if known is None else STEPS,
        keep_basis=True,
    )
    steps = int(found.steps[0])
    if found.status[0] == "nonfinite" or found.basis is None:
        raise NumericalError(f"a Hessian-vector product for {name!r} holds NaN or inf")
    off = np.diag(found.betas[0, : steps - 1], 1)
    values, vectors = np.linalg.eigh(np.diag(found.alphas[0, :steps]) + off + off.T)
    place = int(np.argmax(sign * values))
    weights = torch.from_numpy(vectors[:, place]).to(found.basis)
    moment.vectors[name] = weights @ found.basis[0, :steps]
    residual = abs(found.betas[0, steps - 1] * vectors[-1, place])
    return {name: float(values[place]), f"{name}_residual": float(residual)}


def hutchinson(moment: Moment) -> Values:
    found = trace(
        moment.operator,
        "hutchinson",
        num_matvecs=max(2, moment.num_probes),
        seed=moment.seed,
        progress=False,
    )
    return {"trace": found.value, "trace_error": found.standard_error}


def scale(moment: Moment) -> Values:
    return _spread(moment, moment.operator, "scale")


def preconditioned_scale(moment: Moment) -> Values:
    assert moment.optimizer is not None
    scaling = preconditioner_of(moment.optimizer, moment.problem)
    operator = PreconditionedOperator(moment.operator, scaling)
    return _spread(moment, operator, "preconditioned_scale")


def _spread(moment: Moment, operator: CurvatureOperator, name: str) -> Values:
    """The spread of scales, and its 95 % interval.

    One step would tell a block's rms; the second makes the interval cover (one step and two probes:
    87 to 89 %).
    """
    spectra = blockwise_slq(
        operator,
        moment.blocks,
        num_probes=moment.num_probes,
        num_steps=2,
        seed=moment.seed,
        progress=False,
    )
    found = js_heterogeneity(spectra).scale_spread
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def update_sharpness(moment: Moment) -> Values:
    u = moment.update()
    size = float(u @ u)
    if size == 0:
        return {"update_sharpness": math.nan}
    product = moment.operator.matmat(u[None])[0]
    return {"update_sharpness": float(u.double() @ product.double()) / size}


def critical_sharpness(moment: Moment) -> Values:
    assert moment.optimizer is not None
    rate = float(moment.optimizer.param_groups[0]["lr"])
    with moment.moved() as line:
        factor = rising_factor(line)
    return {"critical_sharpness": 2 / (factor * rate) if rate > 0 else math.nan}


def rising_factor(line: Line) -> float:
    """The factor of the update from which the loss is above its start.

    nan where it never is, and where it is so at once.
    """
    start = line.loss(0.0)

    def rises(power: float) -> bool:
        loss = line.loss(2.0**power)
        return not loss <= start  # nan and infinity have risen

    low = high = 0.0
    if rises(0.0):
        while rises(low):
            high, low = low, low - 1
            if low < -HALVINGS:
                return math.nan
    else:
        while not rises(high):
            low, high = high, high + 1
            if high > DOUBLINGS:
                return math.nan
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if rises(middle) else (middle, high)
    return float(2.0 ** ((low + high) / 2))


MEASURES: dict[str, TrackedMeasure] = {
    "loss": TrackedMeasure(
        "mean loss on the Problem's batches, in the mode in which curvature is measured",
        loss,
        "1",
    ),
    "largest": TrackedMeasure(
        "largest eigenvalue, by Lanczos from the last eigenvector, with its residual",
        largest,
        f"6 a step, {FIRST_STEPS} steps at first, then {STEPS}",
    ),
    "smallest": TrackedMeasure(
        "smallest eigenvalue, likewise",
        smallest,
        f"6 a step, {FIRST_STEPS} steps at first, then {STEPS}",
    ),
    "trace": TrackedMeasure(
        "trace by Hutchinson's estimator, with its standard error",
        hutchinson,
        "6 a probe",
    ),
    "scale": TrackedMeasure(
        "spread of block scales: standard deviation over blocks of log10 of the rms eigenvalue, "
        "decades, with its 95 % interval",
        scale,
        "about 2.4 a block and probe",
    ),
    "preconditioned_scale": TrackedMeasure(
        "the same of P^-1/2 H P^-1/2, P what the optimizer divides by",
        preconditioned_scale,
        "about 2.4 a block and probe",
        needs_optimizer=True,
    ),
    "update_sharpness": TrackedMeasure(
        "u'Hu / u'u for the last update u, H after it (directional sharpness, arXiv 2606.04662)",
        update_sharpness,
        "6",
        needs_update=True,
    ),
    "critical_sharpness": TrackedMeasure(
        "2 / the smallest rate at which the last update would have raised the loss (arXiv "
        "2601.16979), to 4 %; nan where the update goes uphill on the Problem's batches",
        critical_sharpness,
        "6 to 10",
        needs_update=True,
        needs_optimizer=True,
        moves_weights=True,
    ),
}


def of(names: list[str]) -> dict[str, TrackedMeasure]:
    """The entries of ``names``.

    Raises:
        ValueError: for none, or one that is not known.
    """
    unknown = [name for name in names if name not in MEASURES]
    if unknown or not names:
        given = ", ".join(map(repr, unknown)) or "empty"
        raise ValueError(f"readings: {given}; choose one or more of {', '.join(MEASURES)}")
    return {name: MEASURES[name] for name in names}
