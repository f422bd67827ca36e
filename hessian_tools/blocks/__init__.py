"""HOW the parameters are cut into named blocks.

Reading order: block, ownership, partition say what blocks are; projection, trial_runs, behaviour,
attention and kinds find out what the tensors of a model are; survey cuts them, presets and
specification say how; param_groups, adam_mini and adam_mini_call speak to optimizers.
"""

from hessian_tools.blocks.adam_mini import adam_mini_names
from hessian_tools.blocks.adam_mini_call import AdamMiniArguments, adam_mini_arguments
from hessian_tools.blocks.block import Block, Cut, Part
from hessian_tools.blocks.param_groups import StateSavings, state_savings
from hessian_tools.blocks.partition import Partition
from hessian_tools.blocks.presets import PRESETS, Preset, alternatives
from hessian_tools.blocks.specification import AXES

__all__ = [
    "AXES",
    "PRESETS",
    "AdamMiniArguments",
    "Block",
    "Cut",
    "Part",
    "Partition",
    "Preset",
    "StateSavings",
    "adam_mini_arguments",
    "adam_mini_names",
    "alternatives",
    "state_savings",
]
