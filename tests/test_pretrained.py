"""The experiment on pretrained weights: which blocks, and how it is judged."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from hessian_tools.app.models.saved_model import library
from hessian_tools.training import Trajectory

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "experiments"))
experiment = importlib.import_module("pretrained")


def test_a_claim_about_spreads_needs_intervals_that_are_apart():
    low, middle, high = (0.5, 0.6), (0.55, 0.9), (1.0, 1.2)

    def judged(pretrained, *others):
        named = {f"random {number}": interval for number, interval in enumerate(others)}
        return experiment.judged({experiment.PRETRAINED: pretrained, **named})

    assert judged(low, high, high) == "holds here"
    assert judged(high, low, middle) == "does not hold here"
    assert judged(low, middle, high) == judged(middle, low, high) == "not decidable"


def test_only_the_layers_that_are_asked_for_are_measured():
    config = library().LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = library().LlamaForCausalLM(config)
    names = [block.name for block in experiment.blocks_of(model, (1,))]
    assert len(names) == 8 and "model.embed_tokens.weight" in names
    assert all(name.startswith(("model.layers.1.", "model.embed")) for name in names)


def test_the_gap_is_a_share_of_adams_progress():
    def run(*losses):
        none, integers = np.array([]), np.array([], dtype=np.int64)
        steps = len(losses)
        return Trajectory(np.array(losses), none, none, integers, none, steps, False, False, 0.0, 0)

    assert experiment.gap(run(4.0, 2.0), run(4.0, 1.0)) == pytest.approx(1 / 3)
    assert experiment.best_of({0.1: run(4.0, 2.0), 1.0: run(4.0, 1.0)}) == 1.0
