"""Saving and loading results: readable JSON beside an npz of arrays, written atomically.

No pickle is read or written.

A result type registers itself where it is defined, by :func:`registered`; this module knows none of
them. ``save(result, "out/js0")`` writes ``out/js0.npz`` and then ``out/js0.json``, each to a
temporary file that is renamed into place. The JSON carries its own checksum and that of the npz, so
a pair torn by a crash, and a single changed character, are found out. :class:`Journal` keeps the
finished parts of a run, a line each with a checksum, so that a killed run goes on where it was.
"""

import base64
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import platform
import zipfile
import zlib
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
    name = _saved_name(cls)
    known = TYPES.get(name, cls)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise TypeError(f"{cls} would be saved as {name}, which is how {known} is saved")
    TYPES[name] = cls
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
    document["checksum"] = _checksum(document)
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
    document = _checked_document(_suffixed(stem, ".json"))
    content = _checked_arrays(stem, document)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return _decoded(document["result"], lambda reference: arrays[reference["array"]])
    except (KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{stem}.json was written by another version of this package: {error}"
        ) from error


def _checked_document(file: Path) -> JsonObject:
    document = load_json(file)
    if document.get("format") != FORMAT:
        raise ValueError(
            f"{file} is not a saved result of format {FORMAT}; give the file of a result, or "
            "write it again with this version"
        )
    # version 0.1.0 wrote none
    if "checksum" in document and document["checksum"] != _checksum(document):
        raise ValueError(
            f"{file} is not as it was written: its checksum does not match its content; restore "
            "it from a copy, or delete it and run again"
        )
    return document


def _checked_arrays(stem: Path, document: JsonObject) -> bytes:
    """The npz file's content, which must be that of the time when the JSON file was written."""
    file = _suffixed(stem, ".npz")
    if not file.exists():
        raise FileNotFoundError(
            f"{stem}.json is there, but not the arrays beside it, {file.name}; copy both, or run "
            "again"
        )
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() == document.get("arrays_sha256"):
        return content
    way_out = "restore it from a copy, or delete both and run again"
    if _is_whole(content):
        raise ValueError(
            f"{stem}.json and {stem}.npz do not belong together: the npz is not the one that the "
            f"JSON file was written with; {way_out}"
        )
    raise ValueError(f"{file} is damaged: its checksum is not the one in {stem}.json; {way_out}")


def _is_whole(content: bytes) -> bool:
    """Whether these are a zip file's bytes, with every member's own checksum right."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError, NotImplementedError):
        return False
    except RuntimeError:  # a flag says that the member is encrypted
        return False


def _checksum(document: Mapping[str, Json]) -> str:
    """Of all but the checksum itself, whatever the layout of the file."""
    rest = {key: value for key, value in document.items() if key != "checksum"}
    return _digest(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def load_json(file: Path) -> JsonObject:
    """The JSON object in ``file``. Raises ValueError for other content."""
    try:
        document = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{file} holds a {type(document).__name__}, not a JSON object")
    return document


class Journal:
    """Finished parts of a run, a line each, appended as they come; ``finished`` holds them by name.

    A line is a JSON list: the run's id, a name, the result, and a checksum of all before it. What
    follows the last whole line, torn by a kill, is cut off on reading, and ``notes`` say so.

    Args:
        path: the file; need not exist.
        run: id of the run. "" continues whatever run wrote the file.
        check: called before every line is written, to raise where that must not be.
        repair: whether the torn end is cut off in the file as well. False leaves the file alone,
            which another process may be writing.
    Raises:
        ValueError: a line that is not as it was written, or of another run, by its number.
    """

    def __init__(
        self,
        path: Path,
        run: str = "",
        check: Callable[[], None] = lambda: None,
        repair: bool = True,
    ) -> None:
        self.path = path
        self.run = run
        self.finished: JsonObject = {}
        self.notes: list[str] = []
        self._check = check
        content = path.read_bytes() if path.exists() else b""
        whole = self._read(content)
        if repair and whole != content:
            write_atomically(path, whole)
        self._size = path.stat().st_size if path.exists() else 0

    def append(self, name: str, result: Json) -> None:
        """Writes a line.

        Raises:
            ValueError: somebody else has written to the file, or taken it away.
            OSError: it cannot be written; it is as it was before then.
        """
        self._check()
        line = self._line(name, result)
        try:
            self._write(line)
        except OSError as error:
            reason = error.strerror or error
            raise OSError(
                f"{self.path} cannot be written ({reason}); the parts finished before stand in "
                "it: make room, or see to the folder, and the same command goes on"
            ) from error
        self._size += len(line)

    def _line(self, name: str, result: Json) -> bytes:
        encoded = _encoded(result, _as_inline)
        sealed = json.dumps([self.run, name, encoded], allow_nan=False)[:-1].encode()
        return sealed + f', "{_digest(sealed)}"]\n'.encode()

    def _write(self, line: bytes) -> None:
        # once written, the line is the system's, and survives the death of this process
        with self.path.open("ab", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != self._size:
                raise ValueError(
                    f"{self.path} was changed while this run wrote to it, by another process or "
                    "by hand; let one process alone use it, and give the command again"
                )
            left = memoryview(line)
            try:
                while left:
                    left = left[file.write(left) :]
            except BaseException:
                with contextlib.suppress(OSError):
                    file.truncate(self._size)
                raise

    def _read(self, content: bytes) -> bytes:
        """Takes all lines; returns the content that the file should have."""
        *lines, rest = content.split(b"\n")
        if rest:
            content = content[: -len(rest)]
            self.notes.append(
                f"the last line of {self.path} was cut short and is dropped; what it held is "
                "computed again"
            )
        is_old = bool(lines) and all(map(_is_of_first_version, lines))
        for number, line in enumerate(lines, start=1):
            self._take(number, line, is_old)
        if is_old:
            self.notes.append(
                f"{self.path} is of version 0.1.0, whose lines had no checksum; taken as it is"
            )
            content = b"".join(self._line(name, part) for name, part in self.finished.items())
        return content

    def _take(self, number: int, line: bytes, is_old: bool) -> None:
        """One line, into ``finished``."""
        entry = [self.run, *json.loads(line)] if is_old else _unsealed(line)
        if entry is None:
            raise ValueError(
                f"line {number} of {self.path} is not as it was written: its checksum does not "
                "match its content; delete this line, and what it held is computed again"
            )
        run, name, encoded = entry
        self.run = self.run or run
        if run != self.run:
            raise ValueError(
                f"line {number} of {self.path} is of another run ({run}; this one is "
                f"{self.run}); delete this line, or name another folder"
            )
        try:
            self.finished[name] = _decoded(encoded, _inline_array)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            kind = type(error).__name__
            raise ValueError(
                f"line {number} of {self.path} was written by another version of this package "
                f"({kind}: {error}); delete this line, and what it held is computed again"
            ) from error


def _unsealed(line: bytes) -> Json:
    """[run, name, encoded] of a line of a journal, None where its checksum is not right."""
    sealed, comma, seal = line.rpartition(b", ")
    if not comma or seal != f'"{_digest(sealed)}"]'.encode():
        return None
    return json.loads(sealed + b"]")


def _is_of_first_version(line: bytes) -> bool:
    """Whether it is a line [name, encoded], as version 0.1.0 wrote them."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)


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
    """Writes a whole file or none of it; an OSError names the file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None:
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with contextlib.suppress(OSError):
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
