"""Optimizers that the theories speak of: Adam over the blocks of a partition, and its relatives.

Reading order: blockwise_adam, adam_family, state.
"""

from hessian_tools.optimizers.adam_family import (
    PRESETS,
    adalayer,
    adalayer_star,
    adam,
    adam_mini,
    frozen_adalayer,
    sgd_adalayer,
)
from hessian_tools.optimizers.blockwise_adam import BlockwiseAdam
from hessian_tools.optimizers.state import StateBytes, state_bytes

__all__ = [
    "PRESETS",
    "BlockwiseAdam",
    "StateBytes",
    "adalayer",
    "adalayer_star",
    "adam",
    "adam_mini",
    "frozen_adalayer",
    "sgd_adalayer",
    "state_bytes",
]
