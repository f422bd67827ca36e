"""Verification of a run's products: as much as the run is worth, and of one network once.

A run of few products is verified quickly, a long one in full. What has passed is remembered under
``$XDG_CACHE_HOME/hessian_tools/verified`` (by default ``~/.cache``), by a checksum of everything
that the products follow from: weights, data, the sources of model, loss, hessian_tools and whatever
else is imported that is not installed, precision, device and torch's version.
"""

import contextlib
import hashlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from hessian_tools.app.terminal import say
from hessian_tools.curvature.engine_operator import LEVELS, EngineOperator
from hessian_tools.curvature.verification import FULL_PASSES, Verification
from hessian_tools.errors import NumericalError
from hessian_tools.results import JsonObject, write_atomically

NEVER, AUTO = "never", "auto"
CHOICES = (AUTO, *LEVELS, NEVER)
# Forward passes of an announced run from which the full set adds at most a twentieth.
_WORTH_FULL = 20 * FULL_PASSES


def verify(hessian: EngineOperator, asked: str, identity: JsonObject) -> None:
    """Checks the products as ``asked``, one of CHOICES, and says how they compare.

    ``identity`` is what identifies network and data (of :func:`..options.load_problem`).

    Raises:
        NumericalError: they fail.
    """
    if asked == NEVER:
        return
    level = asked if asked in LEVELS else _worth(hessian)
    record = _record(hessian, identity)
    known = _remembered(record)
    if asked == AUTO and known in (level, "full"):
        say(f"verified before (the {known} set, same network, data and code): not again")
        return
    _check(hessian.verify(level=level), level, hessian.title)
    _remember(record, level)


def _worth(hessian: EngineOperator) -> str:
    return "full" if hessian.announced > _WORTH_FULL else "quick"


def _check(verification: Verification, level: str, title: str) -> None:
    if not verification.passed:
        failures = "; ".join(map(str, verification.failures))
        raise NumericalError(
            f"the {title}'s products fail verification: {failures}; the model's gradient may not "
            "be that of its loss (a padding_idx that is read, a detach, a custom backward); "
            "--verify never goes on all the same"
        )
    errors = ", ".join(f"{check.name} {check.error:.0e}" for check in verification.checks)
    say(f"verified ({level} set, relative errors): {errors}")
    for skipped in verification.skipped:
        say(f"not verified: {skipped}")


def _remembered(record: Path | None) -> str:
    """The level that was passed before; "" where none is known."""
    try:
        return str(json.loads(record.read_bytes())["level"]) if record else ""
    except (OSError, ValueError, KeyError, TypeError):  # not there, or not ours: verified again
        return ""


def _remember(record: Path | None, level: str) -> None:
    if record is None:
        return
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(record, json.dumps({"level": level}).encode())
    except OSError as error:
        say(f"not remembered as verified: {error}")


def _record(hessian: EngineOperator, identity: JsonObject) -> Path | None:
    """The file that remembers it; None where there is no home to keep one in."""
    stated = {
        "identity": identity,
        "matrix": hessian.title,
        "arithmetic": str(hessian.arithmetic),
        "device": str(hessian.device),
        "torch": torch.__version__,
        "sources": _digest(_sources(hessian)),
    }
    name = hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # no home
        return None
    return Path(cache) / "hessian_tools" / "verified" / f"{name[:32]}.json"


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(set(files)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _sources(hessian: EngineOperator) -> Iterator[Path]:
    """Of hessian_tools, the model's modules, the loss, and all else imported that is the user's."""
    package = Path(__file__).parents[1]
    yield from package.rglob("*.py")
    problem = hessian.problem
    kinds = {type(module) for module in problem.model.modules()}
    codes: list[Callable[..., object]] = [*kinds, problem.loss_fn, type(problem.loss_fn)]
    for code in codes:
        with contextlib.suppress(TypeError):  # built in, or an object whose class comes next
            yield from _file(inspect.getsourcefile(code))
    installed = (package, Path(sys.prefix), Path(sys.base_prefix))
    for module in list(sys.modules.values()):
        for file in _file(getattr(module, "__file__", None)):
            if not any(file.is_relative_to(place) for place in installed):
                yield file


def _file(name: str | None) -> Iterator[Path]:
    """The file of that name, if it is Python's and there."""
    if name and name.endswith(".py") and Path(name).is_file():
        yield Path(name).resolve()
