"""Optimizers that the theories speak of: Adam over the blocks of a partition, and the others.

Reading order: blockwise_adam, adam_family, adafactor, shampoo, blockwise_sgd, muon, named, state.
"""

from hessian_tools.optimizers.adafactor import Adafactor
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
from hessian_tools.optimizers.blockwise_sgd import BlockwiseSGD
from hessian_tools.optimizers.muon import Together, muon_with_adamw
from hessian_tools.optimizers.named import OPTIMIZERS, Entry, make
from hessian_tools.optimizers.shampoo import Shampoo
from hessian_tools.optimizers.state import StateBytes, state_bytes

__all__ = [
    "OPTIMIZERS",
    "PRESETS",
    "Adafactor",
    "BlockwiseAdam",
    "BlockwiseSGD",
    "Entry",
    "Shampoo",
    "StateBytes",
    "Together",
    "adalayer",
    "adalayer_star",
    "adam",
    "adam_mini",
    "frozen_adalayer",
    "make",
    "muon_with_adamw",
    "sgd_adalayer",
    "state_bytes",
]
