"""One process has a run's folder; what is damaged, missing, full or of another run is told in one
sentence, and no finished part is lost."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import hessian_tools as ht
from hessian_tools import lock as locks
from hessian_tools import results
from hessian_tools.app import run_folder
from hessian_tools.app.run_folder import RunFolder
from hessian_tools.lock import InUse, Lock

ROOT = Path(__file__).parents[2]
CONFIG = {"command": "test", "seed": 1}
# holds a folder with one finished part until it is told to go on
HOLDER = """
import sys
from pathlib import Path
from hessian_tools.app.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[1]), {"command": "test", "seed": 1})
folder.journal.append("a", 1)
print("holds", flush=True)
sys.stdin.readline()
folder.finish({"a": 1})
"""


@pytest.fixture
def out(tmp_path):
    yield tmp_path / "out"
    run_folder.close_all()


def start(code: str, *arguments: object) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *(["-c", code] if code else ["-m", "hessian_tools"])]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def refusal(path: Path, config: dict = CONFIG) -> str:
    with pytest.raises(ValueError) as refused:
        RunFolder(path, config)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_second_process_is_refused_and_the_first_goes_on(out):
    """The holder, another process, is named; killed, it blocks nobody, and its part is kept."""
    first = start(HOLDER, out)
    assert first.stdout.readline() == "holds\n"
    told = refusal(out)
    assert told.startswith(f"--out {out} is in use by process {first.pid} on ")
    assert "since 2" in told and "wait until it ends" in told
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert (out / "run.lock").exists()
    folder = RunFolder(out, CONFIG)
    assert folder.journal.finished == {"a": 1}
    folder.finish({"a": 1, "b": 2})
    assert sorted(file.name for file in out.iterdir()) == [
        "config.json",
        "result.json",
        "result.npz",
    ]


def test_a_folder_keeps_what_to_type(out):
    """The command is no part of the configuration: a run that was moved goes on by another."""
    file = out / "commands.json"
    RunFolder(out, CONFIG, {"repeat": "hessian-tools test"}).close()
    assert json.loads(file.read_text()) == {"repeat": "hessian-tools test"}
    folder = RunFolder(out, CONFIG, {"repeat": "hessian-tools test --out moved"})
    assert json.loads(file.read_text()) == {"repeat": "hessian-tools test --out moved"}
    folder.finish({"a": 1})
    RunFolder(out, CONFIG)  # by the library, which types nothing
    assert json.loads(file.read_text()) == {"repeat": "hessian-tools test --out moved"}


def test_two_commands_on_one_folder(out):
    """Both are started together: one result, the other refused in one line or read it finished."""
    command = ("quadratic", 3, "--starts", 2, "--steps", 2000, "--methods", "gd", "--out", out)
    both = [start("", *command) for _ in range(2)]
    told = [process.communicate()[1] for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes in ([0, 0], [0, 2]) and "Traceback" not in "".join(told)
    for process, err in zip(both, told, strict=True):
        if process.returncode == 2:
            assert err.splitlines()[-1].startswith(f"hessian-tools: --out {out} is in use by")
    assert ht.load(out / "result")["runs"]["gd"].num_steps == 2000
    assert not (out / "run.lock").exists() and not (out / "blocks.jsonl").exists()


def test_within_one_process_a_folder_is_had_once(out):
    folder = RunFolder(out, CONFIG)
    assert f"in use by process {os.getpid()} on" in refusal(out)
    folder.close()
    folder.close()
    again = RunFolder(out, CONFIG)
    del again  # nobody refers to it: it holds nothing
    RunFolder(out, CONFIG)


def test_a_finished_folder_is_read_by_many(out):
    RunFolder(out, CONFIG).finish({"x": np.arange(3)})
    both = [RunFolder(out, CONFIG) for _ in range(2)]
    assert [folder.result["x"].tolist() for folder in both] == [[0, 1, 2]] * 2


def _exit_quietly() -> None:
    time.sleep(60)


def test_a_forked_worker_keeps_no_lock(out):
    """A lock lives as long as any copy of its descriptor, and a fork copies it."""
    folder = RunFolder(out, CONFIG)
    worker = multiprocessing.get_context("fork").Process(target=_exit_quietly, daemon=True)
    worker.start()
    try:
        time.sleep(0.1)
        assert folder._lock.is_ours()  # the worker has not removed it either
        folder.close()
        RunFolder(out, CONFIG).close()
    finally:
        worker.kill()
        worker.join()


def test_an_owner_that_has_not_signed_is_told_as_such(tmp_path, monkeypatch):
    path = tmp_path / "run.lock"
    lock = Lock(path)
    path.write_text("")
    monkeypatch.setattr(locks, "_PAUSE", 0)
    with pytest.raises(InUse, match=r"another process, of which .*run.lock does not say which"):
        Lock(path)
    lock.release()
    assert not path.exists()


@pytest.mark.parametrize("without", ["errno", "fcntl"])
def test_a_file_system_without_locks_is_said(without, out, capsys, monkeypatch):
    def unsupported(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    if without == "fcntl":
        monkeypatch.setattr(locks, "fcntl", None)
    else:
        monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    one, other = RunFolder(out, CONFIG), RunFolder(out, CONFIG)
    assert capsys.readouterr().err.count("has no locks; see to it that no other process") == 2
    one.journal.append("a", 1)
    with pytest.raises(ValueError, match="was changed while this run wrote to it"):
        other.journal.append("a", 1)


@pytest.mark.parametrize("how", ["deleted", "moved", "replaced", "unlocked"])
def test_a_folder_that_goes_away_is_told_and_what_was_finished_is_kept(how, out):
    folder = RunFolder(out, CONFIG)
    folder.journal.append("a", 1)
    moved = out.with_name("moved")
    if how == "unlocked":
        (out / "run.lock").unlink()
    elif how == "deleted":
        shutil.rmtree(out)
    else:
        out.rename(moved)
    if how == "replaced":
        out.mkdir()
    words = "was deleted or moved away" if how in ("deleted", "moved") else "has another run.lock"
    with pytest.raises(ValueError, match=f"--out {out} {words}.* goes on"):
        folder.journal.append("b", 2)
    folder.close()
    place = out if how == "unlocked" else moved
    if how != "deleted":
        assert RunFolder(place, CONFIG).journal.finished == {"a": 1}


def test_what_is_computed_is_saved_although_the_folder_went_away(out):
    folder = RunFolder(out, CONFIG)
    shutil.rmtree(out)
    folder.finish({"a": 1})
    assert RunFolder(out, CONFIG).result == {"a": 1}


@pytest.mark.parametrize("full", ["config.json", "result.npz", "result.json"])
def test_a_full_disk_at_the_end_keeps_the_journal(full, out, monkeypatch):
    folder = RunFolder(out, CONFIG)
    folder.journal.append("a", 1)
    write = results.write_atomically

    def limited(path, content):
        if path.name == full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(results, "write_atomically", limited)
        patch.setattr(run_folder, "write_atomically", limited)
        with pytest.raises(ValueError, match=f"No space left on device: .*{full}.*in its journal"):
            folder.finish({"a": 1})
    folder.close()
    again = RunFolder(out, CONFIG)
    assert again.result is None and again.journal.finished == {"a": 1}
    again.finish({"a": 1})
    assert RunFolder(out, CONFIG).result == {"a": 1}


def test_a_place_that_cannot_be_written_is_told(out, monkeypatch):
    out.write_text("a file")
    assert (
        refusal(out)
        == f"--out {out} cannot be written (it is a file); name a folder you may write to"
    )
    assert "cannot be written ([Errno 20] Not a directory" in refusal(out / "below")

    def denied(*arguments):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(out / "run.lock"))

    monkeypatch.setattr(os, "open", denied)
    out.unlink()
    assert "Permission denied" in refusal(out) and "in use" not in refusal(out)


@pytest.mark.parametrize("name", ["result.json", "result.npz", "blocks.jsonl", "config.json"])
def test_a_changed_character_in_any_file_is_told(name, out):
    folder = RunFolder(out, CONFIG)
    folder.journal.append("a", 1.5)
    if name.startswith("result"):
        folder.finish({"a": 1.5, "x": np.arange(9.0)})
    folder.close()
    file = out / name
    content = file.read_bytes()
    digit = {"result.json": b"1.5", "result.npz": content[200:201]}.get(name, b"1")
    place = content.index(digit, 1)
    file.write_bytes(content[:place] + b"2" + content[place + 1 :])
    told = refusal(out)
    if name == "config.json":
        assert "holds a run with another seed (seed was 2, is now 1)" in told
        # and whoever believes it meets the id that stands in every line
        assert "line 1 of" in refusal(out, {**CONFIG, "seed": 2})
    else:
        assert name in told and ("delete" in told or "restore" in told)
    file.write_bytes(content)
    RunFolder(out, CONFIG)


def test_a_result_of_another_configuration_is_told(out, tmp_path):
    other = tmp_path / "other"
    RunFolder(out, CONFIG).finish({"a": 1})
    RunFolder(other, {**CONFIG, "seed": 2}).finish({"a": 2})
    for name in ("result.json", "result.npz"):
        shutil.copy(other / name, out / name)
    assert "result.json is not of the configuration in config.json" in refusal(out)


def test_a_configuration_that_has_lost_a_key_is_no_other(out):
    """As in results/js0_families, whose script stopped saying what it always does."""
    RunFolder(out, {**CONFIG, "blocks": "weights"}).finish({"a": 1})
    (out / "config.json").write_text(json.dumps(CONFIG))
    assert RunFolder(out, CONFIG).result == {"a": 1}


def test_lines_of_another_configuration_are_told(out, tmp_path):
    other = RunFolder(tmp_path / "other", {**CONFIG, "seed": 2})
    folder = RunFolder(out, CONFIG)
    for each in (folder, other):
        each.journal.append("a", 1)
        each.close()
    with folder.journal.path.open("ab") as file:
        file.write(other.journal.path.read_bytes())
    assert "line 2 of" in refusal(out) and "of another run" in refusal(out)


def test_a_journal_of_version_0_1_0_goes_on(out, capsys):
    out.mkdir()
    (out / "config.json").write_text(json.dumps(CONFIG))
    (out / "blocks.jsonl").write_text('["a", [1, 2]]\n["b", {"ty')
    folder = RunFolder(out, CONFIG)
    assert folder.journal.finished == {"a": (1, 2)}
    told = capsys.readouterr().err
    assert "cut short" in told and "of version 0.1.0, whose lines had no checksum" in told
    folder.journal.append("b", 3)
    folder.close()
    assert RunFolder(out, CONFIG).journal.finished == {"a": (1, 2), "b": 3}
    assert not capsys.readouterr().err


def test_what_a_killed_run_left_half_written_is_cleared_away(out):
    RunFolder(out, CONFIG).close()
    (out / ".result.npz.123.tmp").write_bytes(b"half")
    (out / ".mine.tmp").write_bytes(b"somebody's")
    RunFolder(out, CONFIG)
    assert {file.name for file in out.iterdir()} == {".mine.tmp", "config.json"}
