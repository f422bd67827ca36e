"""Hessian products, densities and JS0 side by side with the published libraries.

Compared are time, memory, work and truth.

Every contender lives in its own process; in every round each does one repetition while the others
sleep, and times are compared within the round. Correctness is held against float64 finite
differences in the same run. Writes JSON to benchmarks/results/ and prints the README's tables;
`--table` prints them from the JSON alone. `make bench` runs it.
"""

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from contest import jobs as job_list
from contest.cases import MODELS, SPECIAL
from contest.contenders import CONTENDERS
from contest.processes import Process
from contest.tables import markdown, summarise
from tqdm import tqdm

from hessian_tools.results import write_atomically

ROUNDS = {"a1": 5, "a8": 4, "b": 4, "g1": 5, "g8": 4, "h": 4, "c": 2, "d": 2}
SETTLE = (
    0.05  # seconds between two contenders, so that idle threads of the last one have gone to sleep
)
LIMIT = 900.0  # seconds after which a request is given up
RESULTS = Path(__file__).parent / "results"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--jobs", nargs="+", choices=job_list.WORDS, default=list(job_list.WORDS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, help=f"of every job (default {ROUNDS})")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument(
        "--threads", type=int, default=0, help="of torch in each contender (default: torch's own)"
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="tiny networks, one round: under a minute, times mean nothing",
    )
    parser.add_argument(
        "--out", type=Path, help=f"JSON file (default {RESULTS.name}/side_by_side_DEVICE.json)"
    )
    parser.add_argument(
        "--add",
        action="store_true",
        help="put what is measured into the JSON file, in place of the same models' jobs",
    )
    parser.add_argument(
        "--table", action="store_true", help="print the tables of the JSON file, run nothing"
    )
    found = parser.parse_args()
    kind = found.device.partition(":")[0] + ("_smoke" if found.smoke else "")
    found.out = found.out or RESULTS / f"side_by_side_{kind}.json"
    found.rounds = {job: found.rounds or (1 if found.smoke else ROUNDS[job]) for job in found.jobs}
    return found


def hardware() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cpu = names[0] if names else platform.processor() or platform.machine()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "system": platform.system(),
        "gpu": None,
    }


class Run:
    """All contenders' processes, and what they have found so far."""

    def __init__(
        self, options: argparse.Namespace, processes: dict[str, Process], scratch: str
    ) -> None:
        self.options, self.processes, self.scratch = options, processes, scratch

    @contextmanager
    def opened(self, contender: str, case: str) -> Iterator[tuple[Process, dict[str, Any]]]:
        process, options = self.processes[contender], self.options
        settings = {"device": options.device, "dtype": options.dtype, "threads": options.threads}
        found = process.open(name=case, smoke=options.smoke, **settings)
        try:
            yield process, found
        finally:
            process.close()

    def case(self, name: str) -> dict[str, Any]:
        """Description, referee and correctness of one case; jobs and their costs of a model."""
        reference = os.path.join(self.scratch, f"{name}.pt")
        with self.opened(next(iter(self.processes)), name) as (process, _):
            found = process.ask("describe") | process.ask("reference", path=reference)
        if "error" in found:
            raise SystemExit(f"{name}: no reference: {found['error']}")
        if name in SPECIAL:
            found["correctness"] = {}
            for contender in self.processes:
                with self.opened(contender, name) as (process, opened):
                    found["correctness"][contender] = (
                        opened if "error" in opened else process.ask("check", path=reference)
                    )
            return found
        found["jobs"] = {job: self.job(job, found) for job in self.options.rounds}
        self.measure_memory(name, found)
        with ExitStack() as stack:
            opened = {c: stack.enter_context(self.opened(c, name)) for c in self.processes}
            alive = [c for c, (_, answer) in opened.items() if "error" not in answer]
            found["threads"] = max(answer.get("threads", 0) for _, answer in opened.values())
            found["correctness"] = {
                c: self.processes[c].ask("check", path=reference) if c in alive else opened[c][1]
                for c in self.processes
            }
            self.count_operations(found)
            self.time(found)
            for contender in alive:
                if "error" not in found["correctness"][contender]:
                    found["correctness"][contender] |= self.processes[contender].ask("notes")
        return found

    def job(self, job: str, model: dict[str, Any]) -> dict[str, Any]:
        count = len(model["blocks"])
        blocks = f"all {count}" if count == model["matrices"] else f"{count} of {model['matrices']}"
        text = job_list.WORDS[job].format(**model["work"] | {"blocks": blocks})
        return {"text": text, "contenders": {contender: {} for contender in self.processes}}

    def measure_memory(self, name: str, model: dict[str, Any]) -> None:
        """Each job once in a fresh process; where that fails, it is not tried again."""
        for job, contender, entry in tqdm(
            list(self.entries(model)), desc=f"{name}: memory", file=sys.stderr, disable=None
        ):
            with self.opened(contender, name) as (process, opened):
                entry |= opened if "error" in opened else process.ask("measure", job=job)
            entry.pop("threads", None)
        rounds = self.options.rounds
        expected = sum(e.get("seconds", 0) * rounds[job] for job, _, e in self.entries(model))
        print(
            f"{name}: timing will take about {expected / 60:.1f} minutes",
            file=sys.stderr,
            flush=True,
        )

    def count_operations(self, model: dict[str, Any]) -> None:
        probes, blocks = model["work"]["probes"], len(model["blocks"])
        products = {"a1": 1, "a8": probes, "b": blocks, "g1": 1, "g8": probes, "h": blocks}
        for job, contender, entry in self.entries(model):
            if job in job_list.COUNTED and "error" not in entry:
                entry |= self.processes[contender].ask("count", job=job)
                if "operations" in entry:
                    entry["F_a_product"] = entry["operations"] / model["F"] / products[job]

    def time(self, model: dict[str, Any]) -> None:
        """Round robin; who goes first moves on by one in every round."""
        for job, rounds in self.options.rounds.items():
            entries = {
                c: e for c, e in model["jobs"][job]["contenders"].items() if "error" not in e
            }
            for number in tqdm(
                range(rounds), desc=f"({job})", file=sys.stderr, disable=None, leave=False
            ):
                order = list(entries)
                start = number % max(1, len(order))
                for contender in order[start:] + order[:start]:
                    time.sleep(SETTLE)
                    answer = self.processes[contender].ask("repeat", job=job)
                    if "error" in answer:
                        entries.pop(contender) | answer
                        model["jobs"][job]["contenders"][contender] |= answer
                    else:
                        entries[contender].setdefault("repetitions", []).append(answer)

    def entries(self, model: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
        for job, found in model["jobs"].items():
            for contender, entry in found["contenders"].items():
                yield job, contender, entry


def run(options: argparse.Namespace, result: dict[str, Any], partial: Path) -> None:
    """Adds to ``result`` every model and special case that it lacks, saving after each."""
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        log = stack.enter_context((Path(scratch) / "log").open("wb+"))
        processes = {c: Process(c, options.models, log, LIMIT) for c in options.contenders}
        for process in processes.values():
            stack.callback(process.end)
        for contender, process in processes.items():
            if "error" in (loaded := process.loaded()):
                raise SystemExit(
                    f"{contender} cannot be loaded ({loaded['error']}): `make bench` installs it"
                )
        bench = Run(options, processes, scratch)
        for group, names in (("models", options.models), ("special", list(SPECIAL))):
            for name in names:
                if name not in result[group]:
                    result[group][name] = bench.case(name)
                    write_atomically(partial, json.dumps(result, indent=1).encode())
    found = result["models"].values()
    result["hardware"] |= {
        "gpu": next((model["gpu"] for model in found), None),
        "threads": max(model["threads"] for model in found),
    }


def added(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """``old`` with the jobs that ``new`` has measured. Raises SystemExit where they are of
    different machines.
    """
    for what in ("hardware", "packages"):
        kept, found = old[what], {**old[what], **new[what]}
        if kept != found:
            raise SystemExit(
                f"--add: {what} of the file, {kept}, are not those of this run, {new[what]}; "
                f"leave --add out"
            )
    for name, model in new["models"].items():
        jobs, correctness = model["jobs"], model["correctness"]
        if name in old["models"]:
            jobs = {
                job: {**old["models"][name]["jobs"], **jobs}[job]
                for job in job_list.WORDS
                if job in jobs or job in old["models"][name]["jobs"]
            }
            correctness = old["models"][name]["correctness"] | correctness
        old["models"][name] = {**model, "jobs": jobs, "correctness": correctness}
    return {**old, "contenders": old["contenders"] | new["contenders"]}


def main() -> None:
    options = arguments()
    if not options.table:
        packages = {"torch": version("torch")}
        packages |= {
            c.package: version(c.package)
            for c in map(CONTENDERS.get, options.contenders)
            if c.package
        }
        labels = {
            name: {"label": CONTENDERS[name].name, "how": CONTENDERS[name].how}
            for name in options.contenders
        }
        settings = {
            k: v
            for k, v in vars(options).items()
            if k not in ("out", "add", "table", "jobs", "contenders")
        }
        result = {
            "benchmark": "side_by_side",
            "hardware": hardware(),
            "packages": packages,
            "settings": settings,
            "contenders": labels,
            "models": {},
            "special": {},
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        partial = options.out.with_suffix(".partial.json")
        if partial.exists():
            kept = json.loads(partial.read_text())
            if {**kept, "models": {}, "special": {}} == result:
                print(
                    f"going on from {partial}, which has {', '.join(kept['models'])}",
                    file=sys.stderr,
                )
                result = kept
        run(options, result, partial)
        if options.add and options.out.exists():
            result = added(json.loads(options.out.read_text()), result)
        summarise(result)
        write_atomically(options.out, json.dumps(result, indent=1).encode())
        partial.unlink(missing_ok=True)
    print(markdown(json.loads(options.out.read_text())))


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that the contenders' processes are ended, too
    main()
