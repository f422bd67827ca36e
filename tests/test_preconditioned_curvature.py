"""The experiment on preconditioned curvature: who moves the weights, and how it is judged."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "experiments"))
evidence = importlib.import_module("evidence")
experiment = importlib.import_module("preconditioned_curvature")
from hessian_tools.optimizers import make  # noqa: E402
from hessian_tools.training import train  # noqa: E402

PAIR = evidence.SUITE["mlp/tanh-deep"]


def test_those_that_follow_move_nothing_and_have_state():
    alone, led = PAIR.make_model(0), PAIR.make_model(0)
    train(alone, PAIR.stream(), make("adam", alone, 1e-3), budget=4, validate_every=0)
    leader = make("adam", led, 1e-3)
    every = experiment.led(leader, experiment.followers(led))
    train(led, PAIR.stream(), leader, budget=4, validate_every=0)
    for one, other in zip(alone.parameters(), led.parameters(), strict=True):
        assert torch.equal(one, other)
    assert len(every) == 5
    for optimizer in every.values():
        assert optimizer.state


def test_a_change_counts_where_intervals_are_apart_at_both_times():
    wide = experiment.Measured(1.0, 1.0, 0.9, 1.1, 2.0, 1.0, 1.0)
    narrow = replace(wide, spread=0.5, spread_low=0.4, spread_high=0.6)
    close = replace(wide, spread=0.8, spread_low=0.7, spread_high=0.95)
    assert experiment.judged([(narrow, wide), (narrow, wide)]) == "evens out the blocks"
    assert experiment.judged([(wide, narrow), (wide, narrow)]) == "makes the blocks differ"
    for pairs in ([(narrow, wide), (close, wide)], [(wide, narrow), (narrow, wide)], []):
        assert "no more than is resolved" in experiment.judged(pairs)
