"""A training lab: optimizers on the same batches, each at its best rate.

Reading order: budget, schedule, sources, stream, z_loss, trajectory, checkpoint, loop, runs,
sweeps, races, race_report.
"""

from hessian_tools.training.budget import Budget
from hessian_tools.training.loop import train
from hessian_tools.training.races import Race, RaceEntry, race
from hessian_tools.training.schedule import SCHEDULES, constant, cosine, linear, schedule_of
from hessian_tools.training.stream import Stream, problem_stream, zoo_stream
from hessian_tools.training.sweeps import RateSweep, sweep
from hessian_tools.training.trajectory import Trajectory
from hessian_tools.training.z_loss import ZLoss

__all__ = [
    "SCHEDULES",
    "Budget",
    "Race",
    "RaceEntry",
    "RateSweep",
    "Stream",
    "Trajectory",
    "ZLoss",
    "constant",
    "cosine",
    "linear",
    "problem_stream",
    "race",
    "schedule_of",
    "sweep",
    "train",
    "zoo_stream",
]
