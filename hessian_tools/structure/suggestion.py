"""A partition made of the ways that suit each tensor, or each role of a fused one.

Ways are the names of :func:`hessian_tools.blocks.presets.alternatives`; where a tensor is
judged by roles, a way means that role alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from hessian_tools.blocks.block import Block, Cut, Part
from hessian_tools.blocks.kinds import Site
from hessian_tools.blocks.partition import Partition
from hessian_tools.blocks.survey import Survey
from hessian_tools.structure.cuttings import ELEMENTS, WHOLE

_COUNTERS = {"whole": "", "heads": "head", "rows": "row"}  # of the ways to cut along a role's axis


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
