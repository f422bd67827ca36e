"""Sweeps: extension at an edge, refinement, hopeless runs, journals; on bowls of known best rate."""

import math

import numpy as np
import pytest
from problems.trained import Bowl, bowl_stream

import hessian_tools as ht
from hessian_tools.problem import zoo
from hessian_tools.results import Journal
from hessian_tools.training import Stream, constant, sweep, zoo_stream
from hessian_tools.training.runs import Runs, Setting, hopeless
from hessian_tools.training.sweeps import width
from hessian_tools.training.trajectory import Trajectory

PLAIN = {"momenta": (0.0,), "schedule": constant, "clip": None, "budget": 40}


def of_bowl(rates, **options):
    (result,) = sweep(Bowl, bowl_stream(), ["sgd"], rates={"sgd": rates}, **{**PLAIN, **options})
    return result


def trajectory(losses, num_steps=None, diverged=False):
    losses = np.array(losses, dtype=float)
    none = np.empty(0)
    steps = num_steps or len(losses)
    return Trajectory(losses, none, none, none.astype(int), none, steps, diverged, False, 1.0, 0)


@pytest.mark.parametrize("start", [1e-2, 1e2])
def test_the_grid_is_extended_while_the_best_is_at_an_edge(start):
    result = of_bowl(
        (start, start * math.sqrt(10)) if start < 1 else (start / math.sqrt(10), start)
    )
    assert result.best_rate == pytest.approx(1.0) and not result.at_edge
    np.testing.assert_allclose(np.diff(np.log10(result.rates)), 0.5)
    assert result.loss < 1e-20
    lost = result.diverged | result.stopped
    assert lost[result.rates > 2.1].all() and not result.diverged[result.rates < 2].any()


def test_the_extension_ends_and_says_so():
    result = of_bowl((1e-9,))
    assert result.at_edge and len(result.rates) == 7


def test_refinement_adds_quarter_decades_beside_the_best():
    result = of_bowl((0.1, 10**-0.5, 1.0, 10**0.5), refine=True)
    exponents = [-1, -0.5, -0.25, 0, 0.25, 0.5]
    np.testing.assert_allclose(np.log10(result.rates), exponents, atol=1e-12)
    assert result.best_rate == pytest.approx(1.0)


def test_seeds_and_momenta_have_runs_of_their_own():
    # heavy ball at rate 1 and momentum 0.5 oscillates; seeds scale the start
    results = sweep(
        Bowl,
        bowl_stream(),
        ["sgd"],
        rates={"sgd": (0.1, 0.3)},
        **{**PLAIN, "momenta": (0.0, 0.5), "budget": 10},
        seeds=(0, 2),
    )
    assert [result.momentum for result in results] == [0.0, 0.5]
    for result in results:
        assert result.losses.shape == (len(result.rates), 2)
        np.testing.assert_allclose(result.losses[0, 1], 9 * result.losses[0, 0])
        best = result.losses[result.best]
        assert result.spread == pytest.approx(best.std(ddof=1))


def test_every_run_is_a_line_and_none_is_run_twice(tmp_path, monkeypatch):
    file = tmp_path / "runs.jsonl"
    trained = Runs._trained
    names = []

    def counted(self, setting, *rest):
        if len(names) == 5:
            names.append("killed")
            raise KeyboardInterrupt
        names.append(setting.name)
        return trained(self, setting, *rest)

    monkeypatch.setattr(Runs, "_trained", counted)
    whole_rates = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    with pytest.raises(KeyboardInterrupt):
        of_bowl(whole_rates, journal=Journal(file, "a"))
    assert len(file.read_text().splitlines()) == 5
    resumed = of_bowl(whole_rates, journal=Journal(file, "a"))
    names.remove("killed")
    assert len(set(names)) == len(names) == len(resumed.rates)
    assert set(Journal(file, "a").finished) == set(names)
    whole = of_bowl(whole_rates)
    assert np.array_equal(whole.losses, resumed.losses)


def test_hopeless_runs_are_stopped_by_the_stated_rule():
    result = of_bowl((1e-4, 1e-3, 1e-2, 0.1, 1.0))
    stopped = result.stopped[:, 0]
    assert stopped.tolist() == [True, True, True, False, False, True]  # the last one grows
    assert not of_bowl((1e-4, 1.0), stop_hopeless=False).stopped.any()
    rival = trajectory(np.linspace(10, 0, 100))
    give_up = hopeless(rival)
    assert give_up(50, [10.0] * 50) and not give_up(49, [10.0] * 49)
    assert not give_up(50, list(np.linspace(10, 6, 50))) and not give_up(
        75, list(np.linspace(10, 3, 75))
    )
    assert give_up(75, list(np.linspace(10, 8, 75)))


def test_the_width_is_that_of_the_rates_within_five_percent():
    rates = np.array([0.01, 0.1, 1.0, 10.0, 100.0])
    assert width(rates, np.array([2.0, 1.04, 1.0, 1.0, np.inf])) == pytest.approx(2 + 0.01 / 0.96)
    assert width(rates, np.array([2.0, 2.0, 1.0, 2.0, 2.0])) == pytest.approx(0.1)
    assert math.isnan(width(rates, np.full(5, np.inf)))


def test_a_sweep_is_saved_and_loaded(tmp_path):
    result = of_bowl((0.3, 1.0, 3.0))
    loaded = ht.load(ht.save(result, tmp_path / "sweep"))
    assert np.array_equal(loaded.losses, result.losses) and loaded.width == result.width


def test_all_optimizers_get_the_same_batches_and_the_same_start(monkeypatch):
    stream = zoo_stream("mlp", batch_size=2)
    asked = []
    batch = Stream.batch

    def recorded(self, step):
        drawn = batch(self, step)
        asked.append((self.seed, step, drawn[0].numpy().tobytes()))
        return drawn

    monkeypatch.setattr(Stream, "batch", recorded)
    sweep(
        lambda seed: zoo.load("mlp", seed=seed).model,
        stream,
        ["sgd", "adam"],
        rates={"sgd": (0.01, 0.1, 1.0), "adam": (1e-3, 1e-2, 1e-4)},
        seeds=(0, 1),
        budget=3,
    )
    assert len(asked) > 30 and len(set(asked)) == 6


def test_names_tell_all_that_differs():
    one = Setting("sgd", 0.1, 0, 100)
    assert one.name == "sgd, rate 0.1, 100 steps, seed 0"
    other = Setting("sgd", 0.1, 0, 100, batch_size=8, momentum=0.9)
    assert other.name == "sgd, rate 0.1, momentum 0.9, batch 8, 100 steps, seed 0"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"budget": "5min"},
            "a sweep's budget is the steps of one run, such as 500steps, got 300 seconds",
        ),
        ({"seeds": ()}, "seeds is empty; name one or more"),
        ({"momenta": ()}, "momenta is empty"),
        ({"rates": {"sgd": (0.1, -1)}}, "rates of sgd must be one or more positive numbers"),
        ({"rates": {"sgd": ()}}, "rates of sgd must be one or more"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        sweep(Bowl, bowl_stream(), ["sgd"], **{**PLAIN, **options})


def test_an_unknown_optimizer():
    with pytest.raises(ValueError, match="optimizer 'adem' is not known; there are"):
        sweep(Bowl, bowl_stream(), ["adem"], budget=3)
