"""Saving and loading every result: a readable json beside an npz of its arrays, no pickle, written atomically.

``save(result, "out/js0")`` writes ``out/js0.npz`` and then ``out/js0.json``, each to a temporary file that is renamed
into place; the json carries the npz's checksum, so a pair torn by a crash is found out. :class:`Journal` keeps the
blocks of an unfinished run, a line a block, so that a killed run goes on where it was.
"""

import base64
import dataclasses
import hashlib
import io
import json
import math
import os
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from hessian_tools.blocks.adam_mini import Keywords
from hessian_tools.blocks.adam_mini_arguments import AdamMiniArguments
from hessian_tools.blocks.block import Cut, Part
from hessian_tools.blocks.param_groups import StateSavings
from hessian_tools.blocks.partition import Partition
from hessian_tools.curvature.verification import Check, Verification
from hessian_tools.heterogeneity.adaptive import AdaptiveJS0, Round, Uncertainty
from hessian_tools.heterogeneity.js import JSHeterogeneity, Reading, ScaleSpread
from hessian_tools.heterogeneity.verdict import Verdict
from hessian_tools.quadratic.simulation import Runs
from hessian_tools.quadratic.sweeps import Sweep
from hessian_tools.quadratic.theory import BoundCheck, Constants, LimitCycle, Scorecard
from hessian_tools.spectra.density import Axis, SpectralDensity
from hessian_tools.spectra.quadrature import BlockSpectra, Estimate, Quadrature, RitzValue
from hessian_tools.structure.conditioning import AdamConditioning, BlockConditioning, BlockExtremes
from hessian_tools.structure.coupling import Coupling
from hessian_tools.structure.dense import DenseBlock
from hessian_tools.structure.judgement import Levels, Statement
from hessian_tools.structure.report import CutEvidence, PartitionReport, TensorReport

FORMAT = 1
_RESULTS: tuple[type, ...] = (
    Quadrature, BlockSpectra, Estimate, RitzValue, Axis, SpectralDensity, JSHeterogeneity, Reading, ScaleSpread,
    Verdict, Check, Verification, AdaptiveJS0, Round, Uncertainty, DenseBlock, Coupling, AdamConditioning,
    BlockConditioning, BlockExtremes,
    Part, Cut, Partition, Keywords, AdamMiniArguments, StateSavings,
    Levels, Statement, CutEvidence, TensorReport, PartitionReport,
    Runs, Sweep, Constants, BoundCheck, Scorecard, LimitCycle,
)  # fmt: skip
TYPES: dict[str, Any] = {cls.__name__: cls for cls in _RESULTS}


def save(result: Any, path: str | os.PathLike, *, config: Mapping[str, Any] | None = None) -> Path:
    """Writes ``result`` to PATH.json and PATH.npz; ``config`` (JSON-able: knobs, seed) goes along.

    Args:
        result: any result of this package, an array, number or string, or dicts (of string keys), tuples and lists of
            them. numpy's scalars come back as Python's.
    Returns:
        the json's path.
    Raises:
        TypeError: for anything else; nothing is written then.
    """
    stem, arrays = _stem(path), dict[str, np.ndarray]()

    def by_reference(array: np.ndarray) -> dict[str, Any]:
        arrays[f"a{len(arrays)}"] = array
        return {"array": f"a{len(arrays) - 1}"}

    encoded, buffer = _encoded(result, by_reference), io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    checksum = hashlib.sha256(buffer.getvalue()).hexdigest()
    document = {
        "format": FORMAT,
        "versions": versions(),
        "config": config or {},
        "arrays_sha256": checksum,
    }
    text = json.dumps({**document, "result": encoded}, indent=1, allow_nan=False)
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(_suffixed(stem, ".npz"), buffer.getvalue())
    return write_atomically(_suffixed(stem, ".json"), text.encode())


def load(path: str | os.PathLike) -> Any:
    """The result that :func:`save` wrote to PATH (with or without the .json).

    Raises:
        FileNotFoundError: no such result.
        ValueError: not one of ours, of another format, or a pair of files that do not belong together.
    """
    stem = _stem(path)
    document = load_json(_suffixed(stem, ".json"))
    if document.get("format") != FORMAT:
        raise ValueError(
            f"{stem}.json is not a saved result of format {FORMAT}; write it again with this version"
        )
    content = _suffixed(stem, ".npz").read_bytes()
    if hashlib.sha256(content).hexdigest() != document.get("arrays_sha256"):
        raise ValueError(
            f"{stem}.json and {stem}.npz do not belong together (a crash between the two?); run again"
        )
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        try:
            return _decoded(document["result"], lambda reference: arrays[reference["array"]])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{stem}.json was written by another version of this package: {error}"
            ) from error


def load_json(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``. Raises ValueError for other content."""
    try:
        document = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{file} holds a {type(document).__name__}, not a JSON object")
    return document


class Journal:
    """Finished blocks of a run, a line a block, appended as they come; ``finished`` are those found, by name.

    What follows the last whole line, torn by a kill, is cut off on reading.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.finished: dict[str, Quadrature] = {}
        content, kept = path.read_bytes() if path.exists() else b"", 0
        for line in content.splitlines(keepends=True):
            try:
                name, encoded = json.loads(line)
                found = _decoded(encoded, _inline_array)
            except (ValueError, TypeError, KeyError):
                break
            if not line.endswith(b"\n"):
                break
            self.finished[name] = found
            kept += len(line)
        if kept < len(content):
            os.truncate(path, kept)

    def append(self, name: str, quadrature: Quadrature) -> None:
        line = json.dumps([name, _encoded(quadrature, _as_inline)], allow_nan=False)
        with self.path.open(
            "a"
        ) as file:  # closed, the line is the system's, and survives the death of this process
            file.write(line + "\n")


def versions() -> dict[str, str]:
    """Versions of everything a number depends on."""
    found = {"python": platform.python_version(), "platform": platform.machine()}
    for package in ("hessian_tools", "torch", "torchvision", "transformers", "numpy", "scipy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_atomically(path: Path, content: bytes) -> Path:
    """Writes a whole file or none of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _stem(path: str | os.PathLike) -> Path:
    return Path(path).with_suffix("") if Path(path).suffix in (".json", ".npz") else Path(path)


def _suffixed(stem: Path, suffix: str) -> Path:
    return stem.with_name(stem.name + suffix)


def _encoded(value: Any, array: Callable[[np.ndarray], Any]) -> Any:
    """JSON-able; a JSON list is a tuple, everything else that JSON lacks is an object of one tag."""
    if TYPES.get(type(value).__name__) is type(value):
        fields = {
            f.name: _encoded(getattr(value, f.name), array) for f in dataclasses.fields(value)
        }
        return {"type": type(value).__name__, "fields": fields}
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return array(value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": [[key, _encoded(item, array)] for key, item in value.items()]}
    if isinstance(value, tuple | list):
        items = [_encoded(item, array) for item in value]
        return items if isinstance(value, tuple) else {"list": items}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop]}
    if isinstance(value, bool | int | float | str | None):
        return value
    raise TypeError(
        f"cannot save a {type(value).__name__}; results, arrays, numbers, strings and dicts of them can be"
    )


def _decoded(value: Any, array: Callable[[Any], np.ndarray]) -> Any:
    if isinstance(value, list):
        return tuple(_decoded(item, array) for item in value)
    if not isinstance(value, dict):
        return value
    if "type" in value:
        return TYPES[value["type"]](
            **{name: _decoded(item, array) for name, item in value["fields"].items()}
        )
    if "dict" in value:
        return {key: _decoded(item, array) for key, item in value["dict"]}
    if "list" in value:
        return [_decoded(item, array) for item in value["list"]]
    if "slice" in value:
        return slice(*value["slice"])
    return float(value["float"]) if "float" in value else array(value)


def _as_inline(array: np.ndarray) -> dict[str, Any]:
    return {
        "dtype": array.dtype.str,
        "shape": array.shape,
        "base64": base64.b64encode(array.tobytes()).decode(),
    }


def _inline_array(value: dict[str, Any]) -> np.ndarray:
    return (
        np.frombuffer(base64.b64decode(value["base64"]), value["dtype"])
        .reshape(value["shape"])
        .copy()
    )
