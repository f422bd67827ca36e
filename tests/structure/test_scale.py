"""Masses, verdicts and conditions do not depend on the scale of the loss, nor are they made of too
few entries."""

import math

import numpy as np
import pytest
import torch
from problems.planted import planted, symmetric
from torch import nn

import hessian_tools as ht
from hessian_tools.structure.adam_preconditioning import adam_conditioning
from hessian_tools.structure.conditioning import block_extremes
from hessian_tools.structure.cuttings import ELEMENTS, WHOLE, Cutting, _log_alternatives

FACTORS = (2.0**-100, 2.0**-70, 2.0**70, 2.0**100)


class Scaled(nn.Module):
    """A float32 weight of (a, b) whose loss has the Hessian c M, computed without squares."""

    def __init__(self, matrix, shape, factor):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.register_buffer("matrix", (matrix * factor).float())


def scaled(factor, shape=(8, 6)):
    stream = torch.Generator().manual_seed(3)
    matrix = symmetric(math.prod(shape), stream)

    def loss(model, batch):
        w = model.weight.flatten()
        return w @ (model.matrix @ w) / 2

    return ht.Problem(Scaled(matrix, shape, factor), loss, [torch.zeros(1, 1)])


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("factor", FACTORS)
def test_the_partition_check_does_not_see_the_scale(factor, exact):
    reports = [
        ht.check_partition(scaled(c), {"*": "rows"}, exact=exact, num_blocks=6, progress=False)
        for c in (1.0, factor)
    ]
    one, other = (report.tensors[0] for report in reports)
    assert (one.verdict, one.reason) == (other.verdict, other.reason)
    assert other.norm == pytest.approx(one.norm * factor, rel=1e-5)
    for a, b in zip(one.evidence, other.evidence, strict=True):
        assert b.share == pytest.approx(a.share, rel=1e-5)
        assert b.share_error == pytest.approx(a.share_error, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("factor", FACTORS)
def test_coupling_does_not_see_the_scale(factor, exact):
    problems = [scaled(c) for c in (1.0, factor)]
    settings = {"num_blocks": 4, "exact": exact, "progress": False}
    one, other = (
        ht.coupling(problem, ht.partition(problem.model, {"*": "rows"}), **settings)
        for problem in problems
    )
    assert other.names == one.names
    np.testing.assert_allclose(other.mass, one.mass * factor**2, rtol=1e-4)
    for place, share in one.shares.items():
        assert other.shares[place].value == pytest.approx(share.value, rel=1e-5, abs=1e-9)


def test_a_two_by_two_tensor_is_undecided_whatever_it_holds():
    for kind in ("rows", "columns", "dense", "elements"):
        for claim in ("rows", "columns", "whole", "elements"):
            report = ht.check_partition(planted((2, 2), kind), {"*": claim}, progress=False)
            (found,) = report.tensors
            assert found.verdict == "undecided"
            assert "4 entries are too few to judge: there are 3 ways" in found.reason
            assert found.suggested == claim


@pytest.mark.parametrize(
    ("shape", "verdict"),
    [((2, 3), "undecided"), ((2, 4), "undecided"), ((3, 3), "too coarse"), ((4, 4), "too coarse")],
)
def test_the_least_size_follows_from_the_number_of_cuts(shape, verdict):
    report = ht.check_partition(
        planted(shape, "elements"), {"*": "rows"}, exact=True, progress=False
    )
    assert report.tensors[0].verdict == verdict


@pytest.mark.parametrize(
    ("labels", "around", "ways"),
    [
        ([0, 0, 1, 1], None, 3),  # pairs of four
        ([0, 0, 0, 1, 1, 1], None, 10),
        ([0, 0, 1, 1, 2, 2], None, 15),
        ([0, 0, 1], None, 3),  # one of three stands alone
        ([0, 0, 1, 1, 2, 2, 3, 3], [0] * 4 + [1] * 4, 9),  # within two blocks
        (ELEMENTS, None, 210),  # 4 of 10 numbers
    ],
)
def test_alternatives_are_counted(labels, around, ways):
    size = 4 if labels == ELEMENTS else len(labels)
    empty = torch.empty(0, dtype=torch.int64)
    finer = Cutting(ELEMENTS, empty, size)
    if labels != ELEMENTS:
        finer = Cutting("finer", torch.tensor(labels), max(labels) + 1)
    coarser = Cutting(WHOLE, empty, 1)
    if around is not None:
        coarser = Cutting("coarser", torch.tensor(around), max(around) + 1)
    assert math.exp(_log_alternatives(finer, coarser, size)) == pytest.approx(ways)


@pytest.mark.parametrize("factor", [1e-300, 1e-30, 1e30, 1e300])
def test_conditions_do_not_see_the_scale(factor):
    stream = np.random.default_rng(0)
    matrix = stream.standard_normal((2, 5, 5))
    matrix = matrix + matrix.transpose(0, 2, 1)
    gradient = stream.standard_normal((2, 5))
    one = adam_conditioning(matrix, gradient)
    other = adam_conditioning(matrix * factor, gradient * factor)
    for name in ("kappa", "kappa_adam", "r", "tau"):
        np.testing.assert_allclose(getattr(other, name), getattr(one, name), rtol=1e-9)
    np.testing.assert_array_equal(other.negative, one.negative)


@pytest.mark.parametrize("factor", FACTORS)
def test_extremes_of_blocks_do_not_see_the_scale(factor):
    problems = [scaled(c) for c in (1.0, factor)]
    one, other = (
        block_extremes(p, ht.partition(p.model, {"*": "whole"}), num_steps=6, progress=False)
        for p in problems
    )
    np.testing.assert_allclose(other.largest, one.largest * factor, rtol=1e-4)
    np.testing.assert_allclose(other.smallest, one.smallest * factor, rtol=1e-4)
    assert other.status == one.status == ("complete",)
