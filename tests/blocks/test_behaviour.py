"""Heads of attention as its code computes them: each head's block reaches its own slice of the
attention's result alone, whatever the family."""

import pytest
import torch
from problems import transformers
from problems.architectures import HEADS, SIZES, VOCABULARY, D
from torch import nn

from hessian_tools.blocks.presets import partition

IDS = {"input_ids": torch.tensor([[5, 9, 2, 17, 4, 11]])}
IMAGE = {"pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
MLA = {
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "num_key_value_heads": HEADS,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 2,
}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}
WINDOWS = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, HEADS],
    "window_size": 4,
}
GPT = {"n_embd": D, "n_layer": 1, "n_head": HEADS, "n_positions": 16, "rotary_dim": 4}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}

# name of the configuration: its arguments, the model's, the path of the first attention, of its
# output projection inside, and how many heads there are
FAMILIES = {
    "Deberta": (SIZES | VOCABULARY | RELATIVE, IDS, "encoder.layer.0.attention", "output.dense", 4),
    "DebertaV2": (
        SIZES | VOCABULARY | RELATIVE | {"position_buckets": 4, "share_att_key": False},
        IDS,
        "encoder.layer.0.attention",
        "output.dense",
        4,
    ),
    "GptOss": (SIZES | VOCABULARY | GROUPED | EXPERTS, IDS, "layers.0.self_attn", "o_proj", 4),
    "Swin": (WINDOWS, IMAGE, "encoder.layers.0.blocks.0.attention", "o_proj", 2),
    "Swinv2": (WINDOWS, IMAGE, "encoder.layers.0.blocks.0.attention", "output.dense", 2),
    "DeepseekV2": (SIZES | VOCABULARY | MLA, IDS, "layers.0.self_attn", "o_proj", 4),
    "DeepseekV3": (SIZES | VOCABULARY | MLA, IDS, "layers.0.self_attn", "o_proj", 4),
    "CodeGen": (GPT | VOCABULARY, IDS, "h.0.attn", "out_proj", 4),
    "GPTJ": (GPT | VOCABULARY, IDS, "h.0.attn", "out_proj", 4),
    "Falcon": (
        SIZES | VOCABULARY | {"new_decoder_architecture": False, "multi_query": True},
        IDS,
        "h.0.self_attention",
        "dense",
        4,
    ),
    "Ernie4_5": (SIZES | VOCABULARY | GROUPED, IDS, "layers.0.self_attn", "o_proj", 4),
    "Qwen3Next": (
        SIZES
        | VOCABULARY
        | GROUPED
        | {"layer_types": ["full_attention"] * 2, "num_experts": 2}
        | {"num_experts_per_tok": 1},
        IDS,
        "layers.0.self_attn",
        "o_proj",
        4,
    ),
}
# blocks of some tensors: name inside the attention, counts by what is before "head="
COUNTS = {
    "Deberta": {"self.in_proj.weight": "q4 k4 v4", "self.q_bias": "4", "self.pos_proj.weight": "4"},
    "DebertaV2": {"self.key_proj.weight": "4", "self.pos_query_proj.weight": "4"},
    "GptOss": {"q_proj.weight": "4", "k_proj.weight": "2", "sinks": "4"},
    "Swin": {"relative_position_bias.relative_position_bias_table": "2", "v_proj.bias": "2"},
    "Swinv2": {"self.logit_scale": "2", "self.continuous_position_bias_mlp.2.weight": "2"},
    "DeepseekV2": {"q_b_proj.weight": "4", "kv_b_proj.weight": "k4 v4"},
    "DeepseekV3": {"q_b_proj.weight": "4", "kv_b_proj.weight": "k4 v4"},
    "CodeGen": {"qkv_proj.weight": "q4 v4 k4"},
    "Falcon": {"query_key_value.weight": "q4 k1 v1"},
    "Qwen3Next": {"q_proj.weight": "q4 gate4", "k_proj.weight": "2"},
}


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers(), f"{family}Config")(**FAMILIES[family][0])
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = transformers().AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.double()


def context(model: nn.Module, module: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the output projection ``module`` is given, (tokens, features)."""
    taken: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, given: taken.append(given[0].detach()))
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return taken[0].flatten(0, -2)


def heads_changed(before, after, count):
    by_head = (before - after).abs().unflatten(-1, (count, -1)).amax((0, 2))
    return tuple((by_head > 1e-12 * before.abs().max()).nonzero().flatten().tolist())


def shift(model, block):
    """Adds noise to one block, and returns how to take it away again."""
    parameter = model.get_parameter(block.parameters[0])
    before = parameter.detach().clone()
    with torch.no_grad():
        for part in block.as_cut().parts:
            noise = 0.5 + torch.rand(1, part.block_size, dtype=before.dtype)
            part.place(part.rows(before) + noise, parameter)

    def back():
        with torch.no_grad():
            parameter.copy_(before)

    return back


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_is_what_reaches_its_slice_of_the_result_alone(family):
    _, inputs, path, output, count = FAMILIES[family]
    model = build(family)
    projection = model.get_submodule(f"{path}.{output}")
    before = context(model, projection, inputs)
    blocks = partition(model, "head", only=f"{path}.*")
    by_tensor: dict[tuple[str, str], list[tuple[int, ...]]] = {}
    for block in blocks:
        name, _, inside = block.name.removeprefix(f"{path}.").partition("[")
        if "head=" not in inside or name.startswith(output):
            continue
        back = shift(model, block)
        after = context(model, projection, inputs)
        back()
        label = inside.partition(",")[0] if "," in inside else ""
        by_tensor.setdefault((name, label), []).append(heads_changed(before, after, count))
    for (name, _), of_one in by_tensor.items():
        if name.endswith("bias") and not any(of_one):
            continue  # it shifts all scores of a query alike, which the softmax does not see
        # Every head once, in order: a key of several queries changes all of these.
        assert [head for heads in of_one for head in heads] == list(range(count)), by_tensor
        assert len(set(map(len, of_one))) == 1
    counts = {}
    for (name, label), of_one in by_tensor.items():
        counts[name] = f"{counts.get(name, '')} {label}{len(of_one)}".strip()
    assert COUNTS.get(family, {}).items() <= counts.items(), counts
    for head in range(count):
        silent = before.clone().unflatten(-1, (count, -1))
        silent[:, head] = 0
        weight = projection.weight.detach().clone()
        columns = blocks[f"{path}.{output}.weight[head={head}]"].as_cut().parts[0]
        columns.place(torch.zeros(1, columns.block_size), weight)
        without = before @ weight.T
        assert torch.allclose(without, silent.flatten(1) @ projection.weight.T, atol=1e-12)


class Eva(nn.Module):
    """timm's EVA: one matrix without bias, biases of query and value, a norm before the output."""

    def __init__(self, is_normed=True):
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(D)) for _ in range(2))
        self.norm = nn.LayerNorm(D) if is_normed else nn.Identity()
        self.proj = nn.Linear(D, D)

    def forward(self, x, rope=None):
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = nn.functional.linear(x, weight=self.qkv.weight, bias=bias)
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).transpose(1, 3).unbind(2)
        result = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(self.norm(result.transpose(1, 2).flatten(2)))


def timm_eva(**options):
    eva = pytest.importorskip("timm.models.eva")
    return eva.EvaAttention(D, HEADS, norm_layer=nn.LayerNorm, **options)


EVAS = {
    "look-alike": Eva,
    "without norm": lambda: Eva(is_normed=False),
    "timm": timm_eva,
    "timm, separate": lambda: timm_eva(qkv_fused=False, scale_norm=False),
    "timm, bias apart": lambda: timm_eva(qkv_bias_separate=True),
    "timm, gated": lambda: timm_eva(gated=True, qk_norm=True),
}


@pytest.mark.parametrize("name", EVAS)
def test_eva(name):
    torch.manual_seed(0)
    module = EVAS[name]().eval().double()
    norm = module.norm
    x = {"x": torch.randn(2, 5, D)}
    before = context(module, norm, x)
    seen: dict[str, list[int]] = {}
    for block in partition(module, "head"):
        tensor, _, inside = block.name.partition("[")
        if "head=" not in inside or tensor.startswith(("proj", "gate")):
            continue
        back = shift(module, block)
        label = inside.partition("head=")[0]
        seen.setdefault(tensor + label, []).extend(
            heads_changed(before, context(module, norm, x), HEADS)
        )
        back()
    if "separate" in name:
        expected = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "q_proj.bias", "v_proj.bias")
    else:
        expected = ("qkv.weightq,", "qkv.weightk,", "qkv.weightv,", "q_bias", "v_bias")
    assert seen == {tensor: list(range(HEADS)) for tensor in expected}
    assert f"proj.weight[head={HEADS - 1}]" in partition(module, "head")


def test_mixed_heads_are_not_cut():
    class Talking(Eva):
        """Talking heads (Shazeer et al. 2020): scores are mixed across heads."""

        def __init__(self):
            super().__init__()
            self.mix = nn.Parameter(torch.randn(HEADS, HEADS))

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).transpose(1, 3).unbind(2)
            scores = torch.einsum("bhqk,hg->bgqk", q @ k.transpose(-1, -2), self.mix)
            return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    blocks = partition(Talking(), "head", only="qkv.weight")
    assert blocks.names == tuple(f"qkv.weight[{role},head=0]" for role in "qkv")  # one of all


def test_a_sink_that_is_no_parameter_leaves_the_layout_unread():
    class OffByOne(Eva):
        num_heads = HEADS

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).transpose(1, 3).unbind(2)
            scores = (q @ k.transpose(-1, -2)).exp()
            shares = scores / (1 + scores.sum(-1, keepdim=True))
            return self.proj((shares @ v).transpose(1, 2).flatten(2))

    assert not any("[" in name for name in partition(OffByOne(), "head").names)
