"""A partition as param groups, as Adam-mini's arguments and as state saved."""

import re

import pytest
import torch
from problems.architectures import ARCHITECTURES, HEADS, KV, D, F, gpt2, llama, mixtral
from torch import nn

from hessian_tools.blocks.adam_mini import adam_mini_names
from hessian_tools.blocks.adam_mini_call import adam_mini_arguments
from hessian_tools.blocks.block import Cut, Part
from hessian_tools.blocks.param_groups import (
    param_groups,
    patterns,
    state_savings,
)
from hessian_tools.blocks.presets import partition


def blocks_by_entry(cuts, tensors):
    """For every tensor the number of its block at every entry, numbered in the order in which they
    appear."""
    found = {}
    for name, p in tensors.items():
        owner, start = torch.zeros(p.shape, dtype=torch.long), 1
        for part in (part for cut in cuts for part in cut.parts if part.parameter == name):
            part.place(
                torch.arange(start, start + part.num_blocks)[:, None].expand(-1, part.block_size),
                owner,
            )
            start += part.num_blocks
        _, first = torch.unique(owner.flatten(), return_inverse=True)
        order = dict.fromkeys(first.tolist())
        rank = {label: i for i, label in enumerate(order)}
        found[name] = [rank[label] for label in first.tolist()]
    return found


@pytest.mark.parametrize("preset", ["tensor", "layer", "model"])
def test_whole_tensors_make_groups_that_torch_takes(preset):
    model = llama()
    blocks = partition(model, preset)
    groups = param_groups(model, blocks)
    assert [group["block"] for group in groups] == list(blocks.names) and not any(
        group["cuts"] for group in groups
    )
    optimizer = torch.optim.SGD(groups, lr=1.0)
    for number, group in enumerate(optimizer.param_groups):
        group["lr"] = float(number)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for number, block in enumerate(blocks):
        for name in block.parameters:
            torch.testing.assert_close(model.get_parameter(name), before[name] - number)
    assert partition(model, optimizer).names == tuple(f"group {i}" for i in range(len(groups)))
    optimizer.load_state_dict(optimizer.state_dict())


def test_finer_cuts_say_how_to_view_the_tensor():
    model = gpt2()
    blocks = partition(model, "adam_mini")
    groups = {group["block"]: group for group in param_groups(model, blocks)}
    assert sum(sum(cut["num_blocks"] for cut in g["cuts"]) or 1 for g in groups.values()) == len(
        blocks
    )
    name = "transformer.h.0.attn.c_attn.weight"
    weight, moments = model.get_parameter(name).detach(), []
    for cut in groups[name]["cuts"]:
        region = weight.view(cut["view"])[tuple(slice(*span) for span in cut["index"])]
        inside = tuple(axis for axis in range(region.ndim) if axis not in cut["axes"])
        moments += region.square().mean(inside).flatten().tolist()
    expected = [
        float(block.select(weight).square().mean())
        for block in blocks
        if block.parameters == (name,)
    ]
    assert moments == pytest.approx(expected) and len(moments) == 2 * HEADS + D
    torch.optim.AdamW(list(groups.values())).state_dict()


def test_tensors_in_no_block_are_told_and_kept():
    model = llama()
    groups = param_groups(model, partition(model, "weights"))
    assert groups[-1]["block"] == "(no block)" and len(groups[-1]["names"]) == 5
    assert sum(p.numel() for group in groups for p in group["params"]) == sum(
        p.numel() for p in model.parameters()
    )


def test_blocks_that_no_group_can_say_and_other_models_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    half = [Part(f"{i}.weight", (2, 2), (2, 2), (slice(0, 1), slice(0, 2))) for i in (0, 1)]
    from_two = partition(model, [Cut(tuple(half), "both")[0]])
    with pytest.raises(ValueError, match="'both', whose blocks join parts of several"):
        param_groups(model, from_two)
    assert set(adam_mini_arguments(model, from_two).inexpressible) == {
        n for n, _ in model.named_parameters()
    }
    for export in (param_groups, state_savings, adam_mini_arguments):
        with pytest.raises(ValueError, match="lies in no trainable parameter of this model"):
            export(model, partition(llama(), "tensor"))


@pytest.mark.parametrize("preset", ["adam_mini", "neuron", "tensor", "adalayer_star"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_published_optimizer_then_makes_these_blocks(name, preset):
    model = ARCHITECTURES[name]()
    blocks = partition(model, preset)
    arguments = adam_mini_arguments(model, blocks)
    made = adam_mini_names(
        model, dim=arguments.dim, n_heads=arguments.n_heads, keywords=arguments.keywords
    )
    assert not any("crashes" in note for note in made.notes)
    tensors = {n: p for n, p in model.named_parameters() if p.numel() < 10**5}
    wanted, got = blocks_by_entry(blocks.cuts, tensors), blocks_by_entry(made.cuts, tensors)
    assert {n for n in tensors if wanted[n] != got[n]} == set(arguments.inexpressible) & set(
        tensors
    )


def test_what_adam_mini_is_given_by_hand():
    arguments = adam_mini_arguments(llama(), partition(llama(), "adam_mini"))
    assert arguments.dim**2 // arguments.n_heads == 8 * D and arguments.inexpressible == {}
    assert (
        arguments.keywords.query_key == ("q_proj.weight", "k_proj.weight")
        and arguments.keywords.adam == ()
    )
    assert 'optimizer.wqk_names = {"q_proj.weight", "k_proj.weight"}' in arguments.code
    assert "optimizer.adam_block_names = set()" in arguments.code
    told = adam_mini_arguments(gpt2(), partition(gpt2(), "adam_mini")).inexpressible
    assert {n.removeprefix("transformer.h.0.") for n in told if ".0." in n} == {
        "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}  # fmt: skip
    assert (
        "get" in told["transformer.h.0.mlp.c_fc.weight"]
        and f"its {F} blocks" in told["transformer.h.0.mlp.c_fc.weight"]
    )
    fused = adam_mini_arguments(
        ARCHITECTURES["phi3"](), partition(ARCHITECTURES["phi3"](), "adam_mini")
    )
    assert (
        f"it gets {HEADS + 2 * KV} blocks"
        in fused.inexpressible["model.layers.0.self_attn.qkv_proj.weight"]
    )


def test_the_package_itself_takes_the_arguments():
    package = pytest.importorskip("adam_mini")
    model = llama()
    blocks = partition(model, "adam_mini")
    space = {"Adam_mini": package.Adam_mini, "model": model, "lr": 1e-3}
    exec(adam_mini_arguments(model, blocks).code, space)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    space["optimizer"].step()
    for name, p in model.named_parameters():
        expected = torch.cat(
            [
                c.rows({name: p.grad}).square().mean(1)
                for c in blocks.cuts
                if c.parameters == (name,)
            ]
        )
        torch.testing.assert_close(
            space["optimizer"].state[p]["vmean"].flatten(), expected * 1e-3, rtol=1e-3, atol=1e-9
        )


def test_state_saved_by_hand():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3).double())
    saved = state_savings(model, partition(model, "neuron"))
    # first moments 30 floats and 21 doubles; second moments 6 rows + bias, 3 rows + bias
    assert (saved.num_parameters, saved.num_blocks) == (51, 6 + 1 + 3 + 1)
    assert (
        saved.adam_bytes == 2 * (30 * 4 + 21 * 8)
        and saved.state_bytes == 30 * 4 + 21 * 8 + 7 * 4 + 4 * 8
    )
    assert saved.saved_percent == pytest.approx(100 * (1 - saved.state_bytes / saved.adam_bytes))
    assert state_savings(model, partition(model, "element")).saved_bytes == 0
    part = state_savings(model, partition(model, "weights"))  # biases keep Adam's own second moment
    assert part.num_blocks == 2 + 9 and "11 learning rates for 51 parameters" in str(part)


def test_patterns_match_every_tensor_once():
    for build in (gpt2, llama, mixtral):
        model = build()
        found = patterns(partition(model, "adam_mini"))
        for name, _ in model.named_parameters():
            assert sum(bool(re.match(pattern, name)) for pattern in found) == 1
        assert len(found) < len(list(model.parameters()))
    assert found[r"^model\.layers\.\d+\.self_attn\.q_proj\.weight$"] == "head"
    mixed = partition(llama(), {"*.0.*.up_proj.weight": "whole", "*.up_proj.weight": "row"})
    alone = r"^model\.layers\.0\.mlp\.up_proj\.weight$"
    assert patterns(mixed) == {alone: "whole", alone.replace("0", "1"): "row"}


def test_a_wrapper_of_the_model_is_named_in_the_error():
    model = nn.Linear(3, 2)
    wrapped = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match=r"has it as '_orig_mod\.weight'; take both"):
        param_groups(wrapped, partition(model, "tensor"))
    with pytest.raises(ValueError, match="has it as 'weight'; take both"):
        param_groups(model, partition(wrapped, "tensor"))
    assert len(param_groups(wrapped, partition(wrapped, "tensor"))) == 2
