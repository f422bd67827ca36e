"""A small quadratic that every method runs on, and the methods' formulas written out in NumPy."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hessian_tools import quadratic
from hessian_tools.quadratic.methods import METHODS, Settings

Vector = NDArray[np.float64]
Step = Callable[[Vector, int], Vector]  # (w, t), t = 1, 2, ...

ADAM: Settings = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-3, "bias_correction": True}
SETTINGS: dict[str, Settings] = {name: {} for name in METHODS} | {
    "heavy_ball": {"beta": 0.8},
    "nesterov": {"beta": 0.8},
    "adam": ADAM,
    "adagrad": {"eps": 1e-3},
    "adam_mini": ADAM | {"groups": (2, 3)},
    "adalayer": {"beta2": 0.9, "groups": (4, 1)},
    "block_jacobi": {"groups": (4, 1)},
}


GROUPS = {  # the group of every coordinate
    "adam": np.arange(5),
    "adam_mini": np.array([0, 0, 1, 1, 1]),
    "adalayer": np.array([0, 0, 0, 0, 1]),
}


def five() -> quadratic.Quadratic:
    """Five coordinates in blocks of two and three."""
    return quadratic.from_blocks([[1.0, 5.0], [2.0, 3.0, 30.0]], seed=2)


def losses_by_hand(
    name: str,
    h: Vector,
    w: Vector,
    eta: float,
    steps: int,
    settings: Settings,
) -> list[float]:
    """Losses of a plain loop over the published formula on :func:`five`, at every step."""
    if name in ("heavy_ball", "nesterov"):
        step = with_momentum(name, h, eta, settings["beta"])
    elif name in ("sign", "adagrad"):
        step = by_sizes(name, h, eta, settings.get("eps", 0.0))
    elif name in GROUPS:
        step = adam_family(GROUPS[name], h, eta, **settings)
    else:
        step = preconditioned(preconditioner(name, h), h, eta)
    losses = [w @ h @ w / 2]
    for t in range(1, steps + 1):
        w = step(w, t)
        losses.append(w @ h @ w / 2)
    return losses


def preconditioner(name: str, h: Vector) -> Vector:
    """P of w <- w - eta P g as a dense matrix."""
    if name == "jacobi":
        return np.diag(1 / np.diag(h))
    if name == "blockwise_gd":
        first = np.linalg.eigvalsh(h[:2, :2])
        second = np.linalg.eigvalsh(h[2:, 2:])
        rates = [2 / (first[0] + first[-1]), 2 / (second[0] + second[-1])]
        return np.diag(np.repeat(rates, [2, 3]))
    if name == "block_jacobi":
        groups = h.copy()
        groups[4, :4] = 0
        groups[:4, 4] = 0
        return np.linalg.inv(groups)
    assert name == "gd"
    return np.eye(5)


def preconditioned(matrix: Vector, h: Vector, eta: float) -> Step:
    def step(w: Vector, t: int) -> Vector:
        return w - eta * matrix @ h @ w

    return step


def with_momentum(name: str, h: Vector, eta: float, beta: float) -> Step:
    before = np.zeros(5)

    def step(w: Vector, t: int) -> Vector:
        nonlocal before
        velocity = beta * (w - before) if t > 1 else np.zeros(5)
        before = w
        if name == "heavy_ball":
            return w - eta * h @ w + velocity
        return w + velocity - eta * h @ (w + velocity)

    return step


def by_sizes(name: str, h: Vector, eta: float, eps: float) -> Step:
    v = np.zeros(5)

    def step(w: Vector, t: int) -> Vector:
        g = h @ w
        if name == "sign":
            return w - eta * np.sign(g)
        v[:] += g**2
        return w - eta * g / (np.sqrt(v) + eps)

    return step


def adam_family(
    group_of: NDArray[np.int_],
    h: Vector,
    eta: float,
    beta1: float = 0.0,
    beta2: float = 0.0,
    eps: float = 0.0,
    bias_correction: bool = False,
    **_: object,
) -> Step:
    m = np.zeros(5)
    v = np.zeros(5)

    def step(w: Vector, t: int) -> Vector:
        g = h @ w
        square = np.array([np.mean(g[group_of == k] ** 2) for k in group_of])
        if t == 1 and not bias_correction:
            m[:] = g
            v[:] = square
        m[:] = beta1 * m + (1 - beta1) * g
        v[:] = beta2 * v + (1 - beta2) * square
        corrected1 = m / (1 - beta1**t) if bias_correction else m
        corrected2 = v / (1 - beta2**t) if bias_correction else v
        return w - eta * corrected1 / (np.sqrt(corrected2) + eps)

    return step
