"""Quadratic problems: the theory of gradient descent against Adam as a laboratory.

Reading order: problems, construction, cases, methods, preconditioning, plan, watch, simulation,
steps, sweeps, runs, theory, practice, lineup.
"""

from hessian_tools.quadratic.cases import CASES, case, from_spectra
from hessian_tools.quadratic.construction import dense, from_blocks, from_matrix, rotated
from hessian_tools.quadratic.lineup import LINEUP, Standing, compare, standings
from hessian_tools.quadratic.methods import METHOD_DEFAULTS, METHODS
from hessian_tools.quadratic.practice import (
    BoundCheck,
    LimitCycle,
    check_adam_bound,
    check_gd_bound,
    limit_cycle,
)
from hessian_tools.quadratic.preconditioning import extremes, linear_iterations
from hessian_tools.quadratic.problems import Quadratic, draw_starts
from hessian_tools.quadratic.runs import Runs, run
from hessian_tools.quadratic.steps import STEPS
from hessian_tools.quadratic.sweeps import Sweep, best_step
from hessian_tools.quadratic.theory import (
    Constants,
    Scorecard,
    constants,
    random_problems,
    score_prediction,
)

__all__ = [
    "CASES",
    "LINEUP",
    "METHODS",
    "METHOD_DEFAULTS",
    "STEPS",
    "BoundCheck",
    "Constants",
    "LimitCycle",
    "Quadratic",
    "Runs",
    "Scorecard",
    "Standing",
    "Sweep",
    "best_step",
    "case",
    "check_adam_bound",
    "check_gd_bound",
    "compare",
    "constants",
    "dense",
    "draw_starts",
    "extremes",
    "from_blocks",
    "from_matrix",
    "from_spectra",
    "limit_cycle",
    "linear_iterations",
    "random_problems",
    "rotated",
    "run",
    "score_prediction",
    "standings",
]
