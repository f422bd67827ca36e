"""What :func:`hessian_tools.predicted_progress` finds, by name and as a table.

Letters: B blocks, R rows, T steps.
"""

from dataclasses import dataclass

from hessian_tools.descent.reduced import Floats
from hessian_tools.results import registered
from hessian_tools.shown import Record, Tabular
from hessian_tools.tables import plus_minus, table


@registered
@dataclass(frozen=True, eq=False)
class Decrease:
    """By how much one method lowers the local quadratic, in the unit of the loss.

    Ratios are over that of one rate. What does not exist or was not asked for is nan; ``why`` says
    why there is no best rate.
    """

    one_step: float
    one_step_error: float  # standard error from the batches
    ratio: float
    ratio_error: float
    many_steps: float  # after T steps
    many_steps_ratio: float
    many_steps_rate: (
        float  # T steps' common rate: eta, or a factor of ``rates`` where these are many
    )
    rates: Floats  # the best rates of one step, one for each direction
    why: str = ""
    many_steps_why: str = ""


@registered
@dataclass(frozen=True, eq=False)
class PredictedProgress(Tabular):
    """See :func:`predicted_progress`; ``str`` of it is a table."""

    one_rate: Decrease
    block_rates: Decrease  # ``rates`` in the order of ``blocks``
    row_rates: Decrease | None  # ``rates`` in the order of ``rows``; None unless asked for
    adam: Decrease  # the preconditioner's direction, one rate
    adam_block_rates: Decrease
    loss: float  # L at the present weights
    steps: int  # T
    blocks: tuple[str, ...]  # (B,) names; the last may be "(no block)"
    rows: tuple[str, ...]  # (R,)
    num_matvecs: int  # products spent
    route: str
    notes: tuple[str, ...]

    def methods(self) -> dict[str, Decrease]:
        """The decreases by what they are called in the table."""
        named = {
            "one rate": self.one_rate,
            "a rate a block": self.block_rates,
            "a rate a row": self.row_rates,
            "preconditioned": self.adam,
            "preconditioned, a rate a block": self.adam_block_rates,
        }
        return {name: found for name, found in named.items() if found is not None}

    def records(self) -> list[Record]:
        """A row a method; errors are standard errors from the batches."""
        return [
            {
                "method": name,
                "rates": len(found.rates),
                "one_step": found.one_step,
                "one_step_error": found.one_step_error,
                "ratio": found.ratio,
                "ratio_error": found.ratio_error,
                "many_steps": found.many_steps,
                "many_steps_ratio": found.many_steps_ratio,
            }
            for name, found in self.methods().items()
        ]

    def __str__(self) -> str:
        header = ["method", "rates", "decrease", "ratio"]
        if self.steps > 1:
            header += [f"{self.steps} steps", "ratio"]
        rows = [[name, *self._cells(found)] for name, found in self.methods().items()]
        reasons = [
            f"{name}: {why}"
            for name, found in self.methods().items()
            for why in dict.fromkeys([found.why, found.many_steps_why])
            if why
        ]
        lines = [
            "best decrease of the local quadratic, in the unit of the loss "
            f"(loss now {self.loss:.4g})",
            table(header, rows),
            *reasons,
            *self.notes,
        ]
        return "\n".join(lines)

    def _cells(self, found: Decrease) -> list[str]:
        cells = [
            f"{len(found.rates):,}",
            _shown(found.one_step, found.one_step_error),
            _shown(found.ratio, found.ratio_error),
        ]
        if self.steps > 1:
            cells += [f"{found.many_steps:.3g}", f"{found.many_steps_ratio:.3g}"]
        return cells


def _shown(value: float, error: float) -> str:
    return f"{value:.3g}" if not error > 0 else plus_minus(value, error)
