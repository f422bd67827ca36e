"""SGD with a rate for each block of a partition, from the block's own measured curvature.

    rate_b = lr / |theta_b|
    m <- b m + (1 - b) g
    w_b <- (1 - rate_b wd) w_b - rate_b m_b / (1 - b^t)

theta_b is the Ritz value of largest magnitude of the diagonal block A_bb, by Lanczos
(:func:`hessian_tools.structure.conditioning.block_extremes`), with A the Hessian or the
Gauss-Newton matrix of a Problem. ``lr`` is the one number that is swept: without momentum, and if
the blocks did not interact, below 2 would be stable and 1 kills the stiffest direction at once.
Networks want less, as a block that is flat at the start gets a rate that is too high a step later.
A decoder of 3,760 parameters (60 steps on one batch, one seed, half-decades of lr) diverged from
0.1 up and was best at 0.01; with ``refresh`` 5, from 0.316 up, and best at 0.0316.

It is the blockwise gradient descent of Zhang et al., "Adam-mini" (arXiv 2406.16793), who show on
quadratics that one good rate a block beats Adam. There each block has its optimal rate 2 / (largest
+ smallest eigenvalue); here the smallest, which a network's block has near or below zero, is left
out. It is not a Newton method: within a block all directions have one rate.

The momentum is an average, as in Zhao et al. (arXiv 2407.07972); with ``heavy_ball`` it is
m <- b m + g and w_b <- w_b - rate_b m_b, whose steps are 1 / (1 - b) times as long.

A block whose |theta_b| is zero, or at most 16 eps of the products' dtype times the largest of all
blocks, has no curvature but rounding (a bias that softmax cancels). It gets the largest rate among
the others, and its name is in its group's ``unmeasured``.

Letters: B blocks in a tensor, n entries of a block, t steps.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hessian_tools.blocks.block import Part
from hessian_tools.blocks.ownership import check_blocks
from hessian_tools.blocks.param_groups import ParamGroup
from hessian_tools.blocks.partition import Partition
from hessian_tools.curvature.gauss_newton import GaussNewtonOperator
from hessian_tools.curvature.hessian import HessianOperator
from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.optimizers.stepping import (
    Closure,
    State,
    Stepping,
    gradient_of,
    no_steps,
    wide,
)
from hessian_tools.problem.problem import Problem
from hessian_tools.problem.weights import follow
from hessian_tools.structure.adam_preconditioning import Floats
from hessian_tools.structure.conditioning import BlockExtremes, block_extremes

MATRICES: dict[str, Callable[[Problem], CurvatureOperator]] = {
    "hessian": HessianOperator,
    "gauss_newton": GaussNewtonOperator,
}
ROUNDING = 16  # eps of the largest |Ritz value| of all, at or below which one is rounding


@dataclass(frozen=True)
class _Piece:
    """The blocks of one cut in one tensor."""

    part: Part
    names: tuple[str, ...]  # (B,)


class BlockwiseSGD(Stepping):
    """SGD with a measured rate a block.

    State of each tensor: ``step``, ``exp_avg``, and ``curvature``, the |theta_b| of its blocks in
    the partition's order, float64. What is loaded is not measured again until it is due.

    Args:
        problem: of the model that is trained; its batches are those that curvature is measured on.
        partition: every trainable entry in a block. Blocks may join parts of several tensors.
        lr: c, the same for all blocks, or groups' own.
        params: groups of the model's parameters; default one of all.
        momentum: b, in [0, 1).
        heavy_ball: Polyak's momentum in place of the average.
        weight_decay: wd, decoupled, at each block's own rate.
        matrix: "hessian" or "gauss_newton".
        refresh: steps from one measurement to the next; None: only before the first step.
        num_steps, num_probes, seed: of ``block_extremes``.

    Attributes: ``measured``, the last BlockExtremes of this process, or None.

    Raises:
        ValueError: a number or a name out of range; a partition that is not one of the model's, or
            leaves entries out; from ``step``, a model in which no block has curvature.
        RuntimeError: from ``step``, for a sparse or complex gradient.
    """

    def __init__(
        self,
        problem: Problem,
        partition: Partition,
        lr: float = 0.01,
        *,
        params: ParamsT | None = None,
        momentum: float = 0.9,
        heavy_ball: bool = False,
        weight_decay: float = 0.0,
        matrix: str = "hessian",
        refresh: int | None = None,
        num_steps: int = 12,
        num_probes: int = 1,
        seed: int = 0,
    ) -> None:
        _check(matrix, refresh)
        follow(problem)
        check_blocks(partition.cuts, problem.parameters, "partition")
        self.problem = problem
        self.partition = partition
        self.matrix = matrix
        self.refresh = refresh
        self.measured: BlockExtremes | None = None
        self._extremes = partial(
            block_extremes,
            partition=partition,
            num_steps=num_steps,
            num_probes=num_probes,
            seed=seed,
            progress=False,
        )
        self._pieces = _pieces(problem, partition)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "heavy_ball": heavy_ball,
            "weight_decay": weight_decay,
            "unmeasured": (),
        }
        super().__init__(list(problem.parameters.values()) if params is None else params, defaults)
        self._named()

    def step(  # type: ignore[override]  # torch's own has overloads
        self,
        closure: Closure | None = None,
    ) -> Tensor | float | None:
        """One step, before it a measurement where one is due; returns what ``closure`` does."""
        if self._is_due():
            self.measure()
        return super().step(closure)

    def measure(self) -> BlockExtremes:
        """Measures the curvature of all blocks at the present weights, which sets their rates."""
        operator = MATRICES[self.matrix](self.problem)
        with torch.enable_grad():
            found = self._extremes(operator)
        operator.release()
        curvature, is_rounding = _usable(found, torch.finfo(operator.dtype).eps)
        by_name = dict(zip(found.names, curvature.tolist(), strict=True))
        unmeasured = {name for name, bad in zip(found.names, is_rounding, strict=True) if bad}
        names = {p: _names(pieces) for p, pieces in self._named().items()}
        for p in names:
            values = [by_name[name] for name in names[p]]
            self.state[p]["curvature"] = torch.tensor(values, dtype=torch.float64, device=p.device)
        for group in self.param_groups:
            inside = [name for p in group["params"] for name in names[p]]
            group["unmeasured"] = tuple(name for name in inside if name in unmeasured)
        self.measured = found
        return found

    def rates(self) -> dict[str, float]:
        """By block, lr / |theta_b| as of now.

        Raises:
            ValueError: before the first step, unless :meth:`measure` was called.
        """
        found: dict[str, float] = {}
        pieces = self._named()
        for group in self.param_groups:
            for p in group["params"]:
                if "curvature" not in self.state.get(p, {}):
                    raise no_steps(p)
                values = (float(group["lr"]) / self.state[p]["curvature"]).tolist()
                found.update(zip(_names(pieces[p]), values, strict=True))
        return found

    def update(self, parameters: list[Tensor], group: ParamGroup) -> None:
        momentum = group["momentum"]
        pieces = self._named()
        for p in parameters:
            state = self._state_of(p)
            state["step"] += 1
            if group["heavy_ball"]:
                move = state["exp_avg"].mul_(momentum).add_(gradient_of(p))
            else:
                mean = state["exp_avg"].lerp_(gradient_of(p), 1 - momentum)
                move = mean / (1 - momentum ** int(state["step"]))
            if group["weight_decay"]:
                move = move.add(p, alpha=group["weight_decay"])
            _move(p, move, state["curvature"], pieces[p], float(group["lr"]))

    def _is_due(self) -> bool:
        """Whether there is no curvature yet, or ``refresh`` steps were made with the last."""
        states = [self.state.get(p, {}) for p in self._named()]
        if not all("curvature" in state for state in states):
            return True
        taken = max(int(state.get("step", 0)) for state in states)
        return self.refresh is not None and taken > 0 and taken % self.refresh == 0

    def _state_of(self, p: Tensor) -> State:
        state: State = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(p, dtype=wide(p))
        return state

    def _named(self) -> dict[Tensor, list[_Piece]]:
        """The pieces of every tensor that this optimizer trains."""
        parameters = self.problem.parameters
        pieces: dict[Tensor, list[_Piece]] = {parameters[n]: q for n, q in self._pieces.items()}
        trained = {p for group in self.param_groups for p in group["params"]}
        if trained == pieces.keys():
            return pieces
        raise ValueError(
            f"params holds {len(trained)} tensors, of which {len(trained - pieces.keys())} are "
            f"none of the Problem's {len(pieces)} trainable ones; pass exactly those"
        )


def _names(pieces: list[_Piece]) -> list[str]:
    """Of all blocks, in order."""
    return [name for piece in pieces for name in piece.names]


def _move(
    p: Tensor,
    move: Tensor,
    curvature: Tensor,
    pieces: list[_Piece],
    lr: float,
) -> None:
    """Block by block, p <- p - lr / |theta_b| move."""
    counts = [len(piece.names) for piece in pieces]
    for piece, values in zip(pieces, curvature.split(counts), strict=True):
        rates = (lr / values).to(move.dtype)[:, None]
        moved = piece.part.rows(p) - rates * piece.part.rows(move)
        piece.part.place(moved, p)


def _usable(found: BlockExtremes, eps: float) -> tuple[Floats, np.ndarray]:
    """(B,) |theta_b|, the least of the others where it is rounding, and (B,) where it is."""
    top = found.top
    is_rounding = ~(top > ROUNDING * eps * top.max())
    if is_rounding.all():
        raise ValueError(
            f"the {found.curvature} of every one of {len(top)} blocks is zero, so no rate can be "
            "measured; give the Problem a loss with curvature"
        )
    return np.where(is_rounding, top[~is_rounding].min(), top), is_rounding


def _pieces(problem: Problem, partition: Partition) -> Mapping[str, list[_Piece]]:
    """By parameter name; ValueError for one that is not covered, or cannot be written by blocks."""
    pieces: dict[str, list[_Piece]] = {name: [] for name in problem.parameters}
    for cut in partition.cuts:
        for part in cut.parts:
            pieces[part.parameter].append(_Piece(part, cut.names))
    for name, p in problem.parameters.items():
        covered = sum(piece.part.numel for piece in pieces[name])
        if covered != p.numel():
            raise ValueError(
                f"partition has {covered:,} of the {p.numel():,} entries of {name} in blocks, and "
                "every entry needs a rate; take ht.partition(model, 'tensor'), for one, or freeze "
                "what is not trained"
            )
        if not p.is_contiguous():
            raise ValueError(
                f"{name} is not contiguous, so its blocks are no views of it; make it so: "
                "parameter.data = parameter.data.contiguous()"
            )
    return pieces


def _check(matrix: str, refresh: int | None) -> None:
    if matrix not in MATRICES:
        raise ValueError(f"matrix is {matrix!r}; one of {', '.join(MATRICES)} is needed")
    if refresh is not None and (int(refresh) != refresh or refresh < 1):
        raise ValueError(f"refresh is {refresh}; a number of steps from 1, or None, is needed")
