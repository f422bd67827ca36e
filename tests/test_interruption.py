"""Ctrl-C at any moment, twice too, and readers that hang up: no traceback, and the right code."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hessian_tools import interruption as module
from hessian_tools.app import cli
from hessian_tools.interruption import Interruption, answered

ROOT = Path(__file__).parents[1]
LONG = ("quadratic", "3", "--starts", "2", "--steps", "1000000", "--methods", "gd")


def start(*arguments: str, options: tuple[str, ...] = (), **keywords) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *options, "-m", "hessian_tools", *arguments]
    return subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE, **keywords)


@pytest.mark.parametrize(
    ("moment", "options", "signals", "code"),
    [
        # importing torch comes right after
        ("hessian_tools.interruption", ("-X", "importtime"), [signal.SIGINT], 130),
        ("gd: 2 starts", (), [signal.SIGINT, signal.SIGINT], 130),
        ("gd: 2 starts", (), [signal.SIGTERM], 143),
    ],
)
def test_no_traceback_whenever_a_process_is_interrupted(moment, options, signals, code):
    process = start(*LONG, options=options)
    for line in process.stderr:
        if moment in line:
            break
    for number in signals:
        process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code
    told = [line for line in err.splitlines() if line and not line.startswith("import time")]
    assert len(told) in (1, 2) and "Traceback" not in err
    assert told[-1].startswith("hessian-tools: interrupted")


def test_a_full_disk_behind_stdout_is_told_once():
    with open("/dev/full", "w") as full:
        process = start("--help", stdout=full)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err.count("\n") == 1 and "standard output cannot be written: [Errno 28]" in err


@pytest.fixture
def ended(monkeypatch):
    """Codes that the process would have ended with."""
    codes = []
    monkeypatch.setattr(module.os, "_exit", codes.append)
    monkeypatch.setattr(module.os, "write", lambda descriptor, words: len(words))
    return codes


def test_the_first_signal_raises_and_the_second_ends_the_process(ended):
    interruption = Interruption()
    for expected in ([], [130]):
        with pytest.raises(KeyboardInterrupt):
            interruption(signal.SIGINT, None)
        assert ended == expected
    assert interruption.exit_code == 130


def test_a_forked_worker_is_interrupted_as_ever(ended, monkeypatch):
    interruption = Interruption()
    monkeypatch.setattr(module.os, "getpid", lambda: -1)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            interruption(signal.SIGINT, None)
    assert not ended


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_in_a_destructor_ends_the_process(ended, monkeypatch):
    class Interrupted:
        def __del__(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "__unraisablehook__", lambda unraisable: None)
    monkeypatch.setattr(sys, "unraisablehook", Interruption().swallowed)
    Interrupted()
    assert ended == [130]


def test_what_became_of_an_interrupt_is_known():
    def raised(first: BaseException, then: BaseException) -> BaseException:
        with pytest.raises(type(then)) as found:
            try:
                raise first
            except BaseException:
                raise then  # noqa: B904
        return found.value

    interruption = Interruption()
    assert interruption.is_cause_of(KeyboardInterrupt())
    assert interruption.is_cause_of(raised(KeyboardInterrupt(), RuntimeError("x")))
    assert not interruption.is_cause_of(raised(KeyError(), ValueError()))


@pytest.fixture
def handlers(monkeypatch):
    """Python's own handlers, put back afterwards."""
    kept = {number: signal.getsignal(number) for number in module._SIGNALS}
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_signals_are_answered_inside_and_ignored_afterwards(handlers):
    interruption = Interruption()
    with answered(interruption):
        assert signal.getsignal(signal.SIGINT) is interruption
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert interruption.exit_code == 143
    for number in module._SIGNALS:
        signal.raise_signal(number)  # all is done: nothing happens


def test_who_ignores_signals_goes_on_ignoring_them(handlers):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup does
    with answered(Interruption()):
        signal.raise_signal(signal.SIGINT)


def test_other_threads_answer_no_signals(handlers):
    def inside() -> None:
        with answered(Interruption()):
            pass

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("argv", "orig_argv", "is_ours"),
    [
        (["/bin/hessian-tools", "models"], ["python", "/bin/hessian-tools", "models"], True),
        (["-m", "models"], ["python", "-X", "dev", "-m", "hessian_tools", "models"], True),
        (["-m"], ["python", "-m", "pytest", "hessian_tools"], False),
        (["train.py", "hessian-tools"], ["python", "train.py", "hessian-tools"], False),
        # a worker that was spawned, with its parent's argv
        (["/bin/hessian-tools"], ["python", "-c", "from multiprocessing.spawn ..."], False),
        ([""], ["python"], False),
        ([], [], False),
    ],
)
def test_only_the_command_line_itself_is_ended_while_it_imports(
    argv, orig_argv, is_ours, monkeypatch
):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    assert module._is_command_line() == is_ours


def test_a_reader_that_hangs_up_stops_nothing(monkeypatch):
    reader, writer = os.pipe()
    stream = cli._UntilHungUp(os.fdopen(writer, "wb"), line_buffering=True)
    print("read", file=stream)
    assert os.read(reader, 9) == b"read\n"
    os.close(reader)
    for _ in range(2):
        print("not read", file=stream)
        stream.flush()
    stream.close()


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_letters_that_an_encoding_lacks_are_written_as_their_numbers(
    encoding, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "stdout", (tmp_path / "out").open("w", encoding=encoding))
    monkeypatch.setattr(sys, "stderr", None)
    cli._settle_streams()
    with sys.stdout, sys.stderr:
        print("κ")
        print("nowhere", file=sys.stderr)
        assert cli._flushed(1) == 1
    monkeypatch.undo()
    written = (tmp_path / "out").read_text(encoding)
    assert written == ("\\u03ba\n" if encoding == "ascii" else "κ\n")
