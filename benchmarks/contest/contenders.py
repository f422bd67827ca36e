"""This package, the published script's algorithm, and the registry of all contenders."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hessian_tools as ht
from contest.cases import criterion
from contest.contender import GRID, Contender, quadrature, smoothed
from contest.peers import Curvlinops, HessianEigenthings, PyHessian
from hessian_tools.spectra.quadrature import Quadrature


class HessianTools(Contender):
    name, package, rebuilds = "hessian_tools", "hessian_tools", False
    how = (
        "HessianOperator(route='tangent program').matmat and .block, warm, GaussNewtonOperator "
        "likewise; slq and "
        "spectral_density, blockwise_slq with "
        "defaults"
    )

    @classmethod
    def load(cls) -> None:
        pass

    @cached_property
    def hessian(self) -> ht.HessianOperator:
        return ht.HessianOperator(self.case.problem())

    @cached_property
    def settled(self) -> ht.HessianOperator:
        """What the default comes to after some products, for jobs that time a product on its
        own.
        """
        return ht.HessianOperator(self.case.problem(), route="tangent program")

    @cached_property
    def blocks(self) -> ht.Partition:
        return ht.partition(self.case.model, list(self.case.weights))

    @cached_property
    def operators(self) -> dict[str, Any]:
        return {block.name: self.settled.block(block) for block in self.blocks}

    def product(self, vectors: Tensor) -> Tensor:
        return self.settled.matmat(vectors)

    def block_products(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.operators[name] @ vector.flatten() for name, vector in vectors.items()}

    @cached_property
    def of_outputs(self) -> ht.GaussNewtonOperator:
        return ht.GaussNewtonOperator(self.case.problem(), route="tangent program")

    def gauss_newton(self, vectors: Tensor) -> Tensor:
        return self.of_outputs.matmat(vectors)

    def gauss_newton_blocks(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        by_name = {block.name: block for block in self.blocks}
        return {
            name: self.of_outputs.block(by_name[name]) @ vector.flatten()
            for name, vector in vectors.items()
        }

    def density(self, probes: int, steps: int, hint: Any) -> tuple[np.ndarray, np.ndarray]:
        quadrature = ht.slq(self.hessian, num_probes=probes, num_steps=steps, seed=0)
        density = ht.spectral_density(quadrature, num_points=GRID)
        return density.eigenvalues, density.values[0]

    def blockwise(self, probes: int, steps: int) -> ht.BlockSpectra:
        return ht.blockwise_slq(
            self.hessian, self.blocks, num_probes=probes, num_steps=steps, seed=0, progress=False
        )

    def notes(self) -> list[str]:
        return [
            f"route: {getattr(self, name).route}"
            for name in ("settled", "hessian", "of_outputs")
            if name in self.__dict__
        ]

    def close(self) -> None:
        for name in ("settled", "hessian", "of_outputs"):
            if name in self.__dict__:
                getattr(self, name).release()


class OfficialAlgorithm(Contender):
    """The algorithm of the published script (Zhang et al. 2024, arXiv 2402.16788), written anew
    from its description.

    Every product builds the gradient's graph of all parameters again and differentiates it back
    into all leaves, of which a block's is then read; losses of several batches are summed, not
    averaged. Lanczos takes one Gaussian probe at a time and does not re-orthogonalise.
    """

    name, package = "official algorithm", None
    how = (
        "written anew: graph rebuilt for every product, backward into all leaves, plain "
        "Lanczos, one probe at a time, "
        "losses of several batches summed"
    )

    @classmethod
    def load(cls) -> None:
        pass

    def multiply(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parameters, model = self.case.parameters, self.case.model
        total = {name: torch.zeros_like(parameters[name]) for name in vectors}
        for inputs, targets in self.case.batches:
            loss = criterion(model(inputs), targets)
            gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
            chosen = [g for name, g in zip(parameters, gradients, strict=True) if name in vectors]
            torch.autograd.backward(
                chosen, [vectors[name] for name in parameters if name in vectors]
            )
            for name in vectors:
                total[name] += parameters[name].grad
            model.zero_grad()
        return total

    def product(self, vectors: Tensor) -> list[dict[str, Tensor]]:
        parameters = self.case.parameters
        rows = (vector.split([p.numel() for p in parameters.values()]) for vector in vectors)
        return [
            self.multiply(
                {n: piece.view_as(p) for (n, p), piece in zip(parameters.items(), row, strict=True)}
            )
            for row in rows
        ]

    def rows(self, products: list[dict[str, Tensor]]) -> Tensor:
        return torch.stack(
            [torch.cat([piece.flatten() for piece in row.values()]) for row in products]
        )

    def block_products(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.multiply({name: vector})[name] for name, vector in vectors.items()}

    def lanczos(self, names: tuple[str, ...], probes: int, steps: int) -> tuple[Tensor, Tensor]:
        """Nodes and weights, each (k, m), of the diagonal block of all named parameters
        together.
        """
        shapes = {name: self.case.parameters[name].shape for name in names}
        sizes = [shape.numel() for shape in shapes.values()]
        found = []
        for _ in range(probes):
            current = torch.randn(sum(sizes), device=self.case.device, dtype=self.case.dtype)
            current /= current.norm()
            previous, beta, alphas, betas = torch.zeros_like(current), 0.0, [], []
            for _ in range(steps):
                pieces = current.split(sizes)
                row = self.multiply(
                    {n: piece.view(shapes[n]) for n, piece in zip(names, pieces, strict=True)}
                )
                residual = torch.cat([piece.flatten() for piece in row.values()]) - beta * previous
                alphas.append(float(residual @ current))
                residual -= alphas[-1] * current
                beta = float(residual.norm())
                betas.append(beta)
                previous, current = current, residual / beta
            off = torch.tensor(betas[:-1])
            nodes, vectors = torch.linalg.eigh(
                torch.diag(torch.tensor(alphas)) + torch.diag(off, 1) + torch.diag(off, -1)
            )
            found.append((nodes, vectors[0] ** 2))
        nodes, weights = (torch.stack(column) for column in zip(*found, strict=True))
        return nodes, weights

    def density(self, probes: int, steps: int, hint: Any) -> tuple[np.ndarray, np.ndarray]:
        nodes, weights = self.lanczos(tuple(self.case.parameters), probes, steps)
        return smoothed(nodes.numpy(), weights.numpy())

    def blockwise(self, probes: int, steps: int) -> dict[str, Quadrature]:
        parameters = self.case.parameters
        return {
            name: quadrature(*self.lanczos((name,), probes, steps), parameters[name].numel())
            for name in self.case.weights
        }


CONTENDERS: dict[str, type[Contender]] = {
    "ours": HessianTools,
    "eigenthings": HessianEigenthings,
    "curvlinops": Curvlinops,
    "pyhessian": PyHessian,
    "official": OfficialAlgorithm,
}
