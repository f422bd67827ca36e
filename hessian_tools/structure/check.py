"""Does a partition follow the Hessian's dense sub-blocks? A verdict for every tensor, and a better
partition.

Adam-mini's principle (Zhang et al., arXiv 2406.16793): parameters that share a learning rate should
be one dense sub-block of the Hessian, the smallest such. Every tensor (every role of a fused
query/key/value tensor, unless blocks go across roles) is judged by itself against every way to cut
it: :mod:`hessian_tools.structure.judgement` has the rules, :mod:`hessian_tools.structure.mass` what
is measured. What lies between tensors is measured by :mod:`hessian_tools.structure.coupling`; a
block over several tensors is judged in each of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from hessian_tools.blocks.ownership import check_trained
from hessian_tools.blocks.param_groups import state_savings
from hessian_tools.blocks.partition import Partition
from hessian_tools.blocks.presets import partition as partition_of
from hessian_tools.blocks.specification import Spec
from hessian_tools.curvature.hessian import as_operator, problem_of
from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.curvature.progress import product_bar
from hessian_tools.problem.problem import Problem
from hessian_tools.structure.cuttings import (
    CLAIMED,
    WHOLE,
    JudgedRegion,
    composed,
    judged_regions,
)
from hessian_tools.structure.judgement import CONTRADICTED, FOLLOWS, Judgement, Levels, judge
from hessian_tools.structure.mass import BlockMass
from hessian_tools.structure.probing import cost, measure
from hessian_tools.structure.report import CutEvidence, PartitionReport, TensorReport

EXACT_WORTH = 4
MOST_EXACT = 4096  # entries of a tensor that exact=True takes: 128 MiB, and as many products

Measurements = dict[tuple[object, ...], BlockMass]  # by region, cuts and settings


def check_partition(
    curvature: Problem | CurvatureOperator,
    partition: Partition | str | Spec = "adam_mini",
    *,
    seed: int = 0,
    num_probes: int = 8,
    num_blocks: int = 32,
    exact: bool | None = None,
    alpha: float = 0.05,
    contrast: float = 4.0,
    diagonal: float = 0.5,
    measured: Measurements | None = None,
    finished: Mapping[str, TensorReport] | None = None,
    on_tensor: Callable[[str, TensorReport], None] | None = None,
    progress: bool = True,
) -> PartitionReport:
    """Judges every tensor's blocks by the mass inside them.

    It is held against that of a Hessian without structure, and of every other way to cut.

    Args:
        curvature: a Problem (its Hessian) or any curvature operator.
        partition: a Partition, or what ``ht.partition`` takes. Tensors that it leaves out are not
            judged.
        seed: with tensors' names the only source of randomness.
        num_probes: products with all of a tensor; at least 3.
        num_blocks: products with single blocks of each way to cut it; at least 4.
        exact: from the dense matrix of each tensor, without error. None: where that takes at most
            EXACT_WORTH times the products; True: always, up to MOST_EXACT entries; False: never.
        alpha: chance, for one tensor, that any statement its verdict rests on is wrong (Bonferroni,
            t-tests).
        contrast, diagonal: see :mod:`hessian_tools.structure.judgement`.
        measured: keeps the masses; with the same dict, further partitions of the same problem cost
            only what is new.
        finished: reports of an earlier run with the same arguments, by name: these tensors are not
            computed again.
        on_tensor: called with name and report as each tensor is done.
        progress: a bar on stderr, products done and left, when that is a terminal.
    Raises:
        ValueError: an argument out of range; blocks of another model; ``exact=True`` for too large
            a tensor.
        NumericalError: for a product with NaN or inf, naming the tensor.
    """
    _validate(num_probes, num_blocks, alpha, contrast, diagonal)
    problem = problem_of(curvature)
    blocks = _partition(problem, partition)
    operator = as_operator(curvature)
    levels = Levels(alpha, contrast, diagonal)
    effort = _Effort(num_probes, num_blocks, exact)
    known = {} if measured is None else measured
    done = dict(finished or {})
    total = planned_products(problem, blocks, num_probes, num_blocks, exact, done)
    regions = []
    with product_bar(total, shown=progress) as bar:
        measuring = _Measuring(operator, effort, seed, known, bar)
        for region in judged_regions(problem.model, blocks):
            regions.append(region.block)
            if region.name in done:
                continue
            bar.set_postfix_str(region.name)
            report = _report(region, measuring.mass(region), levels)
            done[region.name] = report
            if on_tensor is not None:
                on_tensor(region.name, report)
    reports = tuple(done[region.name] for region in regions)
    ways = {report.name: report.suggested for report in reports}
    suggestion = composed(problem.model, regions, ways, blocks)
    return PartitionReport(
        tensors=reports,
        preset=blocks.preset,
        levels=levels,
        seed=seed,
        num_matvecs=sum(report.num_matvecs for report in reports),
        suggestion=suggestion,
        savings=state_savings(problem.model, suggestion),
        notes=_notes(blocks),
        route=operator.route,
        curvature=operator.title,
    )


def planned_products(
    problem: Problem,
    blocks: Partition,
    num_probes: int,
    num_blocks: int,
    exact: bool | None = None,
    finished: Mapping[str, TensorReport] | None = None,
) -> int:
    """Products that :func:`check_partition` will spend, at most.

    Tensors that are ``finished`` cost none.
    """
    effort = _Effort(num_probes, num_blocks, exact)
    done = finished or {}
    regions = judged_regions(problem.model, blocks)
    return sum(effort.products(region) for region in regions if region.name not in done)


@dataclass(frozen=True)
class _Effort:
    """How much is spent on a tensor."""

    num_probes: int
    num_blocks: int
    exact: bool | None

    def is_exact(self, region: JudgedRegion) -> bool:
        """Whether the dense matrix is taken. Raises ValueError where it is too large."""
        size = region.block.numel
        if self.exact and size > MOST_EXACT:
            raise ValueError(
                f"exact=True asks for the dense Hessian of {region.name}, {size:,} entries; at "
                f"most {MOST_EXACT:,} are taken: leave exact out, or the tensor"
            )
        if self.exact is None:
            return size <= EXACT_WORTH * self._probes(region)
        return self.exact

    def products(self, region: JudgedRegion) -> int:
        """At most."""
        return region.block.numel if self.is_exact(region) else self._probes(region)

    def _probes(self, region: JudgedRegion) -> int:
        return cost(region.cuttings, self.num_probes, self.num_blocks)


@dataclass(frozen=True)
class _Measuring:
    """Measures regions, or finds their masses in ``known``, which keeps them."""

    operator: CurvatureOperator
    effort: _Effort
    seed: int
    known: Measurements
    bar: tqdm

    def mass(self, region: JudgedRegion) -> BlockMass:
        exact = self.effort.is_exact(region)
        cuts = (way.name for way in region.cuttings)
        key = (region.name, *cuts, self.effort.num_probes, self.effort.num_blocks, self.seed, exact)
        # Of one name, a claimed cut may be another each time.
        if key in self.known and region.claim != CLAIMED:
            self.bar.update(self.known[key].num_matvecs)
            return self.known[key]
        self.known[key] = measure(
            self.operator,
            region.block,
            region.cuttings,
            num_probes=self.effort.num_probes,
            num_blocks=self.effort.num_blocks,
            seed=self.seed,
            exact=exact,
            on_products=self.bar.update,
        )
        return self.known[key]


def _report(region: JudgedRegion, mass: BlockMass, levels: Levels) -> TensorReport:
    judgements = {cut: judge(mass, cut, levels) for cut in mass.cuts}
    evidence = tuple(_evidence(mass, judgement) for judgement in judgements.values())
    claimed = judgements[region.claim]
    return TensorReport(
        name=region.name,
        parameter=region.block.parameter,
        size=region.block.numel,
        claim=region.claim,
        verdict=claimed.verdict,
        reason=claimed.reason,
        likely=claimed.likely,
        suggested=_suggested(evidence, region.claim),
        evidence=evidence,
        tests=claimed.tests,
        norm=mass.norm,
        exact=mass.exact,
        num_matvecs=mass.num_matvecs,
    )


def _evidence(mass: BlockMass, judgement: Judgement) -> CutEvidence:
    cut = judgement.cut
    share = mass.share(cut)
    excess = mass.excess(cut)
    return CutEvidence(
        cut=cut,
        num_blocks=mass.num_blocks[cut],
        share=share.value,
        share_error=share.standard_error,
        expected=mass.expected(cut),
        excess=excess.value,
        excess_error=excess.standard_error,
        contrast=mass.contrast(cut),
        verdict=judgement.verdict,
        likely=judgement.likely,
    )


def _suggested(evidence: Sequence[CutEvidence], claim: str) -> str:
    """A cut that follows, the claim before others.

    Where none does, it is the claim, or if that is contradicted a cut that likely follows.
    """
    (claimed,) = (cut for cut in evidence if cut.cut == claim)
    following = [cut for cut in evidence if cut.verdict == FOLLOWS]
    if not following and claimed.verdict in CONTRADICTED:
        following = [cut for cut in evidence if cut.likely == FOLLOWS]
    if not following or claimed in following:
        return claim
    # The whole tensor has no excess.
    return max(following, key=lambda cut: (cut.cut != WHOLE, cut.excess)).cut


def _partition(problem: Problem, given: Partition | str | Spec) -> Partition:
    blocks = given if isinstance(given, Partition) else partition_of(problem.model, given)
    check_trained(blocks.cuts, problem.parameters, "partition")
    return blocks


def _notes(blocks: Partition) -> tuple[str, ...]:
    across = [cut.name for cut in blocks.cuts if len(cut.parameters) > 1]
    if not across:
        return tuple(blocks.notes)
    note = (
        f"{len(across)} cuts ({across[0]}, ...) have blocks over several tensors, which are judged "
        "in each tensor by itself"
    )
    return (*blocks.notes, note)


def _validate(
    num_probes: int, num_blocks: int, alpha: float, contrast: float, diagonal: float
) -> None:
    for name, value, least in (("num_probes", num_probes, 3), ("num_blocks", num_blocks, 4)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}; it must be an integer of at least {least}")
    for name, level in (("alpha", alpha), ("diagonal", diagonal)):
        if not 0 < level < 1:
            raise ValueError(f"{name} is {level!r}; it must lie between 0 and 1")
    if not contrast > 1:
        raise ValueError(
            f"contrast is {contrast!r}; it must exceed 1, which is no structure at all"
        )
