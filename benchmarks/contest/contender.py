"""The interface of all contenders, and what those share that return bare nodes and weights.

Letters: P parameters, n entries of a block, k probes, m Lanczos steps, G grid points.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from contest.cases import Case
from hessian_tools.spectra.quadrature import Quadrature

GRID = 10_000  # G
NOT_OFFERED = "no Gauss-Newton products"


class Contender(ABC):
    """One library on one case. An instance keeps what its library keeps between products."""

    name: str
    package: str | None  # its distribution's name
    how: str
    rebuilds = (
        True  # every product starts anew, so that a job may be measured on part of its products
    )

    def __init__(self, case: Case) -> None:
        self.case = case

    @classmethod
    @abstractmethod
    def load(cls) -> None:
        """Imports the library; raises ImportError without it."""

    def layout(self, vectors: Tensor) -> Any:
        """(k, P) vectors in the library's own format."""
        return vectors

    @abstractmethod
    def product(self, vectors: Any) -> Any:
        """H v for all vectors of :meth:`layout`, in the library's own format."""

    def rows(self, products: Any) -> Tensor:
        """(k, P) from what :meth:`product` gave."""
        return products

    @abstractmethod
    def block_products(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """H_bb v_b for every named parameter tensor, (n,) or the parameter's shape."""

    def gauss_newton(self, vectors: Any) -> Any:
        """G v, G the Gauss-Newton matrix, for all vectors of :meth:`layout`, as :meth:`product`."""
        raise NotImplementedError(NOT_OFFERED)

    def gauss_newton_blocks(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """G_bb v_b for every named parameter tensor, as :meth:`block_products`."""
        raise NotImplementedError(NOT_OFFERED)

    def hint(self) -> Any:
        """What :meth:`density` is told free of charge."""
        return None

    @abstractmethod
    def density(self, probes: int, steps: int, hint: Any) -> tuple[np.ndarray, np.ndarray]:
        """Grid points and density of the whole Hessian, each (G,)."""

    @abstractmethod
    def blockwise(self, probes: int, steps: int) -> Mapping[str, Quadrature]:
        """Spectra of all diagonal blocks of ``case.weights``."""

    def notes(self) -> list[str]:
        """What a reader should know about this contender on this case."""
        return []

    def close(self) -> None:  # noqa: B027
        """Lets go of graphs that Python alone would keep; most have none."""


def quadrature(nodes: Tensor, weights: Tensor, size: int) -> Quadrature:
    """Nodes and weights (k, m) of a library as this package's Quadrature of an operator of
    ``size``.

    A run that ended early and was padded with NaN is padded with its largest node, whose weight
    there is 0.
    """
    table = nodes.detach().double().cpu().numpy()
    held = np.where(np.isnan(table), np.nanmax(table, axis=1, keepdims=True), table)
    steps = (~np.isnan(table)).sum(axis=1)
    order = np.argsort(held, axis=1)
    held = np.take_along_axis(held, order, axis=1)
    shares = np.take_along_axis(weights.detach().double().cpu().numpy(), order, axis=1)
    unknown = np.full(held.shape, np.nan)
    return Quadrature(
        held, shares, unknown, steps, size, int(steps.sum()), "complete", "rademacher", "none"
    )


def smoothed(nodes: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Grid points and density, each (G,): a Gaussian of 1/200 of the spectrum's range on every node
    (k, m).
    """
    width = float(np.ptp(nodes)) / 200 or 1.0
    grid = np.linspace(nodes.min() - 5 * width, nodes.max() + 5 * width, GRID)
    kernels = np.exp(-(((grid[:, None] - nodes.ravel()) / width) ** 2) / 2)
    return grid, kernels @ weights.ravel() / (len(nodes) * width * np.sqrt(2 * np.pi))
