"""A user's own blocks: globs to axes, functions, optimizers."""

import pytest
import torch
from problems.architectures import (
    HEADS,
    SIZES,
    VOCABULARY,
    D,
    F,
    V,
    gpt2,
    hf,
    llama,
    mixtral,
    neox,
    phi3,
)

from hessian_tools.blocks.partition import Partition
from hessian_tools.blocks.presets import alternatives, partition
from hessian_tools.blocks.projection import heads, parse_heads

C_FC = "transformer.h.0.mlp.c_fc.weight"
WTE = "transformer.wte.weight"


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


def rows_of(blocks, model):
    """{block: its entries, in order}, by name."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    found = {}
    for cut in blocks.cuts:
        for name, row in zip(cut.names, cut.rows(parameters), strict=True):
            found[name] = row
    return found


def deepseek():
    return hf(
        "DeepseekV3ForCausalLM", **SIZES, **VOCABULARY, num_key_value_heads=HEADS, q_lora_rank=12,
        kv_lora_rank=10, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6,
        n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        moe_intermediate_size=16, first_k_dense_replace=2,
    )  # fmt: skip


def falcon():
    return hf(
        "FalconForCausalLM", **SIZES, **VOCABULARY, num_kv_heads=2, new_decoder_architecture=True
    )


def codegen():
    sizes = {"n_embd": D, "n_layer": 1, "n_head": HEADS, "n_positions": 16, "rotary_dim": 4}
    return hf("CodeGenForCausalLM", **sizes, **VOCABULARY)


@pytest.mark.parametrize("build, stated", [
    (gpt2, {"*.c_attn.weight": heads(HEADS, 1, fused="qkv"), "*.c_attn.bias": heads(HEADS, fused="qkv"),
            "*.attn.c_proj.weight": heads(HEADS)}),
    (llama, {"*.[qkv]_proj.weight": heads(HEADS), "*.o_proj.weight": heads(HEADS, axis=-1)}),
    (phi3, {"*.qkv_proj.weight": heads(HEADS, fused="qkv", kv_count=2)}),
    (neox, {"*.query_key_value.*": heads(HEADS, fused="qkv", groups=HEADS)}),
    (falcon, {"*.query_key_value.weight": heads(HEADS, fused="qkv", kv_count=2, groups=2)}),
    (codegen, {"*.qkv_proj.weight": heads(HEADS, fused="qvk", groups=4)}),
    (deepseek, {"*.q_b_proj.weight": heads(HEADS), "*.o_proj.weight": heads(HEADS, 1),
                "*.kv_b_proj.weight": heads(HEADS, fused="kv", groups=HEADS, sizes=(8, 6))}),
])  # fmt: skip
def test_stated_heads_are_those_that_the_code_computes(build, stated, tmp_path):
    torch.manual_seed(0)
    model = build()
    mine = partition(model, stated)
    learnt = rows_of(partition(model, "head"), model)
    for name, row in rows_of(mine, model).items():
        assert torch.equal(row, learnt[name]), name
    assert all("head=" in name for name in mine.names)
    assert not any("computes with" in note for note in mine.notes)
    again = Partition.from_json(mine.to_json(tmp_path / "mine.json"), model)
    assert again == mine and rows_of(again, model).keys() == rows_of(mine, model).keys()


def test_heads_override_a_preset_and_nothing_else(models):
    name = "model.layers.0.self_attn.q_proj.weight"
    ours = partition(models["llama"], "adam_mini", heads={name: heads(2)})
    theirs = partition(models["llama"], "adam_mini")
    rest = [block for block in theirs.names if not block.startswith(name)]
    assert [block for block in ours.names if not block.startswith(name)] == rest
    assert [block for block in ours.names if block.startswith(name)] == [
        f"{name}[head=0]",
        f"{name}[head=1]",
    ]
    assert f"{name}: cut by heads(2) as stated, in heads of 16; its module computes with heads of 8" in ours.notes  # fmt: skip
    assert ours.preset == "" and len(partition(models["llama"], "adam_mini", heads={})) == len(
        theirs
    )
    # a preset that leaves the tensor out
    bias = partition(
        models["gpt2"], "weights", heads={"*.0.attn.c_attn.bias": heads(4, fused="qkv")}
    )
    assert len([block for block in bias.names if "c_attn.bias[" in block]) == 12


def test_heads_where_nothing_is_recognised():
    class Einsum(torch.nn.Module):  # XLNet's
        def __init__(self):
            super().__init__()
            self.n_head = HEADS
            self.q, self.o = (torch.nn.Parameter(torch.randn(D, HEADS, 8)) for _ in range(2))

    model = Einsum()
    blocks = partition(model, "head", heads={"[qo]": heads(HEADS, axis=1)})
    assert torch.equal(blocks["o[head=3]"].select(model.o), model.o[:, 3])
    by_function = partition(model, lambda name, parameter, module: heads(HEADS, 1))
    assert by_function.names == blocks.names
    pairs = partition(model, {"q": heads(2, axis=1)})  # two heads of the code's in one
    assert torch.equal(pairs["q[head=1]"].select(model.q).reshape(D, 2, 8), model.q[:, 2:])


@pytest.mark.parametrize("spec, words", [
    ({C_FC: heads(5)}, r"heads\(5\) is stated for .*c_fc.weight of shape \(32, 48\), whose axis 0 has 32 places, which 5"),
    ({C_FC: heads(5, axis=1)}, "axis 1 has 48 places"),
    ({C_FC: heads(64)}, "32 places, which 64 heads do not divide"),
    ({C_FC: heads(4, axis=2)}, r"heads\(4, axis=2\) .* has no axis 2; it has axis 0 to 1"),
    ({"*.0.mlp.c_fc.bias": heads(4, axis=1)}, "has no axis 1; it has axis 0 alone"),
    ({"*.wq": heads(4)}, r"'\*.wq' matches no trainable parameter"),
    ({"*": "whole", C_FC: heads(4)}, r"states heads\(4\) for '.*c_fc.weight' by .*, and whole by '\*' before it"),
    ({"*c_fc.weight": heads(4), C_FC: heads(8)}, r"states heads\(8\) .*, and heads\(4\) by"),
    ({C_FC: heads(4), "mine": WTE}, "put them into two dicts"),
    ({C_FC: heads(4, fused="qkv")}, r"32 places, which 4 \+ 4 \+ 4 = 12 heads do not divide"),
    ({C_FC: heads(2, fused="kv", sizes=(8, 4))}, r"heads fill 2 x 8 \+ 2 x 4 = 24"),
    ({C_FC: heads(2, fused="qk", sizes=(10, 6))}, "must begin at multiples of their size"),
])  # fmt: skip
def test_stated_heads_never_leave_a_tensor_whole(models, spec, words):
    with pytest.raises(ValueError, match=words):
        partition(models["gpt2"], spec)


def test_heads_that_do_not_go_with_a_preset(models):
    with pytest.raises(ValueError, match=r"in one block with others, '.*'; choose a preset"):
        partition(models["gpt2"], "layer", heads={C_FC: heads(4)})
    with pytest.raises(ValueError, match="heads are stated beside a spec of your own"):
        partition(models["gpt2"], {"*": "whole"}, heads={C_FC: heads(4)})
    with pytest.raises(
        TypeError, match=r"heads\['\*.c_fc.weight'\] is 8; hessian_tools.heads\(8\)"
    ):
        partition(models["gpt2"], heads={"*.c_fc.weight": 8})
    with pytest.raises(ValueError, match="matches no trainable"):
        partition(models["gpt2"], heads={"*.wq": heads(8)})


@pytest.mark.parametrize("arguments, options, words", [
    ((0,), {}, "count is 0; a whole number of at least 1"),
    ((True,), {}, "count is True"),
    ((8.0,), {}, "count is 8.0"),
    ((8, "1"), {}, "axis is '1'"),
    ((8,), {"fused": "qkx"}, "fused is 'qkx'; the letters q, k and v"),
    ((8,), {"fused": "qqk"}, "each at most once"),
    ((8,), {"kv_count": 2}, "kv_count and groups are of fused tensors"),
    ((8,), {"fused": "qkv", "groups": 3}, r"heads\(8, fused=qkv, groups=3\): 8 heads do not divide into 3 groups"),
    ((8,), {"fused": "qkv", "kv_count": 2, "groups": 4}, "2 heads do not divide into 4 groups"),
    ((8,), {"fused": "kv", "sizes": (4,)}, "one size for each of the roles 'kv'"),
    ((8,), {"sizes": (0,)}, "sizes is 0"),
])  # fmt: skip
def test_statements_that_make_no_sense(arguments, options, words):
    with pytest.raises(ValueError, match=words):
        heads(*arguments, **options)


@pytest.mark.parametrize("text, meant", [
    ("8", heads(8)),
    ("heads(8)", heads(8)),
    ("heads(8, axis=1)", heads(8, 1)),
    ("4,axis=-1,fused=qkv,kv_count=2,groups=2", heads(4, -1, fused="qkv", kv_count=2, groups=2)),
    ("16, fused=kv, groups=16, sizes=128+64", heads(16, fused="kv", groups=16, sizes=(128, 64))),
])  # fmt: skip
def test_heads_in_words(text, meant):
    assert parse_heads(text) == meant == parse_heads(str(meant))


@pytest.mark.parametrize("text", ["", "heads()", "eight", "8,by=1", "8,axis=one", "heads(8", "8 9"])
def test_words_that_state_no_heads(text):
    with pytest.raises(ValueError, match="states no heads; write"):
        parse_heads(text)
