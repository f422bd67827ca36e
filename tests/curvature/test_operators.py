"""A new curvature matrix is one class: H + c I goes through everything that takes an operator."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from problems import dense_hessian
from torch import Tensor, nn

import hessian_tools as ht
from hessian_tools.curvature.hessian import HessianOperator, in_float64
from hessian_tools.curvature.operators import Collect, CurvatureOperator, Spread
from hessian_tools.curvature.referees import Reference, finite_difference
from hessian_tools.curvature.verification import verify
from hessian_tools.problem.problem import Problem
from hessian_tools.structure.conditioning import block_conditioning, block_extremes

SHIFT = 0.25


class ShiftedHessian(CurvatureOperator):
    """H + shift I."""

    def __init__(self, hessian: HessianOperator, shift: float) -> None:
        super().__init__(hessian.problem, hessian.arithmetic)
        self.hessian = hessian
        self.shift = shift

    def products(self, names: Sequence[str], count: int, spread: Spread, collect: Collect) -> None:
        self.hessian.products(names, count, spread, collect)
        every = slice(0, count)
        collect(every, spread(every), self.shift)

    def rebuilt(self, problem: Problem, **settings) -> "ShiftedHessian":
        return ShiftedHessian(self.hessian.rebuilt(problem, **settings), self.shift)

    def reference(self, problem: Problem, direction: Sequence[Tensor]) -> Reference:
        hessian = finite_difference(problem, direction)
        pairs = zip(hessian.product, direction, strict=True)
        return Reference(
            [product + self.shift * v for product, v in pairs], hessian.uncertainty, hessian.remark
        )


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def problem(request) -> Problem:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(request.param)
    batches = [(torch.randn(n, 5, dtype=request.param), torch.randint(3, (n,))) for n in (7, 4)]
    return ht.Problem(model, ht.cross_entropy, batches)


@pytest.fixture
def shifted(problem) -> ShiftedHessian:
    return ShiftedHessian(HessianOperator(problem), SHIFT)


@pytest.fixture
def oracle(problem) -> np.ndarray:
    """H + shift I by plain double backward."""
    dense = dense_hessian(problem).double().numpy()
    return dense + SHIFT * np.eye(len(dense))


def tolerance(problem: Problem) -> float:
    return 1e-10 if problem.dtype == torch.float64 else 1e-5


def test_products_whole_by_block_and_by_column(problem, shifted, oracle):
    allowed = tolerance(problem)
    np.testing.assert_allclose(shifted.to_dense().double().numpy(), oracle, atol=allowed)
    block = ht.partition(problem.model, "tensor")["2.weight"]
    first = 5 * 4 + 4
    inside = slice(first, first + 12)
    found = shifted.block(block).to_dense().double().numpy()
    np.testing.assert_allclose(found, oracle[inside, inside], atol=allowed)
    cuts = ht.partition(problem.model, "tensor").cuts
    unit = torch.zeros(1, 12)
    unit[0, 5] = 1
    column = shifted.columns(cuts).products(block.as_cut(), torch.zeros(1, dtype=int), unit)
    np.testing.assert_allclose(column[0].double().numpy(), oracle[first + 5], atol=allowed)


def test_verify_holds_it_against_a_referee_of_its_own(shifted):
    verification = verify(shifted)
    assert verification.passed, str(verification)
    assert any("finite difference" in check.name for check in verification.checks)


def test_verify_fails_where_the_referee_disagrees(problem):
    class Wrong(ShiftedHessian):
        def reference(self, problem, direction):
            return finite_difference(problem, direction)

        def rebuilt(self, problem, **settings):
            return Wrong(self.hessian.rebuilt(problem, **settings), self.shift)

    failures = verify(Wrong(HessianOperator(problem), SHIFT)).failures
    assert [check.name for check in failures] == ["finite difference of the gradient"]


def test_spectra(problem, shifted, oracle):
    whole = ht.slq(shifted, num_probes=1, num_steps=4, exact=True)
    allowed = tolerance(problem)
    np.testing.assert_allclose(whole.nodes[0], np.linalg.eigvalsh(oracle), atol=allowed)
    names = ["0.weight", "2.weight"]
    partition = ht.partition(problem.model, names)
    given = {"num_probes": 2, "num_steps": 3, "exact": False}
    with_shift = ht.blockwise_slq(shifted, partition, **given)
    without = ht.blockwise_slq(problem, partition, **given)
    for name in names:  # Lanczos does not see a shift: same vectors, nodes moved
        np.testing.assert_allclose(
            with_shift[name].nodes, without[name].nodes + SHIFT, atol=10 * allowed
        )
    adaptive = ht.adaptive_js0(shifted, partition, reading="scale", progress=False)
    assert adaptive.spectra.names == tuple(names)


def test_dense_block_and_its_float64_copy(problem, shifted, oracle):
    dense = ht.dense_block(shifted, "tensor")
    expected = "float64" if problem.dtype == torch.float64 else "float64 copy"
    assert dense.arithmetic == expected
    np.testing.assert_allclose(dense.matrix, oracle, atol=tolerance(problem))
    operator, _ = in_float64(shifted)
    assert isinstance(operator, ShiftedHessian)
    assert operator.dtype == torch.float64


@pytest.mark.parametrize("exact", [True, False])
def test_coupling(problem, shifted, oracle, exact):
    coupling = ht.coupling(shifted, "tensor", num_probes=400, exact=exact, progress=False)
    ends = np.cumsum([20, 4, 12, 3])
    blocks = [slice(end - size, end) for end, size in zip(ends, (20, 4, 12, 3), strict=True)]
    mass = np.array([[np.square(oracle[a, b]).sum() for b in blocks] for a in blocks])
    rtol = 1e-4 if exact else 0.4
    np.testing.assert_allclose(np.diag(coupling.mass), np.diag(mass), rtol=rtol)


def test_partition_check_and_conditioning(problem, shifted, oracle):
    partition = ht.partition(problem.model, ["2.weight"])
    report = ht.check_partition(shifted, partition, exact=True, progress=False)
    block = oracle[24:36, 24:36]
    share = np.square(np.diag(block)).sum() / np.square(block).sum()
    assert report.tensors[0]["elements"].share == pytest.approx(share, rel=1e-3)
    conditioning = block_conditioning(shifted, partition, progress=False)
    values = np.abs(np.linalg.eigvalsh(block))
    assert conditioning.values.kappa[0] == pytest.approx(values.max() / values.min(), rel=1e-3)
    extremes = block_extremes(shifted, partition, progress=False)
    assert extremes.largest[0] == pytest.approx(np.linalg.eigvalsh(block)[-1], rel=1e-4)
