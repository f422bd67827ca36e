"""What is trained: budgets, batch sizes, clipping, rates, seeds. The protocol as data.

docs/evidence/protocol.md says why.
"""

from dataclasses import dataclass

from evidence.pair import BATCH_SIZE, Pair
from hessian_tools.optimizers.named import half_decades
from hessian_tools.training.loop import CLIP

OPTIMIZERS = ("sgd", "adam")
MOMENTUM = 0.9  # SGD's, and Adam's first beta
SEEDS = (0, 1, 2)
RACE = 200  # steps of the baseline that each predictor has to beat
SHORT, LONG = 300, 1000  # steps
# half-decades with which a sweep begins; it goes on beyond an end that is best
RATES = {"sgd": half_decades(-2, 0)[1:], "adam": half_decades(-3, -1)[:4]}
SMALL, LARGE = 8, 128  # the other batch sizes


@dataclass(frozen=True)
class Arm:
    """One way of training a part of the suite.

    Attributes:
        budgets: steps of a run, ascending; the rates are tuned at each.
        clip: the gradient's largest norm; None: as it is.
        refine: quarter-decades beside the best rate.
        seeds: of the runs at the best rates; the first tunes them.
    """

    name: str
    batch_size: int = BATCH_SIZE
    budgets: tuple[int, ...] = (SHORT, LONG)
    clip: float | None = CLIP
    refine: bool = True
    seeds: tuple[int, ...] = SEEDS

    @property
    def runs(self) -> int:
        """About how many whole runs an optimizer takes at one budget."""
        return 5 + len(self.seeds) if self.refine else 4 + len(self.seeds)


MAIN = Arm("main")
ARMS = {
    arm.name: arm
    for arm in (
        MAIN,
        Arm("race", budgets=(RACE,), refine=False, seeds=SEEDS[:1]),
        Arm("small-batch", batch_size=SMALL),
        Arm("large-batch", batch_size=LARGE, budgets=(SHORT,)),
        Arm("unclipped", budgets=(SHORT,), clip=None),
    )
}


def pairs_of(arm: Arm, families: dict[str, list[Pair]]) -> list[Pair]:
    """All pairs, for the main arm and the race; for the others, the first of families.

    Of every family where nothing is clipped, of every second one for the batch sizes.
    """
    if arm.batch_size == BATCH_SIZE and arm.clip is not None:
        return [pair for pairs in families.values() for pair in pairs]
    every = 1 if arm.batch_size == BATCH_SIZE else 2
    return [families[name][0] for name in sorted(families)[::every]]
