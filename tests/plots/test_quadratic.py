"""Figures of quadratics show every method, both bounds and every block."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from hessian_tools import quadratic
from hessian_tools.plots.quadratic import block_eigenvalues, loss_curves


def test_loss_curves_show_every_method_and_both_bounds():
    q = quadratic.case(4)
    names = ["gd", "adam_frozen", "sign"]
    runs = quadratic.compare(q, names, num_starts=4, num_steps=100, progress=False)
    axes = Figure().subplots()
    loss_curves(axes, runs, quadratic.constants(q))
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[:3] == ["GD", "Adam, β₂ = 1", "sign descent"]
    assert len(labels) == 5
    drawn = dict(zip(labels, axes.get_lines(), strict=True))
    steps, losses = drawn["GD"].get_data()
    last = np.quantile(runs["gd"].losses[:, -1], 0.5, method="inverted_cdf")
    assert losses[-1] == pytest.approx(last)
    assert steps[-1] == 100
    steps, bound = drawn["GD's worst start, any step (Thm 3.2)"].get_data()
    assert bound == pytest.approx((1 - 2 / 2001) ** (2 * steps))


def test_eigenvalues_are_shown_by_block():
    axes = Figure().subplots()
    block_eigenvalues(axes, quadratic.case(4))
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == ["block 1", "block 2", "block 3"]
