"""hessian_tools: curvature of neural networks, block by block, and what to do about it.

The names here are what most users need; the rest is in the folders, which are read in this order:
problem, blocks, curvature, spectra, heterogeneity, structure, descent, quadratic, optimizers,
training, tracking, page. Heavy optional libraries (torchvision, transformers, matplotlib) are
imported only when a model or a figure asks for them.
"""

# first of all, for the imports take seconds in which Ctrl-C has to be answered
from hessian_tools import interruption as interruption  # isort: skip
from hessian_tools import blocks as blocks
from hessian_tools import curvature as curvature
from hessian_tools import descent as descent
from hessian_tools import heterogeneity as heterogeneity
from hessian_tools import optimizers as optimizers
from hessian_tools import page as page
from hessian_tools import problem as problem
from hessian_tools import quadratic as quadratic
from hessian_tools import spectra as spectra
from hessian_tools import structure as structure
from hessian_tools import tracking as tracking
from hessian_tools import training as training
from hessian_tools.blocks.block import Block
from hessian_tools.blocks.param_groups import param_groups
from hessian_tools.blocks.partition import Partition
from hessian_tools.blocks.presets import partition
from hessian_tools.blocks.projection import heads
from hessian_tools.curvature.fisher import EmpiricalFisherOperator, FisherOperator
from hessian_tools.curvature.gauss_newton import GaussNewtonOperator
from hessian_tools.curvature.hessian import HessianOperator
from hessian_tools.curvature.optimizer_state import preconditioner_of
from hessian_tools.curvature.preconditioned import PreconditionedOperator
from hessian_tools.descent.predicted import predicted_progress
from hessian_tools.errors import NotTwiceDifferentiable, NumericalError
from hessian_tools.heterogeneity.adaptive import adaptive_js0
from hessian_tools.heterogeneity.block_heterogeneity import js_heterogeneity
from hessian_tools.page.writing import write_report
from hessian_tools.problem.losses import Loss, cross_entropy, huggingface, mse
from hessian_tools.problem.problem import Problem
from hessian_tools.results import load, save
from hessian_tools.spectra.density import spectral_density
from hessian_tools.spectra.eigenpairs import top_eigenpairs
from hessian_tools.spectra.lanczos import lanczos
from hessian_tools.spectra.quadrature import BlockSpectra, Quadrature
from hessian_tools.spectra.slq import blockwise_slq, slq
from hessian_tools.spectra.traces import diagonal, trace
from hessian_tools.structure.check import check_partition
from hessian_tools.structure.coupling import coupling
from hessian_tools.structure.dense import dense_block
from hessian_tools.tracking.tracker import Tracker

__all__ = [
    "Block",
    "BlockSpectra",
    "EmpiricalFisherOperator",
    "FisherOperator",
    "GaussNewtonOperator",
    "HessianOperator",
    "Loss",
    "NotTwiceDifferentiable",
    "NumericalError",
    "Partition",
    "PreconditionedOperator",
    "Problem",
    "Quadrature",
    "Tracker",
    "adaptive_js0",
    "blockwise_slq",
    "check_partition",
    "coupling",
    "cross_entropy",
    "dense_block",
    "diagonal",
    "heads",
    "huggingface",
    "js_heterogeneity",
    "lanczos",
    "load",
    "mse",
    "param_groups",
    "partition",
    "preconditioner_of",
    "predicted_progress",
    "quadratic",
    "save",
    "slq",
    "spectral_density",
    "top_eigenpairs",
    "trace",
    "write_report",
]
