"""Many runs at once against each alone: pieces, threads, divergence, early stops, what is kept."""

import numpy as np
import pytest
import torch
from problems.quadratics import SETTINGS, five

from hessian_tools import quadratic
from hessian_tools.quadratic import simulation
from hessian_tools.quadratic.methods import METHODS

QUIET = {"progress": False}


@pytest.mark.parametrize("name", METHODS)
def test_batched_runs_are_looped_runs(name):
    """All problems, step sizes and starts at once, against each alone."""
    q = quadratic.from_blocks([[1.0, 5.0], [2.0, 3.0, 30.0]], num_problems=3)
    steps = [0.01, 0.03]
    some = {"num_steps": 70, **SETTINGS[name], **QUIET}
    whole = quadratic.run(q, name, step=steps, num_starts=3, **some)
    assert whole.final.shape == (3, 2, 3, 5)
    assert whole.losses.shape[:3] == (3, 2, 3)
    starts = quadratic.draw_starts(q, 3, 0)
    for i, e, s in ((0, 0, 0), (1, 1, 2), (2, 0, 1)):
        alone = quadratic.from_matrix(q.hessian[i], q.block_sizes)
        one = quadratic.run(alone, name, step=steps[e], starts=starts[i, s : s + 1], **some)
        assert whole.losses[i, e, s] == pytest.approx(one.losses[0], rel=1e-9, abs=1e-13)
        assert np.array_equal(whole.reached[i, e, s], one.reached[0])


@pytest.mark.parametrize("name", METHODS)
def test_the_size_of_pieces_changes_nothing(name, monkeypatch):
    q = quadratic.from_blocks([[1.0, 5.0], [2.0, 3.0, 30.0]], num_problems=3)
    some = {"step": [0.01, 0.03], "num_starts": 3, "num_steps": 70, **SETTINGS[name], **QUIET}
    whole = quadratic.run(q, name, **some)
    monkeypatch.setattr(simulation, "_PIECE_BYTES", 8 * 5 * 4)
    pieces = quadratic.run(q, name, **some)
    assert pieces.final == pytest.approx(whole.final, rel=1e-11, abs=1e-13)


def test_threads_change_nothing(monkeypatch):
    q = quadratic.case(3)
    some = {"step": 0.05, "num_starts": 40, "num_steps": 100, **QUIET}
    cores = torch.get_num_threads()
    monkeypatch.setattr(simulation, "_PIECE_BYTES", 8 * 9 * 5)
    once = quadratic.run(q, "adam", **some)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    again = quadratic.run(q, "adam", **some)
    monkeypatch.undo()
    torch.set_num_threads(cores)
    assert np.array_equal(once.losses, again.losses)


def test_products_by_blocks_are_the_dense_products():
    blocks = [np.linspace(1, 9, 20), np.linspace(20, 30, 7), np.linspace(2, 5, 18)]
    q = quadratic.from_blocks(blocks, num_problems=3)
    for part in (q, q.part(slice(1, 2))):
        widths = [where.stop - where.start for where, _ in simulation.tiles_of(part)]
        assert widths == [20, 25]
        w = torch.randn(part.num_problems, 4, 45, dtype=torch.float64)
        out = torch.empty_like(w)
        simulation.product(part, w, out)()
        assert torch.allclose(out, w @ part.hessian, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [("gd", 2 / 2001, 2.5e-2), ("heavy_ball", 2 / 2001, 2.5e-2), ("adam", 0.01, 1e4)],
)
def test_a_run_that_diverges_is_flagged_and_changes_nothing_for_the_others(name, good, bad):
    q = quadratic.case(3)
    some = {"num_starts": 4, "num_steps": 1500, **QUIET}
    both = quadratic.run(q, name, step=[good, bad], **some)
    alone = quadratic.run(q, name, step=good, **some)
    assert not both.diverged[0].any()
    assert both.losses[0] == pytest.approx(alone.losses, rel=1e-10)
    assert both.diverged[1].all()
    assert np.isinf(both.reached[1]).all()
    assert not both.final[1].any()
    for losses, at in zip(both.losses[1], both.diverged_at[1], strict=True):
        assert (np.isinf(losses) == (both.recorded >= at)).all()
    assert not np.isnan(both.losses).any()
    assert not np.isnan(both.final).any()


def test_divergence_is_flagged_at_its_step():
    q = quadratic.from_blocks([[1.0], [9.0]], basis="identity")
    runs = quadratic.run(q, "gd", step=1.0, starts=[[0.0, 1.0]], num_steps=100, **QUIET)
    expected = np.ceil(np.log(1e12) / np.log(64))  # f grows 64-fold a step
    assert runs.diverged_at.tolist() == [expected]


def test_losses_that_vanish_stay_zero_and_are_no_divergence():
    q = quadratic.from_blocks([[1.0], [1.5]], basis="identity")
    start = [[1.0, 1.0]]
    runs = quadratic.run(q, "gd", step="optimal", starts=start, num_steps=2000, **QUIET)
    assert not runs.diverged.any()
    assert runs.losses[0, -1] == 0
    assert runs.final.tolist() == [[0.0, 0.0]]
    adam = quadratic.run(q, "adam", beta2=0.5, step=1e-3, starts=start, num_steps=3000, **QUIET)
    assert np.isfinite(adam.losses).all()


def test_stopping_early_keeps_every_first_crossing():
    q = quadratic.case(3)
    some = {"step": "safe", "num_starts": 20, "num_steps": 3000, **QUIET}
    full = quadratic.run(q, "adam", **some)
    short = quadratic.run(q, "adam", stop_at=1e-6, **some)
    assert np.array_equal(full.iterations_to(1e-6), short.iterations_to(1e-6))


def test_first_crossings_are_those_of_the_losses():
    q = quadratic.case(3)
    runs = quadratic.run(q, "adam", step="safe", num_starts=20, num_steps=3000, **QUIET)
    iterations = runs.iterations_to(1e-6)
    first_recorded = runs.recorded[(runs.losses <= 1e-6).argmax(-1)]
    assert (iterations <= first_recorded).all()
    apart = np.diff(runs.reached, axis=1)[np.isfinite(iterations)]
    assert (apart >= 0).all()
    ordered = np.sort(iterations)
    assert runs.quantiles(1e-6).tolist() == [ordered[4], ordered[9], ordered[14]]


def test_the_last_iterates_are_kept_in_order():
    q = quadratic.case(3)
    runs = quadratic.run(q, "gd", step=[1e-3, 5e-4], num_starts=3, num_steps=70, tail=9, **QUIET)
    assert runs.tail.shape == (9, 2, 3, 9)
    assert np.array_equal(runs.tail[-1], runs.final)
    step = np.eye(9) - 5e-4 * q.hessian[0].numpy()
    assert runs.tail[5, 1] == pytest.approx(runs.tail[4, 1] @ step, rel=1e-10, abs=1e-13)


def test_everything_is_float64():
    q = quadratic.from_blocks([torch.tensor([1.0, 2.0], dtype=torch.float32)])
    assert q.hessian.dtype == torch.float64
    runs = quadratic.run(q, "adam", step=0.1, starts=torch.ones(2, 2), num_steps=5, **QUIET)
    for name in ("final", "losses", "reached", "first_losses", "steps", "tail"):
        assert getattr(runs, name).dtype == np.float64, name


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", METHODS)
def test_cuda_gives_the_same_runs(name):
    q = five()
    # close to the minimum, Adam's second moments vanish and its steps amplify rounding
    some = {"step": [0.01, 0.03], "num_starts": 5, "num_steps": 100, **SETTINGS[name], **QUIET}
    here = quadratic.run(q, name, **some)
    there = quadratic.run(q.to("cuda"), name, **some)
    assert there.losses == pytest.approx(here.losses, rel=1e-6, abs=1e-12)
