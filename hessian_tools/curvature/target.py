"""What an algorithm about one matrix is given: an operator, its memory, the names of its entries.

Letters: n size of the operator.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessian_tools.curvature.engine.memory import budget_bytes
from hessian_tools.curvature.hessian import as_operator
from hessian_tools.curvature.operators import CurvatureOperator, StackedBlocks
from hessian_tools.curvature.symmetric import SymmetricOperator
from hessian_tools.problem.problem import Problem

Shape = tuple[int, ...]


def single_operator(given: Problem | SymmetricOperator) -> SymmetricOperator:
    """The operator itself; of a Problem its Hessian.

    Raises:
        TypeError: for anything else.
        ValueError: for several blocks side by side, which are several matrices.
    """
    if not isinstance(given, Problem | SymmetricOperator):
        raise TypeError(
            f"operator is a {type(given).__name__}; pass a symmetric operator, such as "
            "ht.HessianOperator(problem), or an ht.Problem"
        )
    operator = as_operator(given) if isinstance(given, Problem) else given
    if isinstance(operator, StackedBlocks) and operator.num_blocks > 1:
        raise ValueError(
            f"operator holds {operator.num_blocks} blocks side by side; pass one of them, "
            "curvature.block(block)"
        )
    if operator.size < 1:
        raise ValueError("operator has size 0; there is nothing to compute")
    return operator


def vector_bytes(operator: SymmetricOperator, memory: str | int = "auto") -> int:
    """Bytes that vectors may take: ``memory``, where "auto" is what the operator leaves for them.

    Raises:
        ValueError: for a ``memory`` that is no size.
    """
    if memory != "auto":
        return budget_bytes(memory, operator.device)
    if isinstance(operator, CurvatureOperator):
        return operator.krylov_bytes
    if isinstance(operator, StackedBlocks):
        return operator.curvature.krylov_bytes
    return budget_bytes("auto", operator.device)


def names_and_shapes(operator: SymmetricOperator) -> tuple[tuple[str, ...], tuple[Shape, ...]]:
    """Names and shapes of the tensors that make up a vector, in order; () where it has none.

    A block has the pieces that it is made of, each under the name of its parameter.
    """
    if isinstance(operator, CurvatureOperator):
        parameters = operator.problem.parameters
        shapes = tuple(tuple(p.shape) for p in parameters.values())
        return tuple(parameters), shapes
    if isinstance(operator, StackedBlocks):
        parts = operator.cut.parts
        names = _distinct([part.parameter for part in parts])
        return names, tuple(part.block_shape for part in parts)
    return (), ()


def by_name(
    flat: NDArray[np.floating],
    names: Sequence[str],
    shapes: Sequence[Shape],
) -> dict[str, Tensor]:
    """The pieces of ``flat`` (n,) as tensors of ``shapes``.

    Raises:
        ValueError: where the entries have no names.
    """
    if not names:
        raise ValueError(
            "the operator was given without parameters, so its entries have no names; use the "
            "flat array, or pass an ht.HessianOperator or one of its blocks"
        )
    pieces = torch.from_numpy(flat).split([math.prod(shape) for shape in shapes])
    shaped = [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]
    return dict(zip(names, shaped, strict=True))


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    """``names``, numbered from the second on where one occurs again: ``w``, ``w (2)``."""
    seen: list[str] = []
    for position, name in enumerate(names):
        times = names[:position].count(name)
        seen.append(f"{name} ({times + 1})" if times else name)
    return tuple(seen)
