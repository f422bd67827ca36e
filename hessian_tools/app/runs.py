"""A run on disk: its folder, its configuration, its finished blocks, and the user's own model files."""

import hashlib
import importlib.util
import json
import random
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hessian_tools.errors import NumericalError
from hessian_tools.problem.batches import tensors_of, to_device
from hessian_tools.problem.problem import Problem
from hessian_tools.problem.vision import repair
from hessian_tools.results import Journal, load, load_json, save, write_atomically


class RunFolder:
    """``--out DIR``: config.json, the journal of finished blocks while a run lasts, then result.json and result.npz.

    Attributes: ``result``, what :meth:`finish` wrote, None as long as it has not (or a crash tore it); ``journal``.

    Args:
        path: the folder; created.
        config: all that the numbers depend on, JSON-able.
    Raises:
        ValueError: the folder cannot be written, or holds something of another configuration (naming what differs).
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path, self.config = path, json.loads(json.dumps(config))
        try:
            path.mkdir(parents=True, exist_ok=True)
            kept = self._kept()
            self.journal = Journal(path / "blocks.jsonl")
            self.result: dict[str, Any] | None = self._loaded()
            if self.result or self.journal.finished:
                self._refuse_other(kept)
            write_atomically(path / "config.json", json.dumps(self.config, indent=1).encode())
        except OSError as error:
            raise ValueError(
                f"--out {path} cannot be written ({error}); name a folder you may write to"
            ) from error

    def finish(self, result: Mapping[str, Any]) -> Path:
        """Writes result.json and result.npz and drops the journal."""
        written = save(dict(result), self.path / "result", config=self.config)
        self.journal.path.unlink(missing_ok=True)
        return written

    def _kept(self) -> dict[str, Any]:
        file = self.path / "config.json"
        started = any(
            (self.path / name).exists() for name in ("blocks.jsonl", "result.json", "result.npz")
        )
        kept = load_json(file) if file.exists() else {} if started else self.config
        if "command" not in kept:
            raise ValueError(
                f"--out {self.path} holds files that are no run of this package; name another folder"
            )
        return kept

    def _loaded(self) -> dict[str, Any] | None:
        try:
            result = load(self.path / "result")
        except (FileNotFoundError, ValueError):  # half a pair: compute again
            return None
        self.journal.path.unlink(missing_ok=True)  # what a crash left
        return result

    def _refuse_other(self, kept: dict[str, Any]) -> None:
        differing = [key for key in self.config | kept if kept.get(key) != self.config.get(key)]
        if differing:
            was, now = (json.dumps(config.get(differing[0])) for config in (kept, self.config))
            raise ValueError(
                f"--out {self.path} holds a run with another {', '.join(differing)} ({differing[0]} was {was}, is now "
                f"{now}); name another folder or remove this one"
            )


def fingerprint(problem: Problem) -> str:
    """Checksum of parameters, buffers and batches: blocks of another initialisation must not complete a run."""
    digest = hashlib.blake2b(digest_size=12)
    for tensor in (
        *problem.model.parameters(),
        *problem.model.buffers(),
        *tensors_of(problem.batches),
    ):
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def own_problem(
    reference: str, *, seed: int = 0, batch_stats: bool | None = None, device: str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Problem, dict[str, str]]:  # fmt: skip
    """The Problem made by the function of ``path/file.py:function``, and what identifies it (file, function, checksum).

    The function takes nothing and returns a Problem or (model, loss_fn, batches). It is called with torch, numpy and
    random seeded by ``seed``; ``batch_stats``, ``device`` and ``dtype``, where given, replace what it chose.

    Raises:
        ValueError: no such file or function, a file or function that fails (with its line), or one that returns
            something else.
        NumericalError: a loss that is NaN or infinite.
    """
    path, _, function = reference.rpartition(":")
    file = Path(path)
    if not path or not function.isidentifier() or not file.is_file():
        missing = (
            f"there is no file {path!r}"
            if path and function.isidentifier()
            else "the function's name is missing"
        )
        raise ValueError(
            f"--model {reference}: {missing}; use FILE.py:FUNCTION or a name of `hessian-tools models`"
        )
    try:
        try:
            made = _made(file, function, seed)
        except (
            ImportError,
            RuntimeError,
        ):  # torchvision and transformers fail beside a CPU-only torch until repaired
            if not repair():
                raise
            made = _made(file, function, seed)
        problem = _adapted(made, batch_stats, device, dtype)
    except (NumericalError, MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename) == file.resolve()
        ]
        where = f"line {frames[-1].lineno}: " if frames else ""
        raise ValueError(f"--model {reference}: {where}{type(error).__name__}: {error}") from error
    return problem, {
        "file": file.name,
        "function": function,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }


def _adapted(
    made: Any, batch_stats: bool | None, device: str | None, dtype: torch.dtype | None
) -> Problem:
    if not isinstance(made, Problem) and not (isinstance(made, tuple) and len(made) == 3):
        raise TypeError(
            f"it returned a {type(made).__name__}, not ht.Problem(...) or (model, loss_fn, batches)"
        )
    problem = made if isinstance(made, Problem) else Problem(*made, batch_stats=batch_stats)
    if (batch_stats, device, dtype) == (None, None, None):
        return problem
    to, stats = (
        torch.device(device or problem.device),
        problem.batch_stats if batch_stats is None else batch_stats,
    )
    batches = [to_device(batch, to, dtype) for batch in problem.batches]
    model = problem.model.to(to, dtype)
    return Problem(
        model, problem.loss_fn, batches, batch_stats=stats, num_examples=problem.num_examples
    )


def _made(file: Path, function: str, seed: int) -> Any:
    spec = importlib.util.spec_from_file_location(f"own_{file.stem}", file.resolve())
    if spec is None or spec.loader is None:
        raise ValueError("it is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    if str(file.parent.resolve()) not in sys.path:
        sys.path.insert(0, str(file.parent.resolve()))  # as if the file were run
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ValueError(f"the file has no function {function}")
    return getattr(module, function)()
