"""What the published Adam-mini does, against the package itself where it is installed."""

import pytest
import torch
from problems.architectures import ARCHITECTURES, D, F, V, gemma, gpt2, llama, qwen3

from hessian_tools.blocks.adam_mini import Keywords, adam_mini_names
from hessian_tools.blocks.presets import partition

# By the published rules and the tiny models' names and shapes, by hand: tensors that a step crashes
# on.
CRASHES = {
    "gpt2": set(), "llama": set(), "qwen3": set(), "phi3": set(), "mamba": set(), "resnet": set(), "convnext": set(),
    "swin": set(),
    "bert": {"bert.embeddings.LayerNorm.weight",
             *(f"bert.encoder.layer.{i}.{x}output.LayerNorm.weight" for i in (0, 1) for x in ("", "attention."))},
    "vit": {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings",
            "vit.embeddings.patch_embeddings.projection.weight"},
    "neox": {"gpt_neox.final_layer_norm.weight"},
    "gemma": {f"model.layers.{i}.self_attn.k_proj.weight" for i in (0, 1)},
    "mixtral": {f"model.layers.{i}.mlp.experts.{x}_proj" for i in (0, 1) for x in ("gate_up", "down")},
    "t5": {"encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"},
}  # fmt: skip


def counts(blocks):
    found = {}
    for cut in blocks.cuts:
        found[cut.parameters[0]] = found.get(cut.parameters[0], 0) + cut.num_blocks
    return found


@pytest.mark.parametrize("name", CRASHES)
def test_crashes_are_findings(name):
    model = ARCHITECTURES[name]()
    blocks = partition(model, "adam_mini_names")
    crashed = {note.partition(":")[0] for note in blocks.notes if ": crashes, " in note}
    assert crashed == CRASHES[name]
    assert set(counts(blocks)) == {n for n, _ in model.named_parameters()} - crashed


def test_llama_is_cut_as_intended_and_gpt2_is_not():
    found = counts(adam_mini_names(llama()))
    attention = {name: found[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkvo"}
    assert attention == {"q": 4, "k": 4, "v": D, "o": D}
    mlp = {name: found[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")}
    assert mlp == {"gate": F, "up": F, "down": D}
    assert (
        found["lm_head.weight"] == found["model.embed_tokens.weight"] == V
        and found["model.norm.weight"] == 1
    )
    found = counts(adam_mini_names(gpt2()))
    assert (
        found["transformer.h.0.attn.c_attn.weight"]
        == found["transformer.h.0.attn.c_proj.weight"]
        == 1
    )
    assert found["transformer.h.0.mlp.c_fc.weight"] == D  # inputs: the tensor is (in, out)
    assert found["transformer.h.0.attn.c_attn.bias"] == 3 * D


def test_heads_of_another_size_are_cut_astray():
    found = counts(adam_mini_names(qwen3()))  # heads of 16 where dim / n_heads is 8
    assert (
        found["model.layers.0.self_attn.q_proj.weight"] == 8
        and found["model.layers.0.self_attn.k_proj.weight"] == 4
    )
    blocks = adam_mini_names(gemma(), dim=24, n_heads=3)  # runs of 192 = 6 rows of 32
    assert counts(blocks)["model.layers.0.self_attn.k_proj.weight"] == 2 and not blocks.notes
    odd = adam_mini_names(gemma(), dim=24, n_heads=36)  # runs of 16: half rows
    assert (
        counts(odd)["model.layers.0.self_attn.k_proj.weight"] == 24
        and "no whole rows" in odd.notes[0]
    )


def test_arguments():
    assert "does not divide by n_heads = 3" in adam_mini_names(llama(), dim=31, n_heads=3).notes[0]
    notes = adam_mini_names(ARCHITECTURES["resnet"]()).notes
    assert notes == tuple(
        f"the model's config does not tell {n}, so Adam-mini's default {d} is taken"
        for n, d in (("dim", 2048), ("n_heads", 32))
    )
    with pytest.raises(ValueError, match="n_heads is 0"):
        adam_mini_names(llama(), n_heads=0)
    own = adam_mini_names(
        gpt2(), keywords=Keywords(adam=(), mlp=("C_FC.WEIGHT".lower(),), embedding=())
    )
    found = counts(own)
    assert found["transformer.h.0.mlp.c_fc.weight"] == D and found["transformer.wte.weight"] == 1


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("arguments", [{}, {"dim": 24, "n_heads": 4}, {"dim": 16, "n_heads": 16}])
def test_the_package_itself_agrees(name, arguments):
    package = pytest.importorskip("adam_mini")
    torch.manual_seed(0)
    model = ARCHITECTURES[name]()
    config = getattr(model, "config", None)
    dim = arguments.get("dim", getattr(config, "hidden_size", 2048))
    heads = arguments.get("n_heads", getattr(config, "num_attention_heads", 32))
    blocks = adam_mini_names(model, **arguments)
    crashed = {note.partition(":")[0] for note in blocks.notes if ": crashes, " in note}
    cuts = {cut.name: cut for cut in blocks.cuts}
    for key, p in model.named_parameters():
        p.grad = torch.randn_like(p)
        optimizer = package.Adam_mini([(key, p)], dim=dim, n_heads=heads, verbose=False)
        if key in crashed:
            with pytest.raises((RuntimeError, IndexError)):
                optimizer.step()
            continue
        optimizer.step()
        state = optimizer.state[p]
        expected = cuts[key].rows({key: p.grad}).square().mean(1) * (1 - 0.999)
        torch.testing.assert_close(
            state.get("v", state.get("vmean")).flatten(), expected, rtol=1e-3, atol=1e-9
        )
