"""The operator contract: shapes, kinds of arrays, views, errors."""

import numpy as np
import pytest
import torch
from problems import network
from scipy.sparse.linalg import LinearOperator, aslinearoperator, eigsh

import hessian_tools as ht

MATRIX = torch.tensor([[2.0, -1.0, 0.0], [-1.0, 3.0, 0.5], [0.0, 0.5, -4.0]], dtype=torch.float64)
OPERATORS = {
    "dense": lambda: ht.curvature.DenseOperator(MATRIX),
    "diagonal": lambda: ht.curvature.DiagonalOperator(
        torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    ),
    "scipy": lambda: ht.curvature.ScipyOperator(
        LinearOperator((3, 3), matvec=lambda v: MATRIX.numpy() @ v, dtype=np.float64)
    ),
    "hessian": lambda: ht.HessianOperator(network("mlp")),
    "block": lambda: (
        (p := network("mlp"))
        and ht.HessianOperator(p).block(ht.partition(p.model, "tensor")["0.bias"])
    ),
}


@pytest.fixture(params=OPERATORS)
def operator(request):
    return OPERATORS[request.param]()


def test_products_agree_in_every_view(operator):
    dense = operator.to_dense()
    assert dense.shape == operator.shape and torch.allclose(dense, dense.T)
    rows = torch.randn(5, operator.size, dtype=torch.float64)
    assert torch.allclose(operator.matmat(rows), rows @ dense)
    assert torch.allclose(operator @ rows[0], dense @ rows[0])
    as_numpy = operator.matmat(rows.numpy().astype(np.float32))
    assert as_numpy.dtype == np.float32 and np.allclose(as_numpy, rows @ dense, atol=1e-5)
    scipy = operator.to_scipy()
    assert np.allclose(scipy @ rows.numpy().T, dense @ rows.T) and np.allclose(
        scipy @ rows[0].numpy(), dense @ rows[0]
    )
    assert np.allclose(scipy.H @ rows[0].numpy(), dense @ rows[0])


def test_scipy_solvers_take_it():
    largest = eigsh(
        ht.HessianOperator(network("mlp")).to_scipy(), k=1, which="LA", return_eigenvectors=False
    )
    expected = torch.linalg.eigvalsh(ht.HessianOperator(network("mlp")).to_dense())[-1]
    assert abs(largest[0] - expected) < 1e-8


def test_dense_in_pieces_is_dense(operator):
    assert torch.allclose(operator.to_dense(rows_per_call=2), operator.to_dense())


@pytest.mark.parametrize(
    ("vectors", "error", "words"),
    [
        (torch.zeros(3), ValueError, r"expected \(k, 3\)"),
        (torch.zeros(1, 4), ValueError, "last axis"),
        ([1.0], TypeError, "list"),
    ],
)
def test_wrong_vectors_are_refused(vectors, error, words):
    with pytest.raises(error, match=words):
        OPERATORS["dense"]().matmat(vectors)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ht.curvature.DenseOperator(torch.zeros(2, 3)), "square"),
        (
            lambda: ht.curvature.DenseOperator(torch.tensor([[0.0, 1.0], [0.0, 0.0]])),
            "not symmetric",
        ),
        (lambda: ht.curvature.DenseOperator(torch.full((2, 2), float("nan"))), "not symmetric"),
        (lambda: ht.curvature.DiagonalOperator(torch.zeros(2, 2)), "vector of shape"),
        (lambda: ht.curvature.ScipyOperator(aslinearoperator(np.ones((2, 3)))), "square"),
    ],
)
def test_what_is_no_symmetric_operator_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
