"""The verdicts over the zoo: what would contradict one."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import hessian_tools as ht

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "experiments"))
experiment = importlib.import_module("zoo_verdicts")


def test_advice_that_lost_a_race_is_a_contradiction():
    race = ht.load(ROOT / "results" / "race_mlp" / "result")["race"]  # Adam has the lowest loss
    said = ht.load(ROOT / "results" / "js0_families" / "result")["mlp"].verdict
    assert experiment.contradicted(replace(said, decision="SGD"), race)
    assert not experiment.contradicted(replace(said, decision="Adam"), race)
    assert not experiment.contradicted(replace(said, decision="undecided"), race)
    assert not experiment.contradicted(replace(said, decision="SGD"), None)
    assert experiment.told(race).startswith("adam ")
    assert experiment.told(None) == "-"


def test_no_committed_verdict_is_contradicted():
    found = ht.load(ROOT / "results" / "zoo_verdicts" / "result")
    assert len(found) >= 10
    assert not [name for name, told in found.items() if told["contradicted"]]
