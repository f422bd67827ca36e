"""hessian_tools: curvature of neural networks, block by block, and what to do about it.

Reading order: problem, partition, hessian, lanczos, quadrature, density, heterogeneity, verdict. Heavy optional
libraries (torchvision, transformers, matplotlib) are imported only when a model or a figure asks for them.
"""

from hessian_tools import quadratic
from hessian_tools.adam_mini_names import adam_mini_names
from hessian_tools.adaptive import AdaptiveJS0, adaptive_js0
from hessian_tools.conditioning import (
    BlockConditioning,
    BlockExtremes,
    adam_conditioning,
    block_conditioning,
    block_extremes,
)
from hessian_tools.coupling import Coupling, coupling
from hessian_tools.dense import DenseBlock, dense_block
from hessian_tools.density import SpectralDensity, spectral_density
from hessian_tools.errors import NotTwiceDifferentiable, NumericalError
from hessian_tools.hessian import HessianOperator
from hessian_tools.heterogeneity import JSHeterogeneity, js_heterogeneity
from hessian_tools.lanczos import LanczosResult, lanczos
from hessian_tools.operators import DenseOperator, DiagonalOperator, ScipyOperator, SymmetricOperator
from hessian_tools.param_groups import AdamMiniArguments, StateSavings, adam_mini_arguments, param_groups, state_savings
from hessian_tools.partition import Block, Partition, alternatives, partition
from hessian_tools.partition_check import check_partition
from hessian_tools.partition_report import PartitionReport
from hessian_tools.problem import Problem, cross_entropy, huggingface, mse
from hessian_tools.quadrature import BlockSpectra, Quadrature, blockwise_slq, slq
from hessian_tools.recompute import Segments
from hessian_tools.results import load, save
from hessian_tools.verdict import Verdict

__all__ = [
    "AdamMiniArguments",
    "AdaptiveJS0",
    "Block",
    "BlockConditioning",
    "BlockExtremes",
    "BlockSpectra",
    "Coupling",
    "DenseBlock",
    "DenseOperator",
    "DiagonalOperator",
    "HessianOperator",
    "JSHeterogeneity",
    "LanczosResult",
    "NotTwiceDifferentiable",
    "NumericalError",
    "Partition",
    "PartitionReport",
    "Problem",
    "Quadrature",
    "ScipyOperator",
    "Segments",
    "SpectralDensity",
    "StateSavings",
    "SymmetricOperator",
    "Verdict",
    "adam_conditioning",
    "adam_mini_arguments",
    "adam_mini_names",
    "adaptive_js0",
    "alternatives",
    "block_conditioning",
    "block_extremes",
    "blockwise_slq",
    "check_partition",
    "coupling",
    "cross_entropy",
    "dense_block",
    "huggingface",
    "js_heterogeneity",
    "lanczos",
    "load",
    "mse",
    "param_groups",
    "partition",
    "quadratic",
    "save",
    "slq",
    "spectral_density",
    "state_savings",
]
