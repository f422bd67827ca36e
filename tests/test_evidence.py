"""The suite of evidence: every pair trains, families are as the protocol has them, gaps are right."""

import hashlib
import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hessian_tools as ht
from hessian_tools.problem.evaluation import batch_norm_mode
from hessian_tools.training import Trajectory

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "experiments"))
evidence = importlib.import_module("evidence")
arms = importlib.import_module("evidence.arms")
gaps = importlib.import_module("evidence.gaps")
lines = importlib.import_module("evidence.lines")
readings = importlib.import_module("evidence.readings")
tuning = importlib.import_module("evidence.tuning")
FEW = {"num_batches": 1, "num_steps": 5, "simulated": 2}


@pytest.mark.parametrize("name", evidence.EVERY)
def test_a_pair_takes_two_steps(name):
    pair = evidence.EVERY[name]
    model = pair.make_model(0)
    stream = pair.stream(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with batch_norm_mode(model, stream.batch_stats):
        for step in range(2):
            optimizer.zero_grad()
            loss = stream.loss_fn(model, stream.batch(step))
            loss.backward()
            optimizer.step()
            assert math.isfinite(loss.detach())
    for parameter_name, parameter in model.named_parameters():
        assert parameter.requires_grad, parameter_name
        assert parameter.grad is not None and bool(parameter.grad.any()), parameter_name


@pytest.mark.parametrize("name", ["mlp/relu", "vit/library", "contrastive/text"])
def test_a_seed_gives_the_same_network_and_another_another(name):
    pair = evidence.SUITE[name]
    first, again, other = (list(pair.make_model(seed).parameters()) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_making_a_network_draws_none_of_the_callers_random_numbers():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    evidence.SUITE["mlp/relu"].make_model(0)
    assert torch.equal(torch.rand(1), expected)


def test_a_smaller_batch_size_cuts_the_same_examples_finer():
    pair = evidence.SUITE["decoder-pre-norm/bytes"]
    whole = pair.stream(16).batch(0)[0]
    halves = [pair.stream(8).batch(step)[0] for step in range(2)]
    assert torch.equal(whole, torch.cat(halves))


# ------------------------------------------------------------------------------------- the families


def test_families_are_many_and_of_about_equal_size():
    sizes = [len(pairs) for pairs in evidence.FAMILIES.values()]
    assert len(sizes) >= 20 and sum(sizes) == len(evidence.SUITE) >= 60
    assert set(sizes) <= {3, 4}
    assert len({id(pair) for pairs in evidence.FAMILIES.values() for pair in pairs}) == sum(sizes)


def test_a_third_of_the_families_is_held_out_by_the_hash_of_their_names():
    def digest(name: str) -> str:
        return hashlib.sha256(name.encode()).hexdigest()

    assert len(evidence.HELD_OUT) == round(len(evidence.FAMILIES) / 3)
    kept = set(evidence.FAMILIES) - evidence.HELD_OUT
    assert max(map(digest, evidence.HELD_OUT)) < min(map(digest, kept))


def test_a_name_given_twice_is_refused():
    pair = evidence.SUITE["mlp/relu"]
    with pytest.raises(ValueError, match="two pairs are named 'mlp/relu'"):
        evidence.pair.by_name([pair, pair])


def test_batch_sizes_are_tried_on_a_third_of_the_families():
    for name in ("small-batch", "large-batch"):
        pairs = arms.pairs_of(arms.ARMS[name], evidence.FAMILIES)
        families = {pair.family for pair in pairs}
        assert len(families) == len(pairs) >= len(evidence.FAMILIES) / 3


def test_interventions_are_none_of_the_suite():
    assert not set(evidence.INTERVENTIONS) & set(evidence.SUITE)
    assert len(evidence.EVERY) == len(evidence.SUITE) + len(evidence.INTERVENTIONS)


def test_the_loss_scale_scales_the_loss_and_nothing_else():
    base = evidence.SUITE["mlp/relu"]
    scaled = evidence.INTERVENTIONS["loss-scale/mlp-relu-10"]
    losses = []
    for pair in (base, scaled):
        stream = pair.stream()
        losses.append(float(stream.loss_fn(pair.make_model(0), stream.batch(0)).detach()))
    assert losses[1] == pytest.approx(10 * losses[0])


# ----------------------------------------------------------------------------------------- training


def run_of(losses: list[float], diverged: bool = False) -> Trajectory:
    none = np.array([])
    integers = none.astype(np.int64)
    return Trajectory(
        np.array(losses), none, none, integers, none, len(losses), diverged, False, 0.0, 0
    )


def test_gaps_of_runs_whose_numbers_are_known():
    # of 20 steps: smoothed over one, the final loss is the mean of two
    adam = run_of([4.0] * 5 + [1.0] * 15)
    sgd = run_of([4.0] * 18 + [2.5, 2.5])
    found = gaps.gap([sgd], [adam])
    assert found.g1 == pytest.approx((2.5 - 1) / (4 - 1))
    assert found.g3 == pytest.approx(math.log10(20 / 6))
    assert math.isnan(found.g1_spread) and not found.is_tie
    turned = gaps.gap([adam], [sgd])
    assert turned.g1 == pytest.approx((1 - 2.5) / (4 - 2.5))
    assert turned.g3 == pytest.approx(-math.log10(20 / 6))
    assert gaps.gap([adam, adam], [adam, adam]) == gaps.Gap(
        0.0, pytest.approx(math.log10(20 / 6)), 0
    )
    assert gaps.gap([adam], [adam]).is_tie


def test_sgd_that_diverges_loses_everything():
    found = gaps.gap([run_of([1.0, 9.0], diverged=True)], [run_of([1.0, 0.5])])
    assert found.g1 == math.inf


def test_rates_go_on_around_the_best():
    assert tuning.around(0.1) == pytest.approx([10**-1.5, 0.1, 10**-0.5])
    assert tuning.around(0.1 * 10**0.25) == pytest.approx([10**-1.5, 0.1, 10**-0.5])


@pytest.fixture
def short_arm():
    return arms.Arm("main", batch_size=8, budgets=(3, 6))


def test_a_killed_pair_goes_on(tmp_path, short_arm, monkeypatch):
    pair = evidence.SUITE["mlp/tanh-deep"]
    found, runs = tuning.tuned(pair, short_arm, tmp_path)
    assert [(one.optimizer, one.num_steps) for one in found] == [
        ("sgd", 3),
        ("sgd", 6),
        ("adam", 3),
        ("adam", 6),
    ]
    assert all(len(one.runs) == 3 for one in found)
    # the best rates are not trained again from the seed that has tuned them
    written = tuning.journal_path(tmp_path, pair, short_arm).read_text()
    names = [json.loads(line)[1] for line in written.splitlines()]
    assert len(names) == len(set(names)) == len(runs)
    # nothing is left to train
    monkeypatch.setattr("hessian_tools.training.runs.train", None)
    again, same = tuning.tuned(pair, short_arm, tmp_path)
    assert list(same) == list(runs)
    assert [one.rate for one in again] == [one.rate for one in found]
    # a later budget is left alone where only the earlier is asked for
    _, early = tuning.tuned(pair, short_arm, tmp_path, up_to=3)
    assert {run.num_steps for run in early.values()} == {3}


def test_lines_hold_what_gaps_are_made_of(tmp_path):
    falling = {seed: run_of([4 - seed / 10] * 5 + [1.23456] * 15) for seed in range(3)}
    slow = {seed: run_of([4 - seed / 10] * 18 + [2.5, 2.5]) for seed in range(3)}
    found = [
        tuning.Tuned("sgd", 20, 0.1, tuple(slow.values())),
        tuning.Tuned("adam", 20, 0.01, tuple(falling.values())),
    ]
    name = "{}, rate {}, momentum 0.9, 20 steps, seed {}"
    runs = {name.format("sgd", 0.1, seed): run for seed, run in slow.items()}
    runs |= {name.format("adam", 0.01, seed): run for seed, run in falling.items()}
    runs[name.format("sgd", 10, 0)] = run_of([4.0, math.inf], diverged=True)
    packed = lines.Packed(tmp_path / "runs.jsonl.gz")
    packed.update(lines.lines_of("some/pair", "main", found, runs))
    packed.write()
    reread = lines.Packed(packed.path)
    assert reread.lines == packed.lines and len(reread.lines) == 7
    (key, (gap, rates)), *others = reread.gaps().items()
    assert key == ("some/pair", "main", 20) and not others
    expected = gaps.gap(list(slow.values()), list(falling.values()))
    assert gap.g1 == pytest.approx(expected.g1, rel=1e-3)  # losses have four digits
    assert gap.g3 == pytest.approx(expected.g3)
    assert rates == {"sgd": 0.1, "adam": 0.01}


# ----------------------------------------------------------------------------------------- readings


def test_gini_is_that_of_the_textbook():
    assert readings.gini([2.0, 2.0, 2.0]) == pytest.approx(0)
    assert readings.gini([0.0, 0.0, 1.0]) == pytest.approx(2 / 3)  # 1 - 1/n
    assert readings.gini([1.0, 2.0, 3.0, 4.0]) == pytest.approx(0.25)


def test_spreads_leave_out_what_is_nothing():
    assert readings.spread_in_decades([1.0, 1000.0, 0.0], np.ptp) == pytest.approx(3)


def test_every_predictor_of_a_pair_with_blocks():
    found = readings.measured(evidence.SUITE["mlp/tanh-deep"], **FEW)
    assert tuple(found["predictors"]) == readings.PREDICTORS
    assert all(value is not None for value in found["predictors"].values())
    assert found["predictors"]["block_progress"] >= 0  # one rate is a choice of block rates
    assert found["baselines"]["num_blocks"] == len(found["gradient_norms"])


def test_one_block_has_no_differences():
    found = readings.measured(evidence.SUITE["softmax-zipf/images"], **FEW)
    apart = dict(found["predictors"])
    assert apart.pop("adam_progress") != 0
    assert apart.pop("block_progress") >= 0  # the bias has a rate of its own
    assert set(apart.values()) == {0.0}


def test_contrastive_losses_have_a_gauss_newton_matrix_that_is_psd():
    problem = evidence.SUITE["contrastive/mlp"].problem(1)
    progress = ht.predicted_progress(ht.GaussNewtonOperator(problem), progress=False)
    assert progress.block_rates.ratio >= 1 and not progress.block_rates.why


def test_readings_can_be_taken_a_little_later():
    pair = evidence.SUITE["mlp/tanh-deep"]
    model = readings.trained(pair, 1e-2, num_steps=3, budget=30)
    start = pair.make_model(0)
    moved = [
        not torch.equal(one, other)
        for one, other in zip(model.parameters(), start.parameters(), strict=True)
    ]
    assert all(moved)
    earlier, later = readings.measured(pair, **FEW), readings.measured(pair, **FEW, model=model)
    assert later["baselines"]["loss"] < earlier["baselines"]["loss"]
    assert later["predictors"] != earlier["predictors"]
