"""Which embedding tables are looked up by token, and which by position, segment or distance.

A table of tokens receives the token numbers that the model is given. So the model runs on a few, up to its first
layer, in evaluation mode and without gradients; where that cannot be done, shapes decide.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

IDS = ((2, 0, 3, 1),)  # neither positions, nor segments


class _Reached(Exception):
    """The tables have been looked up."""


def token_tables(
    model: nn.Module, tables: Mapping[str, nn.Module], outputs: set[int], first: nn.Module | None
) -> list[str]:
    """Names of those of ``tables`` (by parameter name, outside the layers) that are looked up by token.

    Args:
        outputs: numbers of features of the linear layers outside the transformer layers.
        first: the first transformer layer, where the run may stop.

    Falls back on the largest table with as many rows as a linear layer has outputs, else the first. Tables with as many
    rows as one found count as well (a decoder's own).
    """
    rows = {name: table.get_parameter("weight").shape[0] for name, table in tables.items()}
    if not tables:
        return []
    found = set(tables) if len(tables) == 1 else _receivers(model, tables, first)
    if not found:
        found = {
            max(
                (name for name in tables if rows[name] in outputs),
                key=rows.__getitem__,
                default=next(iter(tables)),
            )
        }
    sizes = {rows[name] for name in found}
    return [name for name in tables if rows[name] in sizes]


def _receivers(
    model: nn.Module, tables: Mapping[str, nn.Module], first: nn.Module | None
) -> set[str]:
    ids, received = torch.tensor(IDS, device=next(model.parameters()).device), set[str]()

    def listener(name: str) -> Callable[[nn.Module, Any], None]:
        def listen(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            if arguments and isinstance(arguments[0], Tensor) and torch.equal(arguments[0], ids):
                received.add(name)

        return listen

    def stop(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        raise _Reached

    hooks = [table.register_forward_pre_hook(listener(name)) for name, table in tables.items()]
    hooks += [first.register_forward_pre_hook(stop)] if first is not None else []
    try:
        with (
            _quietly(model),
            suppress(Exception),
        ):  # a foreign forward may want other arguments, after the look-up
            model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return received


@contextmanager
def _quietly(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, warnings or traces in the random state."""
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad(), torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in modes:
            module.training = False
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
