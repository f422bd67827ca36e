"""What a folder holds: runs finished and interrupted, saved results, journals, and bad input."""

import json

import numpy as np
import pytest
from problems.page_folders import (
    COMMANDS,
    CONFIG,
    EIGENVALUES,
    exact_spectra,
    js0_folder,
    race_folder,
    tracker_journal,
    trajectory,
)

import hessian_tools as ht
from hessian_tools.app.run_folder import RunFolder
from hessian_tools.page.found import find_runs
from hessian_tools.results import Journal, save
from hessian_tools.tracking import Track


def test_a_finished_run_with_its_command(tmp_path):
    spectra, _ = js0_folder(tmp_path)
    (run,) = find_runs(tmp_path)
    assert (run.name, run.command, run.is_finished) == (tmp_path.name, "js0", True)
    assert run.config == CONFIG and run.commands == COMMANDS
    assert run.results["spectra"].names == spectra.names
    assert run.versions["hessian_tools"]


def test_all_that_lies_in_a_folder_and_below(tmp_path):
    js0_folder(tmp_path / "a" / "js0")
    race_folder(tmp_path / "race")
    tracker_journal(tmp_path / "a" / "curvature.jsonl")
    ht.save(exact_spectra(), tmp_path / "by_hand")
    # of other programs
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    (tmp_path / "tokenizer.json").write_text('{"format": 1}')
    (tmp_path / "lines.jsonl").write_text('{"loss": 1.0}\n')
    (tmp_path / "words.jsonl").write_text("not even JSON\n")
    (tmp_path / "pairs.jsonl").write_text('["a text", "its label"]\n')
    runs = find_runs(tmp_path)
    assert [run.name for run in runs] == ["a/curvature", "a/js0", "by_hand", "race"]
    assert isinstance(runs[0].results["track"], Track) and len(runs[0].results["track"]) == 4
    assert runs[2].results[""].names == tuple(EIGENVALUES)


def test_an_interrupted_run_is_what_its_journal_holds_and_stays_as_it_is(tmp_path):
    folder = RunFolder(tmp_path, CONFIG, COMMANDS)
    for name, quadrature in list(exact_spectra().items())[:3]:
        folder.journal.append(name, quadrature)
    with folder.journal.path.open("ab") as file:
        file.write(b'["torn')
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    (run,) = find_runs(tmp_path)  # while the run goes on
    assert not run.is_finished and run.commands == COMMANDS
    assert run.results["spectra"].names == tuple(EIGENVALUES)[:3]
    assert "cut short" in run.notes[0]
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    folder.close()


def test_a_run_that_was_only_begun_has_nothing_yet(tmp_path):
    RunFolder(tmp_path, CONFIG).close()
    (run,) = find_runs(tmp_path)
    assert not run.is_finished and run.results == {} and run.commands == {}


def test_saved_quadratures_are_spectra(tmp_path):
    ht.save(dict(exact_spectra()), tmp_path / "by_hand")
    (run,) = find_runs(tmp_path)
    assert run.results["spectra"].names == tuple(EIGENVALUES)


def test_a_journal_of_the_first_version(tmp_path):
    line = {"dict": [["step", 3], ["loss", 1.5], ["seconds", 0.1]]}
    (tmp_path / "track.jsonl").write_text(json.dumps(["3", line]) + "\n")
    (run,) = find_runs(tmp_path)
    assert run.results["track"].steps.tolist() == [3] and "version 0.1.0" in run.notes[0]


def test_an_interrupted_race_has_its_runs(tmp_path):
    folder = RunFolder(tmp_path, {"command": "race", "model": "small"})
    folder.journal.append("steps", (40,))
    folder.journal.append("sgd, rate 0.1, 40 steps, seed 0", trajectory([2.0, 1.0]))
    folder.close()
    (run,) = find_runs(tmp_path)
    assert list(run.results["trained"]) == ["sgd, rate 0.1, 40 steps, seed 0"]


@pytest.fixture
def trainer_state(tmp_path):
    """Of transformers' Trainer, in two checkpoints."""
    for step in (10, 20):
        history = [{"step": k, "loss": 4.0 - k / 10, "epoch": 1.0} for k in range(5, step + 1, 5)]
        history.append({"step": step, "eval_loss": 3.0})
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "trainer_state.json").write_text("no JSON")


def test_losses_of_a_trainer_stand_beside_a_track(tmp_path, trainer_state):
    tracker_journal(tmp_path / "curvature.jsonl")
    (run,) = find_runs(tmp_path)
    assert run.log.file.parent.name == "checkpoint-20"  # the longest
    assert run.log.training.tolist() == [[5, 3.5], [10, 3.0], [15, 2.5], [20, 2.0]]
    assert run.log.held_out.tolist() == [[20, 3.0]]


# ------------------------------------------------------------------------------------- bad input


def test_no_folder_no_run_and_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        find_runs(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no run of this package: neither what js0"):
        find_runs(tmp_path)
    file = tmp_path / "file.txt"
    file.write_text("words")
    with pytest.raises(ValueError, match="is a file; name the folder"):
        find_runs(file)


def test_a_file_of_another_version(tmp_path):
    js0_folder(tmp_path)
    file = tmp_path / "result.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "format": 2}, indent=1))
    with pytest.raises(ValueError, match=r"result\.json is not a saved result of format 1"):
        find_runs(tmp_path)
    file.rename(tmp_path / "kept.json")  # and so by hand
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"kept\.json is not a saved result of format 1"):
        find_runs(tmp_path)


def test_files_that_are_not_as_they_were_written(tmp_path):
    save({"a": np.arange(3)}, tmp_path / "x")
    (tmp_path / "x.npz").unlink()
    with pytest.raises(FileNotFoundError, match="not the arrays beside it"):
        find_runs(tmp_path)
    (tmp_path / "x.json").unlink()
    journal = tmp_path / "track.jsonl"
    Journal(journal, "r").append("0", {"step": 0, "seconds": 0.1, "loss": 1.0})
    journal.write_bytes(journal.read_bytes().replace(b"1.0", b"2.0"))
    with pytest.raises(ValueError, match=r"line 1 of .*track.jsonl is not as it was written"):
        find_runs(tmp_path)
