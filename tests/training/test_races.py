"""Races: halving keeps the best rate, one race for every batch size, journals, words."""

import dataclasses
import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from problems.trained import Bowl, Valley, bowl_stream, classifier, points, valley_stream

import hessian_tools as ht
from hessian_tools.results import Journal
from hessian_tools.training import Stream, race
from hessian_tools.training.race_report import notes, race_table, race_text, summary
from hessian_tools.training.races import Race, RaceEntry
from hessian_tools.training.runs import Runs, Setting
from hessian_tools.training.sources import Examples

RATES = {
    "sgd": tuple(10 ** (k / 2) for k in range(-8, 5)),
    "adam": tuple(10 ** (k / 2) for k in range(-8, 3)),
}
OPTIMIZERS = ["sgd", "adam"]


def points_stream(batch_size=8):
    return Stream(Examples(points()), batch_size, ht.cross_entropy, described="clusters")


def still(seed):
    return classifier(seed).eval()


@pytest.fixture(scope="module")
def raced():
    """On clusters, three batch sizes, two seeds."""
    torch.manual_seed(0)
    return race(still, points_stream(), OPTIMIZERS, budget=64, batch_sizes=(2, 8, 32), seeds=(0, 1))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("curvature", [1e-2, 1.0, 30.0])
def test_halving_keeps_the_best_rate(optimizer, curvature):
    """Against every rate run to the end: as good as the best to 1e-3 of what it gains."""
    stream = valley_stream(curvature)
    (entry,) = race(Valley, stream, [optimizer], budget=160, rates=RATES).entries
    runs = Runs(Valley, stream)
    settings = [Setting(optimizer, rate, 0, 160) for rate in RATES[optimizer]]
    best = min(runs.run(setting).final for setting in settings)
    gain = float(entry.runs[0].losses[0]) - best
    assert entry.loss - best < 1e-3 * gain  # below zero where a rate beyond the grid is better


def test_rounds_halve_the_rates_and_double_the_steps(raced):
    for entry in raced.entries:
        assert [tried.num_steps for tried in entry.rounds] == [8, 16, 32, 64]
        counts = [len(tried.rates) for tried in entry.rounds]
        assert counts[0] >= 5 and counts[-1] == 2
        assert entry.rounds[-1].losses.min() == pytest.approx(entry.loss)  # both over all seeds
        assert all(after <= before / 2 + 1 for before, after in pairwise(counts))
        for before, after in pairwise(entry.rounds):
            kept = np.isin(before.rates, after.rates)
            assert before.losses[kept].max() <= before.losses[~kept].min(initial=math.inf)


def test_the_first_round_goes_beyond_the_grid():
    rates = {"sgd": (1e-3, 10**-2.5)}
    (entry,) = race(Bowl, bowl_stream(), ["sgd"], budget=160, rates=rates).entries
    first = entry.rounds[0]
    best = int(np.argmin(first.losses))
    assert len(first.rates) > 3 and (0 < best < len(first.rates) - 1 or len(first.rates) == 6)


def test_all_optimizers_start_from_the_same_loss(raced):
    for size in (2, 8, 32):
        first, second = raced.ranking(size)
        starts = [[run.losses[0] for run in entry.runs] for entry in (first, second)]
        assert starts[0] == starts[1] and starts[0][0] != starts[0][1]
        assert first.loss <= second.loss
        assert first.level == second.level == second.loss
        assert first.steps_to_level is not None
        assert first.runs[0].num_steps == 64 and len(first.runs[0].validation_losses) == 5
        assert first.validations.shape == first.losses.shape == (2,)
        assert first.spread == pytest.approx(first.losses.std(ddof=1))


def test_state_is_counted(raced):
    by_name = {entry.optimizer: entry.state_bytes for entry in raced.ranking(8)}
    size = 4 * sum(p.numel() for p in still(0).parameters())
    assert by_name["adam"] >= 2 * size and by_name["sgd"] <= by_name["adam"]


def test_a_killed_race_goes_on_without_loss(tmp_path, monkeypatch):
    options = {"budget": 64, "seeds": (0, 1)}
    whole = race(still, points_stream(), OPTIMIZERS, **options)
    file = tmp_path / "runs.jsonl"
    train = Runs._trained
    names = []

    def deadly(self, setting, *rest):
        names.append(setting.name)
        if len(names) == 20:
            raise KeyboardInterrupt
        return train(self, setting, *rest)

    monkeypatch.setattr(Runs, "_trained", deadly)
    with pytest.raises(KeyboardInterrupt):
        race(still, points_stream(), OPTIMIZERS, journal=Journal(file, "a"), **options)
    resumed = race(still, points_stream(), OPTIMIZERS, journal=Journal(file, "a"), **options)
    assert len(names) == len(set(names)) + 1  # the one that was killed
    for one, other in zip(whole.entries, resumed.entries, strict=True):
        assert one.rate == other.rate and np.array_equal(one.losses, other.losses)


def test_seconds_become_steps_that_a_resumed_race_keeps(tmp_path):
    journal = Journal(tmp_path / "runs.jsonl", "a")
    rates = {"sgd": (0.1, 0.3, 1.0)}
    first = race(still, points_stream(), ["sgd"], budget="3s", rates=rates, journal=journal)
    assert first.budget == "3 seconds" and first.entries[0].num_steps > 64
    assert first.seconds < 60  # however busy the machine
    again = Journal(tmp_path / "runs.jsonl", "a")
    second = race(still, points_stream(), ["sgd"], budget="3s", rates=rates, journal=again)
    assert second.entries[0].num_steps == first.entries[0].num_steps
    assert second.entries[0].loss == first.entries[0].loss


def test_the_table_and_the_words(raced):
    lines = race_table(raced).splitlines()
    assert len(lines) == 2 + 6 and lines[0].split()[:2] == ["optimizer", "batch"]
    text = race_text(raced)
    assert "crossover: " in text and "a longer run, with other rates" in text
    assert "--batch-sizes" not in text and "one seed" not in text
    assert max(map(len, text.splitlines())) <= 100
    numbers = json.loads(json.dumps(summary(raced), allow_nan=False))
    assert len(numbers["entries"]) == 6 and set(numbers["leaders"]) == {"2", "8", "32"}


def entry(optimizer, batch_size, losses, seconds=0.1):
    losses = np.array(losses)
    known = (optimizer, batch_size, 9, 0.1, losses, losses, 1.0, None, 8, seconds)
    return RaceEntry(*known, True, (), ())


def test_a_crossover_is_named_and_what_diverged_is_said():
    entries = [entry("sgd", 8, [1.0]), entry("adam", 8, [2.0])]
    entries += [entry("sgd", 64, [3.0]), entry("adam", 64, [2.0]), entry("lion", 64, [math.inf])]
    result = Race("data", "9 steps", (0,), tuple(entries), 1.0)
    assert "crossover: the leader changes between 8 and 64, from sgd to adam" in race_text(result)
    said = " ".join(notes(result))
    assert "lion in batches of 64 diverged at every rate" in said
    assert "sgd in batches of 8: the best rate is the last one tried" in said
    assert "one seed" in said
    assert "diverged" in race_table(result)
    json.dumps(summary(result), allow_nan=False)


def test_what_equal_steps_hide_is_said():
    def said(seconds):
        entries = (entry("sgd", 8, [1.0]), entry("shampoo", 8, [2.0], seconds))
        return " ".join(notes(Race("data", "9 steps", (0,), entries, 1.0)))

    assert "a step of shampoo takes 300 ms, one of sgd 100 ms" in said(0.3)
    assert "equal time" not in said(0.15)


def test_another_order_on_held_out_data_is_said():
    def said(first, second):
        losses = [entry("adam", 8, [1.0]), entry("sgd", 8, [2.0])]
        entries = [
            dataclasses.replace(one, validations=np.array([value]))
            for one, value in zip(losses, (first, second), strict=True)
        ]
        return " ".join(notes(Race("data", "9 steps", (0,), tuple(entries), 1.0)))

    words = "in batches of 8 sgd has the lowest validation loss, 1.5 against 3 of adam"
    assert words in said(3.0, 1.5)
    assert "validation" not in said(1.5, 3.0)
    assert "validation" not in said(math.nan, math.nan)


def test_a_race_is_saved_and_loaded(raced, tmp_path):
    loaded = ht.load(ht.save(raced, tmp_path / "race"))
    assert race_table(loaded) == race_table(raced) and race_text(loaded) == race_text(raced)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": 63}, "a budget of 63 steps makes runs of 63 steps, and 64 are needed; give a"),
        ({"budget": "0.01s"}, "a budget of 0.01 seconds makes runs of"),
        ({"seeds": (1, 1)}, "seeds has 1 twice; name each once"),
        ({"optimizers": ["sgd", "sgd"]}, "optimizers has sgd twice"),
        ({"optimizers": []}, "optimizers is empty"),
        ({"batch_sizes": (0,)}, "batch_size must be a whole number of at least 1, got 0"),
        ({"batch_sizes": ()}, "batch_sizes is empty"),
    ],
)
def test_bad_arguments(options, words):
    options = {"optimizers": ["sgd"], "budget": 64, **options}
    with pytest.raises(ValueError, match=words):
        race(still, points_stream(), **options)


def test_batches_that_cannot_be_cut_have_one_size():
    with pytest.raises(ValueError, match="batch_size 4 cannot be had"):
        race(Bowl, bowl_stream(), ["sgd"], budget=64, batch_sizes=(4,))
