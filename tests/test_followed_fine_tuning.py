"""The followed fine-tuning: its passages, and what is held against TensorBoard."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

import hessian_tools as ht

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "experiments"))
experiment = importlib.import_module("followed_fine_tuning")


def test_each_play_has_its_passages_and_they_do_not_overlap():
    found = experiment.passages(10)
    assert [label for _, label in found] == 10 * [0] + 10 * [1] + 10 * [2]
    assert all(len(text.split()) == experiment.WORDS for text, _ in found)
    assert "HAMLET," in found[0][0] and "MACBETH" in found[20][0]
    assert len({text for text, _ in found}) == 30


def test_readings_in_the_event_file_are_held_against_the_trackers_own():
    steps = np.array([0, 5])
    readings = {name: np.array([np.nan, 2.0]) for name in experiment.READINGS}
    track = ht.tracking.Track(steps, readings, np.zeros(2))
    logged = {f"train/hessian/{name}": {5: 2.0} for name in experiment.READINGS}
    assert experiment.disagreement(track, logged) == 0.0
    logged["train/hessian/loss"] = {5: 2.2}
    assert experiment.disagreement(track, logged) == pytest.approx(0.1)
    del logged["train/hessian/largest"]
    with pytest.raises(ValueError, match="no hessian/largest"):
        experiment.disagreement(track, logged)
