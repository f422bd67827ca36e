"""Saving and loading results: readable JSON beside an npz of arrays, written atomically.

No pickle is read or written.

A result type registers itself where it is defined, by :func:`registered`; this module knows none of
them. ``save(result, "out/js0")`` writes ``out/js0.npz`` and then ``out/js0.json``, each to a
temporary file that is renamed into place; the JSON carries the checksum of the npz, so a pair torn
by a crash is found out. :class:`Journal` keeps the finished parts of a run, a line each, so that a
killed run goes on where it was.
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
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

FORMAT = 1

Json = Any  # what JSON holds has no type of its own, and neither has what it is decoded to
JsonObject = dict[str, Json]
Array = NDArray[Any]  # of any dtype
ResultClass = TypeVar("ResultClass", bound=type[Json])
# What stands for an array in JSON, and back.
ToReference = Callable[[Array], JsonObject]
FromReference = Callable[[JsonObject], Array]

TYPES: dict[str, type[Json]] = {}  # by the name that files know it by


def registered(cls: ResultClass) -> ResultClass:
    """Class decorator: instances of this dataclass can be saved, and files that hold them loaded.

    Files know the class by its name, so a class that is renamed keeps its old one as
    ``saved_as``, a class attribute.
    """
    TYPES[_saved_name(cls)] = cls
    return cls


def save(
    result: Json, path: str | os.PathLike[str], *, config: Mapping[str, Json] | None = None
) -> Path:
    """Writes ``result`` to PATH.json and PATH.npz; ``config`` (JSON-able: knobs, seed) goes along.

    Args:
        result: any result of this package, an array, number or string, or dicts (of string keys),
            tuples and lists of them. numpy's scalars come back as Python's.
    Returns:
        the JSON file's path.
    Raises:
        TypeError: for anything else; nothing is written then.
    """
    stem = _stem(path)
    arrays: dict[str, Array] = {}

    def by_reference(array: Array) -> JsonObject:
        name = f"a{len(arrays)}"
        arrays[name] = array
        return {"array": name}

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
    text = json.dumps(document, indent=1, allow_nan=False)
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(_suffixed(stem, ".npz"), buffer.getvalue())
    return write_atomically(_suffixed(stem, ".json"), text.encode())


def load(path: str | os.PathLike[str]) -> Json:
    """The result that :func:`save` wrote to PATH (with or without the .json).

    Raises:
        FileNotFoundError: no such result.
        ValueError: not one of ours, of another format, or a pair of files that do not belong
            together.
    """
    stem = _stem(path)
    document = load_json(_suffixed(stem, ".json"))
    if document.get("format") != FORMAT:
        raise ValueError(
            f"{stem}.json is not a saved result of format {FORMAT}; write it again with this "
            "version"
        )
    content = _suffixed(stem, ".npz").read_bytes()
    if hashlib.sha256(content).hexdigest() != document.get("arrays_sha256"):
        raise ValueError(
            f"{stem}.json and {stem}.npz do not belong together (a crash between the two?); run "
            "again"
        )
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        try:
            return _decoded(document["result"], lambda reference: arrays[reference["array"]])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{stem}.json was written by another version of this package: {error}"
            ) from error


def load_json(file: Path) -> JsonObject:
    """The JSON object in ``file``. Raises ValueError for other content."""
    try:
        document = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{file} holds a {type(document).__name__}, not a JSON object")
    return document


class Journal:
    """Finished parts of a run, a line each, appended as they come; ``finished`` holds them by name.

    What follows the last whole line, torn by a kill, is cut off on reading.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.finished: JsonObject = {}
        content = path.read_bytes() if path.exists() else b""
        kept = 0
        for line in content.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            try:
                name, encoded = json.loads(line)
                self.finished[name] = _decoded(encoded, _inline_array)
            except (ValueError, TypeError, KeyError):
                break
            kept += len(line)
        if kept < len(content):
            os.truncate(path, kept)

    def append(self, name: str, result: Json) -> None:
        line = json.dumps([name, _encoded(result, _as_inline)], allow_nan=False)
        # once closed, the line is the system's, and survives the death of this process
        with self.path.open("a") as file:
            file.write(line + "\n")


def versions() -> dict[str, str]:
    """Versions of everything a number depends on."""
    known = {"python": platform.python_version(), "platform": platform.machine()}
    for package in ("hessian_tools", "torch", "torchvision", "transformers", "numpy", "scipy"):
        try:
            known[package] = version(package)
        except PackageNotFoundError:
            known[package] = "not installed"
    return known


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


def _stem(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".json", ".npz") else path


def _suffixed(stem: Path, suffix: str) -> Path:
    return stem.with_name(stem.name + suffix)


def _saved_name(cls: type) -> str:
    return str(getattr(cls, "saved_as", cls.__name__))


def _encoded(value: Json, reference: ToReference) -> Json:
    """JSON-able: a JSON list is a tuple; what JSON lacks is an object of one or two tags."""
    if TYPES.get(_saved_name(type(value))) is type(value):
        fields = {
            field.name: _encoded(getattr(value, field.name), reference)
            for field in dataclasses.fields(value)
        }
        return {"type": _saved_name(type(value)), "fields": fields}
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return reference(value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": [[key, _encoded(item, reference)] for key, item in value.items()]}
    if isinstance(value, tuple | list):
        items = [_encoded(item, reference) for item in value]
        return items if isinstance(value, tuple) else {"list": items}
    return _encoded_scalar(value)


def _encoded_scalar(value: Json) -> Json:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop]}
    if isinstance(value, bool | int | float | str | None):
        return value
    raise TypeError(
        f"cannot save a {type(value).__name__}; results, arrays, numbers, strings and dicts of "
        "them can be"
    )


def _decoded(value: Json, array: FromReference) -> Json:
    if isinstance(value, list):
        return tuple(_decoded(item, array) for item in value)
    if not isinstance(value, dict):
        return value
    if "type" in value:
        fields = {name: _decoded(item, array) for name, item in value["fields"].items()}
        return TYPES[value["type"]](**fields)
    if "dict" in value:
        return {key: _decoded(item, array) for key, item in value["dict"]}
    if "list" in value:
        return [_decoded(item, array) for item in value["list"]]
    if "slice" in value:
        return slice(*value["slice"])
    return float(value["float"]) if "float" in value else array(value)


def _as_inline(array: Array) -> JsonObject:
    return {
        "dtype": array.dtype.str,
        "shape": array.shape,
        "base64": base64.b64encode(array.tobytes()).decode(),
    }


def _inline_array(value: JsonObject) -> Array:
    flat = np.frombuffer(base64.b64decode(value["base64"]), value["dtype"])
    return flat.reshape(value["shape"]).copy()
