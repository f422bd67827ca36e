"""Which results have a table and a picture, and of every other why it has none.

A new public result is Tabular and Drawable, or is named here with its reason.
"""

import dataclasses
import importlib
import inspect

import pytest
from test_house import EXPORTING

import hessian_tools
from hessian_tools.results import TYPES
from hessian_tools.shown import Drawable, Tabular

# What is kept inside another result, whose table or picture shows it.
PART_OF = {
    "AdamConditioning": "BlockConditioning",
    "Axis": "SpectralDensity",
    "CutEvidence": "PartitionReport",
    "Decrease": "PredictedProgress",
    "RaceEntry": "Race",
    "RaceRound": "Race",
    "Reading": "JSHeterogeneity",
    "RitzValue": "BlockSpectra",
    "Round": "AdaptiveJS0",
    "ScaleSpread": "JSHeterogeneity",
    "Statement": "PartitionReport",
    "TensorReport": "PartitionReport",
    "Uncertainty": "AdaptiveJS0",
}
# Neither table nor picture.
NEITHER = {
    "AdamMiniArguments": "arguments for an optimizer, not a measurement",
    "BoundCheck": "a count and one number, in its fields",
    "Check": "one comparison: a line of text",
    "Constants": "arrays of the theory by instance, which the quadratic command tabulates",
    "Cut": "how a tensor is cut: what is asked for, not a measurement",
    "DiagonalEstimate": "a number a parameter: arrays of the parameters' shapes",
    "Estimate": "one number with its error",
    "Keywords": "arguments for an optimizer, not a measurement",
    "Levels": "thresholds of the judgement, not a measurement",
    "LimitCycle": "arrays by step size and start, for plots of one's own",
    "Part": "a tensor of a cut: what is asked for, not a measurement",
    "Partition": "what is asked for, not a measurement",
    "Runs": "whole paths of simulations: plots.quadratic.loss_curves draws several beside each other",
    "Scorecard": "four counts, in its fields",
    "StateBytes": "a handful of numbers, in its fields",
    "StateSavings": "a handful of numbers, in its fields",
    "Sweep": "none made so far: arrays of medians by instance and step size",
    "TraceEstimate": "one number with its error",
    "Verdict": "words, which str shows",
    "Verification": "lines of text, which str shows: passed or FAILED, and what was skipped",
}
NO_TABLE = {
    "Coupling": "a matrix, which is its arrays; a table would have a row a pair of blocks",
    "DenseBlock": "a matrix, which is its array",
    "Quadrature": "nodes and weights, which are its arrays; BlockSpectra has a row a spectrum",
    "SpectralDensity": "values on a grid, which are its arrays",
    "Trajectory": "thousands of steps, which are its arrays; Race and RateSweep have a row a run",
}
NO_PICTURE = {
    "BlockConditioning": "none made so far: a table of a few numbers a block",
    "BlockExtremes": "none made so far: BlockSpectra draws the same extremes of a run",
    "PredictedProgress": "a few ratios beside each other: the table says it all",
}
# Public dataclasses that are no results.
NO_RESULT = set(
    "Block Budget Entry Jackknifed Measure Moment PairMeasure Plan Preset Quadratic Reference Sampled "
    "Segments SpectralGrid Stream TrackedMeasure".split()
)
# Results of steps inside, which nobody saves: what is made of them is shown.
INNER = {"LanczosResult": "slq makes a Quadrature of it", "Standing": "a line of a ranking"}


def public_dataclasses():
    for folder in EXPORTING:
        module = importlib.import_module(f"hessian_tools.{folder}")
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) and dataclasses.is_dataclass(value):
                yield name, value


def every_result():
    """All that can be saved, and public dataclasses besides."""
    of_package = {
        name: kind for name, kind in TYPES.items() if kind.__module__.startswith("hessian_tools.")
    }
    public = {
        name: kind
        for name, kind in public_dataclasses()
        if name not in NO_RESULT and kind not in of_package.values()
    }
    return of_package | public


RESULTS = every_result()


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_has_table_and_picture_or_a_reason(name):
    kind = RESULTS[name]
    silent = name in PART_OF or name in NEITHER or name in INNER
    assert issubclass(kind, Tabular) != (silent or name in NO_TABLE)
    assert issubclass(kind, Drawable) != (silent or name in NO_PICTURE)


def test_reasons_are_of_results_and_given_once():
    reasons = [*PART_OF, *NEITHER, *NO_TABLE, *NO_PICTURE, *INNER]
    assert len(reasons) == len(set(reasons))
    assert set(reasons) <= set(RESULTS)
    assert set(NO_RESULT) <= {name for name, _ in public_dataclasses()}


@pytest.mark.parametrize(("part", "whole"), PART_OF.items())
def test_what_a_part_belongs_to_shows_itself(part, whole):
    assert issubclass(RESULTS[whole], Tabular | Drawable), part


def test_nothing_is_shown_that_is_no_result():
    """The two sets of methods are of results alone, all of which can be saved."""
    for base in (Tabular, Drawable):
        kinds = {
            kind for kind in base.__subclasses__() if kind.__module__.startswith("hessian_tools")
        }
        assert kinds <= set(TYPES.values())
    assert hessian_tools.load and hessian_tools.save
