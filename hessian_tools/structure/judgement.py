"""The verdict on a cut of one tensor: rules over tests of significance on :class:`hessian_tools.structure.mass.BlockMass`.

Every statement is a one-sided t-test at ``alpha`` divided by the number of tests made for the tensor (Bonferroni), in
both directions: it holds ("yes"), it does not ("no"), or neither is significant ("unclear").

- X *splits* the blocks of a coarser cut Y: its contrast within them exceeds ``contrast`` (4: entries inside are twice
  as large, rms, as those outside, or: neighbouring blocks are coupled by less than one half). "elements" split Y where
  the diagonal has more than the share ``diagonal`` of the mass in Y's blocks: a single entry is always a dense block,
  so what stands beside the diagonal counts by all of it together.
- X is *supported*: it splits the finest supported cuts around it (the whole tensor is supported).
- A *beats* X, a cut of another axis: A splits the whole tensor, holds more mass at the same number of blocks
  (neighbours of the cut that has more go together), and X does not split the tensor, or the odds of A's share are
  ``contrast`` times those of X's.

The verdict is the first of these that holds: ``too coarse`` (a supported finer cut splits X's blocks), ``wrong axis``
(X is not supported, and is beaten), ``too fine`` (X is not supported), ``too coarse`` (X is supported and any finer cut
splits its blocks), ``wrong axis`` (X is beaten), ``follows`` (X is supported, no finer cut splits its blocks, nothing
beats it). It is ``undecided`` where that hangs on an unclear test.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtr

from hessian_tools.structure.mass import ELEMENTS, WHOLE, BlockMass, Measured

FOLLOWS, TOO_COARSE, TOO_FINE, WRONG_AXIS, UNDECIDED = (
    "follows",
    "too coarse",
    "too fine",
    "wrong axis",
    "undecided",
)
VERDICTS = (FOLLOWS, TOO_COARSE, TOO_FINE, WRONG_AXIS, UNDECIDED)
CONTRADICTED = (TOO_COARSE, TOO_FINE, WRONG_AXIS)
# Measured, results/partition_error_rates/table.txt: (wrong, of how many) at the defaults of check_partition
CONTRADICTED_THOUGH_RIGHT = (0, 1900)
ACCEPTED_THOUGH_WRONG = (0, 5700)
TAKEN_FOR_ANOTHER_WRONG = (170, 5700)
_RESOLUTION = 1e-6  # of a share: smaller differences are rounding, and decide nothing
_ROUNDING = 0.1  # an asymmetry of this much of the norm: the products have no digits left


def error_rates() -> str:
    """What is known of how often a verdict is wrong, in words."""
    (a, right), (b, wrong), (c, _) = (
        CONTRADICTED_THOUGH_RIGHT,
        ACCEPTED_THOUGH_WRONG,
        TAKEN_FOR_ANOTHER_WRONG,
    )
    return (
        f"on planted Hessians {a} of {right:,} right claims were contradicted, {b} of {wrong:,} wrong ones accepted, "
        f"{c} taken for another kind of wrong (experiments/partition_error_rates.py, default settings)"
    )


@dataclass(frozen=True)
class Levels:
    """What the tests compare with."""

    alpha: float = 0.05
    contrast: float = 4.0
    diagonal: float = 0.5


@dataclass(frozen=True)
class Statement:
    """What a test says, and how surely."""

    words: str
    p_true: float  # p-value of the data if the statement did not hold
    p_false: float  # and if it did
    level: float

    @property
    def answer(self) -> str:
        """ "yes", "no" or "unclear"."""
        return (
            "yes" if self.p_true < self.level else "no" if self.p_false < self.level else "unclear"
        )


@dataclass(frozen=True)
class Judgement:
    """The verdict on one cut."""

    cut: str
    verdict: str
    reason: str
    likely: str  # the same by the estimates alone, never undecided unless nothing can be said
    tests: tuple[Statement, ...]  # those it rests on


def judge(mass: BlockMass, cut: str, levels: Levels) -> Judgement:
    """The verdict on ``cut``, one of ``mass.cuts``."""
    if mass.norm == 0:
        reason = (
            "its Hessian is exactly zero on this data, so nothing couples and nothing can be told"
        )
        return Judgement(cut, UNDECIDED, reason, UNDECIDED, ())
    if mass.asymmetry > _ROUNDING:
        reason = f"products are rounding noise (asymmetric by {mass.asymmetry:.2g} of their norm); try float64"
        return Judgement(cut, UNDECIDED, reason, UNDECIDED, ())
    court = _Court(mass, levels)
    verdict, reason = court.decided(cut)
    sure = _Court(mass, levels, certain=True)
    return Judgement(cut, verdict, reason, sure.decided(cut)[0], tuple(court.tests.values()))


class _Court:
    """The rules; ``certain`` takes estimates for the truth."""

    def __init__(self, mass: BlockMass, levels: Levels, certain: bool = False) -> None:
        self.mass, self.levels, self.certain = mass, levels, certain
        self.tests: dict[str, Statement] = {}
        finer = sum(len(coarser) for coarser in mass.inside.values())
        axes = len(
            [
                1
                for one in mass.cuts
                for other in mass.cuts
                if one < other and self._is_other_axis(one, other)
            ]
        )
        self.level = levels.alpha / max(1, finer + 2 * axes)
        self.known: dict[str, tuple[str, str]] = {}

    def decided(self, cut: str) -> tuple[str, str]:
        supported, words = self.supported(cut)
        finer = {f: self.splits(f, cut) for f in self.mass.cuts if cut in self.mass.inside[f]}
        rivals = {r: self.beats(r, cut) for r in self.mass.cuts if self._is_other_axis(r, cut)}
        splitting, winning = _those(finer, "yes"), _those(rivals, "yes")
        if right := [f for f in splitting if self.supported(f)[0] == "yes"]:
            return TOO_COARSE, self._inside(right, cut)
        if supported == "no" and winning:
            return WRONG_AXIS, self._rival(winning, cut)
        if supported == "no":
            doubtful = "".join(
                f"; whether {r} hold more is not significant" for r in _those(rivals, "unclear")
            )
            return TOO_FINE, f"{words}{doubtful}"
        if splitting and supported == "yes":
            return TOO_COARSE, self._inside(splitting, cut)
        if winning:
            return WRONG_AXIS, self._rival(winning, cut)
        unclear = [f"whether {f} split its blocks" for f in _those(finer, "unclear")]
        unclear += (
            [f"whether {r} hold more" for r in _those(rivals, "unclear")]
            if supported == "yes"
            else []
        )
        if supported == "yes" and not unclear:
            return FOLLOWS, self._follows(cut)
        unclear = ([words] if supported != "yes" else []) + unclear
        return (
            UNDECIDED,
            f"not significant: {'; '.join(unclear)}; more blocks and probes would tell",
        )

    def supported(self, cut: str) -> tuple[str, str]:
        """The answer, and what it rests on in words."""
        if cut not in self.known:
            self.known[cut] = ("yes", "") if cut == WHOLE else self._supported(cut)
        return self.known[cut]

    def _supported(self, cut: str) -> tuple[str, str]:
        around = {y: self.supported(y)[0] for y in self.mass.inside[cut]}
        candidates = [y for y, answer in around.items() if answer != "no"]
        sure = [y for y in candidates if around[y] == "yes"]
        finest = [y for y in sure if not any(y in self.mass.inside[z] for z in sure)]
        asked = finest + [y for y in candidates if y not in sure]
        answers = {y: self.splits(cut, y) for y in asked}
        for y in finest:
            if answers[y] == "no":
                return "no", self._coupled(cut, y)
        doubtful = [y for y, answer in answers.items() if answer != "yes"]
        if doubtful:
            return "unclear", f"whether {cut} split {_blocks_of(doubtful[0])}"
        return "yes", ""

    def splits(self, finer: str, coarser: str) -> str:
        gap = self.mass.above(finer, coarser, self.levels.contrast, self.levels.diagonal)
        return self._test(f"{finer} split {_blocks_of(coarser)}", gap)

    def beats(self, rival: str, cut: str) -> str:
        if cut in (WHOLE, ELEMENTS) or rival in (WHOLE, ELEMENTS):
            return "no"
        one, other = self.mass.matched(rival, cut)
        rules = [
            self.splits(rival, WHOLE),
            self._test(f"{one} hold more than {other}", self.mass.lead(rival, cut)),
        ]
        if "no" in rules:
            return "no"
        odds = f"{one} have {self.levels.contrast:g} times the odds of {other}"
        poor = {"yes": "no", "no": "yes"}.get(self.splits(cut, WHOLE), "unclear")
        far = self._test(odds, self.mass.lead(rival, cut, self.levels.contrast))
        either = "yes" if "yes" in (poor, far) else "no" if poor == far == "no" else "unclear"
        return "no" if either == "no" else "yes" if {*rules, either} == {"yes"} else "unclear"

    def _test(self, statement: str, gap: Measured) -> str:
        if self.certain:
            return "yes" if gap.value > _RESOLUTION else "no"
        if statement not in self.tests:
            if gap.value != gap.value:  # no mass there
                below = above = 0.5
            else:
                deviations = gap.value / max(gap.standard_error, _RESOLUTION)
                above, below = (
                    float(stdtr(min(gap.freedom, 1e9), sign * deviations)) for sign in (-1, 1)
                )
            self.tests[statement] = Statement(statement, above, below, self.level)
        return self.tests[statement].answer

    def _is_other_axis(self, one: str, other: str) -> bool:
        return (
            one != other
            and one not in self.mass.inside[other]
            and other not in self.mass.inside[one]
        )

    def _coupled(self, cut: str, coarser: str) -> str:
        return f"{self._held(cut, coarser)}: neighbouring blocks are strongly coupled"

    def _inside(self, splitting: Sequence[str], cut: str) -> str:
        best = max(splitting, key=lambda f: self.mass.excess(f, cut).value)
        return self._held(best, cut)

    def _rival(self, winning: Sequence[str], cut: str) -> str:
        best = max(winning, key=lambda r: self.mass.lead(r, cut).value)
        one, other = self.mass.matched(best, cut)
        return f"{one} hold {self.mass.share(one).value:.0%} of the mass, {other} {self.mass.share(other).value:.0%}"

    def _follows(self, cut: str) -> str:
        if cut == WHOLE:
            return "no finer cut splits it"
        return f"{self._held(cut, WHOLE)}; no finer cut splits them"

    def _held(self, finer: str, coarser: str) -> str:
        share, expected = self.mass.share(finer, coarser).value, self.mass.expected(finer, coarser)
        return f"{finer} hold {share:.1%} of the mass in {_blocks_of(coarser)}, {expected:.1%} expected without structure"


def _those(answers: dict[str, str], wanted: str) -> list[str]:
    return [name for name, answer in answers.items() if answer == wanted]


def _blocks_of(cut: str) -> str:
    return "the tensor" if cut == WHOLE else f"the blocks of {cut}"
