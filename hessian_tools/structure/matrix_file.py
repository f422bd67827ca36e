"""A square matrix that is filled row by row, in memory or as a memory-mapped file with a journal of
how far it came."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hessian_tools.lock import InUse, Lock
from hessian_tools.results import write_atomically

_TILE = 2048  # rows and columns that are in memory at a time

Matrix = NDArray[np.float64]


@dataclass
class _Journal:
    """What NAME.json says of NAME.npy."""

    fingerprint: str
    done: int = 0  # rows written
    symmetry_error: float | None = None  # once it is known
    finished: bool = False  # the matrix has been symmetrised


class MatrixFile:
    """An (n, n) float64 ``matrix``, in memory (``path`` None) or in a file.

    ``path`` is a file NAME.npy beside NAME.json. What lies there already is continued if it has the
    same ``fingerprint``; ``done`` rows then need no writing. One process alone has the file until
    the matrix is finished, or the ``with`` that it is the subject of is left.

    Raises:
        ValueError: for a path that holds something else, or that another process writes to.
    """

    matrix: Matrix

    def __init__(self, path: Path | None, size: int, fingerprint: str) -> None:
        self.path = path
        self._journal = _Journal(fingerprint)
        self._lock = None if path is None else self._locked(path)
        try:
            self._open(size)
        except BaseException:
            self._unlock()
            raise
        if self._journal.finished:
            self._unlock()

    def _open(self, size: int) -> None:
        path, shape = self.path, (size, size)
        if path is None:
            self.matrix = np.empty(shape)
        elif path.exists() or self._journal_path(path).exists():
            self._journal = self._continued(path)
            mode = "r" if self._journal.finished else "r+"
            self.matrix = np.lib.format.open_memmap(path, mode=mode)
        else:
            self.matrix = np.lib.format.open_memmap(path, "w+", dtype=np.float64, shape=shape)
            self._note()

    def __enter__(self) -> "MatrixFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._unlock()

    @property
    def done(self) -> int:
        """How many rows have been written."""
        return self._journal.done

    def write(self, rows: Matrix) -> None:
        """The next rows, (r, n)."""
        self.matrix[self.done : self.done + len(rows)] = rows
        self._journal.done += len(rows)
        self._note()

    def symmetrise(self) -> float:
        """Makes the matrix (A + A') / 2, read-only on disk.

        Returns:
            |A - A'|_F / |A|_F of what it was, 0 for A = 0.
        """
        # The error is kept before A is changed: tiles of a torn run are symmetric already.
        if self._journal.symmetry_error is None:
            self._journal.symmetry_error = self._asymmetry()
            self._note()
        if not self._journal.finished:
            for a, b, _ in self._tiles():
                a += b.T
                a *= 0.5
                b[:] = a.T
            self._journal.finished = True
            self._note()
            if self.path is not None:
                self.matrix = np.load(self.path, mmap_mode="r")
            self._unlock()
        return self._journal.symmetry_error

    @staticmethod
    def _locked(path: Path) -> Lock:
        try:
            return Lock(path.with_suffix(".lock"))
        except InUse as owner:
            raise ValueError(
                f"path is {str(path)!r}, which is in use by {owner}; wait until it ends, or name "
                "another file"
            ) from owner

    def _unlock(self) -> None:
        """Lets others have the file."""
        if self._lock is not None:
            self._lock.release()

    def _asymmetry(self) -> float:
        apart = whole = 0.0
        for a, b, times in self._tiles():
            apart += float(np.square(a - b.T).sum()) * times
            mirrored = np.square(b).sum() if times > 1 else 0.0
            whole += float(np.square(a).sum() + mirrored)
        return math.sqrt(apart / whole) if whole else 0.0

    def _tiles(self) -> Iterator[tuple[Matrix, Matrix, int]]:
        """Views of every tile on or above the diagonal, of its mirror image, and how many the two
        are."""
        starts = range(0, len(self.matrix), _TILE)
        for i in starts:
            for j in starts[i // _TILE :]:
                a = self.matrix[i : i + _TILE, j : j + _TILE]
                b = self.matrix[j : j + _TILE, i : i + _TILE]
                yield a, b, 1 if i == j else 2

    def _continued(self, path: Path) -> _Journal:
        try:
            journal = _Journal(**json.loads(self._journal_path(path).read_text()))
            is_ours = path.exists() and journal.fingerprint == self._journal.fingerprint
        except (OSError, ValueError, TypeError):
            is_ours = False
        if not is_ours:
            raise ValueError(
                f"path is {str(path)!r}, which holds something else; name another file or delete it"
            )
        return journal

    @staticmethod
    def _journal_path(path: Path) -> Path:
        return path.with_suffix(".json")

    def _note(self) -> None:
        """Brings the file and then the journal up to date."""
        if self.path is None or not isinstance(self.matrix, np.memmap):
            return
        self.matrix.flush()
        journal = self._journal_path(self.path)
        write_atomically(journal, json.dumps(asdict(self._journal)).encode())
