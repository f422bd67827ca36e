"""What is given up when memory runs out: in which order, and that no part of the loss is lost."""

from dataclasses import replace

import pytest
import torch
from problems import network
from torch import nn

import hessian_tools as ht
from hessian_tools.curvature.engine.plan import PlanRequest, choose
from hessian_tools.curvature.engine.precision import arithmetic
from hessian_tools.curvature.engine.retreat import Setback, Work, retreat
from hessian_tools.curvature.engine.trials import Trials
from hessian_tools.curvature.segments.recompute import STREAMED


def setback(problem: ht.Problem, rows: int, graphs_held: bool) -> Setback:
    trials = Trials(problem, arithmetic(problem.model), 1 << 30)
    plan = choose(trials, PlanRequest())
    work = [Work(weight, batch) for weight, batch in plan.pieces]
    return Setback(plan, work, rows, graphs_held, trials)


@pytest.mark.parametrize("graphs_held", [True, False])
def test_what_costs_little_is_given_up_first(graphs_held):
    now, words = setback(network("gpt"), rows=4, graphs_held=graphs_held), []
    with pytest.raises(MemoryError, match=r"out of memory \(says the test\) with the most frugal"):
        while True:
            step = retreat(now, "says the test")
            words.append(step.words)
            now = replace(now, plan=step.plan, work=step.work)
    expected = ["2 probes at once", "1 probes at once"]
    if not graphs_held:
        expected.append("graphs rebuilt for every product")
    # Of the two examples of the longest batch one is left; a single layer is not repeated.
    expected += ["micro-batches of 1", f"recomputing {STREAMED}"]
    assert words == expected
    assert [f"out of memory once, from then on {word}" for word in words] == list(now.plan.notes)


def test_a_batch_that_is_given_twice_counts_twice():
    batch = torch.randn(4, 3)
    problem = ht.Problem(nn.Linear(3, 1), lambda model, x: model(x).square().mean(), [batch, batch])
    step = setback(problem, rows=1, graphs_held=True).smaller_batches()
    assert step is not None and len(step.plan.pieces) == len(step.work) == 4
    assert sum(weight for weight, _ in step.plan.pieces) == pytest.approx(1)
