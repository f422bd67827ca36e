"""WHAT is studied: a model, a loss and data.

Reading order: problem, losses, batches, evaluation, gradient; then what comes with the package:
zoo, specs, networks, data, vision.
"""

from hessian_tools.problem.gradient import mean_gradient
from hessian_tools.problem.losses import (
    CrossEntropy,
    HuggingFace,
    Loss,
    MeanSquaredError,
    cross_entropy,
    huggingface,
    mse,
)
from hessian_tools.problem.problem import Problem

__all__ = [
    "CrossEntropy",
    "HuggingFace",
    "Loss",
    "MeanSquaredError",
    "Problem",
    "cross_entropy",
    "huggingface",
    "mean_gradient",
    "mse",
]
