"""Partitions: exact covers, and query/key/value/head/row blocks checked by what the network
computes with them."""

import math

import pytest
import torch
from problems import transformers
from torch import nn
from torch.nn import functional as F

from hessian_tools.blocks.block import Block, Cut, Part
from hessian_tools.blocks.partition import Partition
from hessian_tools.blocks.presets import PRESETS, partition

D, HEADS = 32, 4
SIZES = {
    "hidden_size": D,
    "num_attention_heads": HEADS,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
}
VOCABULARY = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
FULL = (
    "tensor",
    "semantic",
    "layer",
    "head",
    "neuron",
    "adam_mini",
    "adalayer_star",
)  # that cover every parameter


def hf(model, **config):
    family = model.split("For")[0].removesuffix("LMHeadModel")
    return getattr(transformers(), model)(getattr(transformers(), f"{family}Config")(**config))


def gpt2(layers=2, **keywords):
    return hf(
        "GPT2LMHeadModel",
        n_embd=D,
        n_layer=layers,
        n_head=HEADS,
        n_positions=16,
        **VOCABULARY,
        **keywords,
    )


def bert():
    return hf("BertForMaskedLM", **SIZES, **VOCABULARY)


def vit(layers=2):
    return hf(
        "ViTForImageClassification",
        **{**SIZES, "num_hidden_layers": layers},
        image_size=8,
        patch_size=4,
    )


def llama():
    return hf(
        "LlamaForCausalLM",
        **SIZES,
        **VOCABULARY,
        num_key_value_heads=2,
        head_dim=16,
        attention_bias=True,
    )


def neox():
    return hf("GPTNeoXForCausalLM", **SIZES, **VOCABULARY)


def phi3():
    return hf("Phi3ForCausalLM", **SIZES, **VOCABULARY, num_key_value_heads=2)


def falcon():
    return hf(
        "FalconForCausalLM", **SIZES, **VOCABULARY, num_kv_heads=2, new_decoder_architecture=True
    )


def codegen():
    return hf(
        "CodeGenForCausalLM",
        n_embd=D,
        n_layer=1,
        n_head=HEADS,
        n_positions=16,
        rotary_dim=4,
        **VOCABULARY,
    )


def attend(q, k, v):
    """(b, H, T, h) each -> (b, T, H h), by hand."""
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


class Fused(nn.Module):
    """timm's layout (3, H, h) or GPT-NeoX's (H, 3, h)."""

    def __init__(self, interleaved=False):
        super().__init__()
        self.num_heads, self.interleaved = HEADS, interleaved
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x):
        shape = (self.num_heads, 3, -1) if self.interleaved else (3, self.num_heads, -1)
        q, k, v = self.qkv(x).unflatten(-1, shape).unbind(-2 if self.interleaved else -3)
        return self.proj(attend(*(t.transpose(1, 2) for t in (q, k, v))))


class Nonsense(nn.Module):
    """The same as Fused, with names that say nothing or the wrong thing."""

    def __init__(self, interleaved=False):
        super().__init__()
        self.zorp, self.interleaved = HEADS, interleaved
        self.gate, self.query = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, blub):
        shape = (self.zorp, 3, -1) if self.interleaved else (3, self.zorp, -1)
        a, b, c = self.gate(blub).unflatten(-1, shape).unbind(-2 if self.interleaved else -3)
        return self.query(attend(*(t.transpose(1, 2) for t in (a, b, c))))


class Separate(nn.Module):
    """Four equal linear layers whose order and names mislead: what is called key is the value, and
    so on."""

    def __init__(self):
        super().__init__()
        self.key, self.value, self.query, self.q_proj = (nn.Linear(D, D) for _ in range(4))

    def forward(self, query, memory):
        q, k, v = (f(t).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f, t in (
            (self.q_proj, query), (self.query, memory), (self.key, memory)))  # fmt: skip
        return self.value(attend(q, k, v))


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.table = nn.Parameter(torch.ones(2, 3))
        self.conv, self.norm = nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)
        self.up, self.last = nn.ConvTranspose2d(6, 4, 2, groups=2), nn.Linear(4, 5)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.frozen, self.head = (
            nn.Embedding(64, D),
            nn.Linear(D, D),
            nn.Linear(D, 64, bias=False),
        )
        self.head.weight = self.tokens.weight
        self.frozen.weight.requires_grad_(False)


def encoder():
    return nn.TransformerEncoderLayer(D, HEADS, 48, batch_first=True)


def cross():
    return nn.MultiheadAttention(D, HEADS, kdim=8, vdim=12, add_bias_kv=True)


MODELS = {
    f.__name__: f
    for f in (
        gpt2,
        bert,
        vit,
        llama,
        neox,
        phi3,
        falcon,
        codegen,
        encoder,
        cross,
        Fused,
        Separate,
        ConvNet,
        Tied,
    )
}


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    built = {name: build().eval() for name, build in MODELS.items()}
    built["crossattention"] = gpt2(add_cross_attention=True).eval()
    return built


@pytest.mark.parametrize("preset", FULL)
@pytest.mark.parametrize("name", [*MODELS, "crossattention"])
def test_every_entry_lies_in_exactly_one_block_and_comes_back(models, name, preset):
    model = models[name]
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    blocks = partition(model, preset)
    counts = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for cut in blocks.cuts:
        rows = cut.rows(parameters)
        assert rows.shape == (cut.num_blocks, cut.block_size)
        for part, piece in zip(
            cut.parts, rows.split([p.block_size for p in cut.parts], dim=1), strict=True
        ):
            assert part.num_blocks == cut.num_blocks
            out = torch.zeros(3, 2, *part.shape)
            part.place(torch.ones(3, 2, *piece.shape), out)
            assert out.sum() == 6 * piece.numel()
            counts[part.parameter] += out[2, 1]
            part.place(piece.expand(3, 2, -1, -1), out)
            assert torch.equal(part.rows(out), piece.expand(3, 2, -1, -1))
            assert torch.equal(
                out[0, 1] * (out[0, 1] != 0),
                torch.where(out[0, 1] != 0, parameters[part.parameter], 0),
            )
    assert all((count == 1).all() for count in counts.values())
    assert (
        len(set(blocks.names))
        == len(blocks)
        == len(list(blocks))
        == sum(cut.num_blocks for cut in blocks.cuts)
    )


@pytest.mark.parametrize("preset", ["head", "neuron", "layer"])
@pytest.mark.parametrize("name", ["gpt2", "falcon", "ConvNet"])
def test_blocks_and_chunks_are_rows_of_their_cut(models, name, preset):
    parameters = {n: p.detach() for n, p in models[name].named_parameters()}
    blocks = partition(models[name], preset)
    for cut in blocks.cuts:
        rows = cut.rows(parameters)
        for i in {0, cut.num_blocks // 2, cut.num_blocks - 1}:
            block = blocks[cut.names[i]]
            assert (
                (block.name, block.numel) == (cut.names[i], cut.block_size)
                and block == cut[i]
                and block in blocks
            )
            assert torch.equal(
                block.as_cut().rows(parameters)[0], rows[i]
            ) and block.as_cut().names == (block.name,)
            if len(block.parameters) == 1:
                chosen = block.select(
                    parameters[block.parameter].expand(2, *parameters[block.parameter].shape)
                )
                assert chosen.shape == (2, *block.shape) and torch.equal(
                    chosen[1].flatten(), rows[i]
                )
        for first, last in {(0, cut.num_blocks // 2), (cut.num_blocks // 3, cut.num_blocks - 1)}:
            if first < last:
                chunk = cut.chunk(first, last)
                assert chunk.names == cut.names[first:last] and torch.equal(
                    chunk.rows(parameters), rows[first:last]
                )
                inner = chunk.chunk(chunk.num_blocks // 2, chunk.num_blocks)
                assert torch.equal(
                    inner.rows(parameters), rows[first:last][chunk.num_blocks // 2 :]
                )
                out = {n: torch.zeros_like(p) for n, p in parameters.items()}
                for part in chunk.parts:
                    part.place(part.rows(parameters[part.parameter]), out[part.parameter])
                assert torch.equal(chunk.rows(out), rows[first:last])
                assert sum(int((t != 0).sum()) for t in out.values()) == int(
                    (rows[first:last] != 0).sum()
                )


def heads_seen(model, zeroed=()):
    """Query, key and value (b, H, T, h) that reach the first layer's attention, ``zeroed`` blocks
    set to zero."""
    saved = {n: p.detach().clone() for n, p in model.named_parameters()}
    seen = []

    def spy(module, query, key, value, mask, **_):
        seen.append((query, key, value))
        groups = query.shape[1] // key.shape[1]
        shape = (query.shape[0], query.shape[2], query.shape[1], -1)
        k, v = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return attend(query, k, v).unflatten(-1, shape[2:]), None

    transformers().AttentionInterface.register("spy", spy)
    model.config._attn_implementation = "spy"
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for block in zeroed:
            parameters[block.parameter].copy_(placed(block, 0.0, parameters[block.parameter]))
        inputs = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        model(inputs if model.config.model_type == "vit" else torch.arange(10).view(2, 5))
        for n, p in parameters.items():
            p.copy_(saved[n])
    return dict(zip("qkv", seen[0], strict=True))


def placed(block, value, tensor):
    out = tensor.detach().clone()
    for part in block.as_cut().parts:
        part.place(torch.full((1, part.block_size), value), out)
    return out


# the attention of the first layer: its path, and (parameter stem, label) of query, key and value
LAYOUTS = {
    "gpt2": ("transformer.h.0.attn", {role: ("c_attn", role) for role in "qkv"}),
    "neox": ("gpt_neox.layers.0.attention", {role: ("query_key_value", role) for role in "qkv"}),
    "phi3": ("model.layers.0.self_attn", {role: ("qkv_proj", role) for role in "qkv"}),
    "llama": ("model.layers.0.self_attn", {role: (f"{role}_proj", "") for role in "qkv"}),
    "bert": (
        "bert.encoder.layer.0.attention.self",
        {"q": ("query", ""), "k": ("key", ""), "v": ("value", "")},
    ),
    "vit": ("vit.layers.0.attention", {role: (f"{role}_proj", "") for role in "qkv"}),
}


def blocks_of(blocks, path, stem, inside):
    """The weight's block and, where there is one, the bias's."""
    names = (
        f"{path}.{stem}.{kind}" + (f"[{inside}]" if inside else "") for kind in ("weight", "bias")
    )
    return [blocks[name] for name in names if name in blocks]


@pytest.mark.parametrize("name", LAYOUTS)
def test_zeroing_a_role_silences_exactly_that_role(models, name):
    path, layout = LAYOUTS[name]
    before = heads_seen(models[name])
    for role, (stem, label) in layout.items():
        after = heads_seen(models[name], blocks_of(partition(models[name]), path, stem, label))
        for other in "qkv":
            assert (
                after[other].abs().max() == 0
                if other == role
                else torch.equal(after[other], before[other])
            )


@pytest.mark.parametrize("name", LAYOUTS)
def test_zeroing_a_head_silences_exactly_that_head(models, name):
    path, layout = LAYOUTS[name]
    blocks = partition(models[name], "head")
    before = heads_seen(models[name])
    for role, (stem, label) in layout.items():
        for head in range(before[role].shape[1]):
            inside = ",".join(filter(None, (label, f"head={head}")))
            after = heads_seen(models[name], blocks_of(blocks, path, stem, inside))
            others = [h for h in range(before[role].shape[1]) if h != head]
            assert after[role][:, head].abs().max() == 0
            assert torch.equal(after[role][:, others], before[role][:, others])
            assert all(torch.equal(after[other], before[other]) for other in "qkv" if other != role)


OUTPUTS = {
    "gpt2": "transformer.h.0.attn.c_proj",
    "neox": "gpt_neox.layers.0.attention.dense",
    "phi3": "model.layers.0.self_attn.o_proj",
    "llama": "model.layers.0.self_attn.o_proj",
    "bert": "bert.encoder.layer.0.attention.output.dense",
    "vit": "vit.layers.0.attention.o_proj",
    "falcon": "transformer.h.0.self_attention.dense",
    "encoder": "self_attn.out_proj",
    "Separate": "value",
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_output_projection_is_cut_by_the_heads_that_it_reads(models, name):
    model, path = models[name], OUTPUTS[name]
    layer = model.get_submodule(path)
    blocks = partition(model, "head")
    size = D if name != "llama" else 2 * D  # llama's heads are 16 wide
    result = torch.randn(5, size)
    for head in range(HEADS):
        silent = result.clone().unflatten(-1, (HEADS, -1))
        silent[:, head] = 0
        block = blocks[f"{path}.weight[head={head}]"]
        with_zeros = torch.func.functional_call(
            layer, {"weight": placed(block, 0.0, layer.weight)}, result
        )
        assert torch.allclose(with_zeros, layer(silent.flatten(1)), atol=1e-6)
    assert f"{path}.weight[head={HEADS}]" not in blocks


def torch_attention():
    return nn.MultiheadAttention(D, HEADS, batch_first=True)


@pytest.mark.parametrize("build", [torch_attention, Fused, lambda: Fused(interleaved=True)])
def test_attention_by_hand_from_the_blocks(build):
    model, x = build(), torch.randn(2, 5, D)
    torch_own = isinstance(model, nn.MultiheadAttention)
    weight_name, bias_name = (
        ("in_proj_weight", "in_proj_bias") if torch_own else ("qkv.weight", "qkv.bias")
    )
    weight, bias = (
        model.get_parameter(weight_name),
        torch.nn.init.normal_(model.get_parameter(bias_name)),
    )
    blocks, heads = partition(model), partition(model, "head")
    projected = []
    for role in "qkv":
        rows = blocks[f"{weight_name}[{role}]"].select(weight).reshape(D, D)
        projected.append(F.linear(x, rows, blocks[f"{bias_name}[{role}]"].select(bias).flatten()))
        by_head = [heads[f"{weight_name}[{role},head={h}]"].select(weight) for h in range(HEADS)]
        assert torch.equal(torch.cat(by_head), rows)
    result = attend(*(t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in projected))
    expected = model(x, x, x, need_weights=False)[0] if torch_own else model(x)
    assert torch.allclose(
        (model.out_proj if torch_own else model.proj)(result), expected, atol=1e-6
    )


def test_zeroing_one_value_head_changes_only_its_slice_of_the_result():
    model, x = Fused(interleaved=True), torch.randn(2, 5, D)
    taken = []
    model.proj.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    block = partition(model, "head")["qkv.weight[v,head=2]"]
    with torch.no_grad():
        model.qkv.bias.zero_()
        model(x)
        model.qkv.weight.copy_(placed(block, 0.0, model.qkv.weight))
        model(x)
    changed = (taken[0] != taken[1]).unflatten(-1, (HEADS, -1)).any(-1).flatten(0, 1).any(0)
    assert changed.tolist() == [False, False, True, False]


def structure(model, preset):
    """The cuts without names of parameters."""
    return [
        (
            cut.labels,
            cut.counter,
            [(p.shape, p.view, [(s.start, s.stop) for s in p.index], p.axes) for p in cut.parts],
        )
        for cut in partition(model, preset).cuts
    ]


@pytest.mark.parametrize("preset", FULL)
@pytest.mark.parametrize("interleaved", [False, True])
def test_names_play_no_part(interleaved, preset):
    assert structure(Nonsense(interleaved), preset) == structure(Fused(interleaved), preset)
    names = {name for name in partition(Nonsense(interleaved)).names if "[" in name}
    assert names == {f"gate.{kind}[{role}]" for kind in ("weight", "bias") for role in "qkv"}


def test_misnamed_separate_layers_are_cut_by_what_they_do(models):
    names = partition(models["Separate"], "head", only="*weight*").names
    # "value" is the output projection: its blocks are columns, the others' are rows
    assert len(names) == 4 * HEADS
    blocks = partition(models["Separate"], "head")
    assert {n: blocks[f"{n}.weight[head=1]"].shape for n in ("key", "value", "query", "q_proj")} == {
        "key": (8, D), "value": (D, 8), "query": (8, D), "q_proj": (8, D)}  # fmt: skip


def test_cross_attention_of_gpt2_has_key_and_value(models):
    path = "transformer.h.0.crossattention.c_attn"
    names = [name for name in partition(models["crossattention"]).names if path in name]
    assert names == [f"{path}.{kind}[{role}]" for kind in ("weight", "bias") for role in "kv"]
    conv = models["crossattention"].transformer.h[0].crossattention.c_attn
    block = partition(models["crossattention"])[f"{path}.weight[v]"]
    assert torch.equal(block.select(conv.weight), conv.weight[:, D:])


def test_grouped_queries_of_falcon(models):
    weight = models["falcon"].transformer.h[0].self_attention.query_key_value.weight
    blocks = partition(
        models["falcon"], "head", only="transformer.h.0.self_attention.query_key_value.weight"
    )
    expected = {
        "q": [0, 1, 4, 5],
        "k": [2, 6],
        "v": [3, 7],
    }  # heads of 8 rows: (2 groups, 2 queries + key + value)
    for role, starts in expected.items():
        for head, start in enumerate(starts):
            block = blocks[
                f"transformer.h.0.self_attention.query_key_value.weight[{role},head={head}]"
            ]
            assert torch.equal(block.select(weight), weight[8 * start : 8 * start + 8])


def test_what_nothing_tells_stays_whole_and_is_noted(models):
    assert partition(models["gpt2"], "head").notes == ()

    class Odd(Fused):
        def forward(self, x):
            raise RuntimeError("cannot be run alone")

    odd = partition(Odd(), "head")
    assert (
        odd.names == ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")
        and "(root)" in odd.notes[0]
    )


def test_heads_that_do_not_follow_one_another_are_not_cut():
    class Strided(Fused):
        def forward(self, x):
            q, k, v = (
                t.unflatten(-1, (-1, HEADS)).movedim(-1, 1) for t in self.qkv(x).chunk(3, -1)
            )
            return self.proj(attend(q, k, v))

    class Shuffled(Fused):
        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (HEADS, 3, -1)).transpose(1, 2).unbind(3)
            return self.proj(
                attend(q, k, v).unflatten(-1, (HEADS, -1)).transpose(-1, -2).flatten(2)
            )

    blocks = partition(Strided(), "head")
    assert "qkv.weight[q]" in blocks and "proj.weight" in blocks and len(blocks.notes) == 3
    assert not any("[" in name for name in partition(Shuffled(), "head").names)


def test_gains_that_start_at_zero_and_noise_hide_nothing():
    class Gained(Fused):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.zeros(D // HEADS))

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).transpose(1, 3).unbind(2)
            return self.proj(attend(q * self.gain, k, v + 0 * torch.randn(1)))

    model, before = Gained(), torch.get_rng_state()
    assert "qkv.weight[q,head=3]" in partition(model, "head")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_gate_or_mlp_is_no_attention():
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads, self.qkv, self.proj = HEADS, nn.Linear(D, 3 * D), nn.Linear(3 * D, D)

        def forward(self, x):
            return self.proj(self.qkv(x).relu())

    class Gated(Fused):
        def forward(self, x):
            a, b, c = self.qkv(x).chunk(3, -1)
            return self.proj(a * b.sigmoid() + c)

    for model in (Mlp(), Gated(), nn.Sequential(*(nn.Linear(D, D) for _ in range(4)))):
        assert not any("[" in name for name in partition(model, "head").names)


@pytest.mark.parametrize("name, path, x", [
    ("gpt2", "transformer.h.0.mlp.c_fc", torch.randn(3, D)), ("llama", "model.layers.0.mlp.up_proj", torch.randn(3, D)),
    ("ConvNet", "conv", torch.randn(2, 4, 5, 5)), ("ConvNet", "up", torch.randn(2, 6, 5, 5)), ("Tied", "tokens", None),
])  # fmt: skip
def test_a_row_is_one_output(models, name, path, x):
    layer = models[name].get_submodule(path)
    blocks = partition(models[name], "neuron", only=f"{path}.weight")
    x = torch.arange(64) if x is None else x
    before = layer(x)
    axis = 0 if name == "Tied" else 1  # an embedding's outputs are its tokens
    assert len(blocks) == before.shape[axis]
    for r in (0, 3, len(blocks) - 1):
        weight = placed(blocks[f"{path}.weight[row={r}]"], 7.0, layer.weight)
        changed = torch.func.functional_call(layer, {"weight": weight}, x) != before
        assert changed.movedim(axis, 0).flatten(1).any(1).nonzero().flatten().tolist() == [r]


def test_rows_of_fused_tensors_count_within_their_role(models):
    conv = models["gpt2"].transformer.h[1].attn.c_attn
    blocks = partition(models["gpt2"], "neuron")
    block = blocks["transformer.h.1.attn.c_attn.weight[k,row=17]"]
    assert torch.equal(block.select(conv.weight), conv.weight[:, D + 17]) and block.shape == (D,)
    assert (
        "transformer.h.1.attn.c_attn.bias[k]" in blocks and "transformer.h.1.ln_1.weight" in blocks
    )
    weight = models["neox"].gpt_neox.layers[0].attention.query_key_value.weight
    block = partition(models["neox"], "neuron")[
        "gpt_neox.layers.0.attention.query_key_value.weight[k,row=17]"
    ]
    assert torch.equal(
        block.select(weight), weight.unflatten(0, (HEADS, 3, 8))[2, 1, 1]
    )  # row 17 = head 2, feature 1


def test_tied_and_frozen_tensors(models):
    assert partition(models["Tied"], "tensor").names == ("tokens.weight", "frozen.bias")
    with pytest.raises(ValueError, match="requires grad"):
        partition(nn.Linear(2, 2).requires_grad_(False))


def test_layer_blocks(models):
    blocks = partition(models["ConvNet"], "layer")
    assert blocks.names == ("(root)", "conv", "norm", "up", "last")
    assert blocks["(root)"].parameters == ("scale", "table") and blocks["(root)"].numel == 7
    with pytest.raises(ValueError, match="several tensors"):
        _ = blocks["(root)"].parameter
    assert partition(models["ConvNet"], "weights").names == (
        "table",
        "conv.weight",
        "up.weight",
        "last.weight",
    )
    assert partition(models["ConvNet"], "official").names == (
        "table",
        "conv.weight",
        "up.weight",
        "last.weight",
    )


def test_official_blocks_of_gpt2_are_the_papers():
    expected = ["transformer.wte.weight"]
    for layer in (0, 3, 7, 11):
        ends = [
            "attn.c_attn.weight[q]",
            "attn.c_attn.weight[k]",
            "attn.c_attn.weight[v]",
            "attn.c_proj.weight",
        ]
        expected += [
            f"transformer.h.{layer}.{end}"
            for end in [*ends, "mlp.c_fc.weight", "mlp.c_proj.weight"]
        ]
    assert list(partition(gpt2(layers=12), "official").names) == expected and len(expected) == 25
    assert len(partition(gpt2(layers=1), "official")) == 7


def test_official_blocks_of_vit():
    separate = partition(vit(layers=12), "official").names
    assert len(separate) == 20 and {int(n.split(".")[2]) for n in separate[1:-1]} == {0, 6, 11}

    class FusedViT(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.position = nn.Conv2d(3, D, 4), nn.Parameter(torch.zeros(1, 4, D))
            self.layers = nn.Sequential(*(encoder() for _ in range(12)))
            self.head = nn.Linear(D, 10)

    names = partition(FusedViT(), "official").names
    assert len(names) == 14 and (names[0], names[-1]) == ("patches.weight", "head.weight")
    assert {n.split(".")[1] for n in names[1:-1]} == {
        "0",
        "6",
        "11",
    } and "layers.6.self_attn.in_proj_weight" in names


def test_own_blocks(models):
    model = models["gpt2"]
    weight = model.transformer.h[0].attn.c_attn.weight
    name = "transformer.h.0.attn.c_attn.weight"
    assert partition(model, [name]).names == (name,)
    assert partition(model, [f"{name}[q]", "*.wte.*"]).names == (
        "transformer.wte.weight",
        f"{name}[q]",
    )
    assert partition(model, ["*.attn.*"]).names == tuple(
        n for n in partition(model).names if ".attn." in n
    )
    assert partition(model, "head", only=["*[v,head=?]", "*.wpe.*"]).names == tuple(
        n for n in partition(model, "head").names if "[v,head=" in n or "wpe" in n
    )
    mine = partition(
        model, {"corner": (name, (slice(0, 4), slice(-2, None))), "rest": "transformer.wte.weight"}
    )
    assert mine.names == ("corner", "rest") and mine.preset == ""
    assert torch.equal(mine["corner"].select(weight), weight[:4, -2:])
    heads = partition(model, "head")
    again = partition(model, [heads[f"{name}[k,head=1]"], heads[f"{name}[q,head=0]"]])
    assert again.names == (f"{name}[k,head=1]", f"{name}[q,head=0]")
    assert partition(model, heads).names == heads.names


WTE, C_ATTN = "transformer.wte.weight", "transformer.h.0.attn.c_attn.weight"


@pytest.mark.parametrize("spec, words", [
    ("semantics", "semantics.*presets are tensor, semantic"),
    (["transformer.h.0.attn.c_atn.weight"], f"matches no.*close: {C_ATTN}"),
    (["*.nothing.*"], "matches no block"),
    ([], "empty"),
    ([C_ATTN, "*[k]"], rf"'{C_ATTN}' and '.*weight\[k\]'.*overlap"),
    ({"a": (WTE, (slice(0, 5),)), "b": (WTE, (slice(4, 9),))}, "'a' and 'b'.*overlap"),
    ({"a": (WTE, (slice(0, 9, 2),))}, "step 1"),
    ({"a": (WTE, (slice(70, 80),))}, "non-empty"),
    ({"a": (WTE, (slice(1), slice(1), slice(1)))}, "non-empty slices"),
    ({"a": "transformer.wte.wight"}, f"close: {WTE}"),
    ({"a": (WTE, (3,))}, "TypeError"),
    ([3], "TypeError"), (3, "TypeError"),
])  # fmt: skip
def test_errors_say_what_to_do(models, spec, words):
    kind = TypeError if words == "TypeError" else ValueError
    with pytest.raises(kind, match="spec" if kind is TypeError else words):
        partition(models["gpt2"], spec)


def test_more_errors(models):
    with pytest.raises(ValueError, match=r"'\*\.atn\.\*' matches no"):
        partition(models["gpt2"], "tensor", only="*.atn.*")
    with pytest.raises(TypeError, match="model is a dict"):
        partition({})
    with pytest.raises(KeyError, match=r"c_attn.weight\[z\].*close: .*c_attn.weight\[q\]"):
        partition(models["gpt2"])["transformer.h.0.attn.c_attn.weight[z]"]
    with pytest.raises(ValueError, match="no trainable parameter of this model"):
        partition(models["llama"], list(partition(models["gpt2"], "tensor")))
    with pytest.raises(ValueError, match="has shape"):
        partition(models["gpt2"])["transformer.wte.weight"].select(torch.zeros(3))


def test_a_million_blocks_cost_nothing_until_named():
    part = Part("w", (1000, 1000), (1000, 1000), (slice(0, 1000), slice(0, 1000)), (0, 1))
    blocks = Partition([Cut((part,), "w", counter="element", per_label=10**6)])
    assert len(blocks) == 10**6 and part.block_size == 1
    tensor = torch.arange(10**6).view(1000, 1000)
    block = blocks.cuts[0][123_456]
    assert (
        isinstance(block, Block)
        and block.name == "w[element=123456]"
        and int(block.select(tensor)) == 123_456
    )
    assert (
        part.rows(tensor).data_ptr() == tensor.data_ptr()
        and len({block, blocks.cuts[0][123_456]}) == 1
    )


def test_the_model_and_the_random_state_are_as_before(models):
    model = gpt2().train()
    model.transformer.h[0].attn.eval()
    state, random = {n: p.clone() for n, p in model.named_parameters()}, torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    with torch.no_grad(), torch.inference_mode():
        inside = [partition(model, preset).names for preset in PRESETS]
    assert inside == [partition(model, preset).names for preset in PRESETS]
    assert torch.equal(random, torch.get_rng_state()) and modes == [
        module.training for module in model.modules()
    ]
    assert all(
        torch.equal(state[n], p) and p.requires_grad and p.grad is None
        for n, p in model.named_parameters()
    )
    assert not any(module._forward_hooks for module in model.modules())
