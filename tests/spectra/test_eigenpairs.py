"""Eigenpairs against numpy's of planted spectra, and products against those of scipy's eigsh."""

import warnings

import numpy as np
import pytest
import torch
from problems import network
from problems.planted import random_symmetric
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn

import hessian_tools as ht
from hessian_tools.curvature.progress import product_bar
from hessian_tools.curvature.symmetric import DenseOperator, DiagonalOperator, SymmetricOperator
from hessian_tools.errors import NumericalError
from hessian_tools.spectra.eigenpairs import WHICH, top_eigenpairs
from hessian_tools.spectra.krylov import Krylov, Products, random_rows

N = 200
RNG = np.random.default_rng(1)
BULK = RNG.uniform(-1, 1, N)
SPECTRA = {
    "clustered": np.concatenate([10 + 1e-3 * BULK[:6], -5 + 1e-3 * BULK[6:12], BULK[12:]]),
    "three times": np.concatenate([[9.0] * 3, [7.0] * 3, [-8.0] * 3, BULK[9:]]),
    "five times": np.concatenate([[9.0] * 5, [-8.0] * 5, BULK[10:]]),
    "indefinite": RNG.standard_normal(N) ** 3,
    "rank-deficient": np.concatenate([RNG.uniform(1, 5, 10), np.zeros(N - 10)]),
    "decaying": 1 / np.arange(1, N + 1) ** 1.5,
    "identity": np.ones(N),
    "zero": np.zeros(N),
}


def expected(matrix, k, which):
    values = np.linalg.eigvalsh(matrix)
    if which == "largest":
        return values[::-1][:k]
    if which == "smallest":
        return values[:k]
    if which == "both":
        return np.concatenate([values[::-1][:k], values[:k]])
    return values[np.argsort(-np.abs(values), kind="stable")][:k]


def agrees(pairs, matrix, k, which, tolerance=1e-6):
    """Values, residuals, vectors, and flags of ``pairs``."""
    true, found = expected(matrix, k, which), pairs.values
    if which == "magnitude":  # a repeated magnitude may come in either sign
        true, found = np.abs(true), np.abs(found)
    vectors = pairs.vectors.astype(np.float64)
    scale = np.linalg.norm(matrix, 2)
    residuals = np.linalg.norm(vectors @ matrix - pairs.values[:, None] * vectors, axis=1)
    assert np.abs(true - found).max() <= tolerance * scale
    assert np.abs(residuals - pairs.residuals).max() <= tolerance * scale
    assert np.abs(vectors @ vectors.T - np.eye(len(found))).max() < tolerance
    assert pairs.converged.all() and pairs.which == which
    return True


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", SPECTRA)
def test_planted_spectra(name, which):
    """Each eigenvalue as often as it is there."""
    matrix = random_symmetric(SPECTRA[name])
    for k in (1, 5, 8):
        pairs = top_eigenpairs(DenseOperator(matrix), k, which, max_matvecs=5000, progress=False)
        assert pairs.check == "passed"
        assert agrees(pairs, matrix, k, which)


def test_copies_are_missed_without_the_check():
    """A Krylov space ends before it holds a second copy."""
    operator = DenseOperator(random_symmetric([9.0, 9.0, 5.0, 4.0] + [0.0] * 90))
    without = top_eigenpairs(operator, 2, check=False, progress=False)
    assert without.check == "none" and without.check_matvecs == 0
    assert np.allclose(without.values, [9, 5])
    assert np.allclose(top_eigenpairs(operator, 2, progress=False).values, 9)


def test_every_product_is_counted():
    class Counting(DenseOperator):
        count = 0

        def _matmat(self, vectors):
            self.count += len(vectors)
            return super()._matmat(vectors)

    for k, block in ((4, None), (4, 3), (90, None)):
        operator = Counting(random_symmetric(SPECTRA["indefinite"]))
        pairs = top_eigenpairs(operator, k, block_size=block, progress=False)
        assert operator.count == pairs.num_matvecs
        assert pairs.check_matvecs < pairs.num_matvecs


def products_of_eigsh(operator, k, which, residual):
    """The fewest with which scipy reaches ``residual``."""
    counted, columns = operator.to_scipy(), 2 * k if which == "both" else k
    start = np.random.default_rng(0).standard_normal(operator.size)
    mode = {"largest": "LA", "smallest": "SA", "magnitude": "LM", "both": "BE"}[which]
    for tolerance in 10.0 ** np.arange(-2, -13, -1):
        calls = []

        def product(v, calls=calls):
            calls.append(1)
            return counted.matvec(v)

        watched = LinearOperator(operator.shape, matvec=product, dtype=np.float64)
        values, vectors = eigsh(watched, columns, which=mode, tol=tolerance, v0=start)
        spent = len(calls)
        if np.linalg.norm(counted.matmat(vectors) - vectors * values, axis=0).max() <= residual:
            return spent
    raise AssertionError("eigsh did not reach the residual")


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize(
    "name", ["clustered", "three times", "five times", "indefinite", "rank-deficient"]
)
def test_products_against_scipy(name, which):
    """The residuals at the end and the check are what eigsh does not do."""
    operator = DenseOperator(random_symmetric(SPECTRA[name]))
    for k in (3, 8):
        pairs = top_eigenpairs(operator, k, which, progress=False)
        theirs = products_of_eigsh(operator, k, which, pairs.tolerance * pairs.scale)
        search = pairs.num_matvecs - pairs.check_matvecs - len(pairs.values)
        assert search <= 1.2 * theirs, (k, search, theirs)


@pytest.fixture(scope="module")
def trained():
    """A Hessian with outliers: a network after a few steps."""
    torch.manual_seed(0)
    layers = [nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4)]
    model = nn.Sequential(*layers).double()
    x = torch.randn(100, 12, dtype=torch.float64)
    y = x[:, :4].argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return ht.HessianOperator(ht.Problem(model, ht.cross_entropy, [(x, y)]))


@pytest.mark.parametrize("which", WHICH)
def test_hessians_against_scipy(trained, which):
    blocks = ht.partition(trained.problem.model, "weights")
    chosen = [block for block in blocks if block.numel > 100]
    for operator in (trained, *map(trained.block, chosen)):
        pairs = top_eigenpairs(operator, 4, which, progress=False)
        assert agrees(pairs, operator.to_dense().numpy(), 4, which)
        theirs = products_of_eigsh(operator, 4, which, pairs.tolerance * pairs.scale)
        search = pairs.num_matvecs - pairs.check_matvecs - len(pairs.values)
        assert search <= 1.2 * theirs, (operator.size, search, theirs)


def test_a_problem_is_taken_for_its_hessian_and_vectors_have_names(trained):
    pairs = top_eigenpairs(trained.problem, 2, progress=False)
    named = pairs.named(1)
    shapes = {name: p.shape for name, p in trained.problem.parameters.items()}
    assert {name: piece.shape for name, piece in named.items()} == shapes
    flat = torch.cat([piece.flatten() for piece in named.values()])
    assert np.array_equal(flat.numpy(), pairs.vectors[1])
    block = list(ht.partition(trained.problem.model, "neuron"))[3]
    pairs = top_eigenpairs(trained.block(block), 1, progress=False)
    assert sum(piece.numel() for piece in pairs.named(0).values()) == block.numel
    with pytest.raises(ValueError, match=r"no names; use the flat array"):
        top_eigenpairs(DiagonalOperator(torch.ones(3)), 1).named(0)
    with pytest.raises(ValueError, match=r"16 blocks side by side; pass one of them"):
        cut = ht.partition(trained.problem.model, "neuron").cuts[0]
        top_eigenpairs(trained.stacked(cut), 1)


@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize("name", ["clustered", "five times", "rank-deficient", "decaying"])
def test_a_tiny_memory_gives_the_same_values(name, block):
    """Many restarts; the numbers of one long basis."""
    matrix, k = random_symmetric(SPECTRA[name]), 5
    rows = 3 * k + 4 * block + 12
    operator = DenseOperator(matrix)
    tight = top_eigenpairs(
        operator, k, block_size=block, memory=8 * N * rows, progress=False, max_matvecs=20000
    )
    ample = top_eigenpairs(operator, k, block_size=block, progress=False)
    assert np.allclose(tight.values, ample.values, rtol=0, atol=1e-8 * ample.scale)
    assert agrees(tight, matrix, k, "largest")


@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e30])
def test_float32_and_units(factor):
    matrix = random_symmetric(SPECTRA["three times"])
    operator = DenseOperator(torch.as_tensor(factor * matrix, dtype=torch.float32))
    pairs = top_eigenpairs(operator, 5, "both", progress=False)
    assert pairs.tolerance == pytest.approx(50 * 2**-23)
    assert pairs.converged.all() and pairs.vectors.dtype == np.float32
    assert np.allclose(pairs.values / factor, expected(matrix, 5, "both"), atol=1e-4)


@pytest.mark.parametrize("spectrum", ["clustered", "rank-deficient"])
@pytest.mark.parametrize("block", [1, 2, 3, 4])
def test_the_relation_of_a_krylov_basis(block, spectrum):
    """A V' = V' T + Q' C' after every step, over restarts and up to the last dimension."""
    matrix = random_symmetric(SPECTRA[spectrum][:29])
    products = Products(DenseOperator(matrix), product_bar(None, shown=False))
    for capacity in (20, 40):
        rows = torch.empty(capacity, 29, dtype=torch.float64)
        start = random_rows(products.operator, 3, "test", block)
        space = Krylov(products, rows, start, (3, "test"))
        for _ in range(40):
            space.step()
            end = space.size + space.pending
            v, q = rows[: space.size].numpy(), rows[space.size : end].numpy()
            t = space.projected[: space.size, : space.size]
            left = v @ matrix / products.unit - t @ v - space.coupling @ q
            assert np.abs(left).max() < 1e-12
            basis = rows[:end].numpy()
            assert np.abs(basis @ basis.T - np.eye(end)).max() < 1e-12
            if space.is_whole:
                break
            if space.is_full:
                space.restart(space.ritz(), np.arange(space.size - 9, space.size))
        assert space.restarts if capacity == 20 else space.is_whole


def test_seeds():
    operator = DenseOperator(random_symmetric(SPECTRA["indefinite"]))
    first, again, other = (
        top_eigenpairs(operator, 3, seed=seed, progress=False) for seed in (4, 4, 5)
    )
    assert np.array_equal(first.vectors, again.vectors)
    assert not np.array_equal(first.vectors, other.vectors)
    assert np.allclose(first.values, other.values, rtol=1e-9)


def test_small_operators_go_by_the_dense_matrix():
    pairs = top_eigenpairs(DiagonalOperator(torch.tensor([3.0])), 1, progress=False)
    assert pairs.values == 3 and pairs.num_matvecs == 1 and pairs.check == "dense"
    matrix = random_symmetric(BULK[:60])
    pairs = top_eigenpairs(DenseOperator(matrix), 4, "magnitude", progress=False)
    assert pairs.num_matvecs == 60 and agrees(pairs, matrix, 4, "magnitude")


def test_what_has_not_converged_is_returned_with_one_warning():
    operator = DenseOperator(random_symmetric(BULK))
    with pytest.warns(RuntimeWarning, match=r"of 5 eigenpairs have not converged after 20 pro"):
        pairs = top_eigenpairs(operator, 5, max_matvecs=20, progress=False)
    assert pairs.num_matvecs <= 20 and not pairs.converged.all() and len(pairs.values) == 5
    assert pairs.check == "unfinished"
    true = np.linalg.eigvalsh(operator.matrix.numpy())
    nearest = np.abs(pairs.values[:, None] - true).min(axis=1)
    assert (nearest <= pairs.residuals + 1e-12).all()
    converging = top_eigenpairs(operator, 2, progress=False)
    enough = converging.num_matvecs - converging.check_matvecs + 5
    with pytest.warns(RuntimeWarning, match=r"did not settle whether a repeated eigenvalue"):
        pairs = top_eigenpairs(operator, 2, max_matvecs=enough, progress=False)
    assert pairs.converged.all() and pairs.check == "unfinished"


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("limit", [13, 40, 70, 100])
def test_no_more_products_than_allowed(limit, block):
    """Wherever the limit falls: in the search, between check and search, in the check."""
    operator = DenseOperator(random_symmetric(SPECTRA["three times"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pairs = top_eigenpairs(operator, 5, block_size=block, max_matvecs=limit, progress=False)
    assert pairs.num_matvecs <= limit and len(pairs.values) == 5


class Failing(SymmetricOperator):
    """diag(1 ... n) whose products from number ``last`` on are NaN."""

    def __init__(self, size, last):
        super().__init__(size, torch.float64, "cpu")
        self.last, self.made = last, 0

    def _matmat(self, vectors):
        self.made += len(vectors)
        product = vectors * torch.arange(1, self.size + 1)
        return product * float("nan") if self.made >= self.last else product


@pytest.mark.parametrize("size", [20, 300])
def test_products_that_are_nan(size):
    with pytest.raises(NumericalError, match=r"NaN or inf, first in product \d+"):
        top_eigenpairs(Failing(size, 7), 2, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k is 0; an operator of size 200 has 1 to 200 pairs"),
        ({"k": 101, "which": "both"}, "1 to 100 pairs of each end"),
        ({"k": 2.5}, "k is 2.5"),
        ({"which": "top"}, "which is 'top'; allowed are 'largest', 'smallest'"),
        ({"tolerance": -1}, "tolerance is -1; pass a number from 0"),
        ({"tolerance": "small"}, "tolerance is 'small'"),
        ({"max_matvecs": 6}, "max_matvecs is 6; pass a whole number, at least 7"),
        ({"block_size": 0}, "block_size is 0; pass a whole number, at least 1"),
        ({"memory": 5000}, r"k needs .* but memory is 4.88 KiB; pass a smaller k"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    given = {"k": 3} | arguments
    with pytest.raises(ValueError, match=message):
        top_eigenpairs(DenseOperator(random_symmetric(BULK)), **given)


def test_other_operators_are_refused():
    with pytest.raises(TypeError, match="operator is a Tensor; pass a symmetric operator"):
        top_eigenpairs(torch.eye(3), 1)


def test_to_scipy_serves_eigsh_for_a_block_and_the_whole():
    problem = network("mlp")
    hessian = ht.HessianOperator(problem)
    block = max(ht.partition(problem.model, "weights"), key=lambda block: block.numel)
    for operator in (hessian, hessian.block(block)):
        theirs = eigsh(operator.to_scipy(), 2, which="LA", return_eigenvectors=False)
        ours = top_eigenpairs(operator, 2, progress=False)
        assert np.allclose(np.sort(theirs), np.sort(ours.values))
