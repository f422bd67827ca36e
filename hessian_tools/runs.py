"""A run on disk: its folder, its configuration, its finished blocks, and the user's own model files."""

import hashlib
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hessian_tools.problem import Problem, to_device
from hessian_tools.quadrature import BlockSpectra, Quadrature
from hessian_tools.results import Journal, load, save, write_atomically
from hessian_tools.vision import repair


class RunFolder:
    """``--out DIR``: config.json, the journal of finished blocks while a run lasts, then result.json and result.npz.

    Args:
        path: the folder; created.
        config: all that the numbers depend on, JSON-able.
    Raises:
        ValueError: the folder cannot be written, or holds a run of another configuration (naming what differs).
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path, self.config = path, json.loads(json.dumps(config))
        try:
            path.mkdir(parents=True, exist_ok=True)
            kept = path / "config.json"
            if kept.exists():
                self._refuse_other(json.loads(kept.read_text()))
            write_atomically(kept, json.dumps(self.config, indent=1).encode())
            self.journal = Journal(path / "blocks.jsonl")
        except OSError as error:
            raise ValueError(
                f"--out {path} cannot be written ({error.strerror}); name a folder you may write to"
            ) from error

    @property
    def finished(self) -> dict[str, Quadrature]:
        """Blocks that need no computing: those of the finished result, or of the journal of an interrupted run."""
        if (self.path / "result.json").exists():
            spectra: BlockSpectra = load(self.path / "result")["spectra"]
            return dict(spectra.items())
        return self.journal.finished

    def finish(self, result: Mapping[str, Any]) -> Path:
        """Writes result.json and result.npz and drops the journal."""
        written = save(dict(result), self.path / "result", config=self.config)
        self.journal.path.unlink(missing_ok=True)
        return written

    def _refuse_other(self, kept: Any) -> None:
        if kept == self.config:
            return
        differing = sorted(key for key in {*kept, *self.config} if kept.get(key) != self.config.get(key))
        first = differing[0]
        raise ValueError(
            f"--out {self.path} holds a run with another {', '.join(differing)} ({first} was {kept.get(first)!r}, is now "
            f"{self.config.get(first)!r}); name another folder or remove this one"
        )


def own_problem(
    reference: str, *, batch_stats: bool | None = None, device: str | None = None, dtype: torch.dtype | None = None
) -> tuple[Problem, dict[str, str]]:
    """The Problem made by the function of ``path/file.py:function``, and what identifies it (file, function, checksum).

    The function takes nothing and returns a Problem or (model, loss_fn, batches). ``batch_stats``, ``device`` and ``dtype``,
    where given, replace what it chose.

    Raises:
        ValueError: no such file or function, a file that fails, or a function that returns something else.
    """
    path, _, function = reference.rpartition(":")
    file = Path(path)
    if not function.isidentifier() or not file.is_file():
        missing = f"there is no file {path!r}" if path and function.isidentifier() else "the function's name is missing"
        raise ValueError(
            f"--model {reference}: {missing}; use path/file.py:function or a name of `hessian-tools models`"
        )
    try:
        made = _made(file, function)
    except Exception as error:
        try:  # torchvision and transformers fail beside a CPU-only torch until repaired
            if not repair():
                raise error
            made = _made(file, function)
        except Exception as final:
            raise ValueError(f"--model {reference}: {type(final).__name__}: {final}") from final
    if isinstance(made, Problem):
        made = (made.model, made.loss_fn, made.batches, made.batch_stats, made.num_examples)
    elif isinstance(made, tuple) and len(made) == 3:
        made = (*made, None, None)
    else:
        raise ValueError(
            f"--model {reference}: {function}() returned a {type(made).__name__}; it must return ht.Problem(...) "
            "or (model, loss_fn, batches)"
        )
    model, loss_fn, batches, stats, num_examples = made
    if device is not None or dtype is not None:
        model, batches = (
            model.to(device, dtype),
            [to_device(batch, torch.device(device or "cpu"), dtype) for batch in batches],
        )
    stats = stats if batch_stats is None else batch_stats
    problem = Problem(model, loss_fn, batches, batch_stats=stats, num_examples=num_examples)
    return problem, {"file": file.name, "function": function, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def _made(file: Path, function: str) -> Any:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # dataclasses look themselves up there
    sys.path.insert(0, str(file.parent.resolve()))  # as if the file were run
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, function, None)):
            raise ValueError(f"{file} has no function {function}")
        return getattr(module, function)()
    finally:
        sys.path.pop(0)
