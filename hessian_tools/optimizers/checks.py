"""What every optimizer here refuses, in the same words."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def check_settings(group: Mapping[str, Any]) -> None:  # numbers, and pairs of them
    """Raises ValueError for a number out of range."""
    for name in ("lr", "eps", "weight_decay"):
        if name in group and not float(group[name]) >= 0:
            raise ValueError(f"{name} is {group[name]}; it may not be negative")
    for name in ("betas", "momentum"):
        if name not in group:
            continue
        given = group[name]
        several = given if isinstance(given, tuple | list) else (given,)
        if not all(0 <= beta < 1 for beta in several):
            raise ValueError(f"{name} is {given}; it must lie in [0, 1)")


def check_gradient(p: Tensor, optimizer: str) -> None:
    """Raises RuntimeError for a sparse or complex gradient."""
    if p.grad is not None and (p.grad.is_sparse or p.is_complex()):
        kind = "sparse" if p.grad.is_sparse else "complex"
        raise RuntimeError(
            f"a gradient of shape {tuple(p.shape)} is {kind}; {optimizer} takes real dense ones "
            "(nn.Embedding(sparse=False), torch.view_as_real)"
        )
