"""``--model FOLDER``: what transformers has saved, with its own tokenizer, in every command."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import hessian_tools as ht
from hessian_tools.app import cli
from hessian_tools.app.models import saved_model
from hessian_tools.app.models.saved_problem import problem_from_folder, stream_from_folder
from hessian_tools.curvature.quick import verify_quickly
from hessian_tools.problem.vision import repair

repair()
import transformers  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

WORDS = "the quick brown fox jumps over a lazy dog and so on until it is night".split()
TEXT = " ".join(WORDS * 12)
FAST = ("--probes", "2", "--steps", "3", "--no-verify")
SMALL = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def tokenizer(**special: str) -> transformers.PreTrainedTokenizerFast:
    """A word a token; special tokens come after the words."""
    vocabulary = {word: number for number, word in enumerate([*dict.fromkeys(WORDS), "[UNK]"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", **special)


def gpt2(vocabulary: int = 16) -> torch.nn.Module:
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 12, "vocab_size": vocabulary}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def bert(kind: str, **more: object) -> torch.nn.Module:
    config = transformers.BertConfig(vocab_size=19, max_position_embeddings=12, **SMALL, **more)
    return getattr(transformers, kind)(config)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The folders that the tests copy, so that a model is made once."""
    root = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    special = {"mask_token": "[MASK]", "pad_token": "[PAD]"}
    for name, model, words in (
        ("decoder", gpt2(), tokenizer()),
        ("bert", bert("BertForMaskedLM"), tokenizer(**special)),
        ("classes", bert("BertForSequenceClassification", num_labels=3), tokenizer(**special)),
        ("encoder", bert("BertModel"), tokenizer(**special)),
    ):
        model.save_pretrained(root / name)
        words.save_pretrained(root / name)
    vit = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=10, **SMALL)
    transformers.ViTForImageClassification(vit).save_pretrained(root / "vit")
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(root / "vit")
    return root


@pytest.fixture(autouse=True)
def folders(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)


def run(*words: str) -> int:
    return cli.main(list(words))


def refused(reference: str, **options: object) -> str:
    with pytest.raises(ValueError, match=f"^--model {reference}: ") as caught:
        problem_from_folder(reference, **options)
    return str(caught.value)


# ------------------------------------------------------------------------------- the right problem


def test_a_language_model_predicts_the_next_of_its_own_tokens():
    problem, identity = problem_from_folder("decoder", data="text.txt", num_examples=4, context=8)
    (batch,) = problem.batches
    assert batch["input_ids"].shape == (4, 8)
    words = tokenizer().decode(batch["input_ids"][0])
    assert words in TEXT
    assert identity["architecture"] == "GPT2LMHeadModel" and identity["task"] == "next token"
    # an independent loss: every token but the first, from the logits of the one before
    model = transformers.GPT2LMHeadModel.from_pretrained("decoder").eval()
    logits = model(batch["input_ids"]).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten()
    )
    assert problem.loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert problem.counts == [4 * 7]


def test_a_tokenizer_of_bytes_has_no_files_of_its_own():
    gpt2(vocabulary=300).save_pretrained("bytes")
    transformers.ByT5Tokenizer(extra_ids=0).save_pretrained("bytes")
    problem, _ = problem_from_folder("bytes", data="text.txt", num_examples=2, context=8)
    tokens = problem.batches[0]["input_ids"]
    assert bytes((tokens[0] - 3).tolist()).decode() in TEXT  # three special tokens come first


def test_a_masked_language_model_predicts_the_masked():
    problem, _ = problem_from_folder("bert", data="text.txt", num_examples=5, batch_size=2)
    assert [len(batch["input_ids"]) for batch in problem.batches] == [2, 2, 1]
    assert problem.batches[0]["input_ids"].shape[1] == 12  # all its positions
    mask = tokenizer(mask_token="[MASK]", pad_token="[PAD]").mask_token_id
    hidden = torch.cat([batch["input_ids"] for batch in problem.batches]) == mask
    predicted = torch.cat([batch["labels"] for batch in problem.batches]) != -100
    assert bool(hidden.any()) and bool(predicted[hidden].all())
    assert sum(problem.counts) == int(predicted.sum())


def test_classes_of_sequences_come_by_number_or_name():
    Path("labelled.tsv").write_text("0\tthe quick fox\nLABEL_2\tlazy dog and so on\n\n1\tnight\n")
    problem, identity = problem_from_folder("classes", data="labelled.tsv", num_examples=3)
    (batch,) = problem.batches
    assert sorted(batch["labels"].tolist()) == [0, 1, 2]
    assert batch["attention_mask"].sum(1).sort().values.tolist() == [1, 3, 5]
    assert identity["task"] == "classes of sequences" and math.isfinite(problem.loss)


def test_images_go_through_the_models_own_processor():
    problem, identity = problem_from_folder("vit", num_examples=6)
    (batch,) = problem.batches
    assert batch["pixel_values"].shape == (6, 3, 8, 8)
    assert identity["task"] == "classes of images" and math.isfinite(problem.loss)


def test_weights_are_those_saved_in_the_dtype_asked_for():
    gpt2().to(torch.bfloat16).save_pretrained("half")
    tokenizer().save_pretrained("half")
    single, _ = problem_from_folder("half", data="text.txt")
    assert single.dtype == torch.float32
    double, _ = problem_from_folder("decoder", data="text.txt", dtype=torch.float64)
    saved = transformers.GPT2LMHeadModel.from_pretrained("decoder")
    for name, parameter in saved.named_parameters():
        assert torch.equal(double.parameters[name], parameter.double())


def test_a_seed_draws_the_examples():
    first, again, other = (
        problem_from_folder("decoder", data="text.txt", num_examples=3, seed=seed)[0].batches[0]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert not torch.equal(first["input_ids"], other["input_ids"])


@pytest.mark.parametrize("folder", ["decoder", "bert", "vit"])
def test_products_are_right(folder):
    data = None if folder == "vit" else "text.txt"
    problem, _ = problem_from_folder(folder, data=data, num_examples=2)
    assert verify_quickly(ht.HessianOperator(problem)).passed


def test_the_stream_has_all_the_data():
    stream = stream_from_folder("decoder", data="text.txt", context=8)
    windows = len(WORDS) * 12 // 8
    held_out = sum(len(batch["labels"]) for batch in stream.held_out())
    assert stream.source.size + held_out == windows and stream.batch_size == 8
    first = stream.batch(0)
    assert first["input_ids"].shape == (8, 8) and torch.equal(first["input_ids"], first["labels"])


# ------------------------------------------------------------------------------------ the commands


@pytest.mark.parametrize("command", ["js0", "spectrum"])
def test_spectra_of_a_folder(command, capsys):
    assert run(command, "--model", "./decoder", "--data", "text.txt", *FAST, "--json") == 0
    assert json.loads(capsys.readouterr().out)


def test_js0_of_a_masked_model_resumes(capsys):
    words = ("js0", "--model", "bert", "--data", "text.txt", *FAST, "--out", "results")
    assert run(*words) == 0
    config = json.loads(Path("results/config.json").read_text())
    assert "BertForMaskedLM" in json.dumps(config)
    assert run(*words) == 0
    assert "finished before" in capsys.readouterr().err


def test_partition_of_a_folder(capsys):
    words = ("--only", "*c_fc*", "--probes", "3", "--blocks", "4", "--no-verify")
    assert run("partition", "--model", "decoder", "--data", "text.txt", *words, "--json") in (0, 1)
    assert "c_fc" in capsys.readouterr().out


def test_a_race_on_a_folder(capsys):
    words = ("race", "--model", "decoder", "--data", "text.txt", "--budget", "64steps", "--json")
    assert run(*words) == 0
    found = json.loads(capsys.readouterr().out)
    assert "sgd" in json.dumps(found) and "adam" in json.dumps(found)


# ---------------------------------------------------------------------------------- what is refused


def test_folders_that_cannot_be_read():
    assert "there is no such folder" in refused("nowhere/at_all")
    Path("empty").mkdir()
    assert "no weights in safetensors or GGUF are in it, but nothing" in refused("empty")
    Path("pickled").mkdir()
    torch.save({}, "pickled/pytorch_model.bin")
    assert "pytorch_model.bin" in refused("pickled") and "pickles" in refused("pickled")
    Path("decoder/config.json").unlink()
    assert "config.json is missing" in refused("decoder")


def test_configurations_that_do_not_fit():
    config = Path("bert/config.json")
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"architectures": None}))
    assert "names no architecture" in refused("bert")
    config.write_text(json.dumps(content | {"model_type": "unheard_of"}))
    assert "configuration cannot be read" in refused("bert")
    assert "BertModel has no loss that is known here" in refused("encoder")


def test_weights_that_would_be_random():
    shutil.copy("encoder/model.safetensors", "bert/model.safetensors")
    message = refused("bert", data="text.txt")
    assert "would start at random" in message and "cls.predictions" in message


def test_weights_that_are_damaged():
    Path("decoder/model.safetensors").write_bytes(b"nothing of the kind")
    assert "weights cannot be read" in refused("decoder", data="text.txt")


def test_tokenizers_that_are_missing_or_anothers():
    for file in Path("decoder").glob("tokenizer*"):
        file.unlink()
    assert "tokenizer.save_pretrained" in refused("decoder", data="text.txt")
    # of a class that has files, the settings alone make an empty tokenizer
    gpt2().save_pretrained("empty")
    Path("empty/tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    assert "tokenizer.save_pretrained" in refused("empty", data="text.txt")
    gpt2(vocabulary=5).save_pretrained("small")
    tokenizer().save_pretrained("small")
    assert "the model has 5" in refused("small", data="text.txt")
    tokenizer().save_pretrained("bert")
    assert "no mask token" in refused("bert", data="text.txt")
    Path("vit/preprocessor_config.json").unlink()
    assert "image processor cannot be read" in refused("vit")


def test_data_that_does_not_fit():
    Path("short.txt").write_text("the fox")
    assert "fewer than one window" in refused("decoder", data="short.txt")
    assert "UTF-8 text file" in refused("decoder", data="missing.txt")
    assert "positions for 12 tokens" in refused("decoder", data="text.txt", context=13)
    assert "ask for fewer" in refused("decoder", data="text.txt", num_examples=10_000)
    assert "LABEL<tab>TEXT" in refused("classes")
    Path("labelled.tsv").write_text("7\tthe fox\n")
    assert "line 1 of --data" in refused("classes", data="labelled.tsv")
    assert "does not apply to a model of images" in refused("vit", context=4)


@pytest.mark.parametrize("flag", [("--tokenizer", "byte"), ("--image-size", "8")])
def test_options_that_a_folder_has_no_use_for(flag, capsys):
    assert run("js0", "--model", "decoder", *flag) == 2
    assert f"{flag[0]} does not apply to decoder" in capsys.readouterr().err


def test_ggufs_that_are_damaged_or_several():
    Path("quantised").mkdir()
    Path("quantised/model.Q4.gguf").write_bytes(b"GGUF")
    assert "configuration cannot be read" in refused("quantised")
    Path("quantised/second.gguf").write_bytes(b"GGUF")
    assert "2 GGUF files (model.Q4.gguf, second.gguf)" in refused("quantised")


def test_a_folder_named_as_a_model_of_the_zoo_is_the_zoos():
    Path("mlp").mkdir()
    assert run("spectrum", "--model", "mlp", *FAST) == 0
    assert saved_model.AUTO  # the folder was not looked at, which would have been refused
