"""Methods against their published formulas, torch's optimizers, closed forms and invariances."""

import numpy as np
import pytest
import torch
from problems.quadratics import ADAM, SETTINGS, five, losses_by_hand

from hessian_tools import quadratic
from hessian_tools.quadratic.construction import haar
from hessian_tools.quadratic.methods import METHODS

QUIET = {"progress": False}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_its_formula(name):
    q = five()
    eta = 0.04
    steps = 25
    starts = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 5)))
    settings = SETTINGS[name]
    runs = quadratic.run(
        q,
        name,
        step=eta,
        starts=starts,
        num_steps=steps,
        num_recorded=400,
        **settings,
        **QUIET,
    )
    assert runs.recorded.tolist() == list(range(steps + 1))
    hessian = q.hessian[0].numpy()
    for start, losses, first in zip(starts, runs.losses, runs.first_losses, strict=True):
        expected = losses_by_hand(name, hessian, start.numpy(), eta, steps, settings)
        assert losses * first == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "settings", "optimizer"),
    [
        ("adam", ADAM, lambda p: torch.optim.Adam(p, lr=0.03, betas=(0.9, 0.99), eps=1e-3)),
        ("heavy_ball", {"beta": 0.8}, lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.8)),
        ("adagrad", {"eps": 1e-3}, lambda p: torch.optim.Adagrad(p, lr=0.03, eps=1e-3)),
        ("gd", {}, lambda p: torch.optim.SGD(p, lr=0.03)),
    ],
)
def test_methods_agree_with_torchs_optimizers(name, settings, optimizer):
    q = five()
    w = torch.ones(5, dtype=torch.float64, requires_grad=True)
    start = w.detach()[None]
    runs = quadratic.run(q, name, step=0.03, starts=start, num_steps=40, **settings, **QUIET)
    stepper = optimizer([w])
    for _ in range(40):
        stepper.zero_grad()
        (w @ q.hessian[0] @ w / 2).backward()
        stepper.step()
    assert runs.final[0] == pytest.approx(w.detach().numpy(), rel=1e-9, abs=1e-12)


def test_gradient_descent_in_its_eigenbasis_is_the_closed_form():
    """f_t = sum_i lambda_i c_i^2 (1 - eta lambda_i)^(2 t) / 2, for any basis."""
    q = quadratic.case(3, seed=4)
    eta = 2 / 2001
    runs = quadratic.run(q, "gd", step=eta, num_starts=5, num_steps=3000, seed=1, **QUIET)
    values, vectors = torch.linalg.eigh(q.hessian[0])
    values = values.numpy()
    c = (quadratic.draw_starts(q, 5, 1)[0] @ vectors).numpy()
    t = runs.recorded[:, None]
    energies = values * c[:, None] ** 2 * (1 - eta * values) ** (2 * t)
    losses = runs.losses * runs.first_losses[:, None]
    assert losses == pytest.approx(energies.sum(-1) / 2, rel=1e-9)


def test_contraction_on_a_diagonal_problem_is_exact():
    """From an eigenvector each step multiplies f by (1 - eta lambda)^2.

    At 2/(mu + L) that is (1 - 2/(kappa + 1))^2.
    """
    q = quadratic.from_blocks([[1.0], [9.0]], basis="identity")
    runs = quadratic.run(
        q,
        "gd",
        step="optimal",
        starts=torch.eye(2),
        num_steps=50,
        num_recorded=500,
        **QUIET,
    )
    assert runs.steps.tolist() == pytest.approx([0.2, 0.2])
    factors = runs.losses[:, 1:] / runs.losses[:, :-1]
    assert factors == pytest.approx(np.full((2, 50), 0.64), rel=1e-9)


@pytest.mark.parametrize("name", ["heavy_ball", "nesterov"])
def test_named_steps_of_momentum_reach_the_accelerated_rate(name):
    q = quadratic.case(4)
    runs = quadratic.run(q, name, step="optimal", num_starts=8, num_steps=3000, **QUIET)
    root = np.sqrt(2000)
    factor = {"heavy_ball": (root - 1) / (root + 1), "nesterov": 1 - 1 / root}[name]
    steps = runs.median_iterations(1e-12) - runs.median_iterations(1e-6)
    assert steps == pytest.approx(-6 * np.log(10) / (2 * np.log(factor)), rel=0.25)


def test_newtons_method_takes_one_step():
    runs = quadratic.run(five(), "block_jacobi", step="optimal", num_starts=4, num_steps=2, **QUIET)
    assert runs.steps == pytest.approx(np.ones(4))
    assert runs.iterations_to(1e-12).tolist() == [1] * 4


def test_jacobi_takes_one_step_on_a_diagonal_problem():
    diagonal = quadratic.from_blocks([[1.0, 5.0], [30.0]], basis="identity")
    runs = quadratic.run(diagonal, "jacobi", step=1.0, num_starts=4, num_steps=2, **QUIET)
    assert runs.iterations_to(1e-12).max() == 1


def test_each_blocks_own_rate_is_in_its_preconditioner():
    q = quadratic.case(3)
    runs = quadratic.run(q, "blockwise_gd", step="optimal", num_starts=4, num_steps=40, **QUIET)
    assert runs.steps == pytest.approx(np.ones(4))


def test_adam_of_single_coordinates_and_of_no_memory():
    q = five()

    def final(name: str, **settings):
        runs = quadratic.run(q, name, step=0.03, num_starts=6, num_steps=30, **settings, **QUIET)
        return runs.final

    singles = final("adam_mini", beta2=0.9, groups=(1,) * 5)
    assert singles == pytest.approx(final("adam", beta2=0.9), rel=1e-10)
    assert final("adam", beta1=0.0, beta2=0.0) == pytest.approx(final("sign"), rel=1e-9)
    assert final("adam", beta2=1 - 1e-13) == pytest.approx(final("adam", beta2=1.0), rel=1e-9)


@pytest.mark.parametrize(
    ("name", "same"),
    [("gd", True), ("heavy_ball", True), ("nesterov", True), ("adam", False)],
)
def test_rotation_changes_nothing_for_gradient_descent_and_much_for_adam(name, same):
    q = quadratic.case(3, seed=1)
    turn = haar(7, "turn", 9)
    turned = quadratic.from_matrix(turn @ q.hessian[0] @ turn.T)
    starts = quadratic.draw_starts(q, 6, 0)[0]
    settings = {"step": "optimal", "num_steps": 500, **QUIET}
    here = quadratic.run(q, name, starts=starts, **settings)
    there = quadratic.run(turned, name, starts=starts @ turn.T, **settings)
    assert np.allclose(here.losses, there.losses, rtol=1e-6, atol=1e-13) == same


ADAMS = pytest.mark.parametrize(
    "settings",
    [{}, {"beta1": 0.9, "beta2": 0.99}, {"beta2": 0.9, "bias_correction": True}],
)


@ADAMS
def test_adam_does_not_see_the_scales_of_blocks(settings):
    """g -> C g leaves every step as it is; C H is symmetric where C is constant in each block.

    Powers of two make it exact: Adam near a sign change of g magnifies rounding without bounds.
    """
    blocks = [np.array([1.0, 2.0, 3.0]), np.array([4.0, 9.0])]
    plain = quadratic.from_blocks(blocks, seed=3)
    scaled = quadratic.from_blocks([blocks[0] * 2.0**-10, blocks[1] * 2.0**13], seed=3)
    some = {"num_starts": 5, "num_steps": 100, **QUIET}
    ends = [quadratic.run(q, "adam", step=0.05, **settings, **some).final for q in (plain, scaled)]
    assert np.array_equal(*ends)
    ends = [quadratic.run(q, "gd", step=1e-5, **some).final for q in (plain, scaled)]
    assert not np.allclose(*ends)


@ADAMS
def test_adam_does_not_see_a_diagonal(settings):
    problems = [
        quadratic.from_blocks([[1.0], [2.0], [3.0]], basis="identity"),
        quadratic.from_blocks([[2.0**-9], [2.0**5], [3 * 2.0**20]], basis="identity"),
    ]
    some = {"step": 0.05, "num_starts": 5, "num_steps": 100, **settings, **QUIET}
    assert np.array_equal(*(quadratic.run(q, "adam", **some).final for q in problems))
