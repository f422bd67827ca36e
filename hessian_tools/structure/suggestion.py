"""A partition made of the ways that suit each tensor, or each role of a fused one.

Ways are the names of :func:`hessian_tools.blocks.presets.alternatives`; where a tensor is judged by roles, a way means that
role alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from hessian_tools.blocks.attention import is_transposed
from hessian_tools.blocks.block import Block, Cut, Part
from hessian_tools.blocks.partition import Partition
from hessian_tools.blocks.survey import Site, Survey

_BY = {"whole": "", "heads": "head", "rows": "row"}


def composed(
    model: nn.Module,
    regions: Sequence[Block],
    ways: Mapping[str, str],
    claimed: Partition,
    notes: Sequence[str] = (),
) -> Partition:
    """``regions`` (whole tensors or roles, by their names in ``ways``) cut as ``ways`` say.

    A way that is no alternative of its tensor stands for the cuts that ``claimed`` has there.
    """
    survey = Survey(model)
    sites = {site.name: site for site in survey.sites}
    cuts = [
        cut
        for region in regions
        for cut in _cuts(survey, sites[region.parameter], region, ways[region.name], claimed)
    ]
    return Partition(tuple(cuts), "", tuple(notes))


def _cuts(survey: Survey, site: Site, region: Block, way: str, claimed: Partition) -> list[Cut]:
    part = _region(region.as_cut().parts[0])
    is_role = region.name != site.name
    known = dict(survey.equal_cuts(site))
    if way not in known and way != "whole":
        return [
            cut
            for cut in claimed.cuts
            if cut.parameters == (site.name,) and (not is_role or _lies_in(cut, region))
        ]
    if not is_role:
        return [known[way]]
    projection = survey.attention.projections[site.name]
    transposed = len(site.shape) > 1 and is_transposed(site.module)
    if way in _BY:
        role = next(role for role in projection.roles if region.name.endswith(f"[{role}]"))
        return [
            site.cut(int(transposed), found, _BY[way])
            for found in projection.regions(_BY[way], (role,))
        ]
    axes = (
        tuple(range(len(part.view)))
        if way == "elements"
        else (0 if transposed else len(part.view) - 1,)
    )
    pieces = replace(part, axes=axes)
    label = region.name[len(site.name) + 1 : -1]
    return [Cut((pieces,), site.name, (label,), way.removesuffix("s"), pieces.num_blocks)]


def _region(part: Part) -> Part:
    """A part of one piece, as a region that is not cut."""
    starts = [part.index[axis].start for axis in part.axes]
    grid = [part.index[axis].stop - start for axis, start in zip(part.axes, starts, strict=True)]
    index, places = list(part.index), np.unravel_index(part.window[0] if part.window else 0, grid)
    for axis, start, place in zip(part.axes, starts, places, strict=True):
        index[axis] = slice(start + int(place), start + int(place) + 1)
    return replace(part, index=tuple(index), axes=(), window=None)


def _lies_in(cut: Cut, region: Block) -> bool:
    return all(name.startswith(region.name[:-1]) for name in cut.chunk(0, 1).names)
