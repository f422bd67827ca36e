"""A lock on a place in the file system that dies with the process that holds it.

The operating system holds it (``flock``), so a killed process leaves none behind. The file says in
words who holds it. On NFS, ``flock`` is a lock of the server's, and other machines see it; a file
system without locks (some network ones), and Windows, which has no ``flock``, are told by
:attr:`Lock.is_held` being False.
"""

import contextlib
import errno
import json
import os
import platform
import shlex
import sys
import time
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_BUSY = (errno.EWOULDBLOCK, errno.EACCES)
_TRIES_TO_READ = 5  # the owner writes its name right after it has the lock
_PAUSE = 0.02  # seconds


class InUse(ValueError):
    """Another process holds the lock; the message names it."""


class Lock:
    """An exclusive lock by a file at ``path``, held from the start until :meth:`release`.

    Attributes: ``is_held``, False where the file system (or Windows) has no locks, so that nothing
    keeps another process away.

    Raises:
        InUse: at once, where another process holds it, or another Lock of this one.
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_held = False
        self._process = os.getpid()
        self._descriptor = self._acquired()
        # a Lock that nobody refers to any more holds nothing
        self._finalizer = weakref.finalize(self, _let_go, path, self._descriptor, self._process)
        _LOCKS.add(self)
        self._sign()

    def release(self) -> None:
        """Gives the lock back and removes its file; may be repeated."""
        self.is_held = False
        self._finalizer()

    def is_ours(self) -> bool:
        """Whether the file at ``path`` is still the one that was locked."""
        if not self._finalizer.alive:
            return False
        return _is_at(self._descriptor, self.path)

    def _acquired(self) -> int:
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._lock(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            # the one before may have removed the file while we took it
            if _is_at(descriptor, self.path):
                return descriptor
            os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.is_held = True
        except OSError as error:
            if error.errno in _BUSY:
                raise InUse(_owner(self.path)) from error
            if error.errno not in _UNSUPPORTED:
                raise

    def _sign(self) -> None:
        """Says in the file who holds it."""
        owner = {
            "process": os.getpid(),
            "host": platform.node(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "command": shlex.join(sys.argv),
        }
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(owner).encode(), 0)


def _owner(path: Path) -> str:
    """Who holds the lock, as far as its file says."""
    for _ in range(_TRIES_TO_READ):
        try:
            owner = json.loads(path.read_bytes())
            words = f"process {owner['process']} on {owner['host']} since {owner['since']}"
            return f"{words} ({owner['command']:.200})"
        except (OSError, ValueError, TypeError, KeyError):
            time.sleep(_PAUSE)
    return f"another process, of which {path} does not say which"


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _let_go(path: Path, descriptor: int, process: int) -> None:
    """Removes the file and closes it; a forked child only closes, for the lock is its parent's."""
    with contextlib.suppress(OSError):
        if os.getpid() == process and _is_at(descriptor, path):
            path.unlink()
    with contextlib.suppress(OSError):
        os.close(descriptor)


_LOCKS: "weakref.WeakSet[Lock]" = weakref.WeakSet()


def _forget_in_child() -> None:
    """A lock lives as long as any copy of its descriptor: a forked worker must not keep it."""
    for lock in list(_LOCKS):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
