"""The driver's side of a contender's process: one line of JSON out, one back."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

LOADING = 300.0  # seconds that imports may take
FOLDER = Path(__file__).parent.parent


class Process:
    """A contender in a process of its own, in which cases are opened one after the other.

    Every request returns a dict; with "error" when it failed, and with "closed" when the case is
    not open any more.
    """

    def __init__(self, contender: str, models: list[str], log: IO[bytes], limit: float) -> None:
        self.contender, self.models, self.log, self.limit = contender, models, log, limit
        self.ended = ""  # why the case last opened is not open any more
        self._start()

    def loaded(self) -> dict[str, Any]:
        """Waits until everything is imported; to be asked once, before anything else."""
        return self._answer(LOADING)

    def open(self, **case: Any) -> dict[str, Any]:
        if self.popen.returncode is not None:
            return {"error": self.ended, "closed": True}
        self.ended = ""
        return self.ask("open", **case)

    def close(self) -> None:
        if not self.ended:
            self.ask("close")

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        if self.ended:
            return {"error": self.ended, "closed": True}
        self.popen.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        self.popen.stdin.flush()
        answer = self._answer(self.limit)
        if "late" in answer:
            self._start()
            self.loaded()
        if "closed" in answer:
            self.ended = answer.get("error", "closed")
        return answer

    def end(self) -> None:
        """Ends the process, and the fork in which a case may be open."""
        if self.popen.poll() is None:
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        self.popen.stdin.close()
        self.popen.stdout.close()

    def _start(self) -> None:
        root = FOLDER.parent
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER), str(root)])}
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "contest.worker", self.contender, *self.models],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            start_new_session=True,
        )

    def _answer(self, limit: float) -> dict[str, Any]:
        """One line; without one in time the process is ended, told by "late"."""
        ready, _, _ = select.select([self.popen.stdout], [], [], limit)
        if line := self.popen.stdout.readline() if ready else b"":
            return json.loads(line)
        self.end()
        reason = (
            f"its process ended with code {self.popen.returncode}"
            if ready
            else f"given up after {limit:.0f} s"
        )
        return {"error": reason, "closed": True, "late": True}
