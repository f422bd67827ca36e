"""Products with curvature matrices: exact, within a memory budget, verified.

Reading order: symmetric, operators, hessian, gauss_newton, fisher, referees, verification,
preconditioners, optimizer_state, preconditioned; how products are computed is in engine, the
compiled route in tangent.
"""

from hessian_tools.curvature.engine.plan import Plan
from hessian_tools.curvature.fisher import (
    EmpiricalFisherOperator,
    FisherOperator,
    MonteCarloFisherOperator,
)
from hessian_tools.curvature.gauss_newton import GaussNewtonOperator
from hessian_tools.curvature.hessian import HessianOperator, as_operator, in_float64
from hessian_tools.curvature.operators import Columns, CurvatureOperator, StackedBlocks
from hessian_tools.curvature.optimizer_state import preconditioner_of
from hessian_tools.curvature.preconditioned import PreconditionedOperator
from hessian_tools.curvature.preconditioners import (
    DiagonalPreconditioner,
    KroneckerPreconditioner,
    Preconditioner,
)
from hessian_tools.curvature.referees import Reference, finite_difference, float64_copy
from hessian_tools.curvature.segments.recompute import Segments
from hessian_tools.curvature.symmetric import (
    DenseOperator,
    DiagonalOperator,
    ScipyOperator,
    SymmetricOperator,
)
from hessian_tools.curvature.verification import Check, Verification, verify

__all__ = [
    "Check",
    "Columns",
    "CurvatureOperator",
    "DenseOperator",
    "DiagonalOperator",
    "DiagonalPreconditioner",
    "EmpiricalFisherOperator",
    "FisherOperator",
    "GaussNewtonOperator",
    "HessianOperator",
    "KroneckerPreconditioner",
    "MonteCarloFisherOperator",
    "Plan",
    "PreconditionedOperator",
    "Preconditioner",
    "Reference",
    "ScipyOperator",
    "Segments",
    "StackedBlocks",
    "SymmetricOperator",
    "Verification",
    "as_operator",
    "finite_difference",
    "float64_copy",
    "in_float64",
    "preconditioner_of",
    "verify",
]
