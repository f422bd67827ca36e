"""What Ctrl-C, and the end that a batch system orders, do to the command line.

Importing torch takes seconds, in which Python's own answer to Ctrl-C is a page of traceback. So
``hessian_tools`` imports this module first, and where the process *is* the command line, it is
ended in one line. A program of the user's that imports the package is left alone.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import FrameType

PROGRAM = "hessian-tools"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_OF_A_SHELL = 128  # a shell's code for a process that a signal ended is this and the signal
# what Python, or nobody, does about a signal; whatever else was set is left alone
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class Interruption:
    """Answers signals while a command runs: the first one raises KeyboardInterrupt, so that files
    are closed and words are said; any further one ends the process at once.

    Whatever is on disk then is whole: files are renamed into place, a line of a journal is dropped
    unless it is complete.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._signal: int | None = None  # the first that came

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 143 for SIGTERM."""
        return _OF_A_SHELL + (self._signal or signal.SIGINT)

    def is_cause_of(self, error: BaseException) -> bool:
        """Whether ``error`` is what became of an interrupt."""
        seen: BaseException | None = error
        while seen is not None:
            if isinstance(seen, KeyboardInterrupt):
                return True
            seen = seen.__cause__ or seen.__context__
        return False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._process:  # and not a worker forked from it
            if self._signal is not None:
                _end_at_once(number)
            self._signal = number
        raise KeyboardInterrupt

    def swallowed(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """An interrupt that Python can only print, as in a destructor: the process ends at once."""
        if unraisable.exc_type is KeyboardInterrupt and os.getpid() == self._process:
            _end_at_once(self._signal or signal.SIGINT)
        sys.__unraisablehook__(unraisable)


@contextlib.contextmanager
def answered(interruption: Interruption) -> Iterator[None]:
    """``interruption`` answers signals inside; none is answered from then on, for all is done.

    Only in the main thread, the one that Python lets set handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _set(interruption)
    sys.unraisablehook = interruption.swallowed
    try:
        yield
    finally:
        for number in _SIGNALS:
            if signal.getsignal(number) is interruption:
                signal.signal(number, signal.SIG_IGN)


def _set(handler: Callable[[int, FrameType | None], None]) -> None:
    """Sets a handler where nobody else has; `nohup` and shells in the background ignore SIGINT."""
    for number in _SIGNALS:
        if signal.getsignal(number) in (*_DEFAULTS, _while_importing):
            signal.signal(number, handler)


def _while_importing(number: int, frame: FrameType | None) -> None:
    """Nothing has been computed yet, and nothing needs tidying up."""
    _end_at_once(number)


def _end_at_once(number: int) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"\n{PROGRAM}: interrupted, ended at once\n".encode())
    os._exit(_OF_A_SHELL + number)


def _is_command_line() -> bool:
    """Whether this process was started as ``hessian-tools`` or ``python -m hessian_tools``."""
    if sys.argv[:1] == ["-m"]:  # a module is being looked for, and its package imported
        return ("-m", "hessian_tools") in pairwise(sys.orig_argv)
    started = sys.argv[:1] if sys.argv[:1] and sys.argv[0] in sys.orig_argv else []
    return any(Path(path).name in (PROGRAM, f"{PROGRAM}.exe") for path in started)


if _is_command_line() and threading.current_thread() is threading.main_thread():
    _set(_while_importing)
