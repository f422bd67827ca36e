"""Operators, Problems and spectra with given curvature: what they should measure is known."""

import numpy as np
import torch
from torch import nn

import hessian_tools as ht
from hessian_tools.blocks.block import Cut, Part
from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.curvature.symmetric import SymmetricOperator
from hessian_tools.spectra.quadrature import Quadrature


def random_symmetric(eigenvalues, seed=0):
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.standard_normal((len(eigenvalues), len(eigenvalues))))[0]
    matrix = (vectors * np.asarray(eigenvalues, float)) @ vectors.T
    return (matrix + matrix.T) / 2


class NamedCut(Cut):
    """A cut whose labels are the names of its blocks."""

    def block_name(self, position):
        return self.labels[self.first + position]


def cut_of(names, size):
    """The rows of a tensor (len(names), size)."""
    shape = (len(names), size)
    rows = Part(names[0], shape, shape, tuple(slice(0, n) for n in shape), axes=(0,))
    return NamedCut((rows,), "", labels=tuple(names))


class FakeHessian(CurvatureOperator):
    """Block-diagonal, of matrices by the blocks' names; ``calls`` are (names, rows) of products."""

    route = "dense blocks"
    krylov_bytes = 1 << 30

    def __init__(self, matrices, dtype=torch.float64, krylov_bytes=1 << 30, poison=None):
        SymmetricOperator.__init__(self, sum(map(len, matrices.values())), dtype, "cpu")
        self.matrices = matrices
        self.krylov_bytes = krylov_bytes
        self.poison = poison  # the block whose third product holds a NaN
        self.calls = []

    def products(self, names, count, spread, collect):
        raise AssertionError("blocks only")

    def rebuilt(self, problem, **settings):
        raise AssertionError("blocks only")

    def reference(self, problem, direction):
        raise AssertionError("blocks only")

    def stacked(self, cut):
        return FakeBlocks(self, cut)


class FakeBlocks(SymmetricOperator):
    def __init__(self, parent, cut):
        super().__init__(cut.block_size, parent.dtype, parent.device)
        self.parent = parent
        self.cut = cut
        self.products = 0

    def _matmat(self, vectors):
        names = self.cut.names
        self.products += 1
        self.parent.calls.append((names, len(vectors)))
        matrices = [torch.as_tensor(self.parent.matrices[n], dtype=self.dtype) for n in names]
        product = vectors.reshape(len(names), -1, self.size) @ torch.stack(matrices)
        if self.parent.poison in names and self.products == 3:
            product[names.index(self.parent.poison), -1, 0] = float("nan")
        return product.reshape(-1, self.size)


class Quadratic(nn.Module):
    """Its loss is w' M w / 2 of the weight of ``layer``, whose Hessian thus is M."""

    def __init__(self, layer: nn.Module, matrix: torch.Tensor) -> None:
        super().__init__()
        self.layer, self.matrix = layer.double(), matrix


def loss(model, batch):
    w = model.layer.weight.flatten()
    return w @ model.matrix @ w / 2


def symmetric(size: int, stream: torch.Generator) -> torch.Tensor:
    half = torch.randn(size, size, generator=stream, dtype=torch.float64)
    return (half + half.T) / 2**0.5


def planted(shape, kind, *, noise=0.0, seed=0, layer=None, scales=None):
    """A Problem whose (a, b) weight has a given Hessian: a matrix, or a sum over blocks and dense
    ``noise`` (its Frobenius norm over that of the blocks). ``scales``: of each row."""
    (a, b), stream = shape, torch.Generator().manual_seed(seed)
    if isinstance(kind, torch.Tensor):
        matrix = kind
    else:
        entries = torch.arange(a * b).view(a, b)
        groups = {
            "rows": list(entries),
            "columns": list(entries.T),
            "dense": [entries.flatten()],
            "elements": list(entries.view(-1, 1)),
            "pairs of rows": list(entries.view(a // 2, -1)),
            "alternate rows": [entries[i::2].flatten() for i in range(2)],
        }[kind]
        matrix = torch.zeros(a * b, a * b, dtype=torch.float64)
        for group in groups:
            matrix[group[:, None], group] = symmetric(len(group), stream)
        dense = symmetric(a * b, stream)
        matrix += noise * matrix.norm() / dense.norm() * dense
    if scales is not None:
        weights = scales.double().repeat_interleave(b)
        matrix = weights[:, None] * matrix * weights
    return ht.Problem(
        Quadratic(layer or nn.Linear(b, a, bias=False), matrix), loss, [torch.zeros(1, 1)]
    )


def quadrature(nodes, weights=None, status="complete"):
    nodes = np.atleast_2d(np.asarray(nodes, dtype=float))
    weights = np.full(nodes.shape, 1 / nodes.shape[1]) if weights is None else weights
    steps = (weights > 0).sum(axis=1)
    return Quadrature(
        nodes, weights, np.zeros(nodes.shape), steps, 1000, nodes.size, status, "rademacher", "full"
    )


def exact(eigenvalues):
    return quadrature(np.sort(eigenvalues), status="exact")


def blocks(num_blocks=4, k=3, m=9, factor=1.0, spread=1.0):
    """Blocks whose scales differ by ``spread`` decades each, Dirichlet weights, some negative
    nodes."""
    rng = np.random.default_rng(3)
    found = {}
    for b in range(num_blocks):
        nodes = np.sort(
            10.0 ** (spread * b)
            * (rng.standard_normal((1, m)) ** 3 + 0.02 * rng.standard_normal((k, m))),
            axis=1,
        )
        found[f"layer.{b}"] = quadrature(factor * nodes, rng.dirichlet(np.ones(m), size=k))
    return found
