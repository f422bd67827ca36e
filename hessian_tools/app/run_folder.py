"""A run on disk: its folder, its configuration, and its finished parts."""

import json
from collections.abc import Mapping
from pathlib import Path

from hessian_tools.results import Journal, Json, JsonObject, load, load_json, save, write_atomically


class RunFolder:
    """``--out DIR``: config.json; the journal while a run lasts; then result.json and result.npz.

    Attributes: ``journal`` of finished parts; ``result``, what :meth:`finish` wrote, None as long
    as it has not (or a crash tore it).

    Args:
        path: the folder; created.
        config: all that the numbers depend on, JSON-able.
    Raises:
        ValueError: the folder cannot be written, or holds something of another configuration
            (naming what differs).
    """

    def __init__(self, path: Path, config: Mapping[str, Json]) -> None:
        self.path = path
        self.config: JsonObject = json.loads(json.dumps(config))
        try:
            path.mkdir(parents=True, exist_ok=True)
            kept = self._kept_config()
            self.journal = Journal(path / "blocks.jsonl")
            self.result: JsonObject | None = self._loaded()
            if self.result or self.journal.finished:
                self._refuse_other(kept)
            write_atomically(path / "config.json", json.dumps(self.config, indent=1).encode())
        except OSError as error:
            raise ValueError(
                f"--out {path} cannot be written ({error}); name a folder you may write to"
            ) from error

    def finish(self, result: Mapping[str, Json]) -> Path:
        """Writes result.json and result.npz and drops the journal."""
        written = save(dict(result), self.path / "result", config=self.config)
        self.journal.path.unlink(missing_ok=True)
        return written

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

    def _loaded(self) -> JsonObject | None:
        try:
            result: JsonObject = load(self.path / "result")
        except (FileNotFoundError, ValueError):  # half a pair: compute again
            return None
        self.journal.path.unlink(missing_ok=True)  # what a crash left
        return result

    def _refuse_other(self, kept: JsonObject) -> None:
        differing = [key for key in self.config | kept if kept.get(key) != self.config.get(key)]
        if not differing:
            return
        first = differing[0]
        was = json.dumps(kept.get(first))
        now = json.dumps(self.config.get(first))
        raise ValueError(
            f"--out {self.path} holds a run with another {', '.join(differing)} ({first} was "
            f"{was}, is now {now}); name another folder or remove this one"
        )
