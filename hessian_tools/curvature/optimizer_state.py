"""The preconditioner of a live optimizer: P of its step w <- w - eta P^-1 m, m a momentum.

Read from its state as the step reads it. Factors that are one number for the whole model, such as a
decay of the rate, are left to the rate eta. With t steps made, v the second moment:

- Adam, AdamW, NAdam: sqrt(v) / sqrt(1 - beta2^t) + eps; amsgrad takes its largest v so far
- RAdam: (sqrt(v) + eps) / sqrt(1 - beta2^t), and 1 while it rectifies nothing (its first steps)
- RMSprop: sqrt(v) + eps, centered sqrt(v - mean^2) + eps
- Adagrad: sqrt(sum of g^2) + eps
- Adam-mini: as Adam, with one v a block
- Shampoo: L^q x R^q of a matrix, sqrt(v) + eps of what has no factors

v may be reduced over blocks. It is expanded to its parameter: along axes of size 1 where it has as
many axes as that, or by the ``cuts`` of its group (:func:`hessian_tools.param_groups`) where it
holds a number for each of their blocks, else a number for each run of neighbouring entries, as
Adam-mini 1.1.1 keeps for attention heads.

Letters: B blocks of a tensor.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, optim

from hessian_tools.blocks.block import Part
from hessian_tools.blocks.param_groups import ParamGroup
from hessian_tools.curvature.preconditioners import (
    DiagonalPreconditioner,
    KroneckerPreconditioner,
    Preconditioner,
)
from hessian_tools.problem.problem import Problem
from hessian_tools.problem.weights import follow

State = Mapping[str, Tensor | float | bool]  # of one parameter
_RECTIFIED_ABOVE = 5  # RAdam's length of the average, from which it uses v


class Rule(Protocol):
    """The diagonal of P for parameter ``p``, from its state and its group's settings."""

    def __call__(self, p: Tensor, state: State, group: ParamGroup) -> Tensor: ...


@runtime_checkable
class TellsDenominators(Protocol):
    """An optimizer that says itself what its steps are divided by."""

    param_groups: list[ParamGroup]

    def denominators(self) -> Mapping[Tensor, Tensor]:
        """By parameter, one number for every entry."""
        ...


@runtime_checkable
class TellsFactors(Protocol):
    """An optimizer that multiplies a matrix of momenta by L^-q and R^-q, and says L, R and q."""

    param_groups: list[ParamGroup]

    def kronecker_factors(self) -> Mapping[Tensor, tuple[Tensor, Tensor]]:
        """(L, R) by parameter that has them, as KroneckerPreconditioner takes them."""
        ...

    def kronecker_power(self) -> float:
        """q."""
        ...

    def denominators(self) -> Mapping[Tensor, Tensor]:
        """By parameter that has no factors, one number for every entry."""
        ...


def preconditioner_of(optimizer: optim.Optimizer, problem: Problem) -> Preconditioner:
    """P from the state of ``optimizer`` after its last step, see the module's text.

    Args:
        optimizer: one of torch's Adam, AdamW, NAdam, RAdam, RMSprop and Adagrad, an optimizer that
            derives from them and keeps their state, Adam-mini, or any that has
            ``denominators()``, as those of this package do, or ``kronecker_factors()`` beside
            it, as Shampoo does.
        problem: of the model that it trains.

    Raises:
        TypeError: for any other optimizer.
        ValueError: for a parameter without state; for parameters that optimizer and Problem do not
            share; for a second moment that does not fit its parameter, or a P that is not positive.
    """
    follow(problem)
    if isinstance(optimizer, TellsFactors):
        _groups_by_parameter(optimizer, problem)
        return _of_factors(optimizer, problem)
    if isinstance(optimizer, TellsDenominators):
        _groups_by_parameter(optimizer, problem)
        told = optimizer.denominators()
        return DiagonalPreconditioner({name: told[p] for name, p in problem.parameters.items()})
    rule = _rule_of(optimizer)
    groups = _groups_by_parameter(optimizer, problem)
    diagonal: dict[str, Tensor] = {}
    for name, p in problem.parameters.items():
        state: State = optimizer.state.get(p, {})
        if not _number(state.get("step", 0)):
            raise ValueError(
                f"the optimizer has no state for {name} yet; take a step first (it makes none for "
                "a parameter whose .grad is None)"
            )
        try:
            diagonal[name] = rule(p.detach(), state, groups[name])
        except KeyError as error:
            raise ValueError(
                f"the optimizer's state for {name} holds {', '.join(state)}, but no {error}; pass "
                "a DiagonalPreconditioner made from what it holds"
            ) from error
        except ValueError as error:
            raise ValueError(f"the optimizer's state for {name}: {error}") from error
    return DiagonalPreconditioner(diagonal)


def _of_factors(optimizer: TellsFactors, problem: Problem) -> KroneckerPreconditioner:
    factors, others = optimizer.kronecker_factors(), optimizer.denominators()
    named = problem.parameters.items()
    return KroneckerPreconditioner(
        {name: factors[p] for name, p in named if p in factors},
        power=optimizer.kronecker_power(),
        others={name: others[p] for name, p in named if p in others},
    )


def _of_adam(p: Tensor, state: State, group: ParamGroup) -> Tensor:
    key = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
    second = _expanded(state[key], p, group)
    _, beta2 = group["betas"]
    return second.sqrt() / _correction(beta2, state) + group["eps"]


def _of_radam(p: Tensor, state: State, group: ParamGroup) -> Tensor:
    _, beta2 = group["betas"]
    step = _number(state["step"])
    power = beta2**step
    length = 2 / (1 - beta2) - 1 - 2 * step * power / (1 - power)
    if length <= _RECTIFIED_ABOVE:
        return torch.ones_like(p)
    second = _expanded(state["exp_avg_sq"], p, group)
    return (second.sqrt() + group["eps"]) / _correction(beta2, state)


def _of_rmsprop(p: Tensor, state: State, group: ParamGroup) -> Tensor:
    second = _expanded(state["square_avg"], p, group)
    if group["centered"]:
        mean = _expanded(state["grad_avg"], p, group)
        second = second - mean.square()
    return second.sqrt() + group["eps"]


def _of_adagrad(p: Tensor, state: State, group: ParamGroup) -> Tensor:
    return _expanded(state["sum"], p, group).sqrt() + group["eps"]


def _of_adam_mini(p: Tensor, state: State, group: ParamGroup) -> Tensor:
    known = [key for key in ("vmean", "v", "exp_avg_sq") if key in state]
    if not known:
        raise KeyError("vmean")
    beta2 = group["beta2"] if "beta2" in group else group["betas"][1]
    second = _expanded(state[known[0]], p, group)
    return second.sqrt() / _correction(beta2, state) + group["eps"]


# A class comes before those it derives from.
RULES: dict[type[optim.Optimizer], Rule] = {
    optim.NAdam: _of_adam,
    optim.RAdam: _of_radam,
    optim.AdamW: _of_adam,
    optim.Adam: _of_adam,
    optim.RMSprop: _of_rmsprop,
    optim.Adagrad: _of_adagrad,
}


def _rule_of(optimizer: object) -> Rule:
    kind = type(optimizer).__name__
    if isinstance(optimizer, optim.Optimizer):
        if kind.lower().replace("_", "") == "adammini":
            return _of_adam_mini
        for known, rule in RULES.items():
            if isinstance(optimizer, known):
                return rule
    names = ", ".join(known.__name__ for known in RULES)
    raise TypeError(
        f"optimizer is a {kind}, whose preconditioner is not known; known are {names} and "
        "Adam-mini. Pass hessian_tools.curvature.DiagonalPreconditioner({name: d}) for any other"
    )


def _groups_by_parameter(optimizer: optim.Optimizer, problem: Problem) -> dict[str, ParamGroup]:
    """The group of each parameter of ``problem``, by its name there."""
    trained = {id(p): name for name, p in problem.parameters.items()}
    groups: dict[str, ParamGroup] = {}
    for number, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if id(p) in trained:
                groups[trained[id(p)]] = group
            elif p.requires_grad:
                raise ValueError(
                    f"group {number} of the optimizer trains a parameter of shape "
                    f"{tuple(p.shape)} that is none of the Problem's; pass the optimizer of "
                    "problem.model, and make the Problem of all that it trains"
                )
    missing = [name for name in problem.parameters if name not in groups]
    if missing:
        raise ValueError(
            f"the optimizer does not train {', '.join(missing)}; freeze them "
            "(requires_grad_(False)) before the Problem is made, or pass a DiagonalPreconditioner"
        )
    return groups


def _number(value: Tensor | float) -> float:
    return float(value)


def _correction(beta2: float, state: State) -> float:
    """sqrt(1 - beta2^t)."""
    return math.sqrt(1 - float(beta2) ** _number(state["step"]))


def _expanded(value: Tensor | float, p: Tensor, group: ParamGroup) -> Tensor:
    """A second moment, perhaps one a block, for every entry of ``p``, in float32 or wider."""
    reduced = torch.as_tensor(value, device=p.device).detach()
    reduced = reduced.to(torch.promote_types(reduced.dtype, torch.float32))
    if reduced.shape == p.shape:
        return reduced
    if reduced.numel() == 1:
        return reduced.reshape(()).expand(p.shape)
    ways: list[Callable[[Tensor, Tensor, ParamGroup], Tensor | None]]
    ways = [_along_axes, _by_cuts, _by_runs]
    for way in ways:
        expanded = way(reduced, p, group)
        if expanded is not None:
            return expanded
    raise ValueError(
        f"a second moment of shape {tuple(reduced.shape)} cannot be spread over a parameter of "
        f"shape {tuple(p.shape)}; one number a block is needed, or as many axes as the parameter's"
    )


def _along_axes(reduced: Tensor, p: Tensor, group: ParamGroup) -> Tensor | None:
    """Repeated along its axes of size 1; None where these are not the parameter's."""
    if reduced.ndim != p.ndim:
        return None
    pairs = zip(reduced.shape, p.shape, strict=True)
    fits = all(size in (1, whole) for size, whole in pairs)
    return reduced.expand(p.shape) if fits else None


def _by_cuts(reduced: Tensor, p: Tensor, group: ParamGroup) -> Tensor | None:
    """A number for each block of the group's cuts, in their order; None where they do not fit."""
    parts = list(_parts(p, group))
    counts = [part.num_blocks for part in parts]
    covered = sum(part.numel for part in parts)
    if sum(counts) != reduced.numel() or covered != p.numel():
        return None
    whole = reduced.new_empty(p.shape)
    for part, values in zip(parts, reduced.flatten().split(counts), strict=True):
        part.place(values[:, None].expand(-1, part.block_size), whole)
    return whole


def _parts(p: Tensor, group: ParamGroup) -> Iterator[Part]:
    for cut in group.get("cuts", ()):
        yield Part(
            parameter="",
            shape=tuple(p.shape),
            view=tuple(cut["view"]),
            index=tuple(slice(start, stop) for start, stop in cut["index"]),
            axes=tuple(cut["axes"]),
            window=cut.get("window"),
        )


def _by_runs(reduced: Tensor, p: Tensor, group: ParamGroup) -> Tensor | None:
    """(B,) or (B, 1): a number for each of B equal runs of entries; None where they do not fit."""
    count = reduced.numel()
    if len(reduced) != count or p.numel() % count:
        return None
    rows = reduced.reshape(count, 1).expand(count, p.numel() // count)
    return rows.reshape(p.shape)
