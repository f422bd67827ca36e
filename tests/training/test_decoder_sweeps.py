"""The decoders' sweeps: their text, their tasks, and what their lines come to."""

import json
from pathlib import Path

import numpy as np
import pytest

from hessian_tools.problem.data import text_of
from hessian_tools.training import cosine

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def experiments(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))


def line(optimizer, rate, loss, claim="a"):
    where = {"claim": claim, "size": "1M", "variant": "standard", "momentum": None, "seed": 0}
    return {**where, "optimizer": optimizer, "rate": rate, "loss": loss}


def test_the_small_vocabulary_codes_any_text():
    from decoders.networks import VOCABULARY, tokenizer

    text = text_of()[:5000] + "naïve <mask> ☃"
    coded = tokenizer().encode(text).ids
    assert tokenizer().decode(coded) == text
    assert 0 < max(coded) < VOCABULARY
    assert len(coded) < 0.5 * len(text)  # merges are used


def test_texts_are_interleaved_whole_and_evenly():
    from decoders.networks import interleaved

    one, two = list(range(1000)), list(range(-3000, 0))
    mixed = interleaved([one, two], piece=10)
    assert sorted(mixed) == sorted(one + two)
    assert [token for token in mixed if token >= 0] == one
    last_tenth = np.array(mixed[-400:])
    assert (last_tenth >= 0).mean() == pytest.approx(0.25, abs=0.05)


def test_every_task_has_a_file_of_its_own(tmp_path):
    from decoders.tasks import tasks

    all_tasks = tasks("abce", ["1M", "6M"])
    paths = {(tmp_path / task.name).with_suffix(".json") for task in all_tasks}
    assert len(paths) == len(all_tasks) > 50


def test_the_schedule_begins_after_the_rest():
    from decoders.tasks import Task, rested

    resting = Task("c", "1M", "plain", "frozen_adalayer_short", ()).resting
    assert resting > 0
    after = [rested(resting, resting + step, resting + 50) for step in range(50)]
    assert after == [cosine(step, 50) for step in range(50)]


def test_widths_and_gaps_follow_from_the_lines():
    from decoders.claims import closed_text, sweeps

    lines = [line("sgd", rate, loss) for rate, loss in [(0.1, 5.0), (1.0, 4.0), (10.0, None)]]
    lines += [line("adamw", rate, loss) for rate, loss in [(0.1, 2.0), (0.01, 2.05), (1.0, 4.0)]]
    lines += [line("adalayer", 0.1, 2.5, "c")]
    found = {sweep.key[3]: sweep for sweep in sweeps(lines)}
    assert found["sgd"].best["rate"] == 1.0
    assert not found["sgd"].is_cut_short
    assert not found["adamw"].is_cut_short
    assert found["adalayer"].is_cut_short
    # 1 decade down, where it ends inside; up, 0.1 of the way from 2 to 4
    assert found["adamw"].width == pytest.approx(1.05)
    assert "adalayer: 75 % of the gap from SGD to AdamW, 25.0 % above" in closed_text(
        found.values()
    )


def test_lines_name_their_run_and_are_read_again(tmp_path):
    from decoders.claims import LINES, lines_of, packed

    parts = tmp_path / "parts"
    parts.mkdir()
    written(parts / "b-1M-standard-sgd-90.jsonl")
    (first,) = packed(tmp_path)
    assert first["momentum"] == 0.9
    assert (first["claim"], first["rate"], first["seed"], first["steps"]) == ("b", 0.1, 2, 4)
    assert first == json.loads(json.dumps(lines_of(parts / "b-1M-standard-sgd-90.jsonl")[0]))
    (parts / "b-1M-standard-sgd-90.jsonl").unlink()
    assert packed(tmp_path) == [first]
    assert (tmp_path / LINES).stat().st_size < 2000


def written(path):
    from hessian_tools.results import Journal
    from hessian_tools.training import Trajectory
    from hessian_tools.training.runs import Setting

    run = Trajectory(
        losses=np.array([3.0, 2.0, 1.5, 1.0]),
        learning_rates=np.full(4, 0.1),
        gradient_norms=np.ones(4),
        validation_steps=np.array([4]),
        validation_losses=np.array([1.2]),
        num_steps=4,
        diverged=False,
        stopped=False,
        seconds=1.0,
        state_bytes=8,
    )
    Journal(path).append(Setting("sgd", 0.1, 2, 4, momentum=0.9).name, run)


def test_only_what_the_lines_lack_is_trained():
    from decoders.claims import left
    from decoders.tasks import Task

    task = Task("a", "1M", "standard", "adamw", (1.0, 2.0))

    def rates(*losses):
        lines = [line("adamw", float(rate), loss) for rate, loss in enumerate(losses, start=1)]
        return [found.rates for found in left([task], lines)]

    assert rates() == rates(3.0) == [task.rates]  # a part of the grid is no sweep
    assert rates(3.0, 1.0, 2.0) == []
    ((best, beyond),) = rates(3.0, 2.0, 1.0)
    assert (best, beyond) == pytest.approx((3.0, 3 * 10**0.5))
    ((beyond, best),) = rates(1.0, 2.0, 3.0)
    assert (beyond, best) == pytest.approx((10**-0.5, 1.0))
