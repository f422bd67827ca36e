"""A user's own model: the Problem that a function of their file makes, and what identifies it."""

import hashlib
import importlib.util
import random
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from hessian_tools.errors import NumericalError
from hessian_tools.problem.batches import tensors_of, to_device
from hessian_tools.problem.problem import Problem
from hessian_tools.problem.vision import repair


def problem_from(
    reference: str,
    *,
    seed: int = 0,
    batch_stats: bool | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Problem, dict[str, str]]:
    """The Problem made by the function of ``path/file.py:function``, and what identifies it.

    The function takes nothing and returns a Problem or (model, loss_fn, batches). It is called with
    torch, numpy and random seeded by ``seed``; ``batch_stats``, ``device`` and ``dtype``, where
    given, replace what it chose.

    Returns:
        the Problem, and the file's name, the function's, and the file's checksum.
    Raises:
        ValueError: no such file or function, a file or function that fails (with its line), or one
            that returns something else.
        NumericalError: a loss that is NaN or infinite.
    """
    file, function = _parsed(reference)
    try:
        made = _called_after_repair(file, function, seed)
        problem = _adapted(made, batch_stats, device, dtype)
    except (NumericalError, MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        where = _line_in(file, error)
        raise ValueError(f"--model {reference}: {where}{type(error).__name__}: {error}") from error
    identity = {
        "file": file.name,
        "function": function,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    return problem, identity


def fingerprint(problem: Problem) -> str:
    """Checksum of parameters, buffers and batches.

    Blocks of another initialisation must not complete a run.
    """
    digest = hashlib.blake2b(digest_size=12)
    model = problem.model
    for tensor in (*model.parameters(), *model.buffers(), *tensors_of(problem.batches)):
        entries = tensor.detach().cpu().contiguous().flatten()
        digest.update(entries.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _parsed(reference: str) -> tuple[Path, str]:
    path, _, function = reference.rpartition(":")
    missing = ""
    if not path or not function.isidentifier():
        missing = "the function's name is missing"
    elif not Path(path).is_file():
        missing = f"there is no file {path!r}"
    if missing:
        raise ValueError(
            f"--model {reference}: {missing}; use FILE.py:FUNCTION or a name of "
            "`hessian-tools models`"
        )
    return Path(path), function


def _called_after_repair(file: Path, function: str, seed: int) -> Any:
    """What the user's function returns, which may be anything."""
    try:
        return _called(file, function, seed)
    except (ImportError, RuntimeError):
        # torchvision and transformers fail beside a CPU-only torch until repaired
        if not repair():
            raise
        return _called(file, function, seed)


def _called(file: Path, function: str, seed: int) -> Any:
    module = _module(file)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    module.__spec__.loader.exec_module(module)  # type: ignore[union-attr]  # _module has made both
    made = getattr(module, function, None)
    if not callable(made):
        raise ValueError(f"the file has no function {function}")
    return made()


def _module(file: Path) -> ModuleType:
    """The file as a module that can be imported by name, not yet run."""
    spec = importlib.util.spec_from_file_location(f"own_{file.stem}", file.resolve())
    if spec is None or spec.loader is None:
        raise ValueError("it is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    folder = str(file.parent.resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as if the file were run
    return module


def _adapted(
    made: object,
    batch_stats: bool | None,
    device: str | None,
    dtype: torch.dtype | None,
) -> Problem:
    if isinstance(made, tuple) and len(made) == 3:
        problem = Problem(*made, batch_stats=batch_stats)
    elif isinstance(made, Problem):
        problem = made
    else:
        raise TypeError(
            f"it returned a {type(made).__name__}, not ht.Problem(...) or (model, loss_fn, batches)"
        )
    if batch_stats is None and device is None and dtype is None:
        return problem
    target = torch.device(device or problem.device)
    return Problem(
        problem.model.to(target, dtype),
        problem.loss_fn,
        [to_device(batch, target, dtype) for batch in problem.batches],
        batch_stats=problem.batch_stats if batch_stats is None else batch_stats,
        num_examples=problem.num_examples,
    )


def _line_in(file: Path, error: BaseException) -> str:
    """The last line of the user's file that the error passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == file.resolve()]
    return f"line {lines[-1]}: " if lines else ""
