"""The verdict on a cut of one tensor: rules over significance tests.

What is tested is a :class:`hessian_tools.structure.mass.BlockMass`. Every statement is a one-sided
t-test at ``alpha`` divided by the number of tests made for the tensor (Bonferroni), in both
directions: it holds ("yes"), it does not ("no"), or neither is significant ("unclear").

No p-value is below one over the number of cuts like the one tested (of blocks of the same sizes):
chance alone picks the best of them that often, however sharp the masses are. Of a 2 x 2 tensor
three such cuts exist, so that nothing can be significant, and a tensor where that holds of all its
cuts is undecided.

- X *splits* the blocks of a coarser cut Y: its contrast within them exceeds ``contrast`` (4:
  entries inside are twice as large, rms, as those outside, or: neighbouring blocks are coupled by
  less than one half). "elements" split Y where the diagonal has more than the share ``diagonal`` of
  the mass in Y's blocks: a single entry is always a dense block, so what stands beside the diagonal
  counts by all of it together.
- X is *coupled*: its blocks are coupled to the block closest to each, wherever that stands, with
  more than 1 / ``contrast`` of the mean square within, on average and most of them
  (:mod:`hessian_tools.structure.pairs`).
- X is *supported*: it splits the finest supported cuts around it and is not coupled (the whole
  tensor is supported).
- A *beats* X, a cut of another axis: A splits the whole tensor, holds more mass at the same number
  of blocks (neighbours of the cut that has more go together), and X does not split the tensor, or
  the odds of A's share are ``contrast`` times those of X's.

The verdict is that of the first rule in ``_RULES`` whose condition holds.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import combinations

from scipy.special import stdtr

from hessian_tools.results import registered
from hessian_tools.structure.cuttings import ELEMENTS, WHOLE
from hessian_tools.structure.mass import BlockMass, Measured

FOLLOWS = "follows"
TOO_COARSE = "too coarse"
TOO_FINE = "too fine"
WRONG_AXIS = "wrong axis"
UNDECIDED = "undecided"
VERDICTS = (FOLLOWS, TOO_COARSE, TOO_FINE, WRONG_AXIS, UNDECIDED)
CONTRADICTED = (TOO_COARSE, TOO_FINE, WRONG_AXIS)

# Measured at the defaults of check_partition, (wrong, of how many):
# results/partition_error_rates/table.txt
CONTRADICTED_THOUGH_RIGHT = (1, 800)
ACCEPTED_THOUGH_WRONG = (0, 2900)
UNDECIDED_SHARE = (454, 3700)

MOST = 0.5  # of the blocks, by mass, whose coupling to another makes a cut too fine
_RESOLUTION = 1e-6  # of a share: smaller differences are rounding, and decide nothing
_ROUNDING = 0.1  # an asymmetry of this much of the norm: the products have no digits left


def error_rates() -> str:
    """How often a verdict was wrong where the planted structure was known, in words."""
    contradicted, right = CONTRADICTED_THOUGH_RIGHT
    accepted, wrong = ACCEPTED_THOUGH_WRONG
    undecided, claims = UNDECIDED_SHARE
    return (
        f"on planted Hessians of 18 kinds {contradicted} of {right:,} right claims was "
        f"contradicted, {accepted} of {wrong:,} wrong ones accepted, "
        f"{undecided / claims:.0%} left undecided "
        "(experiments/partition_error_rates.py, default settings)"
    )


class Answer(StrEnum):
    """An answer in Kleene's three-valued logic: ``&`` is and, ``|`` or, ``~`` not."""

    NO = "no"
    UNCLEAR = "unclear"
    YES = "yes"

    @property
    def _rank(self) -> int:
        return list(Answer).index(self)

    def __and__(self, other: "Answer") -> "Answer":
        return min(self, other, key=lambda answer: answer._rank)

    def __or__(self, other: "Answer") -> "Answer":
        return max(self, other, key=lambda answer: answer._rank)

    def __invert__(self) -> "Answer":
        return list(Answer)[-1 - self._rank]


@registered
@dataclass(frozen=True)
class Levels:
    """What the tests compare with."""

    alpha: float = 0.05
    contrast: float = 4.0
    diagonal: float = 0.5


@registered
@dataclass(frozen=True)
class Statement:
    """What a test says, and how surely."""

    words: str
    p_true: float  # p-value of the data if the statement did not hold
    p_false: float  # and if it did
    level: float

    @property
    def answer(self) -> Answer:
        """Whether the statement holds, at ``level``."""
        if self.p_true < self.level:
            return Answer.YES
        return Answer.NO if self.p_false < self.level else Answer.UNCLEAR


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
    level = levels.alpha / max(1, _number_of_tests(mass))
    nothing_to_judge = _obstacle(mass, level)
    if nothing_to_judge:
        return Judgement(cut, UNDECIDED, nothing_to_judge, UNDECIDED, ())
    significance = _Significance(level)
    verdict, reason = _Judge(mass, levels, significance.answer).decide(cut)
    likely, _ = _Judge(mass, levels, _answer_of_estimate).decide(cut)
    return Judgement(cut, verdict, reason, likely, tuple(significance.statements.values()))


def _obstacle(mass: BlockMass, level: float) -> str:
    """Why nothing can be said of this tensor; "" where something can."""
    if mass.norm == 0:
        return (
            "its Hessian is exactly zero on this data, so nothing couples and nothing can be told"
        )
    if mass.asymmetry > _ROUNDING:
        return (
            f"products are rounding noise (asymmetric by {mass.asymmetry:.2g} of their norm); "
            "try float64"
        )
    least_p = _least_p(mass)
    if least_p >= level:
        return (
            f"its {mass.size} entries are too few to judge: there are {1 / least_p:.0f} ways to "
            f"cut them alike, so that chance cannot be excluded at the level {level:.2g} of a test"
        )
    return ""


def _least_p(mass: BlockMass) -> float:
    """The least p-value that any cut of the tensor could reach; 0 where there is none to test.

    Single entries count where they are the only other cut: their blocks cannot be cut otherwise.
    """
    finer = [cut for cut in mass.cuts if cut not in (WHOLE, ELEMENTS)]
    tested = finer or [cut for cut in mass.cuts if cut == ELEMENTS]
    return min((mass.least_p(cut) for cut in tested), default=0.0)


def _number_of_tests(mass: BlockMass) -> int:
    """One for each cut within a coarser one, two for each cut with blocks that may be coupled, and
    two for each pair of cuts of different axes."""
    nested = sum(len(coarser) for coarser in mass.inside.values())
    pairs = combinations(mass.cuts, 2)
    crossing = sum(_is_other_axis(mass, *pair) for pair in pairs)
    return nested + 2 * (crossing + len(mass.pairs))


def _is_other_axis(mass: BlockMass, one: str, other: str) -> bool:
    """Whether neither of two different cuts refines the other."""
    return one not in (other, *mass.inside[other]) and other not in mass.inside[one]


class _Significance:
    """Answers statements by t-tests at one level, and keeps the tests by their words."""

    def __init__(self, level: float) -> None:
        self.level = level
        self.statements: dict[str, Statement] = {}

    def answer(self, words: str, gap: Measured, least_p: float) -> Answer:
        """Whether ``gap``, what ``words`` say is positive, is; no p-value is below ``least_p``."""
        if words not in self.statements:
            self.statements[words] = self._tested(words, gap, least_p)
        return self.statements[words].answer

    def _tested(self, words: str, gap: Measured, least_p: float) -> Statement:
        if math.isnan(gap.value):  # there is no mass to compare
            return Statement(words, 0.5, 0.5, self.level)
        deviations = gap.value / max(gap.standard_error, _RESOLUTION)
        freedom = min(gap.freedom, 1e9)  # stdtr gives nan at infinity
        p_true = max(least_p, float(stdtr(freedom, -deviations)))
        p_false = max(least_p, float(stdtr(freedom, deviations)))
        return Statement(words, p_true, p_false, self.level)


def _answer_of_estimate(words: str, gap: Measured, least_p: float) -> Answer:
    """The answer that takes the estimate for the truth."""
    return Answer.YES if gap.value > _RESOLUTION else Answer.NO


@dataclass(frozen=True)
class _Findings:
    """The answers that the verdict on one cut hangs on."""

    supported: Answer
    objection: str  # why the cut is not supported, or why that is unclear; "" if it is
    finer: Mapping[str, Answer]  # cut that refines it -> whether it splits its blocks
    rivals: Mapping[str, Answer]  # cut of another axis -> whether it beats this one
    supported_splitting: Sequence[str]  # the finer cuts that split it and are supported themselves

    @property
    def splitting(self) -> list[str]:
        return _those(self.finer, Answer.YES)

    @property
    def winning(self) -> list[str]:
        return _those(self.rivals, Answer.YES)

    @property
    def open_questions(self) -> list[str]:
        """What keeps the cut from following, in words."""
        unclear = _those(self.finer, Answer.UNCLEAR)
        questions = [f"whether {cut} split its blocks" for cut in unclear]
        if self.supported is not Answer.YES:
            return [self.objection, *questions]
        rivals = _those(self.rivals, Answer.UNCLEAR)
        return questions + [f"whether {cut} hold more" for cut in rivals]


# (verdict, condition), read from the top: the first whose condition holds is the verdict.
_RULES: tuple[tuple[str, Callable[[_Findings], bool]], ...] = (
    # a supported finer cut splits the blocks
    (TOO_COARSE, lambda f: bool(f.supported_splitting)),
    # the cut is not supported, and a cut of another axis beats it, or none does
    (WRONG_AXIS, lambda f: f.supported is Answer.NO and bool(f.winning)),
    (TOO_FINE, lambda f: f.supported is Answer.NO),
    # any finer cut splits the blocks of a supported cut
    (TOO_COARSE, lambda f: f.supported is Answer.YES and bool(f.splitting)),
    # a cut of another axis beats one that is, or may be, supported
    (WRONG_AXIS, lambda f: bool(f.winning)),
    # the cut is supported, and surely nothing splits its blocks or beats it
    (FOLLOWS, lambda f: not f.open_questions),
    (UNDECIDED, lambda f: True),
)


class _Judge:
    """Applies the rules to one tensor; ``answer`` decides a statement from its words and gap."""

    def __init__(
        self, mass: BlockMass, levels: Levels, answer: Callable[[str, Measured, float], Answer]
    ) -> None:
        self.mass = mass
        self.levels = levels
        self.answer = answer
        self.known_support: dict[str, tuple[Answer, str]] = {WHOLE: (Answer.YES, "")}

    def decide(self, cut: str) -> tuple[str, str]:
        """The verdict on ``cut`` and its reason."""
        findings = self.findings(cut)
        verdict = next(verdict for verdict, holds in _RULES if holds(findings))
        return verdict, self.reason(verdict, cut, findings)

    def findings(self, cut: str) -> _Findings:
        mass = self.mass
        supported, objection = self.supported(cut)
        refining = [name for name in mass.cuts if cut in mass.inside[name]]
        finer = {name: self.splits(name, cut) for name in refining}
        others = [name for name in mass.cuts if _is_other_axis(mass, name, cut)]
        rivals = {name: self.beats(name, cut) for name in others}
        splitting = _those(finer, Answer.YES)
        support = {name: self.supported(name)[0] for name in splitting}
        return _Findings(supported, objection, finer, rivals, _those(support, Answer.YES))

    def supported(self, cut: str) -> tuple[Answer, str]:
        """Whether ``cut`` is supported, and in words what speaks against it."""
        if cut not in self.known_support:
            self.known_support[cut] = self._supported(cut)
        return self.known_support[cut]

    def _supported(self, cut: str) -> tuple[Answer, str]:
        coupled = self.coupled(cut)
        if coupled is Answer.YES:
            return Answer.NO, self._coupling_of(cut)
        around = {coarser: self.supported(coarser)[0] for coarser in self.mass.inside[cut]}
        finest = self._finest(_those(around, Answer.YES))
        # A cut whose support is unclear may be the finest supported one around this.
        asked = [*finest, *_those(around, Answer.UNCLEAR)]
        splits = {coarser: self.splits(cut, coarser) for coarser in asked}
        for coarser in finest:
            if splits[coarser] is Answer.NO:
                held = self._held(cut, coarser)
                return Answer.NO, f"{held}: neighbouring blocks are strongly coupled"
        for coarser in asked:
            if splits[coarser] is not Answer.YES:
                return Answer.UNCLEAR, f"whether {cut} split {_blocks_of(coarser)}"
        if coupled is Answer.UNCLEAR:
            return Answer.UNCLEAR, f"whether blocks of {cut} are coupled to their closest"
        return Answer.YES, ""

    def _coupling_of(self, cut: str) -> str:
        level = 1 / self.levels.contrast
        coupling = self.mass.coupling(cut).value
        share = self.mass.close_share(cut, self.levels.contrast).value
        return (
            f"blocks of {cut} are coupled to the block closest to each with {coupling:.2g} times "
            f"the mean square within, {share:.0%} of them with more than {level:.2g}"
        )

    def _finest(self, cuts: Sequence[str]) -> list[str]:
        """Those of ``cuts`` that no other of them refines."""
        coarser = {name for cut in cuts for name in self.mass.inside[cut]}
        return [cut for cut in cuts if cut not in coarser]

    def splits(self, finer: str, coarser: str) -> Answer:
        gap = self.mass.above(finer, coarser, self.levels.contrast, self.levels.diagonal)
        least_p = self.mass.least_p(finer, coarser)
        return self.answer(f"{finer} split {_blocks_of(coarser)}", gap, least_p)

    def coupled(self, cut: str) -> Answer:
        """Whether ``cut``'s blocks are coupled to others nearly as strongly as within."""
        if cut in (WHOLE, ELEMENTS):
            return Answer.NO
        least_p = self.mass.least_p(cut)
        coupling = _less(self.mass.coupling(cut), 1 / self.levels.contrast)
        share = _less(self.mass.close_share(cut, self.levels.contrast), MOST)
        words = f"blocks of {cut} are coupled to their closest"
        on_average = self.answer(words, coupling, least_p)
        return on_average & self.answer(f"most {words}", share, least_p)

    def beats(self, rival: str, cut: str) -> Answer:
        if {WHOLE, ELEMENTS} & {cut, rival}:
            return Answer.NO
        one, other = self.mass.matched(rival, cut)
        splits = self.splits(rival, WHOLE)
        least_p = max(self.mass.least_p(one), self.mass.least_p(other))
        lead = self.mass.lead(rival, cut)
        holds_more = self.answer(f"{one} hold more than {other}", lead, least_p)
        if splits & holds_more is Answer.NO:
            return Answer.NO
        contrast = self.levels.contrast
        lead = self.mass.lead(rival, cut, contrast)
        is_poor = ~self.splits(cut, WHOLE)
        words = f"{one} have {contrast:g} times the odds of {other}"
        is_far = self.answer(words, lead, least_p)
        return splits & holds_more & (is_poor | is_far)

    def reason(self, verdict: str, cut: str, findings: _Findings) -> str:
        """What a verdict rests on, in words."""
        if verdict == TOO_COARSE:
            splitting = findings.supported_splitting or findings.splitting
            best = max(splitting, key=lambda finer: self.mass.excess(finer, cut).value)
            return self._held(best, cut)
        if verdict == WRONG_AXIS:
            return self._held_by_rival(findings.winning, cut)
        if verdict == TOO_FINE:
            doubtful = _those(findings.rivals, Answer.UNCLEAR)
            doubts = [f"; whether {rival} hold more is not significant" for rival in doubtful]
            return "".join([findings.objection, *doubts])
        if verdict == UNDECIDED:
            questions = "; ".join(findings.open_questions)
            return f"not significant: {questions}; more blocks and probes would tell"
        if cut == WHOLE:
            return "no finer cut splits it"
        return f"{self._held(cut, WHOLE)}; no finer cut splits them"

    def _held_by_rival(self, winning: Sequence[str], cut: str) -> str:
        best = max(winning, key=lambda rival: self.mass.lead(rival, cut).value)
        one, other = self.mass.matched(best, cut)
        held = self.mass.share(one).value
        held_by_cut = self.mass.share(other).value
        return f"{one} hold {held:.0%} of the mass, {other} {held_by_cut:.0%}"

    def _held(self, finer: str, coarser: str) -> str:
        share = self.mass.share(finer, coarser).value
        expected = self.mass.expected(finer, coarser)
        return (
            f"{finer} hold {share:.1%} of the mass in {_blocks_of(coarser)}, "
            f"{expected:.1%} expected without structure"
        )


def _less(measured: Measured, level: float) -> Measured:
    return replace(measured, value=measured.value - level)


def _those(answers: Mapping[str, Answer], wanted: Answer) -> list[str]:
    return [name for name, answer in answers.items() if answer is wanted]


def _blocks_of(cut: str) -> str:
    return "the tensor" if cut == WHOLE else f"the blocks of {cut}"
