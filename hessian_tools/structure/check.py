"""Does a partition follow the Hessian's dense sub-blocks? A verdict for every tensor, and a better partition.

Adam-mini's principle (Zhang et al., arXiv 2406.16793): parameters that share a learning rate should be one dense
sub-block of the Hessian, the smallest such. Every tensor (every role of a fused query/key/value tensor, unless blocks
go across roles) is judged by itself against every way to cut it: :mod:`hessian_tools.structure.judgement` has the rules,
:mod:`hessian_tools.structure.mass` what is measured. What lies between tensors is :func:`hessian_tools.structure.coupling`'s matter;
a block over several tensors is judged in each of them.
"""

from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm

from hessian_tools.blocks.block import Block
from hessian_tools.blocks.param_groups import state_savings
from hessian_tools.blocks.partition import Partition
from hessian_tools.blocks.presets import partition
from hessian_tools.curvature.hessian import as_operator, problem_of
from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.problem.problem import Problem
from hessian_tools.structure.cuttings import CLAIMED, WHOLE, Cutting, judged_regions
from hessian_tools.structure.judgement import CONTRADICTED, FOLLOWS, Levels, judge
from hessian_tools.structure.mass import BlockMass
from hessian_tools.structure.probing import cost, measure
from hessian_tools.structure.report import CutEvidence, PartitionReport, TensorReport
from hessian_tools.structure.suggestion import composed

Measurements = dict[tuple[Any, ...], BlockMass]
EXACT_WORTH = 4
MOST_EXACT = 4096  # entries of a tensor that exact=True takes: 128 MiB, and as many products


def check_partition(
    curvature: Problem | CurvatureOperator, partition: Any = "adam_mini", *, seed: int = 0, num_probes: int = 8,
    num_blocks: int = 32, exact: bool | None = None, alpha: float = 0.05, contrast: float = 4.0, diagonal: float = 0.5,
    measured: Measurements | None = None, finished: Mapping[str, TensorReport] | None = None,
    on_tensor: Callable[[str, TensorReport], None] | None = None, progress: bool = True,
) -> PartitionReport:  # fmt: skip
    """Judges every tensor's blocks against the mass inside them, an unstructured Hessian, and every other cut.

    Args:
        partition: a Partition, or what ``ht.partition`` takes. Tensors that it leaves out are not judged.
        seed: with tensors' names the only source of randomness.
        num_probes: products with all of a tensor; at least 3.
        num_blocks: products with single blocks of each way to cut it; at least 4.
        exact: from the dense matrix of each tensor, without error. None: where that takes at most EXACT_WORTH times the
            products; True: always, up to MOST_EXACT entries; False: never.
        alpha: chance, for one tensor, that any statement its verdict rests on is wrong (Bonferroni, t-tests).
        contrast, diagonal: see :mod:`hessian_tools.structure.judgement`.
        measured: keeps the masses; with the same dict, further partitions of the same problem cost only what is new.
        finished: reports of an earlier run with the same arguments, by name: these tensors are not computed again.
        on_tensor: called with name and report as each tensor is done.
        progress: a bar on stderr, products done and left, when that is a terminal.
    Raises:
        ValueError: an argument out of range; blocks of another model; ``exact=True`` for too large a tensor.
        NumericalError: for a product with NaN or inf, naming the tensor.
    """
    _validate(num_probes, num_blocks, alpha, contrast, diagonal)
    problem = problem_of(curvature)
    blocks = _partition(problem, partition)
    hessian = as_operator(curvature)
    done, levels, regions = dict(finished or {}), Levels(alpha, contrast, diagonal), []
    with tqdm(total=planned_products(problem, blocks, num_probes, num_blocks, exact, done), unit="HVP",
              disable=None if progress else True, dynamic_ncols=True) as bar:  # fmt: skip
        for judged in judged_regions(problem.model, blocks):
            region, cuttings, claim = judged.block, judged.cuttings, judged.claim
            if region.name not in done:
                bar.set_postfix_str(region.name)
                settings: dict[str, Any] = {"num_probes": num_probes, "num_blocks": num_blocks, "seed": seed,
                            "exact": _is_exact(region, cuttings, num_probes, num_blocks, exact)}  # fmt: skip
                key = (region.name, *(way.name for way in cuttings), *settings.values())
                if (
                    measured is None or key not in measured or claim == CLAIMED
                ):  # which may be another cut each time
                    mass = measure(hessian, region, cuttings, **settings, on_products=bar.update)
                    (measured if measured is not None else {})[key] = mass
                else:
                    mass = measured[key]
                    bar.update(mass.num_matvecs)
                done[region.name] = _report(region, mass, claim, levels)
                if on_tensor is not None:
                    on_tensor(region.name, done[region.name])
            regions.append(region)
    reports = tuple(done[region.name] for region in regions)
    suggestion = composed(
        problem.model, regions, {report.name: report.suggested for report in reports}, blocks
    )
    return PartitionReport(
        reports, blocks.preset, levels, seed, sum(report.num_matvecs for report in reports), suggestion,
        state_savings(problem.model, suggestion), _notes(blocks), hessian.route,
    )  # fmt: skip


def planned_products(
    problem: Problem, blocks: Partition, num_probes: int, num_blocks: int, exact: bool | None = None,
    finished: Mapping[str, Any] | None = None,
) -> int:  # fmt: skip
    """Products that :func:`check_partition` will spend on tensors not yet ``finished``, at most."""
    return sum(
        judged.block.numel if _is_exact(judged.block, judged.cuttings, num_probes, num_blocks, exact)
        else cost(judged.cuttings, num_probes, num_blocks)
        for judged in judged_regions(problem.model, blocks) if judged.name not in (finished or {})
    )  # fmt: skip


def _report(region: Block, mass: BlockMass, claim: str, levels: Levels) -> TensorReport:
    judgements = {cut: judge(mass, cut, levels) for cut in mass.cuts}
    evidence = []
    for cut, judgement in judgements.items():
        share, excess = mass.share(cut), mass.excess(cut)
        evidence.append(CutEvidence(
            cut, mass.num_blocks[cut], share.value, share.standard_error, mass.expected(cut), excess.value,
            excess.standard_error, mass.contrast(cut), judgement.verdict, judgement.likely,
        ))  # fmt: skip
    own = judgements[claim]
    return TensorReport(
        region.name, region.parameter, region.numel, claim, own.verdict, own.reason, own.likely,
        _suggested(evidence, claim), tuple(evidence), own.tests, mass.norm, mass.exact, mass.num_matvecs,
    )  # fmt: skip


def _suggested(evidence: list[CutEvidence], claim: str) -> str:
    """A cut that follows, the claim before others; else the claim, or if contradicted what likely follows."""
    (claimed,) = (found for found in evidence if found.cut == claim)
    following = [found for found in evidence if found.verdict == FOLLOWS]
    if not following and claimed.verdict in CONTRADICTED:
        following = [found for found in evidence if found.likely == FOLLOWS]
    if not following or claimed in following:
        return claim
    return max(
        following, key=lambda found: (found.cut != WHOLE, found.excess)
    ).cut  # the whole has no excess


def _is_exact(
    region: Block, cuttings: list[Cutting], num_probes: int, num_blocks: int, exact: bool | None
) -> bool:
    if exact and region.numel > MOST_EXACT:
        raise ValueError(
            f"exact=True asks for the dense Hessian of {region.name}, {region.numel:,} entries; at most {MOST_EXACT:,} "
            "are taken: leave exact out, or the tensor"
        )
    return (
        region.numel <= EXACT_WORTH * cost(cuttings, num_probes, num_blocks)
        if exact is None
        else exact
    )


def _partition(problem: Problem, given: Any) -> Partition:
    found = given if isinstance(given, Partition) else partition(problem.model, given)
    for cut in found.cuts:
        for part in cut.parts:
            parameter = problem.parameters.get(part.parameter)
            if parameter is None or tuple(parameter.shape) != part.shape:
                raise ValueError(
                    f"partition holds {cut.name!r}, which lies in no trainable parameter of this model"
                )
    return found


def _notes(blocks: Partition) -> tuple[str, ...]:
    across = [cut.name for cut in blocks.cuts if len(cut.parameters) > 1]
    if across:
        told = f"{len(across)} cuts ({across[0]}, ...) have blocks over several tensors, which are judged in each tensor"
        return (*blocks.notes, f"{told} by itself")
    return tuple(blocks.notes)


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
