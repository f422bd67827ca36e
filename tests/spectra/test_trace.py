"""Traces and diagonals of planted matrices: no bias, and standard errors that cover."""

import numpy as np
import pytest
import torch
from problems import network
from problems.planted import random_symmetric

import hessian_tools as ht
from hessian_tools.curvature.symmetric import DenseOperator, DiagonalOperator, SymmetricOperator
from hessian_tools.errors import NumericalError
from hessian_tools.spectra.probes import draw_probes
from hessian_tools.spectra.traces import DIAGONAL_METHODS, TRACE_METHODS, diagonal, trace

N = 100
RNG = np.random.default_rng(3)
SPECTRA = {
    "flat": 1 + 0.3 * RNG.random(N),
    "power": 1 / np.arange(1, N + 1),
    "outliers": np.concatenate([RNG.uniform(5, 50, 6), 0.5 * RNG.standard_normal(N - 6)]),
    "indefinite": RNG.standard_normal(N) ** 3,
}
SEEDS = 250


@pytest.mark.parametrize("num_matvecs", [12, 60])
@pytest.mark.parametrize("method", TRACE_METHODS)
@pytest.mark.parametrize("name", SPECTRA)
def test_intervals_of_the_trace_cover(name, method, num_matvecs):
    operator = DenseOperator(random_symmetric(SPECTRA[name]))
    true = float(operator.matrix.trace())
    found = [
        trace(operator, method, num_matvecs=num_matvecs, seed=seed, progress=False)
        for seed in range(SEEDS)
    ]
    covered = [low <= true <= high for low, high in (estimate.interval() for estimate in found)]
    # 0.95, with three standard errors of 250 seeds on either side
    assert 0.90 <= np.mean(covered) <= 0.99
    values = np.array([estimate.value for estimate in found])
    assert abs(values.mean() - true) < 4 * values.std() / SEEDS**0.5
    squares = np.mean([estimate.standard_error**2 for estimate in found])
    assert 0.8 < (squares / values.var()) ** 0.5 < 1.3


@pytest.mark.parametrize("num_matvecs", [6, 30])
@pytest.mark.parametrize("method", DIAGONAL_METHODS)
def test_intervals_of_the_diagonal_cover(method, num_matvecs):
    operator = DenseOperator(random_symmetric(SPECTRA["outliers"]))
    true = operator.matrix.diagonal().numpy()
    covered, errors = [], []
    for seed in range(SEEDS):
        found = diagonal(operator, num_matvecs, method, seed=seed, progress=False)
        low, high = found.interval()
        covered.append((low <= true) & (true <= high))
        errors.append(found.values - true)
    of_each = np.mean(covered, axis=0)
    assert 0.94 < of_each.mean() < 0.96 and of_each.min() > 0.88
    bias = np.mean(errors, axis=0) / (np.std(errors, axis=0) / SEEDS**0.5)
    assert np.abs(bias).max() < 5


def by_definition(matrix, probes):
    """The estimates t_i of XTrace, each with a basis of its own."""
    k, n = probes.shape
    estimates = []
    for i in range(k):
        others = np.delete(probes, i, axis=0)
        basis = np.linalg.qr(matrix @ others.T)[0]
        rest = probes[i] - basis @ (basis.T @ probes[i])
        scale = (n - k + 1) / (rest @ rest)
        estimates.append(np.trace(basis.T @ matrix @ basis) + scale * (rest @ matrix @ rest))
    return np.array(estimates)


@pytest.mark.parametrize("k", [2, 7, 20])
@pytest.mark.parametrize("name", SPECTRA)
def test_xtrace_is_what_its_definition_says(name, k):
    """The estimates, and the covariance from every pair of them with one probe fewer."""
    matrix = random_symmetric(SPECTRA[name])
    probes = draw_probes("gaussian", 5, "probes", k, N, dtype=torch.float64).numpy()
    all_of_them = by_definition(matrix, probes)
    found = trace(DenseOperator(matrix), "xtrace", num_matvecs=2 * k, seed=5, progress=False)
    assert found.value == pytest.approx(all_of_them.mean(), rel=1e-9)
    changes = np.zeros((k, k))
    for j in range(k):
        others = np.arange(k) != j
        changes[others, j] = all_of_them[others] - by_definition(matrix, probes[others])
    covariance = (changes * changes.T).sum() / (k * (k - 1))
    variance = all_of_them.var(ddof=1) / k + max(0.0, covariance)
    assert found.standard_error == pytest.approx(variance**0.5, rel=1e-6)
    assert found.num_matvecs == 2 * k and found.freedom == k - 1


def test_xtrace_covers_where_the_spread_of_its_estimates_alone_does_not():
    matrix = random_symmetric(SPECTRA["power"])
    true, covered = np.trace(matrix), []
    for seed in range(100):
        probes = draw_probes("gaussian", seed, "probes", 30, N, dtype=torch.float64).numpy()
        estimates = by_definition(matrix, probes)
        reach = 2.045 * estimates.std(ddof=1) / 30**0.5
        covered.append(abs(estimates.mean() - true) <= reach)
    assert np.mean(covered) < 0.9


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_a_low_rank_is_found_exactly(method):
    values = np.concatenate([RNG.uniform(1, 5, 6), np.zeros(N - 6)])
    operator = DenseOperator(random_symmetric(values))
    found = trace(operator, method, num_matvecs=48, progress=False)
    assert found.value == pytest.approx(values.sum(), rel=1e-12)
    assert found.standard_error < 1e-12
    zero = trace(DiagonalOperator(torch.zeros(N)), method, num_matvecs=12, progress=False)
    assert zero.value == 0 and zero.standard_error == 0


def test_a_low_rank_leaves_the_diagonal_exact():
    values = np.concatenate([RNG.uniform(1, 5, 6), np.zeros(N - 6)])
    operator = DenseOperator(random_symmetric(values))
    found = diagonal(operator, 30, "diag++", progress=False)
    assert np.allclose(found.values, operator.matrix.diagonal(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_matvecs", [N, 5 * N])
def test_n_products_are_exact(num_matvecs):
    operator = DenseOperator(random_symmetric(SPECTRA["indefinite"]))
    for method in TRACE_METHODS:
        found = trace(operator, method, num_matvecs=num_matvecs, progress=False)
        assert found.exact and found.standard_error == 0 and found.num_matvecs == N
        assert found.value == pytest.approx(float(operator.matrix.trace()))
        assert found.interval() == (found.value, found.value)
    entries = diagonal(operator, num_matvecs, progress=False)
    assert entries.exact and not entries.standard_errors.any()
    assert np.allclose(entries.values, operator.matrix.diagonal(), rtol=1e-14)


@pytest.mark.parametrize("method", TRACE_METHODS)
@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e30])
def test_float32_and_units(method, factor):
    matrix = random_symmetric(SPECTRA["outliers"])
    single = DenseOperator(torch.as_tensor(factor * matrix, dtype=torch.float32))
    found = trace(single, method, num_matvecs=30, seed=2, progress=False)
    double = trace(DenseOperator(matrix), method, num_matvecs=30, seed=2, progress=False)
    assert found.value / factor == pytest.approx(double.value, rel=1e-4)
    assert found.standard_error / factor == pytest.approx(double.standard_error, rel=1e-3)


@pytest.mark.parametrize("method", DIAGONAL_METHODS)
def test_small_batches_and_seeds(method):
    """Memory for a few rows at a time: the same statistics of other batches."""
    operator = DenseOperator(random_symmetric(SPECTRA["flat"]))
    given = {"method": method, "seed": 3, "progress": False}
    first, again = (diagonal(operator, 30, **given) for _ in range(2))
    assert np.array_equal(first.values, again.values)
    tight = diagonal(operator, 30, **given, memory=8 * N * 60)
    assert tight.num_matvecs == first.num_matvecs == 30
    assert np.abs(tight.values - first.values).max() < 6 * first.standard_errors.max()
    other = diagonal(operator, 30, **(given | {"seed": 4}))
    assert not np.array_equal(first.values, other.values)


def test_means_and_errors_are_those_of_the_samples():
    matrix = random_symmetric(SPECTRA["power"])
    probes = draw_probes("rademacher", 0, "diagonal 0", 40, N, dtype=torch.float64).numpy()
    samples = probes * (probes @ matrix)
    found = diagonal(DenseOperator(matrix), 40, progress=False)
    assert np.allclose(found.values, samples.mean(axis=0))
    assert np.allclose(found.standard_errors, samples.std(axis=0, ddof=1) / 40**0.5)


def test_a_problem_and_names():
    problem = network("mlp")
    hessian = ht.HessianOperator(problem)
    found = ht.diagonal(problem, 20, progress=False)
    shapes = {name: p.shape for name, p in problem.parameters.items()}
    for named in found.named():
        assert {name: piece.shape for name, piece in named.items()} == shapes
    exact = ht.trace(hessian, num_matvecs=10**6, progress=False)
    assert exact.value == pytest.approx(float(hessian.to_dense().trace()))
    block = next(iter(ht.partition(problem.model, "weights")))
    pieces, _ = ht.diagonal(hessian.block(block), 20, progress=False).named()
    assert sum(piece.numel() for piece in pieces.values()) == block.numel
    with pytest.raises(ValueError, match="no names"):
        ht.diagonal(DiagonalOperator(torch.ones(9)), 3, progress=False).named()


class Failing(SymmetricOperator):
    """Its products are inf from the third on."""

    made = 0

    def __init__(self):
        super().__init__(50, torch.float64, "cpu")

    def _matmat(self, vectors):
        numbers = self.made + torch.arange(1, len(vectors) + 1)
        self.made += len(vectors)
        return torch.where(numbers[:, None] >= 3, float("inf"), vectors)


def test_products_that_are_infinite():
    for method in TRACE_METHODS:
        with pytest.raises(NumericalError, match="NaN or inf, first in product 3"):
            trace(Failing(), method, num_matvecs=20, progress=False)
    with pytest.raises(NumericalError, match="first in product 3"):
        diagonal(Failing(), 50, progress=False)


def test_arguments_out_of_range():
    operator = DiagonalOperator(torch.ones(30))
    with pytest.raises(ValueError, match="method is 'exact'; allowed are 'hutchinson'"):
        trace(operator, "exact")
    for method, least in TRACE_METHODS.items():
        with pytest.raises(ValueError, match=f"num_matvecs is 1; .* at least {least}"):
            trace(operator, method, num_matvecs=1)
    with pytest.raises(ValueError, match=r"num_matvecs is 7.5; "):
        diagonal(operator, 7.5)
    with pytest.raises(ValueError, match=r"num_matvecs needs .* for a sketch of 8 vectors"):
        trace(operator, num_matvecs=24, memory=1000)
    with pytest.raises(ValueError, match="level is 95; pass a probability"):
        trace(operator, num_matvecs=30, progress=False).interval(95)
    with pytest.raises(TypeError, match="operator is a list"):
        diagonal([1.0], 3)
