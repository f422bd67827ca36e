"""The zoo: published parameter counts, data with signal, seeds, nothing heavy imported early."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hessian_tools.problem import zoo
from hessian_tools.problem.networks import MLP, MLPMixer, NanoGPT
from hessian_tools.problem.problem import Problem

SMALL = [name for name in zoo.names() if "nano" in name or name == "mlp"]
ROOT = Path(zoo.__file__).parents[1]


def run(code: str) -> str:
    """The output of ``code`` in a fresh interpreter with warnings as errors."""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "published"),
    [
        # torchvision's table, with 10 classes in place of 1000
        ("resnet18", 11_689_512 - 990 * 513),
        ("vgg16", 138_357_544 - 990 * 4097),
        ("vit-base", 86_567_656 - 990 * 769),
        ("gpt2", 124_439_808),
        # the checkpoint's, its masked-token head included and its pooler not
        ("bert-base", 109_514_298),
        ("mlp-mixer", 59_880_472 - 990 * 769),  # 59 M in the paper
    ],
)
def test_full_size_models_have_the_published_number_of_parameters(name, published):
    assert zoo.SPECS[name].num_parameters() == published


def test_mixer_matches_the_count_written_out():
    tokens, d, hidden_tokens, hidden_channels, layers = 196, 768, 384, 3072, 12
    token_mixing = 2 * tokens * hidden_tokens + hidden_tokens + tokens
    block = 2 * 2 * d + token_mixing + 2 * d * hidden_channels + hidden_channels + d
    with torch.device("meta"):
        mixer = MLPMixer()
    assert (
        sum(p.numel() for p in mixer.parameters())
        == 3 * 16**2 * d + d + layers * block + 2 * d + d * 1000 + 1000
    )


def test_describe_lists_every_model_without_disturbing_the_generator():
    state = torch.get_rng_state()
    rows = zoo.describe()
    assert [row["name"] for row in rows] == zoo.names() and len(set(zoo.names())) == len(rows)
    assert torch.equal(torch.get_rng_state(), state)
    for row in rows:
        if row["name"] in SMALL:
            assert 300_000 <= row["parameters"] <= 2_000_000
        assert row["description"] and row["data"] and row["family"]


@pytest.mark.parametrize("name", SMALL)
def test_small_models_start_near_chance_and_learn_the_data(name):
    loaded = zoo.load(name, seed=1)
    parameters = sum(p.numel() for p in loaded.model.parameters())
    assert parameters == zoo.SPECS[name].num_parameters()
    assert not any(module.training for module in loaded.model.modules())
    problem = Problem(loaded.model, loaded.loss_fn, loaded.batches, batch_stats=loaded.batch_stats)
    classes = 10 if zoo.SPECS[name].data == "images" else 257
    assert problem.loss == pytest.approx(math.log(classes), rel=0.12)
    model, [batch] = loaded.model, loaded.batches
    has_batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert loaded.batch_stats is (True if has_batch_norm else None)
    model.train(has_batch_norm)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(12):
        optimizer.zero_grad()
        loss = loaded.loss_fn(model, batch)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.85 * problem.loss


def test_labels_belong_to_their_images():
    loaded = zoo.load("mlp", num_examples=1000, batch_size=800)
    (inputs, labels), (unseen, truth) = loaded.batches
    optimizer = torch.optim.Adam(loaded.model.parameters(), lr=1e-3)
    for _ in range(40):
        optimizer.zero_grad()
        loaded.loss_fn(loaded.model, (inputs, labels)).backward()
        optimizer.step()
    assert float((loaded.model(unseen).argmax(1) == truth).float().mean()) > 0.6  # chance is 0.1


def weights(loaded):
    return torch.nn.utils.parameters_to_vector(loaded.model.parameters()).detach()


@pytest.mark.parametrize("name", ["gpt2-nano", "gpt-nano", "bert-nano", "vit-nano", "resnet-nano"])
def test_the_seed_decides_weights_and_data_and_nothing_else_does(name):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = zoo.load(name, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = zoo.load(name, seed=0), zoo.load(name, seed=1)
    assert torch.equal(weights(first), weights(again)) and not torch.equal(
        weights(first), weights(other)
    )
    for side in (0, 1):
        assert torch.equal(first.batches[0][side], again.batches[0][side])
        assert not torch.equal(first.batches[0][side], other.batches[0][side])
    double = zoo.load(name, seed=0, dtype=torch.float64)
    assert weights(double).dtype == torch.float64 and torch.equal(
        weights(double).float(), weights(first)
    )
    loss = double.loss_fn(double.model, double.batches[0])
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(
        first.loss_fn(first.model, first.batches[0]).item(), rel=1e-4
    )


def test_float64_losses_have_no_float32_inside():
    """A step of 1e-9 changes the loss as its gradient says; rounding to float32 would drown it."""
    for name in ("gpt2-nano", "bert-nano", "vit-nano", "mixer-nano"):
        loaded = zoo.load(name, num_examples=1, dtype=torch.float64)
        parameters = list(loaded.model.parameters())
        loss = loaded.loss_fn(loaded.model, loaded.batches[0])
        gradient = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, slope in zip(parameters, gradient, strict=True):
                parameter -= 1e-9 * slope
            change = float(loss - loaded.loss_fn(loaded.model, loaded.batches[0]))
        assert change == pytest.approx(
            1e-9 * sum(float(slope.square().sum()) for slope in gradient), rel=1e-3
        )


def test_bert_reads_every_token_with_a_gradient():
    model = zoo.load("bert-nano").model
    assert all(
        module.padding_idx is None for module in model.modules() if isinstance(module, nn.Embedding)
    )


def test_settings_are_json_and_describe_what_was_loaded(tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("one two three four " * 100)
    loaded = zoo.load(
        "gpt2-nano",
        num_examples=5,
        batch_size=2,
        context=16,
        tokenizer="bpe",
        data=str(file),
        seed=7,
    )
    assert json.loads(json.dumps(loaded.settings)) == {
        "model": "gpt2-nano",
        "num_examples": 5,
        "batch_size": 2,
        "seed": 7,
        "context": 16,
        "tokenizer": "bpe",
        "data": str(file),
        "device": "cpu",
        "dtype": "float32",
    }
    assert [tuple(inputs.shape) for inputs, _ in loaded.batches] == [(2, 16), (2, 16), (1, 16)]
    assert loaded.model(loaded.batches[0][0]).logits.shape == (2, 16, 8192)
    assert loaded.model.config._attn_implementation == "sdpa" and str(file) in loaded.description
    image = zoo.load("vit-nano", num_examples=2, image_size=16)
    assert image.settings["image_size"] == 16 and image.batches[0][0].shape == (2, 3, 16, 16)


def test_the_head_counts_the_users_classes(tmp_path):
    from PIL import Image

    for name in "abc":
        (tmp_path / name).mkdir()
        Image.new("L", (9, 9), 30 * ord(name) % 256).save(tmp_path / name / "x.png")
    loaded = zoo.load("resnet-nano", data=str(tmp_path), num_examples=3)
    assert loaded.model(loaded.batches[0][0]).shape == (3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gpt2-nona",), "did you mean gpt2-nano"),
        (("nothing",), "is not in the zoo; it has resnet18, "),
        (("mlp", {"context": 8}), "context does not apply to mlp"),
        (("vit-nano", {"tokenizer": "bpe"}), "tokenizer does not apply to vit-nano"),
        (("gpt-nano", {"image_size": 32}), "image_size does not apply to gpt-nano"),
        (("vit-nano", {"image_size": 30}), "multiple of 4 for vit-nano, got 30"),
        (("mixer-nano", {"image_size": 0}), "image_size must be a whole number"),
        (("gpt-nano", {"context": 0}), "context must be a whole number"),
        (("gpt2", {"context": 1025}), "at most 1024 for gpt2"),
        (("gpt-nano", {"batch_size": 0}), "batch_size must be a whole number"),
        (("gpt-nano", {"tokenizer": "char"}), "tokenizer must be one of"),
        (("mlp", {"device": "abacus"}), "device must be one this machine has"),
        (("mlp", {"dtype": torch.int64}), "dtype must be a floating torch dtype"),
    ],
)
def test_bad_arguments_are_one_clear_error(arguments, message):
    name, *rest = arguments
    with pytest.raises(ValueError, match=message) as caught:
        zoo.load(name, **(rest[0] if rest else {}))
    assert "\n" not in str(caught.value)


def test_nano_gpt_is_causal_and_ties_its_head():
    torch.manual_seed(0)
    model = NanoGPT(11, 8, layers=2, d=16, num_heads=2)
    assert model.head.weight is model.tokens.weight
    assert NanoGPT(11, 8, layers=1, d=16, num_heads=2, tied=False).head.weight.shape == (11, 16)
    tokens = torch.randint(11, (3, 8))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_nano_gpt_attention_is_softmax_attention():
    torch.manual_seed(0)
    attention = NanoGPT(5, 6, layers=1, d=12, num_heads=3).double().blocks[0].attention
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    out = torch.zeros_like(x)
    for head in range(attention.num_heads):
        rows = slice(4 * head, 4 * head + 4)
        q, k, v = (
            (layer(x))[..., rows] for layer in (attention.query, attention.key, attention.value)
        )
        scores = (q @ k.mT / 2).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
        out[..., rows] = scores.softmax(-1) @ v
    torch.testing.assert_close(attention(x), attention.proj(out))


def test_initialisations_are_the_stated_ones():
    torch.manual_seed(0)
    gpt = NanoGPT(300, 50, layers=4, d=128)
    for name, parameter in gpt.named_parameters():
        if parameter.ndim > 1:
            std = 0.02 / math.sqrt(8) if "proj" in name else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
    mixer = MLPMixer(32, 4, 2, 96, 64, 384, 10)
    for module in mixer.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            assert module.weight.std().item() * module.weight[0].numel() ** 0.5 == pytest.approx(
                1, rel=0.1
            )
            assert not module.bias.any()


def test_mlp_has_the_layers_asked_for():
    model = MLP((6, 4, 3), bias=False, activation=nn.ReLU)
    first, second = model[1], model[3]
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(model(x), (x.flatten(1) @ first.weight.T).relu() @ second.weight.T)
    with pytest.raises(ValueError, match="sizes must be two or more"):
        MLP((3,))


def test_importing_the_zoo_imports_nothing_heavy():
    heavy = "{'torchvision', 'transformers', 'tokenizers', 'PIL', 'matplotlib'}"
    output = run(
        f"import sys, hessian_tools.problem.zoo; print(sorted({heavy} & set(sys.modules)))"
    )
    assert output.strip() == "[]"


def test_repair_makes_transformers_and_torchvision_usable():
    """Where a plain import works already, repair has nothing to do and says so."""
    output = run(
        "failed = False\n"
        "for name in ('GPT2LMHeadModel', 'ViTForImageClassification', 'BertForMaskedLM'):\n"
        "    try:\n"
        "        import transformers; getattr(transformers, name)\n"
        "    except ImportError: failed = True\n"
        "from hessian_tools.problem.vision import repair, torchvision\n"
        "assert repair() is failed and repair() is False\n"
        "from transformers import GPT2LMHeadModel, ViTForImageClassification, BertForMaskedLM\n"
        "import torchvision as again\n"
        "assert torchvision() is again and again.models.resnet18 and again.datasets.ImageFolder\n"
        "print('usable')"
    )
    assert output.strip() == "usable"


def test_repair_leaves_other_failures_alone(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('something else')")
    output = run(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from hessian_tools.problem.vision import repair, torchvision\n"
        "assert repair() is False\n"
        "try: torchvision()\n"
        "except RuntimeError as error: print(error)"
    )
    assert output.strip() == "something else"
