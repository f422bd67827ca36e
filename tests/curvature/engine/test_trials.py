"""Trials within a budget."""

import torch
from problems import network

from hessian_tools.curvature.engine.footprint import Footprint
from hessian_tools.curvature.engine.precision import arithmetic
from hessian_tools.curvature.engine.trials import Trials
from hessian_tools.curvature.segments.recompute import NONE


def test_one_probe_is_tried_where_two_do_not_fit():
    problem = network("gpt", torch.float32)
    trials = Trials(problem, arithmetic(problem.model), 1 << 30)
    free = trials._trial(NONE, 1 << 30)
    largest = free[max(free)]
    assert all(set(trial.passes) == {2, 3} for trial in free.values())
    tight = trials._trial(NONE, largest.graph + largest.passes[2] - 1)
    assert all(set(trial.passes) == {1} for trial in tight.values())
    footprint = Footprint.measured(tight, 0)  # all of a single probe's pass counts as a probe's
    assert (
        footprint.row(max(free)) == tight[max(free)].passes[1] and footprint.fixed(max(free)) == 0
    )
