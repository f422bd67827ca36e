"""A square matrix that is filled row by row, in memory or as a memory-mapped file with a journal of how far it came."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_TILE = 2048  # rows and columns that are in memory at a time


class MatrixFile:
    """The (n, n) float64 ``matrix``, in memory (``path`` None) or at ``path``, a file NAME.npy beside NAME.json.

    What lies there already is gone on with if it has the same ``fingerprint``; ``done`` rows then need no writing.

    Raises:
        ValueError: for a path that holds something else.
    """

    def __init__(self, path: Path | None, size: int, fingerprint: str) -> None:
        self.path, self.done, self.symmetry_error, self.finished = path, 0, math.nan, False
        self.fingerprint = fingerprint
        if path is None:
            self.matrix: np.ndarray = np.empty((size, size))
            return
        self.journal = path.with_suffix(".json")
        if path.exists() or self.journal.exists():
            state = self._state()
            if state.get("fingerprint") != fingerprint:
                raise ValueError(
                    f"path is {str(path)!r}, which holds something else; name another file or delete it"
                )
            self.done, self.finished = state["done"], state["finished"]
            self.symmetry_error = (
                math.nan if state["symmetry_error"] is None else state["symmetry_error"]
            )
            self.matrix = np.lib.format.open_memmap(path, mode="r" if self.finished else "r+")
        else:
            self.matrix = np.lib.format.open_memmap(
                path, mode="w+", dtype=np.float64, shape=(size, size)
            )
            self._note()

    def write(self, rows: np.ndarray) -> None:
        """The next rows, (r, n)."""
        self.matrix[self.done : self.done + len(rows)] = rows
        self.done += len(rows)
        self._note()

    def symmetrise(self) -> float:
        """Makes the matrix (A + A') / 2, read-only on disk; |A - A'|_F / |A|_F of what it was, 0 for A = 0."""
        if math.isnan(self.symmetry_error):
            apart, whole = 0.0, 0.0
            for a, b, times in self._tiles():
                apart += float(np.square(a - b.T).sum()) * times
                whole += float(np.square(a).sum() + (np.square(b).sum() if times > 1 else 0.0))
            self.symmetry_error = math.sqrt(apart / whole) if whole else 0.0
            self._note()
        if not self.finished:
            for a, b, _ in self._tiles():
                a += b.T
                a *= 0.5
                b[:] = a.T
            self.finished = True
            self._note()
            if self.path is not None:
                self.matrix = np.load(self.path, mmap_mode="r")
        return self.symmetry_error

    def _tiles(self) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Views of every tile on or above the diagonal, of its mirror image, and how many the two are."""
        for i in range(0, len(self.matrix), _TILE):
            for j in range(i, len(self.matrix), _TILE):
                yield (
                    self.matrix[i : i + _TILE, j : j + _TILE],
                    self.matrix[j : j + _TILE, i : i + _TILE],
                    1 + (i < j),
                )

    def _state(self) -> dict[str, Any]:
        try:
            found = json.loads(self.journal.read_text())
        except (OSError, ValueError):
            return {}
        return (
            found
            if isinstance(found, dict) and self.path is not None and self.path.exists()
            else {}
        )

    def _note(self) -> None:
        if not isinstance(self.matrix, np.memmap):
            return
        self.matrix.flush()
        error = None if math.isnan(self.symmetry_error) else self.symmetry_error
        state = {
            "fingerprint": self.fingerprint, "done": self.done, "symmetry_error": error, "finished": self.finished
        }  # fmt: skip
        temporary = self.journal.with_name(f".{self.journal.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(state))
        os.replace(temporary, self.journal)
