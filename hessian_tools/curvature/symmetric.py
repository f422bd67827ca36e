"""Symmetric linear operators: the only thing an algorithm of this package ever sees.

Shapes: n size of the operator, k probes. A batch of vectors is always ``(k, n)``, probes in front.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

FloatArray = NDArray[np.floating[Any]]


class SymmetricOperator(ABC):
    """A real symmetric n x n matrix known only through its products.

    A new curvature matrix is one subclass with one method, :meth:`_matmat`. Attributes: ``shape``
    (n, n), ``dtype`` and ``device`` of the vectors it takes and gives.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.size = size
        self.shape = (size, size)
        self.dtype = dtype
        self.device = torch.device(device)

    @abstractmethod
    def _matmat(self, vectors: Tensor) -> Tensor:
        """Products with every row of ``vectors``, (k, n) -> (k, n), already validated."""

    @overload
    def matmat(self, vectors: Tensor) -> Tensor: ...

    @overload
    def matmat(self, vectors: FloatArray) -> FloatArray: ...

    def matmat(self, vectors: Tensor | FloatArray) -> Tensor | FloatArray:
        """A v for each row v of ``vectors``.

        Args:
            vectors: (k, n) torch tensor or numpy array.
        Returns:
            (k, n), of the kind that came in (a numpy array for a numpy array).
        Raises:
            ValueError: for any other shape.
            TypeError: for anything that is not a real floating array.
        """
        product = self._matmat(self._validated(vectors, ndim=2))
        if isinstance(vectors, np.ndarray):
            return product.cpu().numpy().astype(vectors.dtype)
        return product

    @overload
    def __matmul__(self, vector: Tensor) -> Tensor: ...

    @overload
    def __matmul__(self, vector: FloatArray) -> FloatArray: ...

    def __matmul__(self, vector: Tensor | FloatArray) -> Tensor | FloatArray:
        """A v for one ``vector`` of shape (n,)."""
        self._validated(vector, ndim=1)
        return self.matmat(vector[None])[0]

    # a hook that does nothing by default
    def expect(self, num_matvecs: int, blocks: int = 1) -> None:  # noqa: B027
        """Announces how many products will follow, of this operator or of ``blocks`` blocks of it.

        An operator may prepare for a long run; this one does nothing. Algorithms that know how
        many products they will ask for call it (:func:`hessian_tools.slq` does).
        """

    def steady(self) -> AbstractContextManager[None]:
        """Within it, whatever the matrix is made of is taken not to change.

        An operator may look at it once, on entering; this one has nothing to look at. Algorithms
        that ask for many products one after the other enter it.
        """
        return nullcontext()

    def to_scipy(self) -> "LinearOperator":
        """The operator for scipy's solvers, in numpy's float of the same width."""
        from scipy.sparse.linalg import LinearOperator

        dtype = np.dtype(np.float64 if self.dtype == torch.float64 else np.float32)

        def columns(matrix: FloatArray) -> FloatArray:
            return self.matmat(np.ascontiguousarray(matrix.T, dtype=dtype)).T

        def single(vector: FloatArray) -> FloatArray:
            return columns(vector.reshape(-1, 1))[:, 0]

        return LinearOperator(
            self.shape, matvec=single, rmatvec=single, matmat=columns, rmatmat=columns, dtype=dtype
        )

    def to_dense(self, rows_per_call: int = 64) -> Tensor:
        """The whole matrix, (n, n), from products with ``rows_per_call`` unit vectors at a time."""
        dense = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        with self.steady():
            for numbers, products in unit_products(self, rows=rows_per_call):
                dense[numbers] = products[0]
        return dense

    def _validated(self, vectors: object, ndim: int) -> Tensor:
        expected = f"(k, {self.size})" if ndim == 2 else f"({self.size},)"
        if not isinstance(vectors, np.ndarray | Tensor):
            raise TypeError(
                f"vectors is a {type(vectors).__name__}; pass a torch tensor or numpy array of "
                f"shape {expected}"
            )
        if vectors.ndim != ndim or vectors.shape[-1] != self.size:
            remedy = "its last axis is n"
            if vectors.ndim != ndim:
                remedy = "use `operator @ v` for one vector, `matmat` for rows of vectors"
            raise ValueError(
                f"vectors has shape {tuple(vectors.shape)}; expected {expected} ({remedy})"
            )
        tensor = torch.as_tensor(vectors)
        if not tensor.is_floating_point():
            raise TypeError(
                f"vectors has dtype {tensor.dtype}; a real floating dtype is needed (call "
                ".to(torch.float32))"
            )
        return tensor.to(device=self.device, dtype=self.dtype)


def unit_vectors(numbers: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """(r, size) rows that are 1 at one of ``numbers`` (r,) each and 0 elsewhere, on its device."""
    units = torch.zeros(len(numbers), size, dtype=dtype, device=numbers.device)
    units[torch.arange(len(numbers), device=numbers.device), numbers] = 1
    return units


def unit_products(
    operator: SymmetricOperator,
    *,
    num_blocks: int = 1,
    rows: int = 64,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Products with every unit vector, which are the rows of the dense matrix, some at a time.

    Args:
        operator: one matrix, or B = ``num_blocks`` of the same size side by side, to each of which
            belong consecutive rows of a batch
            (:class:`hessian_tools.curvature.operators.StackedBlocks`).
        rows: vectors in one product, over all blocks.
    Yields:
        numbers of unit vectors, (r,), and their products with every block, (B, r, n).
    """
    every = torch.arange(operator.size, device=operator.device)
    for numbers in every.split(max(1, rows // num_blocks)):
        units = unit_vectors(numbers, operator.size, operator.dtype)
        products = operator.matmat(units.repeat(num_blocks, 1))
        yield numbers, products.unflatten(0, (num_blocks, len(numbers)))


class DenseOperator(SymmetricOperator):
    """A given (n, n) symmetric matrix. Raises ValueError when it is not square or not symmetric to
    rounding."""

    def __init__(self, matrix: Tensor | np.ndarray) -> None:
        matrix = torch.as_tensor(matrix)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(
                f"matrix has shape {tuple(matrix.shape)}; a square (n, n) matrix is needed"
            )
        tolerance = (
            100 * torch.finfo(matrix.dtype).eps * float(matrix.abs().max())
            if matrix.numel()
            else 0.0
        )
        asymmetry = float((matrix - matrix.T).abs().max()) if matrix.numel() else 0.0
        if not asymmetry <= tolerance:
            raise ValueError(
                f"matrix is not symmetric: max |A - A'| = {asymmetry:.3g}; pass (A + A') / 2 if "
                "that is meant"
            )
        super().__init__(matrix.shape[0], matrix.dtype, matrix.device)
        self.matrix = matrix

    def _matmat(self, vectors: Tensor) -> Tensor:
        return vectors @ self.matrix


class DiagonalOperator(SymmetricOperator):
    """diag(d) for a given d of shape (n,)."""

    def __init__(self, diagonal: Tensor | np.ndarray) -> None:
        diagonal = torch.as_tensor(diagonal)
        if diagonal.ndim != 1:
            raise ValueError(
                f"diagonal has shape {tuple(diagonal.shape)}; a vector of shape (n,) is needed"
            )
        super().__init__(diagonal.shape[0], diagonal.dtype, diagonal.device)
        self.diagonal = diagonal

    def _matmat(self, vectors: Tensor) -> Tensor:
        return vectors * self.diagonal


class ScipyOperator(SymmetricOperator):
    """A real symmetric :class:`scipy.sparse.linalg.LinearOperator`, on the CPU."""

    def __init__(self, operator: Any) -> None:
        if operator.shape[0] != operator.shape[1]:
            raise ValueError(f"operator has shape {tuple(operator.shape)}; a square one is needed")
        dtype = torch.float32 if operator.dtype == np.float32 else torch.float64
        super().__init__(operator.shape[0], dtype, "cpu")
        self.operator = operator

    def _matmat(self, vectors: Tensor) -> Tensor:
        return torch.as_tensor(self.operator.matmat(vectors.numpy().T).T.copy(), dtype=self.dtype)
