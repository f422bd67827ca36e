"""Optimizers by name."""

from hessian_tools.optimizers.named import OPTIMIZERS, make

__all__ = ["OPTIMIZERS", "make"]
