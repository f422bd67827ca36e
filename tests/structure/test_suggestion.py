"""Suggested cuts are the very blocks that were judged: same entries, nothing twice, nothing outside
their tensor."""

import pytest
import torch
from problems import architectures
from torch import nn

import hessian_tools as ht
from hessian_tools.blocks.ownership import check_disjoint
from hessian_tools.structure.cuttings import ELEMENTS, WHOLE, composed, cutting, judged_regions


def torch_attention() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)


MODELS = [
    architectures.gpt2,
    architectures.neox,
    architectures.phi3,
    architectures.mixtral,
    torch_attention,
]
MOST = 1100  # blocks of a cut whose names are looked at


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("claim", ["semantic", "tensor"])
def test_every_way_is_suggested_as_it_was_judged(build, claim):
    model = build()
    claimed = ht.partition(model, claim)
    judged = [
        (found.block, {way.name: way for way in found.cuttings if way.num_blocks <= MOST})
        for found in judged_regions(model, claimed)
    ]
    for way in {name: None for _, ways in judged for name in ways}:
        regions = {region.name: region for region, ways in judged if way in ways}
        made = composed(model, list(regions.values()), dict.fromkeys(regions, way), claimed)
        check_disjoint(made.cuts)
        assert sum(block.numel for block in made) == sum(
            region.numel for region in regions.values()
        )
        for region, ways in judged:
            if way in ways:
                own = [
                    c
                    for c in made.cuts
                    if c.parameters == (region.parameter,) and _is_of(c, region)
                ]
                found = cutting("found", own, region)
                assert found.num_blocks == ways[way].num_blocks == sum(c.num_blocks for c in own), (
                    region.name,
                    way,
                )
                assert way in (WHOLE, ELEMENTS) or found.is_inside(ways[way]), (region.name, way)
    assert {"whole", "elements", "rows"} <= {name for _, ways in judged for name in ways}


def _is_of(cut, region):
    return cut.block_name(0).startswith(region.name.rstrip("]"))


def test_a_suggestion_of_inputs_for_one_role_covers_that_role():
    """The role is one of three places of an axis of the stored (16, 3 16) tensor, its inputs the
    places of another."""
    model = architectures.gpt2()
    claimed = ht.partition(model, "semantic", only="*h.0.attn.c_attn.weight*")
    regions = [judged.block for judged in judged_regions(model, claimed)]
    ways = dict(
        zip((region.name for region in regions), ("columns", "elements", "rows"), strict=True)
    )
    made = composed(model, regions, ways, claimed)
    width, stored = architectures.D, torch.arange(3 * architectures.D**2).view(architectures.D, -1)
    name = "transformer.h.0.attn.c_attn.weight"
    assert len(made) == width + width * width + width
    assert (
        made[f"{name}[q,column=3]"].select(stored).flatten().tolist() == stored[3, :width].tolist()
    )
    assert (
        made[f"{name}[v,row=5]"].select(stored).flatten().tolist()
        == stored[:, 2 * width + 5].tolist()
    )
    assert made[f"{name}[k,element=1]"].select(stored).item() == stored[0, width + 1]
