"""A user's own blocks: globs to axes, functions, optimizers."""

import pytest
import torch
from problems.architectures import HEADS, D, F, V, gpt2, llama, mixtral, phi3

from hessian_tools.blocks.presets import alternatives, partition

C_FC = "transformer.h.0.mlp.c_fc.weight"


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {build.__name__: build() for build in (gpt2, llama, mixtral, phi3)}


def counts(blocks):
    found = {}
    for cut in blocks.cuts:
        for name in cut.parameters:
            found[name] = found.get(name, 0) + cut.num_blocks
    return found


def test_the_first_glob_that_matches_decides(models):
    found = counts(
        partition(
            models["llama"], {"*.q_proj.weight": "head", "*_proj.weight": "rows", "*": "whole"}
        )
    )
    assert set(found) == {name for name, _ in models["llama"].named_parameters()}
    assert found["model.layers.0.self_attn.q_proj.weight"] == HEADS
    assert (
        found["model.layers.1.self_attn.k_proj.weight"] == D
        and found["model.layers.1.mlp.up_proj.weight"] == F
    )
    assert found["lm_head.weight"] == 1
    other = counts(partition(models["llama"], {"*": "whole", "*.q_proj.weight": "head"}))
    assert set(other.values()) == {1}


def test_words_know_transposed_layers_and_numbers_do_not(models):
    weight = models["gpt2"].get_parameter(C_FC)  # (in, out)
    by_word, by_number = (partition(models["gpt2"], {C_FC: axis}) for axis in ("row", 0))
    assert len(by_word) == F and torch.equal(by_word[f"{C_FC}[row=3]"].select(weight), weight[:, 3])
    assert len(by_number) == D and torch.equal(
        by_number[f"{C_FC}[axis0=3]"].select(weight), weight[3]
    )
    assert by_number.notes[0].endswith("match no glob and are in no block: " + ", ".join(
        [n for n, _ in models["gpt2"].named_parameters() if n != C_FC][:5]) + ", ...")  # fmt: skip
    assert torch.equal(
        partition(models["gpt2"], {C_FC: -1})[f"{C_FC}[axis1=3]"].select(weight), weight[:, 3]
    )
    assert (
        len(partition(models["gpt2"], {C_FC: "columns"})) == D
        and len(partition(models["gpt2"], {C_FC: "element"})) == D * F
    )
    assert len(partition(models["gpt2"], {C_FC: (1, 0)})) == D * F
    experts = "model.layers.0.mlp.experts.down_proj"
    assert [
        len(partition(models["mixtral"], {experts: a})) for a in ("expert", "row", "column", (0, 2))
    ] == [
        3,
        3 * D,
        3 * F,
        3 * F,
    ]
    assert len(partition(models["phi3"], {"*.0.*qkv_proj.weight": "role"})) == 3


def test_axes_that_a_tensor_lacks_leave_it_whole_with_a_note(models):
    blocks = partition(
        models["llama"],
        {"*.0.*.gate_proj.weight": "head", "model.norm.weight": "column", "*": None},
    )
    assert counts(blocks) == {"model.layers.0.mlp.gate_proj.weight": 1, "model.norm.weight": 1}
    assert [note.split(": ")[1] for note in blocks.notes] == [
        "it has no heads, so it is left whole",
        "it has no columns, so it is left whole",
    ]


def test_a_function_decides_by_name_parameter_and_module(models):
    model = models["gpt2"]
    mine = alternatives(model, C_FC)["columns"]

    def choose(name, parameter, module):
        if name == C_FC:
            return mine
        if isinstance(module, torch.nn.Embedding):
            return "row" if parameter.shape[0] == V else None
        return (0,) if type(module).__name__ == "Conv1D" and parameter.ndim > 1 else "whole"

    found = counts(partition(model, choose))
    assert (
        found[C_FC] == D
        and found["transformer.wte.weight"] == V
        and "transformer.wpe.weight" not in found
    )
    assert found["transformer.h.0.attn.c_attn.weight"] == D and found["transformer.ln_f.bias"] == 1
    with pytest.raises(ValueError, match=r"wte.weight' a cut of .*c_fc.weight; cut the tensor"):
        partition(model, lambda name, parameter, module: mine)


def test_an_optimizer_has_a_block_a_group(models):
    model = models["llama"]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2][1:]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "name": "decayed"}, {"params": vectors, "weight_decay": 0}]
    )
    blocks = partition(model, optimizer)
    assert blocks.names == ("decayed", "group 1") and blocks["decayed"].numel == sum(
        p.numel() for p in matrices
    )
    left = next(name for name, p in model.named_parameters() if p.ndim < 2)
    assert blocks.notes == (f"1 tensors are in no group and in no block: {left}",)
    with pytest.raises(ValueError, match="group 0 holds a tensor that is no parameter"):
        partition(models["gpt2"], optimizer)


@pytest.mark.parametrize("spec, kind, words", [
    ({"*.nothing": "row"}, ValueError, "matches no trainable parameter"),
    ({"*.wte.wight": "row"}, ValueError, "matches no trainable parameter; close: transformer.wte.weight"),
    ({"*": "row", "mine": C_FC}, ValueError, r"globs \('\*'\) and a named block \('mine'\)"),
    ({C_FC: 2}, ValueError, r"axis 2; its shape \(32, 48\) has axes 0 to 1"),
    ({C_FC: (0, -2)}, ValueError, "axis"),
    (lambda *_: "diagonal", ValueError, "by 'diagonal'; axes are whole, role"),
    (lambda *_: 1.5, TypeError, "by 1.5; axes are"),
    (lambda *_: None, ValueError, "empty"),
    (7, TypeError, "spec is a int; pass a preset"),
])  # fmt: skip
def test_errors_say_what_to_do(models, spec, kind, words):
    with pytest.raises(kind, match=words):
        partition(models["gpt2"], spec)
