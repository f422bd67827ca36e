"""Saving and loading every result: a readable json beside an npz of its arrays, no pickle, written atomically.

``save(result, "out/js0")`` writes ``out/js0.npz`` and then ``out/js0.json``, each to a temporary file that is renamed into
place; the json carries the npz's checksum, so a pair torn by a crash is found out. :class:`Journal` keeps the blocks of an
unfinished run, a line a block, so that a killed run goes on where it was.
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

from hessian_tools.density import Axis, SpectralDensity
from hessian_tools.heterogeneity import JSHeterogeneity, Reading, ScaleSpread
from hessian_tools.quadrature import BlockSpectra, Quadrature
from hessian_tools.verdict import Verdict

FORMAT = 1
# a new result type is one more entry here
TYPES = {
    cls.__name__: cls
    for cls in (Quadrature, BlockSpectra, Axis, SpectralDensity, JSHeterogeneity, Reading, ScaleSpread, Verdict)
}


def save(result: Any, path: str | os.PathLike, *, config: Mapping[str, Any] | None = None) -> Path:
    """Writes ``result`` to PATH.json and PATH.npz; ``config`` (JSON-able: knobs, seed) goes along.

    Args:
        result: any result of this package, or a dict of them by name.
    Returns:
        the json's path.
    Raises:
        TypeError: for something that is not a result.
    """
    target = Path(path)
    arrays: dict[str, np.ndarray] = {}

    def by_reference(array: np.ndarray) -> dict[str, Any]:
        arrays[f"a{len(arrays)}"] = array
        return {"array": f"a{len(arrays) - 1}"}

    encoded = _encoded(result, by_reference)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    document = {
        "format": FORMAT,
        "versions": versions(),
        "config": config or {},
        "arrays_sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
        "result": encoded,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(_suffixed(target, ".npz"), buffer.getvalue())
    text = json.dumps(document, indent=1, allow_nan=False)
    return write_atomically(_suffixed(target, ".json"), text.encode())


def load(path: str | os.PathLike) -> Any:
    """The result that :func:`save` wrote to PATH (with or without the .json).

    Raises:
        FileNotFoundError: no such result.
        ValueError: not one of ours, of a later format, or a pair of files that do not belong together.
    """
    stem = Path(path).with_suffix("") if Path(path).suffix in (".json", ".npz") else Path(path)
    document = load_document(stem)
    content = _suffixed(stem, ".npz").read_bytes()
    if hashlib.sha256(content).hexdigest() != document["arrays_sha256"]:
        raise ValueError(f"{stem}.json and {stem}.npz do not belong together (a crash between the two?); run again")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return _decoded(document["result"], lambda reference: arrays[reference["array"]])


def load_document(path: str | os.PathLike) -> dict[str, Any]:
    """The json of a saved result as it stands, with ``config`` and ``versions``; errors as in :func:`load`."""
    name = _suffixed(Path(path), ".json")
    try:
        document = json.loads(name.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not a saved result: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{name} is not a saved result of format {FORMAT}; write it again with this version")
    return document


class Journal:
    """Finished blocks of a run, a line a block, appended and flushed to disk as they come.

    A line torn by a kill is dropped on reading. ``finished`` maps names to Quadratures.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.finished: dict[str, Quadrature] = {}
        if not path.exists():
            return
        whole = b""
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            name, encoded = json.loads(line)
            self.finished[name] = _decoded(encoded, _inline_array)
            whole += line
        write_atomically(path, whole)  # appending must not continue a torn line

    def append(self, name: str, quadrature: Quadrature) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps([name, _encoded(quadrature, _as_inline)], allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


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


def _suffixed(path: Path, suffix: str) -> Path:
    return path if path.suffix == suffix else path.with_name(path.name + suffix)


def _encoded(value: Any, array: Callable[[np.ndarray], Any]) -> Any:
    if type(value).__name__ in TYPES and dataclasses.is_dataclass(value):
        fields = {f.name: _encoded(getattr(value, f.name), array) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, "fields": fields}
    if isinstance(value, np.ndarray):
        return array(value)
    if isinstance(value, Mapping):
        return {"dict": [[str(key), _encoded(item, array)] for key, item in value.items()]}
    if isinstance(value, tuple | list):
        return [_encoded(item, array) for item in value]
    if isinstance(value, bool | str | None):
        return value
    if isinstance(value, np.integer | int):
        return int(value)
    if isinstance(value, np.floating | float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    raise TypeError(f"cannot save a {type(value).__name__}; results of this package and dicts of them can be saved")


def _decoded(value: Any, array: Callable[[Any], np.ndarray]) -> Any:
    if isinstance(value, list):
        return tuple(_decoded(item, array) for item in value)
    if not isinstance(value, dict):
        return value
    if "type" in value:
        return TYPES[value["type"]](**{name: _decoded(item, array) for name, item in value["fields"].items()})
    if "dict" in value:
        return {key: _decoded(item, array) for key, item in value["dict"]}
    if "float" in value:
        return float(value["float"])
    return array(value)


def _as_inline(array: np.ndarray) -> dict[str, Any]:
    content = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"dtype": array.dtype.str, "shape": array.shape, "base64": content}


def _inline_array(value: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(value["base64"]), value["dtype"]).reshape(value["shape"]).copy()
