"""hessian_tools: curvature of neural networks, block by block, and what to do about it.

Reading order: problem, partition, hessian, lanczos, quadrature, density, heterogeneity, verdict. Heavy optional
libraries (torchvision, transformers, matplotlib) are imported only when a model or a figure asks for them.
"""

from hessian_tools.adaptive import AdaptiveJS0, adaptive_js0
from hessian_tools.density import SpectralDensity, spectral_density
from hessian_tools.errors import NotTwiceDifferentiable, NumericalError
from hessian_tools.hessian import HessianOperator
from hessian_tools.heterogeneity import JSHeterogeneity, js_heterogeneity
from hessian_tools.lanczos import LanczosResult, lanczos
from hessian_tools.operators import DenseOperator, DiagonalOperator, ScipyOperator, SymmetricOperator
from hessian_tools.partition import Block, Partition, partition
from hessian_tools.problem import Problem, cross_entropy, huggingface, mse
from hessian_tools.quadrature import BlockSpectra, Quadrature, blockwise_slq, slq
from hessian_tools.recompute import Segments
from hessian_tools.results import load, save
from hessian_tools.verdict import Verdict

__all__ = [
    "AdaptiveJS0",
    "Block",
    "BlockSpectra",
    "DenseOperator",
    "DiagonalOperator",
    "HessianOperator",
    "JSHeterogeneity",
    "LanczosResult",
    "NotTwiceDifferentiable",
    "NumericalError",
    "Partition",
    "Problem",
    "Quadrature",
    "ScipyOperator",
    "Segments",
    "SpectralDensity",
    "SymmetricOperator",
    "Verdict",
    "adaptive_js0",
    "blockwise_slq",
    "cross_entropy",
    "huggingface",
    "js_heterogeneity",
    "lanczos",
    "load",
    "mse",
    "partition",
    "save",
    "slq",
    "spectral_density",
]
