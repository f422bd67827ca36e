"""The command line: parse, call, print, save. ``hessian-tools js0 | spectrum | partition | quadratic | models``.

Exit codes: 0 done, 1 a partition is contradicted, 2 bad input (one line on stderr), 3 numerical failure (reported), 130
interrupted (--out resumes).
"""

import argparse
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from hessian_tools.app import partition_command, quadratic_command, report
from hessian_tools.app.options import (
    COUNT,
    add_network_options,
    add_run_options,
    load_problem,
    positive,
    say,
    verify,
)
from hessian_tools.app.runs import RunFolder
from hessian_tools.blocks.partition import Partition
from hessian_tools.blocks.presets import PRESETS, partition
from hessian_tools.curvature.engine.precision import PRECISIONS
from hessian_tools.curvature.hessian import HessianOperator
from hessian_tools.errors import NumericalError
from hessian_tools.heterogeneity.adaptive import adaptive_js0
from hessian_tools.heterogeneity.block_heterogeneity import JSHeterogeneity, js_heterogeneity
from hessian_tools.heterogeneity.readings import JS0, READINGS
from hessian_tools.problem import zoo
from hessian_tools.problem.problem import Problem
from hessian_tools.spectra.lanczos import REORTHOGONALIZE
from hessian_tools.spectra.probes import PROBE_KINDS
from hessian_tools.spectra.quadrature import BlockSpectra
from hessian_tools.spectra.slq import blockwise_slq

_SLQ_KNOBS = (
    "command",
    "blocks",
    "probes",
    "steps",
    "probe_kind",
    "reorthogonalize",
    "seed",
    "precision",
)
_LIMITS = {"probes": 10, "steps": 100}  # of --tolerance: the literature's setting
_EPILOG = """Defaults are this package's own choices, for a first answer in minutes; where a source has others they are
named: "paper" is Zhang et al., Why Transformers Need Adam, NeurIPS 2024, arXiv 2402.16788. Exit codes: 0 done, 1 a
partition is contradicted, 2 bad input (one line says what to change), 3 numerical failure, 130 interrupted.
HESSIAN_TOOLS_TRACEBACK=1 in the environment shows where in the code an error came from."""


class _Parser(argparse.ArgumentParser):
    def error(
        self, message: str
    ) -> NoReturn:  # one line, where argparse would print its usage as well
        raise ValueError(f"{message} (see {self.prog} --help)")


@dataclass(frozen=True)
class _Run:
    """One model of a command, ready to compute."""

    label: str
    described: str
    problem: Problem
    blocks: Partition
    folder: RunFolder | None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    out = None
    try:
        arguments = _parser().parse_args(argv)
        out = arguments.out
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code or 0
    except KeyboardInterrupt:
        kept = (
            f"finished blocks are kept in {out}, the same command goes on"
            if out
            else "with --out it could go on"
        )
        say(f"hessian-tools: interrupted; {kept}")
        return 130
    except BrokenPipeError:  # `hessian-tools ... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        explained = _explained(error)
        if explained is None or os.environ.get("HESSIAN_TOOLS_TRACEBACK"):
            raise
        say(f"hessian-tools: {explained[1].splitlines()[0]}")
        return explained[0]


def _explained(error: Exception) -> tuple[int, str] | None:
    """Exit code and words; None for what is neither the input's fault nor the numbers', but a bug."""
    if isinstance(error, NumericalError):
        return 3, f"numerical failure: {error}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(
        error
    ):
        return (
            2,
            f"out of memory ({type(error).__name__}); give a smaller --memory, --batch-size or --probes",
        )
    if isinstance(error, ValueError | OSError | ImportError):
        return 2, str(error) or type(error).__name__
    return None


def _models(arguments: argparse.Namespace) -> None:
    rows = zoo.describe()
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    cells = [
        [r["name"], r["family"], f"{r['parameters']:,}", r["data"], r["description"]] for r in rows
    ]
    print(
        report.table(("name", "family", "parameters", "default data", "description"), cells, left=2)
    )


def _spectra(arguments: argparse.Namespace) -> None:
    """js0 and spectrum. All models are built before any is computed, so that bad input costs no time."""
    for knob, fixed in {"probes": 4, "steps": 40}.items():
        if getattr(arguments, knob) is None:
            setattr(arguments, knob, fixed if arguments.tolerance is None else _LIMITS[knob])
    if arguments.tolerance is None and arguments.reading is not None:
        raise ValueError(
            f"--reading {' '.join(arguments.reading)} is what --tolerance is about; give --tolerance as well"
        )
    twice = next((name for name in arguments.model if arguments.model.count(name) > 1), None)
    if twice:
        raise ValueError(f"--model names {twice} twice; name each model once")
    with contextlib.redirect_stdout(sys.stderr):  # what a model of the user's prints is no result
        runs = [_run(arguments, reference) for reference in arguments.model]
    computed: dict[str, tuple[BlockSpectra, JSHeterogeneity | None]] = {}
    for run in runs:
        with contextlib.redirect_stdout(sys.stderr):
            computed[run.label] = spectra, _ = _computed(arguments, run)
        if not arguments.json:
            notes = "".join(f"note: {note}\n" for note in spectra.notes)
            print(f"{run.described}\n{report.spectra_table(spectra)}\n{notes}", flush=True)
    found = {label: js for label, (_, js) in computed.items() if js is not None}
    if arguments.json:
        print(
            json.dumps({label: report.summary(*pair) for label, pair in computed.items()}, indent=1)
        )
    elif found:
        print(
            "\n\n".join(
                [report.readings_table(found), *map(report.verdict_text, found, found.values())]
            )
        )


def _run(arguments: argparse.Namespace, reference: str) -> _Run:
    problem, settings = load_problem(arguments, reference)
    given, folder = arguments.blocks, None
    try:
        blocks = partition(
            problem.model, given[0] if len(given) == 1 and given[0] in PRESETS else given
        )
    except ValueError as error:
        raise ValueError(
            f"--blocks {' '.join(given)}: {error}; presets are {', '.join(PRESETS)}"
        ) from error
    if arguments.command == "js0" and len(blocks) < 2:
        raise ValueError(
            f"--blocks {' '.join(given)} is one block of {reference}; js0 compares two or more"
        )
    if arguments.out:
        path = (
            arguments.out / re.sub(r"[/\\:]", "_", reference)
            if len(arguments.model) > 1
            else arguments.out
        )
        adapting = (
            {"tolerance": arguments.tolerance, "reading": arguments.reading}
            if arguments.tolerance
            else {}
        )
        folder = RunFolder(
            path, {knob: getattr(arguments, knob) for knob in _SLQ_KNOBS} | adapting | settings
        )
    data = settings.get("data", "data of its own")
    described = (
        f"{reference} ({problem.num_parameters:,} parameters, {data}, loss {problem.loss:.4g})"
    )
    return _Run(reference, described, problem, blocks, folder)


def _computed(
    arguments: argparse.Namespace, run: _Run
) -> tuple[BlockSpectra, JSHeterogeneity | None]:
    """The spectra and, for js0, their heterogeneity: the folder's finished ones or computed now; saved and drawn."""
    folder = run.folder
    if folder and folder.result:
        spectra, js = folder.result["spectra"], folder.result["heterogeneity"]
        say(f"{run.label}: finished before, nothing is computed")
    else:
        spectra = _block_spectra(arguments, run)
        js = js_heterogeneity(spectra) if arguments.command == "js0" else None
    if folder:
        if not folder.result:
            folder.finish({"spectra": spectra, "heterogeneity": js})
        from hessian_tools.plots import (
            spectra as plotting,  # matplotlib takes longer to import than many runs to compute
        )

        pictures = plotting.draw(folder.path, spectra, js, run.described)
        say(f"saved: {', '.join(map(str, [folder.path / 'result.json', *pictures]))}")
    return spectra, js


def _block_spectra(arguments: argparse.Namespace, run: _Run) -> BlockSpectra:
    """Spectra of the blocks, resumed and journalled where there is a folder, told on the way."""
    finished = run.folder.journal.finished if run.folder else {}
    left = [name for name in run.blocks.names if name not in finished]
    started = time.monotonic()
    hessian = HessianOperator(
        run.problem, memory=arguments.memory, precision=arguments.precision or PRECISIONS[0]
    )
    if left:
        say(f"plan: {run.described}: {len(left)} of {len(run.blocks)} blocks to compute")
        most, steps, sizes = (
            arguments.probes * arguments.steps,
            arguments.steps,
            {b.name: b.numel for b in run.blocks},
        )
        counted = [
            n if n <= most else arguments.probes * min(steps, n)
            for n in map(sizes.__getitem__, left)
        ]
        say(
            hessian.announcement(sum(counted), len(left))
            + (", at most" if arguments.tolerance else "")
        )
    if arguments.verify and left:
        verify(hessian)
    for note in run.blocks.notes:
        say(f"note: {note}")
    before = {name: quadrature.num_matvecs for name, quadrature in finished.items()}
    slq: dict[str, Any] = {
        "seed": arguments.seed, "probes": arguments.probe_kind, "reorthogonalize": arguments.reorthogonalize,
        "finished": finished, "on_block": run.folder.journal.append if run.folder else None,
    }  # fmt: skip
    if arguments.tolerance is None:
        spectra = blockwise_slq(
            hessian, run.blocks, num_probes=arguments.probes, num_steps=arguments.steps, **slq
        )
    else:
        most = {"max_matvecs": arguments.probes * arguments.steps, "max_steps": arguments.steps}
        reading = arguments.reading or [JS0]
        found = adaptive_js0(
            hessian, run.blocks, tolerance=arguments.tolerance, reading=reading, **most, **slq
        )
        spectra = found.spectra
        say(str(found))
    hessian.release()
    say(f"route: {hessian.route}")
    products = spectra.num_matvecs - sum(before.get(name, 0) for name in spectra)
    kept = f" ({len(spectra) - len(left)} were finished before)" if len(left) < len(spectra) else ""
    if (
        arguments.tolerance is not None
    ):  # blocks that an earlier run had begun may have grown further
        left, kept = list(spectra), f" (after {sum(before.values())} before)" if before else ""
    seconds = time.monotonic() - started
    say(
        f"{run.label}: {products} Hessian-vector products for {len(left)} blocks{kept}, {seconds:.0f} s"
    )
    return spectra


def _parser() -> argparse.ArgumentParser:
    about = "Hessian spectra of neural networks, block by block, and what they say."
    parser = _Parser(prog="hessian-tools", description=about, epilog=_EPILOG)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    described = {
        "js0": ("heterogeneity of the block spectra, and a verdict: SGD or Adam", "weights",
                "Spectra of a model's parameter blocks at initialisation, their Jensen-Shannon heterogeneity in all "
                "readings, and a verdict (paper: arXiv 2402.16788). Several models are compared side by side."),
        "spectrum": ("the spectrum of the whole Hessian, or of blocks", "model",
                     "Stochastic Lanczos quadrature (Bai, Fahey & Golub 1996) of the whole Hessian, or of --blocks."),
    }  # fmt: skip
    for name, (short, blocks, long) in described.items():
        command = commands.add_parser(name, help=short, description=long, epilog=_EPILOG)
        _add_options(command, blocks)
        command.set_defaults(
            run=_spectra, **({} if name == "js0" else {"tolerance": None, "reading": None})
        )
    partition_command.add(commands, _EPILOG)
    quadratic_command.add(commands, _EPILOG)
    models = commands.add_parser("models", help="the networks that --model knows")
    models.add_argument(
        "--json", action="store_true", help="print JSON on stdout instead of a table"
    )
    models.set_defaults(run=_models, out=None)
    return parser


def _add_options(command: argparse.ArgumentParser, blocks: str) -> None:
    # fmt: off
    add_network_options(command, nargs="+")
    add = command.add_argument_group("spectra").add_argument
    add("--blocks", nargs="+", default=[blocks], metavar="PRESET|GLOB", help=f"a preset ({', '.join(PRESETS)}), or "
        f"names and globs of blocks; model is the whole Hessian as one block (default: {blocks}; paper: official)")
    add("--probes", **COUNT, help="random vectors a block (default: 4, with --tolerance 10; paper: 10)")
    add("--steps", **COUNT, help="Lanczos steps a probe (default: 40, with --tolerance 100; paper: 100)")
    if blocks == "weights":
        add("--tolerance", type=positive, metavar="FRACTION", help="add probes and steps where they are needed until "
            "standard error, bias left and change over the last steps sum to this fraction of the mean; a block then "
            "gets at most --probes times --steps products (default: none, the same for every block)")
        add("--reading", nargs="+", choices=list(READINGS), help="what shall meet --tolerance; those that do not "
            f"change when the loss is multiplied by a constant: {_scale_free_readings()} (default: {JS0})")
    add("--probe-kind", choices=PROBE_KINDS, default="rademacher", help="distribution of the probes (default: "
        "rademacher, which has the least variance for traces, Hutchinson 1989; paper: gaussian)")
    add("--reorthogonalize", choices=REORTHOGONALIZE, default="full", help="full makes nodes countable, the others "
        "need less memory (default: full; paper: none)")
    # fmt: on
    add_run_options(command, "config.json, result.json, result.npz and pictures")


def _scale_free_readings() -> str:
    return ", ".join(f"{name} ({m.title})" for name, m in READINGS.items() if m.scale_free)
