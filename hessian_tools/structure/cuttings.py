"""Ways to cut a region (a tensor, or a role of a fused one) into blocks, and which lies in which.

Also the partition that is made of the ways that suit each region. Ways are the names of
:func:`hessian_tools.blocks.presets.alternatives`; where a tensor is judged by roles, a way means
that role alone.

Letters: n entries of the region, B blocks of a cut.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, combinations

import numpy as np
import torch
from scipy.special import gammaln
from torch import Tensor, nn

from hessian_tools.blocks.block import Block, Cut, Part
from hessian_tools.blocks.kinds import Site
from hessian_tools.blocks.partition import Partition
from hessian_tools.blocks.specification import SEMANTIC
from hessian_tools.blocks.survey import Survey

WHOLE = "whole"
ELEMENTS = "elements"
CLAIMED = "claimed"  # the name of a claimed cut that is none of the alternatives
_COUNTERS = {"whole": "", "heads": "head", "rows": "row"}  # of the ways to cut along a role's axis


@dataclass(frozen=True, eq=False)
class Cutting:
    """One way to cut a region of n entries."""

    name: str
    labels: Tensor = field(repr=False)  # (n,) int64, the number of each entry's block
    num_blocks: int

    @property
    def is_trivial(self) -> bool:
        """Whether it is the whole region or its single entries, which need no labels."""
        return self.name in (WHOLE, ELEMENTS)

    def is_inside(self, other: "Cutting") -> bool:
        """Whether each of its blocks lies in one block of ``other``."""
        low = torch.full((self.num_blocks,), other.num_blocks)
        high = torch.full((self.num_blocks,), -1)
        low.scatter_reduce_(0, self.labels, other.labels, "amin")
        high.scatter_reduce_(0, self.labels, other.labels, "amax")
        return bool((low >= high).all())

    def refines(self, coarser: "Cutting") -> bool:
        """Whether it cuts the blocks of ``coarser``, another cut, into smaller ones."""
        if self.is_trivial or coarser.is_trivial:
            return self.name == ELEMENTS or coarser.name == WHOLE
        return self.num_blocks > coarser.num_blocks and self.is_inside(coarser)

    def grouped(self, num_blocks: int) -> "Cutting":
        """Runs of neighbouring blocks together, as even as can be."""
        labels = torch.div(self.labels * num_blocks, self.num_blocks, rounding_mode="floor")
        return Cutting(grouped(self.name, num_blocks), labels, num_blocks)


def grouped(name: str, num_blocks: int) -> str:
    """The name of a cut whose neighbours are put together."""
    return f"{name}, in {num_blocks} groups"


def cutting(name: str, cuts: Sequence[Cut], region: Block) -> Cutting | None:
    """What ``cuts`` make of ``region``; None where they hold nothing of it.

    Entries that they leave out are one block, the first.
    """
    (part,) = region.as_cut().parts
    owner = torch.full(part.shape, -1)
    count = 0
    for cut in cuts:
        for piece in cut.parts:
            if piece.parameter == part.parameter:
                numbers = torch.arange(count, count + piece.num_blocks)[:, None]
                piece.place(numbers.expand(-1, piece.block_size), owner)
        count += cut.num_blocks
    labels = region.select(owner).reshape(-1) + 1
    used = torch.bincount(labels) > 0
    if not bool(used[1:].any()):
        return None
    numbers = used.cumsum(0) - 1
    return Cutting(name, numbers[labels], int(used.sum()))


@dataclass(frozen=True, eq=False)
class Nesting:
    """The cuts of one region, by which of them lie within which.

    ``cuttings`` are "whole", "elements" (of a region of more than one entry) and others, no two
    alike.
    """

    cuttings: Sequence[Cutting]

    @cached_property
    def others(self) -> list[Cutting]:
        """The cuts between the whole and single entries."""
        return [cut for cut in self.cuttings if not cut.is_trivial]

    @cached_property
    def inside(self) -> dict[str, tuple[str, ...]]:
        """Cut -> the coarser cuts that it refines."""
        inside = {}
        for cut in self.cuttings:
            coarser = [other for other in self.cuttings if other is not cut and cut.refines(other)]
            inside[cut.name] = tuple(other.name for other in coarser)
        return inside

    @property
    def pairs(self) -> list[tuple[Cutting, Cutting]]:
        """(finer, coarser) of all cuts of which one refines the other."""
        return [
            (finer, coarser)
            for finer in self.cuttings
            for coarser in self.cuttings
            if coarser.name in self.inside[finer.name]
        ]

    @cached_property
    def with_groups(self) -> list[Cutting]:
        """The cuts, then those in groups of neighbours.

        Where two cuts follow different axes, the one with more blocks is grouped to the number of
        the other's, so that the two can be compared.
        """
        groups: dict[str, Cutting] = {}
        for pair in combinations(self.others, 2):
            fewer, more = sorted(pair, key=lambda cut: cut.num_blocks)
            is_nested = fewer.name in self.inside[more.name]
            if more.num_blocks > fewer.num_blocks > 1 and not is_nested:
                group = more.grouped(fewer.num_blocks)
                groups[group.name] = group
        return [*self.cuttings, *groups.values()]

    @cached_property
    def bases(self) -> list[Cutting]:
        """The finest cuts above single entries: products with one of their blocks measure it and
        all that is around it."""
        inside = [self.inside[cut.name] for cut in self.others]
        coarser = set(chain.from_iterable(inside))
        return [cut for cut in self.others if cut.name not in coarser]

    def around(self, base: Cutting) -> list[Cutting]:
        """The cuts whose blocks hold those of ``base`` whole, itself included."""
        return [
            cut
            for cut in self.with_groups
            if cut.name == WHOLE or (cut.name != ELEMENTS and base.is_inside(cut))
        ]

    @cached_property
    def base_of(self) -> dict[str, str]:
        """Cut -> the first base that it is around; none for the whole and for single entries."""
        base_of: dict[str, str] = {}
        for base in self.bases:
            for cut in self.around(base):
                if cut.name != WHOLE:
                    base_of.setdefault(cut.name, base.name)
        return base_of


@dataclass(frozen=True, eq=False)
class JudgedRegion:
    """What is judged by itself: a tensor, or a role of a fused one."""

    block: Block
    cuttings: list[Cutting]  # every way to cut it, no two alike
    claim: str  # the name of the one claimed

    @property
    def name(self) -> str:
        return self.block.name


def judged_regions(model: nn.Module, blocks: Partition) -> Iterator[JudgedRegion]:
    """The regions that the blocks of a partition lie in, each with every way to cut it.

    A region is a role of a fused tensor where the claimed blocks respect roles, else a tensor.
    """
    survey = Survey(model)
    for site in survey.sites:
        cuts = [cut for cut in blocks.cuts if site.name in cut.parameters]
        if not cuts:
            continue
        tensor = site.uncut()[0]
        roles = [cut[i] for cut in survey.cuts(site, SEMANTIC) for i in range(cut.num_blocks)]
        claimed = cutting(CLAIMED, cuts, tensor)
        apart = cutting("roles", [role.as_cut() for role in roles], tensor)
        assert claimed is not None and apart is not None
        known = dict(survey.equal_cuts(site))
        for region in roles if claimed.is_inside(apart) else [tensor]:
            claimed_here = cutting(CLAIMED, cuts, region)
            if claimed_here is not None:
                yield _judged(region, known, claimed_here)


def _judged(region: Block, known: Mapping[str, Cut], claimed: Cutting) -> JudgedRegion:
    """``region`` with the ``known`` ways to cut its tensor and with what is ``claimed``."""
    nothing = torch.empty(0, dtype=torch.int64)
    cuttings = [Cutting(WHOLE, nothing, 1)]
    if region.numel > 1:
        cuttings.append(Cutting(ELEMENTS, nothing, region.numel))
    for name, cut in known.items():
        way = None if name in (WHOLE, ELEMENTS) else cutting(name, [cut], region)
        if way is not None and _twin(way, cuttings) is None:
            cuttings.append(way)
    twin = _twin(claimed, cuttings)
    if twin is None:
        cuttings.append(claimed)
    return JudgedRegion(region, cuttings, CLAIMED if twin is None else twin.name)


def _twin(way: Cutting, cuttings: Sequence[Cutting]) -> Cutting | None:
    """The one of ``cuttings`` that has the same blocks as ``way``."""
    for other in cuttings:
        alike = other.num_blocks == way.num_blocks
        if alike and (other.is_trivial or other.is_inside(way)):
            return other
    return None


def parents_of(finer: Cutting, coarser: Cutting) -> Tensor:
    """(B,) the block of ``coarser`` around each block of ``finer``."""
    if coarser.name == WHOLE:
        return torch.zeros(finer.num_blocks, dtype=torch.int64)
    if finer.name == ELEMENTS:
        return coarser.labels
    parents = torch.zeros(finer.num_blocks, dtype=torch.int64)
    return parents.scatter_(0, finer.labels, coarser.labels)


def all_log_alternatives(nesting: Nesting, size: int) -> dict[tuple[str, str], float]:
    """By (finer, coarser): of nested cuts, and of groups of neighbours in the whole region."""
    whole = next(cut for cut in nesting.cuttings if cut.name == WHOLE)
    groups = nesting.with_groups[len(nesting.cuttings) :]
    pairs = [*nesting.pairs, *((group, whole) for group in groups)]
    return {(one.name, other.name): _log_alternatives(one, other, size) for one, other in pairs}


def _log_alternatives(finer: Cutting, coarser: Cutting, size: int) -> float:
    """The logarithm of how many cuts like ``finer`` there are of the blocks of ``coarser``.

    A block of n entries falls into blocks of sizes s in n! / prod s! ways, over the orders of those
    of one size. For single entries, which can be cut in one way, it is the ways to choose which n
    of the n (n + 1) / 2 numbers of a symmetric block are its diagonal.
    """
    around = np.array([size])
    if coarser.name != WHOLE:
        around = torch.bincount(coarser.labels).numpy()
    if finer.name == ELEMENTS:
        pairs = around * (around - 1) / 2
        ways = gammaln(pairs + around + 1) - gammaln(around + 1) - gammaln(pairs + 1)
        return float(ways.sum())
    sizes = torch.bincount(finer.labels).numpy()
    parents = parents_of(finer, coarser).numpy()
    _, alike = np.unique(np.stack([parents, sizes]), axis=1, return_counts=True)
    orders = gammaln(sizes + 1).sum() + gammaln(alike + 1).sum()
    return float(gammaln(around + 1).sum() - orders)


def composed(
    model: nn.Module,
    regions: Sequence[Block],
    ways: Mapping[str, str],
    claimed: Partition,
) -> Partition:
    """``regions`` (whole tensors or roles, by their names in ``ways``) cut as ``ways`` say.

    A way that is no alternative of its tensor stands for the cuts that ``claimed`` has there.
    """
    survey = Survey(model)
    sites = {site.name: site for site in survey.sites}
    cuts: list[Cut] = []
    for region in regions:
        site = sites[region.parameter]
        cuts += _cuts(survey, site, region, ways[region.name], claimed)
    return Partition(tuple(cuts))


def _cuts(
    survey: Survey,
    site: Site,
    region: Block,
    way: str,
    claimed: Partition,
) -> list[Cut]:
    known = dict(survey.equal_cuts(site))
    is_tensor = region.name == site.name
    if way not in known and way != WHOLE:
        of_tensor = [cut for cut in claimed.cuts if cut.parameters == (site.name,)]
        return [cut for cut in of_tensor if is_tensor or _lies_in(cut, region)]
    if is_tensor:
        return [known[way]]
    return _cuts_of_role(survey, site, region, way)


def _cuts_of_role(survey: Survey, site: Site, region: Block, way: str) -> list[Cut]:
    transposed = site.is_transposed
    if way not in _COUNTERS:
        return [_cut_of_region(site, region, way, transposed)]
    projection = survey.attention.projections[site.name]
    role = next(role for role in projection.roles if region.name.endswith(f"[{role}]"))
    counter = _COUNTERS[way]
    parts = projection.regions(counter, (role,))
    return [site.cut(int(transposed), part, counter) for part in parts]


def _cut_of_region(site: Site, region: Block, way: str, transposed: bool) -> Cut:
    """The single entries of a role, or a block an input."""
    part = _uncut(region.as_cut().parts[0])
    last = len(part.view) - 1
    inputs = 0 if transposed else last
    axes = tuple(range(last + 1)) if way == ELEMENTS else (inputs,)
    pieces = replace(part, axes=axes)
    return Cut(
        parts=(pieces,),
        name=site.name,
        labels=(region.name[len(site.name) + 1 : -1],),
        counter=way.removesuffix("s"),
        per_label=pieces.num_blocks,
    )


def _uncut(part: Part) -> Part:
    """A part of one piece, as a region that is not cut."""
    spans = [part.index[axis] for axis in part.axes]
    grid = [span.stop - span.start for span in spans]
    number = part.window[0] if part.window else 0
    places = np.unravel_index(number, grid)
    index = list(part.index)
    for axis, span, place in zip(part.axes, spans, places, strict=True):
        at = span.start + int(place)
        index[axis] = slice(at, at + 1)
    return replace(part, index=tuple(index), axes=(), window=None)


def _lies_in(cut: Cut, region: Block) -> bool:
    return all(name.startswith(region.name[:-1]) for name in cut.chunk(0, 1).names)
