"""A contender's own process: answers a line of JSON on standard input with one on output.

It only imports; each case is opened in a fork, which answers until it is closed, so a case never
sees another's memory, and a case that dies takes nothing with it. `python -m contest.worker
CONTENDER MODEL...`
"""

import json
import os
import signal
import sys
import traceback
from dataclasses import asdict
from typing import Any, TextIO

import torch

from contest import referee
from contest.cases import Case, build, preload
from contest.contenders import CONTENDERS
from contest.jobs import Bench, forward_operations, peak_bytes


class Session:
    """One opened case of one contender; methods are what a driver may ask for."""

    def __init__(self, contender: str, case: Case) -> None:
        self.kind, self.case = CONTENDERS[contender], case
        self.bench = Bench(self.kind, case)

    def describe(self) -> dict[str, Any]:
        parameters = sum(p.numel() for p in self.case.model.parameters())
        facts = {
            "description": self.case.description,
            "parameters": parameters,
            "blocks": list(self.case.weights),
        }
        work = asdict(self.case.work) if self.case.work else None
        cuda = self.case.device.type == "cuda"
        facts |= {
            "gpu": torch.cuda.get_device_name() if cuda else None,
            "F": forward_operations(self.case),
        }
        return facts | {"matrices": self.case.num_matrices, "work": work}

    def reference(self, path: str) -> dict[str, Any]:
        products, uncertainty = referee.reference(self.case)
        torch.save(products, path)
        return {"uncertainty": uncertainty, "bound": referee.BOUNDS[self.case.dtype]}

    def check(self, path: str) -> dict[str, Any]:
        return {"errors": self.bench.errors(torch.load(path, map_location=self.case.device))}

    def notes(self) -> dict[str, Any]:
        return {"notes": self.bench.notes()}

    def warm(self) -> dict[str, Any]:
        self.bench.warm()
        return {}

    def count(self, job: str) -> dict[str, Any]:
        return {"operations": self.bench.operations(job)}

    def repeat(self, job: str) -> dict[str, Any]:
        return asdict(self.bench.repeat(job))

    def measure(self, job: str) -> dict[str, Any]:
        """A job once, from nothing, and the memory it took."""
        done = []
        peak = peak_bytes(self.case.device, lambda: done.append(self.bench.repeat(job)))
        return {"peak_bytes": peak, "seconds": done[0].seconds}


def answer(request: dict[str, Any], session: Any, out: TextIO) -> None:
    """Calls the session's method named "do" and writes what it returns, or the error."""
    try:
        arguments = {name: value for name, value in request.items() if name != "do"}
        found = getattr(session, request["do"])(**arguments)
    except Exception as error:
        traceback.print_exc()
        line = (str(error).strip() or "no message").splitlines()[0]
        found = {"error": f"{type(error).__name__}: {line}"[:300]}
    out.write(json.dumps(found) + "\n")
    out.flush()


def serve(
    contender: str, request: dict[str, Any], own_threads: int, requests: TextIO, out: TextIO
) -> None:
    """The fork's life: opens the case, answers until told to close."""
    torch.set_num_threads(request["threads"] or own_threads)
    dtype = getattr(torch, request["dtype"])
    session: list[Session] = []

    class Opening:
        def open(self, name: str, device: str, smoke: bool, **rest: Any) -> dict[str, Any]:
            session.append(Session(contender, build(name, device, dtype, smoke)))
            return {"threads": torch.get_num_threads()}

    answer(request, Opening(), out)
    while (following := json.loads(requests.readline() or '{"do": "close"}'))["do"] != "close":
        answer(following, session[0] if session else None, out)


def main() -> None:
    contender, models = sys.argv[1], sys.argv[2:]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to the log
    own_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a pool of threads, once started, would not survive the fork
    preload(models)

    class Loading:
        def load(self) -> dict[str, Any]:
            CONTENDERS[contender].load()
            return {}

    answer({"do": "load"}, Loading(), out)
    requests = os.fdopen(0, "r")
    while line := requests.readline():
        if json.loads(line)["do"] != "open":
            continue  # meant for a case that died before it was asked; that it died is told already
        child = os.fork()
        if not child:
            try:
                serve(contender, json.loads(line), own_threads, requests, out)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        ended: dict[str, Any] = {"closed": True}
        if os.WIFSIGNALED(status):
            reason = signal.Signals(os.WTERMSIG(status)).name
            ended["error"] = f"the process was ended by {reason} (out of memory?)"
        out.write(json.dumps(ended) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
