"""The published libraries as contenders, each used as its documentation tells a user to.

``how`` says in what way. All attention runs on PyTorch's math kernel (the others have no second
derivative), which the caller selects for everyone.
"""

import contextlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from contest.cases import criterion
from contest.contender import GRID, Contender, quadrature, smoothed
from hessian_tools.spectra.quadrature import Quadrature


class HessianEigenthings(Contender):
    name, package = "hessian-eigenthings", "hessian-eigenthings"
    how = (
        "HessianOperator.matvec and GGNOperator.matvec, with param_filter=match_names for blocks; "
        "spectral_density"
    )

    @classmethod
    def load(cls) -> None:
        import hessian_eigenthings

        cls.library = hessian_eigenthings

    def operator(self, name: str | None = None) -> Any:
        chosen = None if name is None else self.library.match_names(name)
        loss = self.library.supervised_loss(criterion)
        return self.library.HessianOperator(
            self.case.model, self.case.batches, loss, param_filter=chosen
        )

    @cached_property
    def whole(self) -> Any:
        return self.operator()

    @cached_property
    def operators(self) -> dict[str, Any]:
        return {name: self.operator(name) for name in self.case.weights}

    def product(self, vectors: Tensor) -> list[Tensor]:
        return [self.whole.matvec(vector) for vector in vectors]

    def rows(self, products: list[Tensor]) -> Tensor:
        return torch.stack(products)

    def block_products(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: self.operators[name].matvec(vector.flatten()) for name, vector in vectors.items()
        }

    def of_outputs(self, name: str | None = None) -> Any:
        chosen = None if name is None else self.library.match_names(name)
        return self.library.GGNOperator(
            self.case.model,
            self.case.batches,
            _logits,  # supervised_forward, but for models of transformers
            self.library.supervised_loss_of_output(criterion),
            param_filter=chosen,
        )

    @cached_property
    def whole_of_outputs(self) -> Any:
        return self.of_outputs()

    @cached_property
    def blocks_of_outputs(self) -> dict[str, Any]:
        return {name: self.of_outputs(name) for name in self.case.weights}

    def gauss_newton(self, vectors: Tensor) -> list[Tensor]:
        return [self.whole_of_outputs.matvec(vector) for vector in vectors]

    def gauss_newton_blocks(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: self.blocks_of_outputs[name].matvec(vector.flatten())
            for name, vector in vectors.items()
        }

    def density(self, probes: int, steps: int, hint: Any) -> tuple[np.ndarray, np.ndarray]:
        found = self.library.spectral_density(
            self.whole, num_runs=probes, lanczos_steps=steps, seed=0
        )
        return found.grid.cpu().numpy(), found.density.cpu().numpy()

    def blockwise(self, probes: int, steps: int) -> dict[str, Quadrature]:
        spectra = {}
        for name in self.case.weights:
            operator = self.operator(name)
            found = self.library.spectral_density(
                operator, num_runs=probes, lanczos_steps=steps, seed=0
            )
            spectra[name] = quadrature(found.raw_eigenvalues, found.raw_weights, operator.size)
        return spectra


def _logits(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    outputs = model(batch[0])
    return getattr(outputs, "logits", outputs)


class _FlatLogits(nn.Module):
    """curvlinops' cross-entropy takes logits (N, C)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.model(inputs)
        return getattr(outputs, "logits", outputs).flatten(0, -2)


class Curvlinops(Contender):
    name, package = "curvlinops", "curvlinops-for-pytorch"
    how = (
        "HessianLinearOperator and GGNLinearOperator @ (P, k), with block_sizes for one Hessian "
        "product of every block and "
        "one operator a block for "
        "Lanczos; lanczos_approximate_spectrum with its boundaries given, so that it spends "
        "k m products, fast_lanczos"
    )

    @classmethod
    def load(cls) -> None:
        import curvlinops
        from curvlinops.papyan2020traces.spectrum import fast_lanczos

        cls.library, cls.fast_lanczos = curvlinops, staticmethod(fast_lanczos)

    def operator(
        self,
        names: tuple[str, ...] | None = None,
        checked: bool = True,
        kind: str = "HessianLinearOperator",
        **options: Any,
    ) -> Any:
        model = _FlatLogits(self.case.model)
        parameters = self.case.parameters
        chosen = [parameters[name] for name in names or parameters]
        batches = [(x, y.flatten()) for x, y in self.case.batches]
        options["batch_size_fn"] = len
        return getattr(self.library, kind)(
            model, nn.CrossEntropyLoss(), chosen, batches, check_deterministic=checked, **options
        )

    @cached_property
    def whole(self) -> Any:
        return self.operator()

    @cached_property
    def diagonal(self) -> Any:
        return self.operator(self.case.weights, block_sizes=[1] * len(self.case.weights))

    @cached_property
    def of_outputs(self) -> Any:
        return self.operator(kind="GGNLinearOperator")

    @cached_property
    def blocks_of_outputs(self) -> dict[str, Any]:
        """GGNLinearOperator takes no block_sizes."""
        return {
            name: self.operator((name,), checked=False, kind="GGNLinearOperator")
            for name in self.case.weights
        }

    def gauss_newton(self, vectors: Tensor) -> Tensor:
        return self.of_outputs @ vectors

    def gauss_newton_blocks(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: self.blocks_of_outputs[name] @ vector.flatten()
            for name, vector in vectors.items()
        }

    def hint(self) -> tuple[float, float]:
        nodes, _ = self.fast_lanczos(self.whole, 3)
        return float(nodes.min()), float(nodes.max())

    def layout(self, vectors: Tensor) -> Tensor:
        return vectors.T.contiguous()

    def product(self, vectors: Tensor) -> Tensor:
        return self.whole @ vectors

    def rows(self, products: Tensor) -> Tensor:
        return products.T

    def block_products(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        products = self.diagonal @ [vectors[name] for name in self.case.weights]
        return dict(zip(self.case.weights, products, strict=True))

    def density(self, probes: int, steps: int, hint: Any) -> tuple[np.ndarray, np.ndarray]:
        grid, density = self.library.lanczos_approximate_spectrum(
            self.whole, steps, num_points=GRID, num_repeats=probes, boundaries=hint
        )
        return grid.cpu().numpy(), density.cpu().numpy()

    def blockwise(self, probes: int, steps: int) -> dict[str, Quadrature]:
        spectra = {}
        for index, name in enumerate(self.case.weights):
            operator = self.operator(
                (name,), checked=index == 0
            )  # its check of determinism once is enough
            runs = [self.fast_lanczos(operator, steps) for _ in range(probes)]
            nodes, vectors = (torch.stack(found) for found in zip(*runs, strict=True))
            spectra[name] = quadrature(nodes, vectors[:, 0] ** 2, operator.shape[0])
        return spectra


class PyHessian(Contender):
    name, package, rebuilds = "PyHessian", "pyhessian", False
    how = (
        "hessian(model, criterion, data).density, utils.hessian_vector_product on its "
        "gradients; for blocks the one "
        "gradient and parameter (products), everything else frozen (density); torch.eig "
        "given back to it"
    )

    @classmethod
    def load(cls) -> None:
        import pyhessian
        from pyhessian.utils import hessian_vector_product

        cls.library, cls.hvp = pyhessian, staticmethod(hessian_vector_product)

    def made(self) -> Any:
        cuda, batches = self.case.device.type == "cuda", self.case.batches
        self.close()
        data = {"data": batches[0]} if len(batches) == 1 else {"dataloader": batches}
        return self.library.hessian(self.case.model, criterion, cuda=cuda, **data)

    @cached_property
    def whole(self) -> Any:
        return self.made()

    def layout(self, vectors: Tensor) -> list[list[Tensor]]:
        shapes = [p.shape for p in self.case.model.parameters()]
        pieces = (vector.split([shape.numel() for shape in shapes]) for vector in vectors)
        return [
            [piece.view(shape) for piece, shape in zip(row, shapes, strict=True)] for row in pieces
        ]

    def product(self, vectors: list[list[Tensor]]) -> list[list[Tensor]]:
        if self.whole.full_dataset:
            return [self.whole.dataloader_hv_product(vector)[1] for vector in vectors]
        return [self.hvp(self.whole.gradsH, self.whole.params, vector) for vector in vectors]

    def rows(self, products: list[list[Tensor]]) -> Tensor:
        return torch.stack([torch.cat([piece.flatten() for piece in row]) for row in products])

    def block_products(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.whole.full_dataset:  # it keeps no gradients then
            found = {}
            for name, vector in vectors.items():
                with self.frozen_but(name):
                    found[name] = self.made().dataloader_hv_product([vector])[1][0]
            return found
        pairs = zip(self.whole.gradsH, self.whole.params, strict=True)
        by_name = dict(zip(self.case.parameters, pairs, strict=True))
        return {
            name: self.hvp([by_name[name][0]], [by_name[name][1]], [v])[0]
            for name, v in vectors.items()
        }

    def density(self, probes: int, steps: int, hint: Any) -> tuple[np.ndarray, np.ndarray]:
        with _eig_given_back():
            nodes, weights = self.whole.density(iter=steps, n_v=probes)
        return smoothed(np.array(nodes), np.array(weights))

    def blockwise(self, probes: int, steps: int) -> dict[str, Quadrature]:
        spectra = {}
        for name in self.case.weights:
            with self.frozen_but(name), _eig_given_back():
                nodes, weights = self.made().density(iter=steps, n_v=probes)
            size = self.case.parameters[name].numel()
            spectra[name] = quadrature(torch.tensor(nodes), torch.tensor(weights), size)
        return spectra

    @contextlib.contextmanager
    def frozen_but(self, name: str) -> Iterator[None]:
        self.case.model.requires_grad_(False)
        self.case.parameters[name].requires_grad_()
        try:
            yield
        finally:
            self.case.model.requires_grad_()

    def notes(self) -> list[str]:
        try:
            self.whole.density(iter=1, n_v=1)
        except RuntimeError as error:
            return [f"density() as installed: {str(error).splitlines()[0]}"]
        return []

    def close(self) -> None:
        self.case.model.zero_grad()  # a gradient with a graph refers to itself


@contextlib.contextmanager
def _eig_given_back() -> Iterator[None]:
    """torch.eig, which PyHessian's density calls and torch has dropped, for the symmetric matrices
    it gets.
    """

    def eig(matrix: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        return torch.stack([values, torch.zeros_like(values)], dim=1), vectors

    kept = torch.eig
    torch.eig = eig
    try:
        yield
    finally:
        torch.eig = kept
