"""Methods and their simulation against closed forms, torch's optimizers, plain loops and invariances."""

import numpy as np
import pytest
import torch

from hessian_tools import quadratic
from hessian_tools.quadratic import simulation
from hessian_tools.quadratic.construction import haar
from hessian_tools.quadratic.methods import METHODS

QUIET = {"progress": False}
ADAM = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-3, "bias_correction": True}
SETTINGS: dict[str, dict] = {name: {} for name in METHODS} | {
    "heavy_ball": {"beta": 0.8}, "nesterov": {"beta": 0.8}, "adam": ADAM, "adagrad": {"eps": 1e-3},
    "adam_mini": ADAM | {"groups": (2, 3)}, "adalayer": {"beta2": 0.9, "groups": (4, 1)},
    "block_jacobi": {"groups": (4, 1)},
}  # fmt: skip


def problem() -> quadratic.Quadratic:
    return quadratic.from_blocks([[1.0, 5.0], [2.0, 3.0, 30.0]], seed=2)


def by_hand(
    name: str, h: np.ndarray, w: np.ndarray, eta: float, steps: int, s: dict
) -> list[float]:
    """Losses of a plain loop over the published formula, with the preconditioners as dense matrices."""
    h11, h22 = np.linalg.eigvalsh(h[:2, :2]), np.linalg.eigvalsh(h[2:, 2:])
    own = np.repeat([2 / (h11[0] + h11[-1]), 2 / (h22[0] + h22[-1])], [2, 3])
    corner = h.copy()
    corner[4, :4] = corner[:4, 4] = 0
    scale = {
        "gd": np.eye(5),
        "jacobi": np.diag(1 / np.diag(h)),
        "blockwise_gd": np.diag(own),
        "block_jacobi": np.linalg.inv(corner),
    }
    groups = {
        "adam": np.arange(5),
        "adam_mini": np.array([0, 0, 1, 1, 1]),
        "adalayer": np.array([0, 0, 0, 0, 1]),
    }.get(name)
    losses, m, v, before = [w @ h @ w / 2], np.zeros(5), np.zeros(5), w
    for t in range(1, steps + 1):
        g = h @ w
        if name in scale:
            w = w - eta * scale[name] @ g
        elif name == "heavy_ball":
            before, w = w, w - eta * g + s["beta"] * (w - before)
        elif name == "nesterov":
            ahead = w + s["beta"] * (w - before)
            before, w = w, ahead - eta * h @ ahead
        elif name == "sign":
            w = w - eta * np.sign(g)
        elif name == "adagrad":
            v = v + g**2
            w = w - eta * g / (np.sqrt(v) + s["eps"])
        else:
            b1, b2, eps, corrected = (
                s.get(k, 0.0) for k in ("beta1", "beta2", "eps", "bias_correction")
            )
            square = np.array([np.mean(g[groups == k] ** 2) for k in groups])
            if t == 1 and not corrected:
                m, v = g, square
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * square
            one, two = (1 - b1**t, 1 - b2**t) if corrected else (1, 1)
            w = w - eta * (m / one) / (np.sqrt(v / two) + eps)
        losses.append(w @ h @ w / 2)
    return losses


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_its_formula(name):
    q, eta, steps = problem(), 0.04, 25
    starts = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 5)))
    found = quadratic.run(
        q,
        name,
        step=eta,
        starts=starts,
        num_steps=steps,
        num_recorded=400,
        **SETTINGS[name],
        **QUIET,
    )
    for start, losses, first in zip(starts, found.losses, found.first_losses, strict=True):
        expected = by_hand(name, q.hessian[0].numpy(), start.numpy(), eta, steps, SETTINGS[name])
        assert found.recorded.tolist() == list(range(steps + 1))
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
    q = problem()
    w = torch.ones(5, dtype=torch.float64, requires_grad=True)
    found = quadratic.run(
        q, name, step=0.03, starts=w.detach()[None], num_steps=40, **settings, **QUIET
    )
    stepper = optimizer([w])
    for _ in range(40):
        stepper.zero_grad()
        (w @ q.hessian[0] @ w / 2).backward()
        stepper.step()
    assert found.final[0] == pytest.approx(w.detach().numpy(), rel=1e-9, abs=1e-12)


def test_gradient_descent_in_its_eigenbasis_is_the_closed_form():
    """f_t = sum_i lambda_i c_i^2 (1 - eta lambda_i)^(2 t) / 2, for any basis."""
    q, eta = quadratic.case(3, seed=4), 2 / 2001
    runs = quadratic.run(q, "gd", step=eta, num_starts=5, num_steps=3000, seed=1, **QUIET)
    values, vectors = torch.linalg.eigh(q.hessian[0])
    c = (quadratic.draw_starts(q, 5, 1)[0] @ vectors).numpy()
    t = runs.recorded[:, None]
    expected = (values.numpy() * c[:, None] ** 2 * (1 - eta * values.numpy()) ** (2 * t)).sum(
        -1
    ) / 2
    assert runs.losses * runs.first_losses[:, None] == pytest.approx(expected, rel=1e-9)


def test_contraction_on_a_diagonal_problem_is_exact():
    """From an eigenvector each step multiplies f by (1 - eta lambda)^2: 2/(mu + L) gives (1 - 2/(kappa + 1))^2."""
    q = quadratic.from_blocks([[1.0], [9.0]], basis="identity")
    runs = quadratic.run(
        q, "gd", step="optimal", starts=torch.eye(2), num_steps=50, num_recorded=500, **QUIET
    )
    assert runs.steps.tolist() == pytest.approx([0.2, 0.2])
    assert runs.losses[:, 1:] / runs.losses[:, :-1] == pytest.approx(
        np.full((2, 50), 0.64), rel=1e-9
    )


def test_named_steps_of_momentum_reach_the_accelerated_rate():
    q = quadratic.case(4)
    runs = {
        name: quadratic.run(q, name, step="optimal", num_starts=8, num_steps=3000, **QUIET)
        for name in ("heavy_ball", "nesterov")
    }
    root = np.sqrt(2000)
    for name, factor in (("heavy_ball", (root - 1) / (root + 1)), ("nesterov", 1 - 1 / root)):
        steps = runs[name].median_iterations(1e-12) - runs[name].median_iterations(1e-6)
        assert steps == pytest.approx(-6 * np.log(10) / (2 * np.log(factor)), rel=0.25), name


def test_block_preconditioners_finish_what_they_contain():
    q = problem()
    newton = quadratic.run(q, "block_jacobi", step="optimal", num_starts=4, num_steps=2, **QUIET)
    assert (
        newton.steps == pytest.approx(np.ones(4))
        and newton.iterations_to(1e-12).tolist() == [1] * 4
    )
    diagonal = quadratic.from_blocks([[1.0, 5.0], [30.0]], basis="identity")
    assert (
        quadratic.run(diagonal, "jacobi", step=1.0, num_starts=4, num_steps=2, **QUIET)
        .iterations_to(1e-12)
        .max()
        == 1
    )
    single = quadratic.run(
        quadratic.case(3), "blockwise_gd", step="optimal", num_starts=4, num_steps=40, **QUIET
    )
    assert single.steps == pytest.approx(
        np.ones(4)
    )  # each block's own rate is in its preconditioner


def test_adam_of_single_coordinates_and_of_no_memory():
    q = problem()
    some = {"num_starts": 6, "num_steps": 30, "step": 0.03, **QUIET}
    adam = quadratic.run(q, "adam", beta2=0.9, **some)
    mini = quadratic.run(q, "adam_mini", beta2=0.9, groups=(1,) * 5, **some)
    assert mini.final == pytest.approx(adam.final, rel=1e-10)
    sign = quadratic.run(q, "sign", **some)
    assert quadratic.run(q, "adam", beta1=0.0, beta2=0.0, **some).final == pytest.approx(
        sign.final, rel=1e-9
    )
    frozen, near = (quadratic.run(q, "adam", beta2=b, **some).final for b in (1.0, 1 - 1e-13))
    assert near == pytest.approx(frozen, rel=1e-9)


def test_rotation_changes_nothing_for_gradient_descent_and_much_for_adam():
    q = quadratic.case(3, seed=1)
    turn = haar(7, "turn", 9)
    turned = quadratic.from_matrix(turn @ q.hessian[0] @ turn.T)
    starts = quadratic.draw_starts(q, 6, 0)[0]
    for name, same in (("gd", True), ("heavy_ball", True), ("nesterov", True), ("adam", False)):
        here = quadratic.run(q, name, step="optimal", starts=starts, num_steps=500, **QUIET)
        there = quadratic.run(
            turned, name, step="optimal", starts=starts @ turn.T, num_steps=500, **QUIET
        )
        assert np.allclose(here.losses, there.losses, rtol=1e-6, atol=1e-13) == same, name


@pytest.mark.parametrize(
    "settings", [{}, {"beta1": 0.9, "beta2": 0.99}, {"beta2": 0.9, "bias_correction": True}]
)
def test_adam_does_not_see_the_scales_of_blocks_nor_of_a_diagonal(settings):
    """g -> C g for a diagonal C leaves every step as it is; C H is symmetric where C is constant in each block.

    Powers of two make it exact: Adam near a sign change of g magnifies rounding without bounds.
    """
    blocks, factors = [[1.0, 2.0, 3.0], [4.0, 9.0]], [2.0**-10, 2.0**13]
    plain = quadratic.from_blocks(blocks, seed=3)
    scaled = quadratic.from_blocks(
        [np.array(b) * f for b, f in zip(blocks, factors, strict=True)], seed=3
    )
    run = {"step": 0.05, "num_starts": 5, "num_steps": 100, **settings, **QUIET}
    assert np.array_equal(
        quadratic.run(scaled, "adam", **run).final, quadratic.run(plain, "adam", **run).final
    )
    slow = {"step": 1e-5, "num_starts": 5, "num_steps": 100, **QUIET}
    assert not np.allclose(
        quadratic.run(scaled, "gd", **slow).final, quadratic.run(plain, "gd", **slow).final
    )
    single, wild = [[1.0], [2.0], [3.0]], [[2.0**-9], [2.0**5], [3 * 2.0**20]]
    left, right = (quadratic.from_blocks(b, basis="identity") for b in (single, wild))
    assert np.array_equal(
        quadratic.run(left, "adam", **run).final, quadratic.run(right, "adam", **run).final
    )


@pytest.mark.parametrize("name", METHODS)
def test_batched_runs_are_looped_runs(name, monkeypatch):
    """All problems, step sizes and starts at once, in pieces of any size, against each alone."""
    q, steps = quadratic.from_blocks([[1.0, 5.0], [2.0, 3.0, 30.0]], num_problems=3), [0.01, 0.03]
    whole = quadratic.run(
        q, name, step=steps, num_starts=3, num_steps=70, **SETTINGS[name], **QUIET
    )
    assert whole.final.shape == (3, 2, 3, 5) and whole.losses.shape[:3] == (3, 2, 3)
    monkeypatch.setattr(simulation, "_PIECE_BYTES", 8 * 5 * 4)
    pieces = quadratic.run(
        q, name, step=steps, num_starts=3, num_steps=70, **SETTINGS[name], **QUIET
    )
    assert pieces.final == pytest.approx(whole.final, rel=1e-11, abs=1e-13)
    starts = quadratic.draw_starts(q, 3, 0)
    for i, e, s in ((0, 0, 0), (1, 1, 2), (2, 0, 1)):
        alone = quadratic.from_matrix(q.hessian[i], q.block_sizes)
        one = quadratic.run(
            alone,
            name,
            step=steps[e],
            starts=starts[i, s : s + 1],
            num_steps=70,
            **SETTINGS[name],
            **QUIET,
        )
        assert whole.losses[i, e, s] == pytest.approx(one.losses[0], rel=1e-9, abs=1e-13)
        assert np.array_equal(whole.reached[i, e, s], one.reached[0])


def test_products_by_blocks_are_the_dense_products():
    q = quadratic.from_blocks(
        [np.linspace(1, 9, 20), np.linspace(20, 30, 7), np.linspace(2, 5, 18)], num_problems=3
    )
    for part in (q, q.part(slice(1, 2))):
        widths = [where.stop - where.start for where, _ in simulation.tiles_of(part)]
        assert widths == [20, 25]
        w = torch.randn(part.num_problems, 4, 45, dtype=torch.float64)
        out = torch.empty_like(w)
        simulation.product(part, w, out)()
        assert torch.allclose(out, w @ part.hessian, rtol=1e-12)


def test_threads_change_nothing(monkeypatch):
    q, cores = quadratic.case(3), torch.get_num_threads()
    monkeypatch.setattr(simulation, "_PIECE_BYTES", 8 * 9 * 5)
    once = quadratic.run(q, "adam", step=0.05, num_starts=40, num_steps=100, **QUIET)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    again = quadratic.run(q, "adam", step=0.05, num_starts=40, num_steps=100, **QUIET)
    monkeypatch.undo()
    torch.set_num_threads(cores)
    assert np.array_equal(once.losses, again.losses)


@pytest.mark.parametrize("name", ["gd", "heavy_ball", "adam"])
def test_a_run_that_diverges_is_flagged_and_changes_nothing_for_the_others(name):
    q, good, bad = quadratic.case(3), 2 / 2001, 2.5e-2
    good, bad = (good, bad) if name != "adam" else (0.01, 1e4)
    both = quadratic.run(q, name, step=[good, bad], num_starts=4, num_steps=1500, **QUIET)
    alone = quadratic.run(q, name, step=good, num_starts=4, num_steps=1500, **QUIET)
    assert both.diverged[1].all() and not both.diverged[0].any()
    assert both.losses[0] == pytest.approx(alone.losses, rel=1e-10)
    assert np.isinf(both.reached[1]).all() and not both.final[1].any()
    for losses, at in zip(both.losses[1], both.diverged_at[1], strict=True):
        assert (np.isinf(losses) == (both.recorded >= at)).all()
    assert not np.isnan(both.losses).any() and not np.isnan(both.final).any()


def test_divergence_is_flagged_at_its_step():
    q = quadratic.from_blocks([[1.0], [9.0]], basis="identity")
    runs = quadratic.run(
        q, "gd", step=1.0, starts=[[0.0, 1.0]], num_steps=100, **QUIET
    )  # f grows 64-fold a step
    assert runs.diverged_at.tolist() == [np.ceil(np.log(1e12) / np.log(64))]


def test_losses_that_vanish_stay_zero_and_are_no_divergence():
    q = quadratic.from_blocks([[1.0], [1.5]], basis="identity")
    runs = quadratic.run(q, "gd", step="optimal", starts=[[1.0, 1.0]], num_steps=2000, **QUIET)
    assert (
        not runs.diverged.any() and runs.losses[0, -1] == 0 and runs.final.tolist() == [[0.0, 0.0]]
    )
    adam = quadratic.run(
        q, "adam", beta2=0.5, step=1e-3, starts=[[1.0, 1.0]], num_steps=3000, **QUIET
    )
    assert np.isfinite(adam.losses).all()


def test_stopping_early_keeps_every_first_crossing():
    q = quadratic.case(3)
    full = quadratic.run(q, "adam", step="safe", num_starts=20, num_steps=3000, **QUIET)
    short = quadratic.run(
        q, "adam", step="safe", num_starts=20, num_steps=3000, stop_at=1e-6, **QUIET
    )
    assert np.array_equal(full.iterations_to(1e-6), short.iterations_to(1e-6))
    crossed = full.recorded[(full.losses <= 1e-6).argmax(-1)]
    found = full.iterations_to(1e-6)
    assert (found <= crossed).all() and (np.diff(full.reached, axis=1) >= 0)[
        np.isfinite(found)
    ].all()
    ordered = np.sort(found)
    assert full.quantiles(1e-6).tolist() == [ordered[4], ordered[9], ordered[14]]


def test_the_last_iterates_are_kept_in_order():
    q = quadratic.case(3)
    runs = quadratic.run(q, "gd", step=[1e-3, 5e-4], num_starts=3, num_steps=70, tail=9, **QUIET)
    assert runs.tail.shape == (9, 2, 3, 9) and np.array_equal(runs.tail[-1], runs.final)
    h = q.hessian[0].numpy()
    assert runs.tail[5, 1] == pytest.approx(
        runs.tail[4, 1] @ (np.eye(9) - 5e-4 * h), rel=1e-10, abs=1e-13
    )


def test_everything_is_float64():
    q = quadratic.from_blocks([torch.tensor([1.0, 2.0], dtype=torch.float32)])
    runs = quadratic.run(q, "adam", step=0.1, starts=torch.ones(2, 2), num_steps=5, **QUIET)
    arrays = (runs.final, runs.losses, runs.reached, runs.first_losses, runs.steps, runs.tail)
    assert q.hessian.dtype == torch.float64 and all(array.dtype == np.float64 for array in arrays)


def test_the_best_step_of_gradient_descent_is_known():
    """From starts of equal energy in mu and L, nothing beats 2 / (mu + L)."""
    q = quadratic.from_blocks([[1.0], [99.0]], basis="identity")
    sweep = quadratic.best_step(q, "gd", starts=[[1.0, 99**-0.5]], num_steps=2000)
    assert sweep.best == pytest.approx(0.02, rel=0.05) and not sweep.at_edge
    at_best = sweep.medians[sweep.steps == sweep.best][0]
    exact = quadratic.run(
        q, "gd", step="optimal", starts=[[1.0, 99**-0.5]], num_steps=2000, **QUIET
    ).iterations_to(1e-6)[0]
    assert at_best == pytest.approx(exact, rel=0.1) and (np.diff(sweep.steps) > 0).all()


def test_the_best_step_lets_few_runs_diverge():
    q = quadratic.case(3)
    sweep = quadratic.best_step(q, "adam", num_steps=3000)
    at = int(np.argmin(np.abs(sweep.steps - sweep.best)))
    assert sweep.diverged[at] <= 0.1 and np.isfinite(sweep.medians[at])
    allowed = sweep.diverged <= 0.1
    assert sweep.medians[at] == sweep.medians[allowed].min()
    runs = quadratic.run(q, "adam", step="best", num_starts=32, num_steps=3000, **QUIET)
    assert runs.steps[0] == sweep.best and runs.step.startswith("best of a sweep")


@pytest.mark.parametrize(
    ("method", "arguments", "words"),
    [
        ("adamw", {}, "choose one of gd"),
        ("adam", {"beta3": 1}, "its settings are beta1, beta2, eps, bias_correction"),
        ("gd", {"beta1": 0.9}, "it has none"),
        ("adam", {"beta1": 1.0, "step": 0.1}, "beta1 is 1.0"),
        ("adam", {"beta2": 1.5, "step": 0.1}, "beta2 is 1.5"),
        ("adam", {"beta2": 1.0, "bias_correction": True, "step": 0.1}, "1 only without"),
        ("adam", {"eps": -1.0, "step": 0.1}, "eps is -1.0"),
        ("adam_mini", {"groups": (2, 2), "step": 0.1}, "add up to 5"),
        ("adam", {"beta2": 0.9, "step": "optimal"}, "no fixed preconditioner"),
        ("adam", {"beta2": 0.9, "step": "theorem"}, "beta2 = 1"),
        ("gd", {"step": "fast"}, "optimal, safe, theorem, best"),
        ("gd", {"step": -1.0}, "positive finite"),
        ("gd", {"step": []}, "positive finite"),
        ("gd", {"step": None}, "give a number"),
        ("gd", {"step": 0.1, "num_starts": 0}, "num_starts is 0"),
        ("gd", {"step": 0.1, "num_steps": 1.5}, "num_steps is 1.5"),
        ("gd", {"step": 0.1, "starts": [[1.0, 2.0]]}, r"starts has shape \(1, 2\)"),
        ("gd", {"step": 0.1, "starts": [[0.0] * 5]}, "start that is zero"),
        ("gd", {"step": 0.1, "tolerances": (2.0,)}, "between 0 and 1"),
        ("gd", {"step": 0.1, "tail": 3, "stop_at": 1e-2}, "without stopping early"),
    ],
)
def test_bad_arguments_are_one_sentence(method, arguments, words):
    with pytest.raises(ValueError, match=words) as error:
        quadratic.run(problem(), method, **({"num_steps": 5} | arguments), **QUIET)
    assert "\n" not in str(error.value)


def test_a_tolerance_that_was_not_watched_is_refused():
    runs = quadratic.run(problem(), "gd", step=0.01, num_steps=5, **QUIET)
    with pytest.raises(ValueError, match="pass tolerances="):
        runs.iterations_to(3e-5)
    assert (
        quadratic.run(problem(), "gd", step=0.05, num_steps=300, tolerances=(3e-5,), **QUIET)
        .iterations_to(3e-5)
        .min()
        > 1
    )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", METHODS)
def test_cuda_gives_the_same_runs(name):
    q = problem()
    here, there = (
        quadratic.run(
            p, name, step=[0.01, 0.03], num_starts=5, num_steps=200, **SETTINGS[name], **QUIET
        )
        for p in (q, q.to("cuda"))
    )
    assert there.losses == pytest.approx(here.losses, rel=1e-6, abs=1e-12)
