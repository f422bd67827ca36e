"""What a folder holds of this package: runs of commands, saved results, journals of trackers.

Nothing in the folder is changed, so that a run that is still going on may be looked at.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from hessian_tools.page.trainer_log import LossLog, find_logs, nearest_log
from hessian_tools.quadratic.runs import Runs
from hessian_tools.results import Journal, Json, JsonObject, load, load_json
from hessian_tools.spectra.quadrature import BlockSpectra, Quadrature
from hessian_tools.structure.report import TensorReport
from hessian_tools.tracking.track import SECONDS, STEP, Track
from hessian_tools.training.trajectory import Trajectory

CONFIG = "config.json"
COMMANDS = "commands.json"
JOURNAL = "blocks.jsonl"
RESULT = "result.json"
Kind = TypeVar("Kind")
_HEAD = 4096  # bytes of a file that show whether it is ours
_COMMANDS = ("js0", "spectrum", "partition", "race", "quadratic")


@dataclass(frozen=True)
class FoundRun:
    """A command's run, a saved result, or a tracker's journal.

    Attributes:
        name: its place in the folder that is reported on; that folder's own name for itself.
        command: "js0", "race", ...; "" of what no command wrote.
        results: by name, of whatever types.
        is_finished: False of a command that was interrupted, or that still runs.
        config: what the numbers depend on, as the run kept it.
        commands: command lines by what they are for, see COMMANDS.
        versions: of packages, by name.
        notes: on the files.
        log: losses that a trainer has kept, of a tracker's run.
    """

    name: str
    command: str
    results: JsonObject
    is_finished: bool = True
    config: JsonObject = field(default_factory=dict)
    commands: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    log: LossLog | None = None


def find_runs(folder: Path) -> list[FoundRun]:
    """All that ``folder`` and the folders in it hold, by their places.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a file in place of a folder, a folder without any run, or a file of ours that
            is not as it was written or of another version.
    """
    if not folder.exists():
        raise FileNotFoundError(f"there is no folder {folder}; name one that --out was given")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; name the folder that it lies in")
    homes = sorted(file.parent for file in folder.rglob(CONFIG) if _config(file))
    runs = [_command_run(home, folder) for home in homes]
    runs += [_saved_run(file, folder) for file in _saved_files(folder, homes)]
    runs += _tracker_runs(folder)
    if not runs:
        raise ValueError(
            f"{folder} holds no run of this package: neither what {', '.join(_COMMANDS)} leave in "
            "--out, nor a saved result, nor a Tracker's journal (journal=FILE.jsonl)"
        )
    return sorted(runs, key=lambda run: run.name)


def _config(file: Path) -> JsonObject:
    """The configuration in a file of that name; empty where the file is another program's."""
    try:
        config = load_json(file)
    except ValueError:
        return {}
    return config if isinstance(config.get("command"), str) else {}


def _command_run(home: Path, folder: Path) -> FoundRun:
    config = _config(home / CONFIG)
    commands = load_json(home / COMMANDS) if (home / COMMANDS).exists() else {}
    name = _place(home, folder)
    command = str(config["command"])
    file = home / RESULT
    if file.exists():
        results = _by_name(load(file))
        versions = load_json(file).get("versions", {})
        return FoundRun(name, command, results, True, config, commands, versions)
    results, notes = {}, []
    if (home / JOURNAL).exists():
        journal = Journal(home / JOURNAL, repair=False)
        results = _of_parts(journal.finished, config)
        notes = journal.notes
    return FoundRun(name, command, results, False, config, commands, {}, tuple(notes))


def _saved_files(folder: Path, homes: list[Path]) -> Iterator[Path]:
    """Files of ``ht.save`` that are no result of a command's run."""
    for file in sorted(folder.rglob("*.json")):
        is_of_run = file.name == RESULT and file.parent in homes
        if not is_of_run and _is_saved(file):
            yield file


def _is_saved(file: Path) -> bool:
    """Whether :func:`hessian_tools.results.save` wrote it, in this format or a later one."""
    with file.open("rb") as opened:
        head = opened.read(_HEAD)
    return head.startswith(b'{\n "format": ') and b'"versions": {' in head


def _saved_run(file: Path, folder: Path) -> FoundRun:
    results = _by_name(load(file))
    document = load_json(file)
    config, versions = document.get("config", {}), document.get("versions", {})
    name = _place(file.with_suffix(""), folder)
    return FoundRun(name, str(config.get("command", "")), results, True, config, {}, versions)


def _tracker_runs(folder: Path) -> Iterator[FoundRun]:
    logs = find_logs(folder)
    for file in sorted(folder.rglob("*.jsonl")):
        if file.name == JOURNAL or not _is_journal(file):
            continue
        journal = Journal(file, repair=False)
        results = _of_parts(journal.finished, {})
        name = _place(file.with_suffix(""), folder)
        log = nearest_log(logs, file)
        yield FoundRun(name, "", results, notes=tuple(journal.notes), log=log)


def _is_journal(file: Path) -> bool:
    """Whether the first line is [run, name, part, checksum], or [name, part] of version 0.1.0."""
    with file.open("rb") as opened:
        line = opened.readline()
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return False
    if not isinstance(entry, list):
        return False
    kinds = [type(item) for item in entry]
    return kinds == [str, dict] or (len(kinds) == 4 and kinds[:2] + kinds[3:] == [str, str, str])


def _by_name(result: Json) -> JsonObject:
    if type(result) is not dict:
        return {"": result}
    is_spectra = result and all(isinstance(part, Quadrature) for part in result.values())
    return {"spectra": _spectra(result, {})} if is_spectra else dict(result)


def _of_parts(parts: JsonObject, config: JsonObject) -> JsonObject:
    """The finished parts of a run, brought together by their types."""
    found: JsonObject = {}
    if blocks := _of_type(Quadrature, parts):
        found["spectra"] = _spectra(blocks, config)
    if tensors := _of_type(TensorReport, parts):
        found["tensors"] = tuple(tensors.values())
    if trained := _of_type(Trajectory, parts):
        found["trained"] = trained
    dicts = _of_type(dict, parts)
    if methods := _of_type(Runs, _joined(dicts.values())):
        found["runs"] = methods
    if lines := {name: line for name, line in dicts.items() if {STEP, SECONDS} <= set(line)}:
        found["track"] = Track.of(lines)
    return found


def _of_type(kind: type[Kind], parts: Mapping[str, Json]) -> dict[str, Kind]:
    return {name: part for name, part in parts.items() if isinstance(part, kind)}


def _joined(parts: Iterable[JsonObject]) -> JsonObject:
    return {name: inner for part in parts for name, inner in part.items()}


def _spectra(blocks: dict[str, Quadrature], config: JsonObject) -> BlockSpectra:
    return BlockSpectra(
        blocks,
        num_probes=config.get("probes") or 0,
        num_steps=config.get("steps") or 0,
        seed=config.get("seed") or 0,
        probes=str(config.get("probe_kind", "")),
        reorthogonalize=str(config.get("reorthogonalize", "")),
        route="",
    )


def _place(path: Path, folder: Path) -> str:
    if path == folder:
        return folder.resolve().name
    return path.relative_to(folder).as_posix()
