"""Figures of races: what is drawn, and that nothing overflows them."""

import itertools
import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from hessian_tools.plots import training as plots
from hessian_tools.training.races import Race, RaceEntry, RaceRound
from hessian_tools.training.trajectory import Trajectory


def trajectory(losses, diverged=False):
    losses = np.array(losses, dtype=float)
    steps = np.array([len(losses)])
    return Trajectory(losses, losses, losses, steps, losses[-1:], 40, diverged, False, 1.0, 8)


def entry(optimizer, size, losses, rounds):
    runs = tuple(map(trajectory, losses))
    finals = np.array([run.final for run in runs])
    return RaceEntry(optimizer, size, 40, 0.1, finals, finals, 2.0, 9, 8, 0.1, False, rounds, runs)


def rounds(*losses):
    rates = 10.0 ** np.arange(len(losses))
    values = np.array(losses)
    return (RaceRound(40, rates, values, ~np.isfinite(values)),)


@pytest.fixture
def race():
    curve = np.geomspace(5, 1, 40)
    entries = [
        entry(f"optimizer {k}", size, [curve + k, curve + 1.1 * k], rounds(3, 1 + k, math.inf))
        for size in (8, 64)
        for k in range(9)
    ]
    return Race("data", "40 steps", (0, 1), tuple(entries), 1.0)


def test_curves_have_a_line_an_optimizer_and_a_panel_a_batch_size(race):
    panels = plots.loss_curves(race, title="A race").axes
    assert [panel.get_title() for panel in panels] == [
        "batches of 8, 40 steps",
        "batches of 64, 40 steps",
    ]
    labels = [text.get_text() for text in panels[0].get_legend().get_texts()]
    assert labels == [f"optimizer {k}, rate 0.1" for k in range(9)]
    styles = {(line.get_color(), line.get_linestyle()) for line in panels[0].lines[:27:3]}
    assert len(styles) == 9
    assert len(panels[0].collections) == 9  # bands over seeds


def test_rates_show_what_diverged_and_what_is_about_as_good(race):
    panel = plots.rate_curves(race).axes[0]
    crosses = [line for line in panel.lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert len(crosses) == 9 and all(line.get_xdata() == [100.0] for line in crosses)
    assert panel.get_yscale() == "log" and len(panel.patches) == 1


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_pictures_are_written(race, tmp_path, kind):
    paths = plots.draw(tmp_path, race, "A race", kind)
    assert [path.name for path in paths] == [f"curves.{kind}", f"rates.{kind}"]
    assert all(path.stat().st_size > 1000 for path in paths)


def test_a_race_in_which_all_diverged_is_drawn(tmp_path):
    bad = trajectory([1.0, math.nan], diverged=True)
    values = np.array([math.inf])
    lost = RaceEntry(
        "sgd", None, 40, 0.1, values, values, math.nan, None, 8, 0.1, True, rounds(math.inf), (bad,)
    )
    race = Race("data", "40 steps", (0,), (lost,), 1.0)
    assert len(plots.draw(tmp_path, race, "Lost")) == 2


def test_losses_below_zero_are_drawn_on_a_linear_axis(tmp_path):
    curve = np.linspace(1, -3, 40)
    race = Race("data", "40 steps", (0,), (entry("sgd", 8, [curve], rounds(-1.0, -3.0)),), 1.0)
    assert plots.loss_curves(race).axes[0].get_yscale() == "linear"
    assert len(plots.draw(tmp_path, race, "Below")) == 2


@pytest.mark.parametrize(("lowest", "labels"), [(0.5, 10), (0.05, 6), (0.0005, 4)])
def test_labels_of_losses_do_not_run_together(lowest, labels):
    axes = Figure(figsize=(4.6, 3.8)).add_subplot()
    plots._limits(axes, lowest, 2.0)
    axes.figure.draw_without_rendering()
    ticks = [*axes.yaxis.get_major_ticks(), *axes.yaxis.get_minor_ticks()]
    low, high = axes.get_ylim()
    shown = [t for t in ticks if low <= t.get_loc() <= high and t.label1.get_text()]
    assert 3 <= len(shown) <= labels
    boxes = sorted((t.label1.get_window_extent() for t in shown), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(boxes))
