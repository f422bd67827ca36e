"""Every preset on every architecture: disjoint, what it covers, save and load; adam_mini's counts
by hand."""

import math

import pytest
import torch
from problems.architectures import ARCHITECTURES, HEADS, KV, D, F, V, hf, inputs
from torch import nn

from hessian_tools.blocks.kinds import KINDS
from hessian_tools.blocks.ownership import check_disjoint
from hessian_tools.blocks.partition import Partition
from hessian_tools.blocks.presets import PRESETS, alternatives, partition
from hessian_tools.blocks.survey import WAYS, Survey

PARTIAL = ("weights", "official", "adam_mini_names")  # presets that say what they leave out


@pytest.fixture(scope="module")
def surveys():
    torch.manual_seed(0)
    return {name: Survey(build()) for name, build in ARCHITECTURES.items()}


def covered(cuts):
    """Entries of every tensor in blocks; with disjointness checked elsewhere, equal to its size if
    it is covered."""
    found = {}
    for part in (part for cut in cuts for part in cut.parts):
        found[part.parameter] = found.get(part.parameter, 0) + part.num_blocks * part.block_size
    return found


def counted(survey, preset):
    found = {}
    for cut in PRESETS[preset](survey):
        found[cut.parameters[0]] = found.get(cut.parameters[0], 0) + cut.num_blocks
    return found


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_disjoint_covering_and_the_same_after_loading(surveys, name, preset, tmp_path):
    survey = surveys[name]
    cuts = PRESETS[preset](survey)
    check_disjoint(cuts)
    sizes = {site.name: math.prod(site.shape) for site in survey.sites}
    assert covered(cuts).items() <= sizes.items()
    if preset not in PARTIAL:
        assert covered(cuts) == sizes
    elif preset == "weights":
        assert covered(cuts) == {
            site.name: sizes[site.name] for site in survey.sites if len(site.shape) > 1
        }
    else:
        assert covered(cuts)
    blocks = Partition(tuple(cuts), preset, tuple(survey.notes))
    assert Partition.from_json(blocks.to_json(tmp_path / "blocks.json"), survey.model) == blocks


def test_presets_are_data():
    for name, preset in PRESETS.items():
        assert preset.says and preset.source and bool(preset.rules) != bool(preset.cuts), name
        for rules in filter(None, (preset.rules, preset.otherwise)):
            assert (
                "else" in rules
                and set(rules) <= {*KINDS, "vector", "else"}
                and set(rules.values()) <= set(WAYS)
            )


# Algorithm 3 by hand: q by head, k by key/value head, v, o and MLP by output neuron, embedding and
# output by token; a fused tensor is the sum of its parts.
ATTENTION = {"q_proj": HEADS, "k_proj": HEADS, "v_proj": D, "o_proj": D}
GATED = {"gate_proj": F, "up_proj": F, "down_proj": D}
TABLES = {"embed_tokens": V, "lm_head": V}
ADAM_MINI = {
    "gpt2": {"c_attn": 2 * HEADS + D, "attn.c_proj": D, "c_fc": F, "mlp.c_proj": D, "wte": V, "wpe": 1},
    "bert": {"query": HEADS, "key": HEADS, "value": D, "attention.output.dense": D, "intermediate.dense": F,
             "0.output.dense": D, "1.output.dense": D, "transform.dense": D, "word_embeddings": V,
             "position_embeddings": 1, "token_type_embeddings": 1},
    "bert_classifier": {"query": HEADS, "value": D, "word_embeddings": V, "token_type_embeddings": 1, "pooler.dense": D,
                        "classifier": 2},
    "vit": {**ATTENTION, "fc1": F, "fc2": D, "classifier": 5, "projection": 1},
    "llama": {**ATTENTION, **GATED, **TABLES},
    "qwen3": {**ATTENTION, **GATED, **TABLES, "k_proj": KV, "v_proj": KV * 16},
    "gemma": {**ATTENTION, **GATED, "embed_tokens": V, "k_proj": 1, "v_proj": 12},
    "phi3": {"qkv_proj": HEADS + KV + KV * 8, "o_proj": D, "gate_up_proj": 2 * F, "down_proj": D, **TABLES},
    "neox": {"query_key_value": 2 * HEADS + D, "attention.dense": D, "h_to_4h": F, "4h_to_h": D, "embed_in": V,
             "lm_head": V},
    "mixtral": {**ATTENTION, "k_proj": KV, "v_proj": KV * 8, "gate": 3, **TABLES},
    "gpt_oss": {"router": 4, **TABLES, "q_proj": HEADS, "k_proj": KV, "v_proj": KV * 8, "o_proj": D},
    "t5": {"Attention.q": HEADS, "Attention.k": HEADS, "Attention.v": HEADS * 12, "Attention.o": D, "wi": F, "wo": D,
           "shared": V, "relative_attention_bias": 1},
    "mamba": {"embeddings": 1, "in_proj": 1, "x_proj": 1, "conv1d": 1},
    "resnet": {"conv1": 1, "fc": 1},
    "convnext": {"0.0": 1, "classifier.2": 1},
    "swin": {"features.1.0.attn.qkv": 2 * 2 + 16, "features.3.1.attn.qkv": 2 * HEADS + 32, "features.3.0.attn.proj": 32,
             "features.1.0.mlp.0": 64, "features.3.0.mlp.3": 32, "reduction": 32, "head": 5, "features.0.0": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_adam_mini_has_as_many_blocks_as_the_algorithm_says(surveys, name):
    found = counted(surveys[name], "adam_mini")
    seen = set()
    for ending, blocks in ADAM_MINI[name].items():
        hits = [n for n in found if n.endswith(f"{ending}.weight")]
        assert hits and {found[n] for n in hits} == {blocks}, ending
        seen |= set(hits)
    fused = {
        f"{path}.bias"
        for path, _ in surveys[name].model.named_modules()
        if surveys[name].kinds.get(f"{path}.weight") == "q/k/v"
    }
    for other in set(found) - seen:
        if surveys[name].kinds[other] in (
            "norm",
            "bias",
            "output bias",
            "position",
            "class token",
            "other",
            "conv",
        ):
            assert found[other] == (3 if other in fused else 1), other
    if name not in ("mamba", "resnet", "convnext"):
        unseen = {
            n
            for n in set(found) - seen
            if surveys[name].kinds[n] in ("q", "k", "v", "o", "mlp", "embedding")
        }
        assert not unseen or name in ("bert_classifier", "swin")


@pytest.mark.parametrize("name, axis", [("mixtral", 1), ("gpt_oss", 2)])
def test_a_row_of_an_expert_is_one_of_its_outputs(surveys, name, axis):
    model = surveys[name].model
    for stem, outputs, inside in (("gate_up_proj", 2 * F, D), ("down_proj", D, F)):
        tensor = f"model.layers.0.mlp.experts.{stem}"
        weight = model.get_parameter(tensor)
        found = {block.name: block for block in partition(model, "adam_mini", only=tensor)}
        assert len(found) == weight.shape[0] * outputs and weight.shape[axis] == outputs
        block = found[f"{tensor}[row={outputs + 7}]"]  # expert 1, neuron 7
        assert torch.equal(block.select(weight), weight[1].select(axis - 1, 7)) and block.shape == (
            inside,
        )


def test_kinds(surveys):
    kinds = surveys["vit"].kinds
    assert (
        kinds["vit.embeddings.cls_token"] == "class token"
        and kinds["vit.embeddings.position_embeddings"] == "position"
    )
    assert (
        kinds["vit.embeddings.patch_embeddings.projection.weight"] == "conv"
        and kinds["classifier.bias"] == "output bias"
    )
    assert kinds["vit.layernorm.weight"] == "norm" and kinds["vit.layers.0.mlp.fc1.bias"] == "bias"
    assert surveys["gpt2"].kinds["transformer.wte.weight"] == "tied"
    assert surveys["mamba"].kinds["backbone.layers.0.mixer.dt_proj.weight"] == "mlp"
    assert surveys["gpt_oss"].kinds["model.layers.0.self_attn.q_proj.weight"] == "q"
    assert not any("query/key/value layout" in note for note in surveys["gpt_oss"].notes)
    assert {
        kind
        for survey in surveys.values()
        for joined in survey.kinds.values()
        for kind in joined.split("/")
    } <= set(KINDS)


def test_names_play_no_part_in_kinds():
    class Renamed(nn.Module):
        """GPT-2 under names that say nothing, tokens and positions in swapped order."""

        def __init__(self):
            super().__init__()
            self.query, self.output = nn.Embedding(16, D), nn.Embedding(V, D)  # positions, tokens
            self.embed = nn.ModuleList(
                nn.TransformerEncoderLayer(D, HEADS, F, batch_first=True) for _ in range(2)
            )
            self.bias = nn.Linear(D, 16)

        def forward(self, ids):
            x = self.output(ids) + self.query(torch.arange(ids.shape[1]))
            for layer in self.embed:
                x = layer(x)
            return self.bias(x)

    kinds = Survey(Renamed()).kinds
    assert (
        kinds["output.weight"] == "embedding" and kinds["query.weight"] == "position"
    )  # though 16 are the outputs
    assert kinds["bias.weight"] == "output" and kinds["embed.1.self_attn.in_proj_weight"] == "q/k/v"
    model = Renamed()
    model.forward = None  # cannot run: shapes decide
    assert Survey(model).kinds["query.weight"] == "embedding"


def test_adalayer_star_and_token_and_element(surveys):
    found = counted(surveys["vit"], "adalayer_star")
    assert found["classifier.weight"] == found["classifier.bias"] == 5
    assert (
        found["vit.layers.0.mlp.fc1.weight"] == 1 == found["vit.layers.0.attention.q_proj.weight"]
    )
    found = counted(surveys["gpt2"], "adalayer_star")
    assert found["transformer.wte.weight"] == V and found["transformer.h.0.attn.c_attn.weight"] == 3
    assert counted(surveys["llama"], "adalayer_star")["model.embed_tokens.weight"] == 1
    assert counted(surveys["llama"], "adalayer")["lm_head.weight"] == 1
    found = counted(surveys["llama"], "token")
    assert (
        found["model.embed_tokens.weight"] == found["lm_head.weight"] == V
        and sum(found.values()) == 2 * V + len(found) - 2
    )
    assert sum(counted(surveys["bert"], "element").values()) == sum(
        p.numel() for p in surveys["bert"].model.parameters()
    )


def swin_heads(model, block):
    """Which heads of the first window attention's query, key and value change if ``block`` is set
    to zero."""
    layer, seen = model.features[1][0].attn, []
    weight = layer.qkv.weight.detach().clone()
    x = torch.randn(1, 4, 4, 16, generator=torch.Generator().manual_seed(0))
    for changed in (False, True):
        w = weight.clone()
        if changed:
            for part in block.as_cut().parts:
                part.place(torch.zeros(1, part.block_size), w)
        seen.append((x.view(16, 16) @ w.T).view(16, 3, 2, 8))  # torchvision: (role, head, feature)
    return (seen[0] != seen[1]).any(0).any(-1).nonzero().tolist()


def test_swin_roles_and_heads_are_torchvisions(surveys):
    model = surveys["swin"].model
    blocks = partition(model, "head")
    for number, role in enumerate("qkv"):
        for head in range(2):
            block = blocks[f"features.1.0.attn.qkv.weight[{role},head={head}]"]
            assert swin_heads(model, block) == [[number, head]]
    assert "features.1.0.attn.proj.weight[head=1]" in blocks
    with torch.no_grad():
        assert model(inputs("swin")[""]).shape == (2, 5)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "mixtral", "gpt_oss", "convnext", "swin", "vit"])
def test_alternatives_cover_their_tensor_each_once(surveys, name):
    survey = surveys[name]
    for site in survey.sites:
        found = alternatives(survey, site.name)
        assert next(iter(found)) == "whole" and found["whole"].num_blocks == 1
        entries = torch.arange(math.prod(site.shape)).view(site.shape)
        ways = set()
        for cut in found.values():
            rows = cut.rows({site.name: entries})
            assert torch.equal(rows.flatten().sort().values, entries.flatten())
            ways.add(tuple(sorted(tuple(sorted(row)) for row in rows.tolist())))
            assert len(set(cut.names)) == cut.num_blocks
        assert len(ways) == len(found)


def test_alternatives_are_named_by_what_they_follow(surveys):
    blocks = {
        key: cut.num_blocks
        for key, cut in alternatives(surveys["gpt2"], "transformer.h.0.attn.c_attn.weight").items()
    }
    assert blocks == {
        "whole": 1,
        "roles": 3,
        "heads": 3 * HEADS,
        "rows": 3 * D,
        "columns": D,
        "elements": 3 * D * D,
    }
    c_fc = surveys["gpt2"].model.transformer.h[0].mlp.c_fc.weight
    rows = alternatives(surveys["gpt2"].model, "transformer.h.0.mlp.c_fc.weight")["rows"]
    assert torch.equal(rows[5].select(c_fc), c_fc[:, 5])
    experts = alternatives(surveys["mixtral"], "model.layers.0.mlp.experts.down_proj")
    assert {key: cut.num_blocks for key, cut in experts.items()} == {
        "whole": 1, "experts": 3, "rows": 3 * D, "columns": 3 * F, "elements": 3 * D * F}  # fmt: skip
    names = alternatives(surveys["phi3"], "model.layers.0.self_attn.qkv_proj.weight")["heads"].names
    assert [name.split("[")[1] for name in names] == [
        f"{r},head={h}]" for r, n in (("q", 4), ("k", 2), ("v", 2)) for h in range(n)
    ]
    assert set(alternatives(surveys["convnext"], "features.1.0.layer_scale")) == {
        "whole",
        "axis 0",
        "elements",
    } - {"elements"}
    with pytest.raises(ValueError, match=r"wte.wight.*close: transformer.wte.weight"):
        alternatives(surveys["gpt2"], "transformer.wte.wight")


def test_a_model_in_training_is_left_as_it_was():
    model = hf("BertForSequenceClassification", hidden_size=D, num_attention_heads=HEADS, num_hidden_layers=1,
               intermediate_size=F, vocab_size=V)  # fmt: skip
    model.train()
    model.bert.encoder.eval()
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    partition(model, "adam_mini")
    assert modes == [m.training for m in model.modules()] and torch.equal(
        random, torch.get_rng_state()
    )
    assert not any(m._forward_pre_hooks for m in model.modules())
