"""The benchmark of the tracker runs, and its share is that of its own seconds."""

import importlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
tracker_overhead = importlib.import_module("tracker_overhead")


def test_the_share_is_that_of_one_measurement_in_fifty_steps():
    found = tracker_overhead.run(2, smoke=True)
    seconds = found["measurement"] + 50 * found["step"]
    assert found["share"] == pytest.approx(found["measurement"] / seconds)
    assert found["first_measurement"] > 0 and "batches of 2 windows" in tracker_overhead.told(found)
