"""hessian_tools: curvature of neural networks, block by block, and what to do about it.

Reading order: problem, partition, hessian, lanczos, quadrature, density, heterogeneity, verdict. Heavy optional
libraries (torchvision, transformers, matplotlib) are imported only when a model or a figure asks for them.
"""

from hessian_tools import quadratic
from hessian_tools.blocks.adam_mini import adam_mini_names
from hessian_tools.blocks.adam_mini_arguments import AdamMiniArguments, adam_mini_arguments
from hessian_tools.blocks.block import Block
from hessian_tools.blocks.param_groups import StateSavings, param_groups, state_savings
from hessian_tools.blocks.partition import Partition
from hessian_tools.blocks.presets import alternatives, partition
from hessian_tools.curvature.engine.recompute import Segments
from hessian_tools.curvature.hessian import HessianOperator
from hessian_tools.curvature.symmetric import (
    DenseOperator,
    DiagonalOperator,
    ScipyOperator,
    SymmetricOperator,
)
from hessian_tools.errors import NotTwiceDifferentiable, NumericalError
from hessian_tools.heterogeneity.adaptive import AdaptiveJS0, adaptive_js0
from hessian_tools.heterogeneity.block_heterogeneity import JSHeterogeneity, js_heterogeneity
from hessian_tools.heterogeneity.verdict import Verdict
from hessian_tools.problem.losses import cross_entropy, huggingface, mse
from hessian_tools.problem.problem import Problem
from hessian_tools.results import load, save
from hessian_tools.spectra.density import SpectralDensity, spectral_density
from hessian_tools.spectra.lanczos import LanczosResult, lanczos
from hessian_tools.spectra.quadrature import BlockSpectra, Quadrature
from hessian_tools.spectra.slq import blockwise_slq, slq
from hessian_tools.structure.adam_conditioning import adam_conditioning
from hessian_tools.structure.check import check_partition
from hessian_tools.structure.conditioning import (
    BlockConditioning,
    BlockExtremes,
    block_conditioning,
    block_extremes,
)
from hessian_tools.structure.coupling import coupling
from hessian_tools.structure.coupling_result import Coupling
from hessian_tools.structure.dense import DenseBlock, dense_block
from hessian_tools.structure.report import PartitionReport

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
