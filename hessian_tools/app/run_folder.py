"""A run on disk: its folder, its lock, its configuration, and its finished parts."""

import contextlib
import hashlib
import json
import re
import weakref
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from hessian_tools.app.terminal import say
from hessian_tools.lock import InUse, Lock
from hessian_tools.page.found import COMMANDS
from hessian_tools.results import Journal, Json, JsonObject, load, load_json, save, write_atomically

_LOCK = "run.lock"
_TEMPORARY = re.compile(r"\..+\.[0-9]+\.tmp")  # what write_atomically leaves when it is killed


class RunFolder:
    """``--out DIR``: config.json; the journal while a run lasts; then result.json and result.npz.

    commands.json holds what to type, for people and for the report page.

    One process alone has it, from here to :meth:`finish` or :meth:`close`; a finished one is only
    read, by as many as like.

    Attributes: ``journal`` of finished parts; ``result``, what :meth:`finish` wrote, None as long
    as it has not (or a crash tore it).

    Args:
        path: the folder; created.
        config: all that the numbers depend on, JSON-able.
        commands: command lines by what they are for: "repeat", which is this run's own and goes on
            with it, and others that the page may offer. None: there are none.
    Raises:
        ValueError: the folder cannot be written, is in use by another process (naming it), holds
            something of another configuration (naming what differs), or files that are not as
            they were written.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Json],
        commands: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self.commands = dict(commands or {})
        self.config: JsonObject = json.loads(json.dumps(config))
        self._lock = self._locked()
        # the journal must not refer to this object: a circle would keep the lock
        self._check = partial(_check_ours, path, self._lock)
        _OPEN.add(self)
        try:
            self._open()
        except OSError as error:
            self.close()
            raise self._not_writable(error) from error
        except BaseException:
            self.close()
            raise
        if self.result:
            self.close()

    def finish(self, result: Mapping[str, Json]) -> Path:
        """Writes result.json and result.npz and drops the journal."""
        if self.path.is_dir():
            self._check()
        try:
            # the folder may have gone while the last part was computed
            self.path.mkdir(parents=True, exist_ok=True)
            self._write_config()
            # of half a pair, which a crash from here on would complete with another's half
            (self.path / "result.json").unlink(missing_ok=True)
            written = save(dict(result), self.path / "result", config=self.config)
            self.journal.path.unlink(missing_ok=True)
        except OSError as error:
            kept = "; the finished parts stand in its journal" if self.journal.path.exists() else ""
            raise ValueError(
                f"--out {self.path}: the result cannot be written ({error}){kept}; make room, or "
                "see to the folder, and give the same command again"
            ) from error
        self.close()
        return written

    def close(self) -> None:
        """Lets other processes have the folder; nothing can be written from then on."""
        self._lock.release()

    def _locked(self) -> Lock:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = Lock(self.path / _LOCK)
        except InUse as owner:
            raise ValueError(
                f"--out {self.path} is in use by {owner}; wait until it ends, end it, or name "
                "another folder"
            ) from owner
        except OSError as error:
            raise self._not_writable(error) from error
        if not lock.is_held:
            say(
                f"note: the file system of --out {self.path} has no locks; see to it that no "
                "other process writes there"
            )
        return lock

    def _not_writable(self, error: OSError) -> ValueError:
        reason = f"({error})"
        if self.path.exists() and not self.path.is_dir():
            reason = "(it is a file)"
        return ValueError(
            f"--out {self.path} cannot be written {reason}; name a folder you may write to"
        )

    def _open(self) -> None:
        kept = self._kept_config()
        for file in self.path.iterdir():
            if _TEMPORARY.fullmatch(file.name):
                file.unlink()
        differing = [key for key in self.config | kept if kept.get(key) != self.config.get(key)]
        run = _run_of(self.config)
        file = self.path / "blocks.jsonl"
        self.result: JsonObject | None = self._loaded(kept)
        # lines of another configuration are not held against this one's id, but refused by name
        self.journal = Journal(file, "" if differing else run, self._check)
        if differing and (self.result or self.journal.finished):
            raise self._of_another(kept, differing)
        self.journal.run = run
        for note in self.journal.notes:
            say(f"note: {note}")
        self._write_config()

    def _write_config(self) -> None:
        write_atomically(self.path / "config.json", json.dumps(self.config, indent=1).encode())
        if self.commands:
            text = json.dumps(self.commands, indent=1)
            write_atomically(self.path / COMMANDS, text.encode())

    def _kept_config(self) -> JsonObject:
        """The configuration that the folder was begun with; this run's, where it is new."""
        file = self.path / "config.json"
        if file.exists():
            kept = load_json(file)
        elif self._is_begun():
            kept = {}
        else:
            kept = self.config
        if "command" not in kept:
            raise ValueError(
                f"--out {self.path} holds files that are no run of this package; name another "
                "folder"
            )
        return kept

    def _is_begun(self) -> bool:
        names = ("blocks.jsonl", "result.json", "result.npz")
        return any((self.path / name).exists() for name in names)

    def _loaded(self, kept: JsonObject) -> JsonObject | None:
        file = self.path / "result.json"
        if not file.exists():
            return None
        if not file.with_suffix(".npz").exists():
            say(f"note: {file} lacks the arrays beside it, result.npz; it is computed again")
            return None
        try:
            result: JsonObject = load(file)
        except ValueError as error:
            raise ValueError(f"--out {self.path}: {error}") from error
        of_result = load_json(file).get("config") or {}
        if any(of_result[key] != kept[key] for key in of_result.keys() & kept.keys()):
            raise ValueError(
                f"--out {self.path}: result.json is not of the configuration in config.json; "
                "restore both from one copy, or name another folder"
            )
        with contextlib.suppress(OSError):
            (self.path / "blocks.jsonl").unlink(missing_ok=True)  # what a crash left
        return result

    def _of_another(self, kept: JsonObject, differing: list[str]) -> ValueError:
        first = differing[0]
        was = json.dumps(kept.get(first))
        now = json.dumps(self.config.get(first))
        return ValueError(
            f"--out {self.path} holds a run with another {', '.join(differing)} ({first} was "
            f"{was}, is now {now}); name another folder or remove this one"
        )


def _check_ours(path: Path, lock: Lock) -> None:
    """Raises where the folder is no longer the one that was locked."""
    if lock.is_ours():
        return
    what = f"has another {_LOCK}, or none: it was replaced or emptied"
    if not path.is_dir():
        what = "was deleted or moved away"
    raise ValueError(
        f"--out {path} {what} while this run was writing to it; where it was moved, the same "
        "command with its new place goes on"
    )


_OPEN: "weakref.WeakSet[RunFolder]" = weakref.WeakSet()


def close_all() -> None:
    """Closes every folder that is still open, as at the end of a command."""
    for folder in list(_OPEN):
        folder.close()


def _run_of(config: JsonObject) -> str:
    """The id of a run: the same for the same configuration."""
    text = json.dumps(config, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
