"""Where the Hessian's mass lies, and whether a partition follows it.

Reading order: dense, coupling, conditioning; then cuttings, mass, pairs, probing, judgement, check.
"""

from hessian_tools.structure.adam_preconditioning import AdamConditioning, adam_conditioning
from hessian_tools.structure.check import check_partition
from hessian_tools.structure.conditioning import (
    BlockConditioning,
    BlockExtremes,
    block_conditioning,
    block_extremes,
)
from hessian_tools.structure.coupling_result import Coupling
from hessian_tools.structure.dense import DenseBlock, dense_block
from hessian_tools.structure.report import PartitionReport, TensorReport

__all__ = [
    "AdamConditioning",
    "BlockConditioning",
    "BlockExtremes",
    "Coupling",
    "DenseBlock",
    "PartitionReport",
    "TensorReport",
    "adam_conditioning",
    "block_conditioning",
    "block_extremes",
    "check_partition",
    "dense_block",
]
