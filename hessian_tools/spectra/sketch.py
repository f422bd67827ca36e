"""Products with random vectors, in batches that fit memory, and the range that they sketch.

Letters: n size of the operator, k vectors of a sketch, r rows of a batch.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessian_tools.curvature.engine.memory import format_bytes
from hessian_tools.curvature.symmetric import unit_vectors
from hessian_tools.spectra.krylov import Products
from hessian_tools.spectra.probes import draw_probes

Floats = NDArray[np.float64]

_ROWS = 64  # of a batch, at most
_HELD = 6  # tensors of a batch's size that are alive at once
_SKETCHES = 5  # the sketch, its basis, their products, and two of the factorisation


class Sampler:
    """Random vectors and their products: all over the unit of ``products``.

    Args:
        products: of the operator.
        seed: with a name the only source of randomness.
        budget: bytes for vectors.
    """

    def __init__(self, products: Products, seed: int, budget: int) -> None:
        self.products = products
        self.operator = products.operator
        self.size = products.operator.size
        self.seed = seed
        self.budget = budget
        self._row = self.size * self.operator.dtype.itemsize

    @property
    def rows(self) -> int:
        """How many vectors go together."""
        fitting = self.budget // (_HELD * self._row)
        return min(_ROWS, max(1, fitting))

    def probes(self, kind: str, name: str, count: int) -> Iterator[Tensor]:
        """``count`` probes in batches, (r, n)."""
        for first in range(0, count, self.rows):
            number = min(self.rows, count - first)
            yield self._drawn(kind, f"{name} {first}", number)

    def applied(self, vectors: Tensor) -> Tensor:
        """Products with the rows of (k, n) ``vectors``, as many at a time as go together."""
        batches = [self.products(some) for some in vectors.split(self.rows)]
        return torch.cat(batches)

    def check_room(self, count: int) -> None:
        """Raises ValueError where a sketch of ``count`` vectors does not fit the budget."""
        needed = _SKETCHES * count * self._row
        if needed > self.budget:
            raise ValueError(
                f"num_matvecs needs {format_bytes(needed)} for a sketch of {count} vectors of "
                f"size {self.size}, but memory is {format_bytes(self.budget)}; pass a smaller "
                'num_matvecs, more memory, or the method "hutchinson"'
            )

    def sketched(self, count: int) -> Tensor:
        """(k, n) orthonormal rows: a basis of A S for ``count`` random signs S."""
        self.check_room(count)
        signs = self._drawn("rademacher", "sketch", count)
        basis, _ = torch.linalg.qr(self.applied(signs).T)
        return basis.T.contiguous()

    def gaussian(self, count: int) -> Tensor:
        """(k, n) Gaussian vectors."""
        return self._drawn("gaussian", "probes", count)

    def diagonal(self) -> Floats:
        """(n,) all diagonal entries, from products with the unit vectors."""
        numbers = torch.arange(self.size, device=self.operator.device)
        entries = []
        for some in numbers.split(self.rows):
            units = unit_vectors(some, self.size, self.operator.dtype)
            products = self.products(units)
            picked = products.gather(1, some[:, None])[:, 0]
            entries.append(picked.double().cpu().numpy())
        return np.concatenate(entries)

    def _drawn(self, kind: str, name: str, count: int) -> Tensor:
        return draw_probes(
            kind,
            self.seed,
            name,
            count,
            self.size,
            dtype=self.operator.dtype,
            device=self.operator.device,
        )
