"""Best steps, what a run refuses, and results that survive saving."""

import numpy as np
import pytest
from problems.quadratics import five

import hessian_tools as ht
from hessian_tools import quadratic

QUIET = {"progress": False}


def test_the_best_step_of_gradient_descent_is_known():
    """From starts of equal energy in mu and L, nothing beats 2 / (mu + L)."""
    q = quadratic.from_blocks([[1.0], [99.0]], basis="identity")
    some = {"starts": [[1.0, 99**-0.5]], "num_steps": 2000}
    sweep = quadratic.best_step(q, "gd", **some)
    assert sweep.best == pytest.approx(0.02, rel=0.05)
    assert not sweep.at_edge
    assert (np.diff(sweep.steps) > 0).all()
    exact = quadratic.run(q, "gd", step="optimal", **some, **QUIET).iterations_to(1e-6)[0]
    at_best = sweep.medians[sweep.steps == sweep.best][0]
    assert at_best == pytest.approx(exact, rel=0.1)


def test_the_best_step_lets_few_runs_diverge():
    q = quadratic.case(3)
    sweep = quadratic.best_step(q, "adam", num_steps=3000)
    at = int(np.argmin(np.abs(sweep.steps - sweep.best)))
    assert sweep.diverged[at] <= 0.1
    assert np.isfinite(sweep.medians[at])
    assert sweep.medians[at] == sweep.medians[sweep.diverged <= 0.1].min()
    runs = quadratic.run(q, "adam", step="best", num_starts=32, num_steps=3000, **QUIET)
    assert runs.steps[0] == sweep.best
    assert runs.step.startswith("best of a sweep")


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
        quadratic.run(five(), method, **({"num_steps": 5} | arguments), **QUIET)
    assert "\n" not in str(error.value)


def test_a_tolerance_that_was_not_watched_is_refused():
    runs = quadratic.run(five(), "gd", step=0.01, num_steps=5, **QUIET)
    with pytest.raises(ValueError, match="pass tolerances="):
        runs.iterations_to(3e-5)


def test_a_tolerance_that_was_asked_for_is_watched():
    some = {"step": 0.05, "num_steps": 300, "tolerances": (3e-5,)}
    runs = quadratic.run(five(), "gd", **some, **QUIET)
    assert runs.iterations_to(3e-5).min() > 1


def test_results_survive_saving(tmp_path):
    q = quadratic.case(3)
    some = {"num_starts": 2, "num_steps": 40, **QUIET}
    runs = quadratic.run(q, "gd", step=[1e-3, 1.0], tail=3, **some)
    kept = {
        "runs": runs,
        "sweep": quadratic.best_step(q, "gd", num_starts=2, num_steps=60),
        "constants": quadratic.constants(q),
        "checks": tuple(quadratic.check_gd_bound(q, num_steps=3)),
        "cycle": quadratic.limit_cycle(q, beta2=0.9, num_steps=300),
        "cards": quadratic.score_prediction(quadratic.random_problems(3)),
    }
    ht.save(kept, tmp_path / "x")
    loaded = ht.load(tmp_path / "x")
    assert np.array_equal(loaded["runs"].losses, runs.losses)
    assert loaded["runs"].settings == {}
    assert np.array_equal(loaded["runs"].iterations_to(1e-2), runs.iterations_to(1e-2))
    assert loaded["checks"] == kept["checks"]
    assert loaded["cards"] == kept["cards"]
    assert loaded["cycle"].exponent == kept["cycle"].exponent
    assert loaded["sweep"].best == kept["sweep"].best


def least_on_a_grid(problem, method, tolerance, steps, **settings):
    """The least median on 120 step sizes, of those at which at most a tenth diverge."""
    unit = 2 / float(problem.largest)
    sizes = np.geomspace(0.01, 3, 120) * unit
    runs = quadratic.run(
        problem,
        method,
        step=sizes,
        num_starts=8,
        num_steps=steps,
        tolerances=(tolerance,),
        stop_at=tolerance,
        **settings,
        **QUIET,
    )
    few = runs.diverged.mean(-1) <= 0.1
    return runs.median_iterations(tolerance)[few].min()


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("gd", {}),
        ("heavy_ball", {}),
        ("heavy_ball", {"beta": 0.9}),
        ("heavy_ball", {"beta": 0.5}),
        ("nesterov", {}),
    ],
)
@pytest.mark.parametrize("number", quadratic.CASES)
def test_the_best_step_is_as_good_as_a_fine_grid(number, method, settings):
    """Iterations of momentum oscillate with the step: the best dip is found, not any."""
    problem = quadratic.case(number)
    tolerance, steps = (1e-3, 60) if number > 2 else (1e-1, 40)
    some = {"num_starts": 8, "num_steps": steps}
    sweep = quadratic.best_step(problem, method, tolerance=tolerance, **some, **settings)
    found = sweep.medians[sweep.steps == sweep.best][0]
    assert np.isfinite(found)
    assert found <= least_on_a_grid(problem, method, tolerance, steps, **settings) + 1


@pytest.mark.parametrize("method", ["gd", "heavy_ball", "adam", "sign", "jacobi"])
@pytest.mark.parametrize("factor", [2.0**-100, 2.0**100])
def test_the_best_step_does_not_see_the_scale(method, factor):
    """Iterations are the same, and the step of methods that are not scale-free goes with 1 / c."""
    blocks = [[1.0, 2.0, 3.0], [99.0, 100.0, 101.0]]
    problems = [
        quadratic.from_blocks([[c * e for e in block] for block in blocks]) for c in (1.0, factor)
    ]
    some = {"num_starts": 4, "num_steps": 60, "tolerance": 1e-2}
    one, other = (quadratic.best_step(problem, method, **some) for problem in problems)
    assert other.medians.min() == one.medians.min()
    power = 1.0 if method in ("gd", "heavy_ball") else 0.0
    assert other.best * factor**power == pytest.approx(one.best, rel=1e-9)


def test_eigenvalues_beyond_float64_are_told():
    huge = quadratic.from_blocks([[1e160], [2e160, 3e160]])
    with pytest.raises(ArithmeticError, match="leaves float64's range; scale the eigenvalues"):
        quadratic.best_step(huge, "adam", num_steps=50, num_starts=4)
