"""``hessian-tools js0`` and ``spectrum``: spectra of blocks or of the whole Hessian."""

import argparse
import contextlib
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from hessian_tools.app import report
from hessian_tools.app.options import (
    COUNT,
    add_network_options,
    add_run_options,
    load_problem,
    matrix_setting,
    operator_for,
    positive,
    race_of,
)
from hessian_tools.app.run_folder import RunFolder
from hessian_tools.app.terminal import say
from hessian_tools.app.verified import verify
from hessian_tools.blocks.partition import Partition
from hessian_tools.blocks.presets import PRESETS, partition
from hessian_tools.curvature.engine_operator import EngineOperator
from hessian_tools.heterogeneity.adaptive import FIRST_PROBES, adaptive_js0
from hessian_tools.heterogeneity.block_heterogeneity import JSHeterogeneity, js_heterogeneity
from hessian_tools.heterogeneity.readings import DEFAULT, READINGS
from hessian_tools.problem.problem import Problem
from hessian_tools.results import JsonObject
from hessian_tools.spectra.lanczos import REORTHOGONALIZE
from hessian_tools.spectra.probes import PROBE_KINDS
from hessian_tools.spectra.quadrature import BlockSpectra, Quadrature
from hessian_tools.spectra.slq import blockwise_slq

FIXED = {"probes": 4, "steps": 40}
LIMITS = {"probes": 10, "steps": 100}  # of --tolerance: the literature's setting
TOLERANCE = 0.05  # of js0, where nothing else says how much to spend
# Of all options, those that the numbers depend on besides network and data.
_KNOBS = (
    "command",
    "blocks",
    "probes",
    "steps",
    "probe_kind",
    "reorthogonalize",
    "seed",
    "precision",
    "exact",
    "reading",
)

Computed = tuple[BlockSpectra, JSHeterogeneity | None]


@dataclass(frozen=True)
class _Run:
    """One model of a command, ready to compute."""

    label: str
    described: str
    problem: Problem
    identity: JsonObject  # of network and data
    blocks: Partition
    folder: RunFolder | None

    @property
    def finished(self) -> dict[str, Quadrature]:
        """Blocks that an interrupted run has left."""
        return self.folder.journal.finished if self.folder else {}


def add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    epilog: str,
) -> None:
    """Adds the subcommands."""
    js0 = commands.add_parser(
        "js0",
        help="heterogeneity of the block spectra, and a verdict: SGD or Adam",
        description=(
            "How different the Hessian spectra of a model's parameter blocks are, in readings with "
            "intervals that cover, and a verdict (paper: arXiv 2402.16788). Products are spent "
            "until the readings are known to --tolerance. Several models are compared side by side."
        ),
        epilog=epilog,
    )
    _add_options(js0, default_blocks="weights")
    _add_tolerance(js0)
    js0.set_defaults(run=run)
    spectrum = commands.add_parser(
        "spectrum",
        help="the spectrum of the whole Hessian, or of blocks",
        description=(
            "Stochastic Lanczos quadrature (Bai, Fahey & Golub 1996) of the whole Hessian, or of "
            "--blocks."
        ),
        epilog=epilog,
    )
    _add_options(spectrum, default_blocks="model")
    spectrum.set_defaults(run=run, tolerance=None, reading=None)


def run(arguments: argparse.Namespace) -> None:
    """js0 and spectrum."""
    _settle(arguments)
    # What a model of the user's prints is no result. All models are built before any is computed,
    # so that bad input costs no time.
    with contextlib.redirect_stdout(sys.stderr):
        runs = [_prepared(arguments, reference) for reference in arguments.model]
    computed: dict[str, Computed] = {}
    for prepared in runs:
        with contextlib.redirect_stdout(sys.stderr):
            computed[prepared.label] = _computed(arguments, prepared)
        if not arguments.json:
            _print_spectra(prepared, computed[prepared.label][0])
    if arguments.json:
        summaries = {label: report.summary(*results) for label, results in computed.items()}
        print(json.dumps(summaries, indent=1))
        return
    compared = {label: js for label, (_, js) in computed.items() if js is not None}
    if compared:
        verdicts = [
            report.verdict_text(label, js, race_of(arguments, label))
            for label, js in compared.items()
        ]
        print("\n\n".join([report.readings_table(compared), *verdicts]))


def _settle(arguments: argparse.Namespace) -> None:
    """Fills in the defaults that depend on each other; refuses what does not go together."""
    if arguments.command == "js0":
        _settle_readings(arguments)
    defaults = FIXED if arguments.tolerance is None else LIMITS
    for knob, default in defaults.items():
        if getattr(arguments, knob) is None:
            setattr(arguments, knob, default)
    for name in arguments.model:
        if arguments.model.count(name) > 1:
            raise ValueError(f"--model names {name} twice; name each model once")


def _settle_readings(arguments: argparse.Namespace) -> None:
    """A tolerance, unless probes or steps are given or a reading has none."""
    arguments.reading = arguments.reading or list(DEFAULT)
    without = [name for name in arguments.reading if not READINGS[name].tolerable]
    if without and arguments.tolerance is not None:
        raise ValueError(
            f"--tolerance {arguments.tolerance:g} cannot be had of {' and '.join(without)}, the "
            "literature's, whose error is not known; give --probes and --steps instead"
        )
    is_fixed = arguments.probes is not None or arguments.steps is not None or without
    if arguments.tolerance is None and not is_fixed:
        arguments.tolerance = TOLERANCE


def _prepared(arguments: argparse.Namespace, reference: str) -> _Run:
    problem, settings = load_problem(arguments, reference)
    blocks = _blocks(arguments, reference, problem)
    folder = _folder(arguments, reference, settings) if arguments.out else None
    data = settings.get("data", "data of its own")
    described = (
        f"{reference} ({problem.num_parameters:,} parameters, {data}, loss {problem.loss:.4g})"
    )
    return _Run(reference, described, problem, settings, blocks, folder)


def _blocks(arguments: argparse.Namespace, reference: str, problem: Problem) -> Partition:
    given = arguments.blocks
    option = f"--blocks {' '.join(given)}"
    is_preset = len(given) == 1 and given[0] in PRESETS
    try:
        blocks = partition(problem.model, given[0] if is_preset else given)
    except ValueError as error:
        raise ValueError(f"{option}: {error}; presets are {', '.join(PRESETS)}") from error
    if arguments.command == "js0" and len(blocks) < 2:
        raise ValueError(f"{option} is one block of {reference}; js0 compares two or more")
    return blocks


def _folder(
    arguments: argparse.Namespace,
    reference: str,
    settings: JsonObject,
) -> RunFolder:
    path: Path = arguments.out
    if len(arguments.model) > 1:
        path = path / re.sub(r"[/\\:]", "_", reference)
    config = {knob: getattr(arguments, knob) for knob in _KNOBS}
    if arguments.tolerance:
        config |= {"tolerance": arguments.tolerance}
    commands = {"repeat": arguments.line, "race": race_of(arguments, reference)}
    return RunFolder(path, config | matrix_setting(arguments) | settings, commands)


def _print_spectra(prepared: _Run, spectra: BlockSpectra) -> None:
    told = [*spectra.notes, report.exact_offer(spectra)]
    notes = "".join(f"note: {note}\n" for note in told if note)
    print(f"{prepared.described}\n{report.spectra_table(spectra)}\n{notes}", flush=True)


def _computed(arguments: argparse.Namespace, prepared: _Run) -> Computed:
    """The spectra and, for js0, their heterogeneity; saved and drawn where there is a folder.

    What the folder holds of an earlier run is not computed again.
    """
    folder = prepared.folder
    if folder and folder.result:
        say(f"{prepared.label}: finished before, nothing is computed")
        spectra = folder.result["spectra"]
        js = folder.result["heterogeneity"]
    else:
        spectra = _block_spectra(arguments, prepared)
        js = None
        if arguments.command == "js0":
            over_pairs = [name for name in arguments.reading if READINGS[name].over_pairs]
            js = js_heterogeneity(spectra, readings=over_pairs or None)
    if folder:
        if not folder.result:
            folder.finish({"spectra": spectra, "heterogeneity": js})
        _draw(folder.path, spectra, js, prepared.described, arguments)
    return spectra, js


def _draw(
    folder: Path,
    spectra: BlockSpectra,
    js: JSHeterogeneity | None,
    title: str,
    arguments: argparse.Namespace,
) -> None:
    # matplotlib takes longer to import than many runs to compute
    from hessian_tools.plots import spectra as plotting

    pictures = plotting.draw(
        folder, spectra, js, title, arguments.format, normalized=arguments.normalize
    )
    say(f"saved: {', '.join(map(str, [folder / 'result.json', *pictures]))}")


def _block_spectra(arguments: argparse.Namespace, prepared: _Run) -> BlockSpectra:
    """Spectra of the blocks, resumed and journalled where there is a folder."""
    started = time.monotonic()
    left = [name for name in prepared.blocks.names if name not in prepared.finished]
    before = {name: quadrature.num_matvecs for name, quadrature in prepared.finished.items()}
    hessian = operator_for(arguments, prepared.problem)
    if left:
        _announce(arguments, prepared, hessian, left)
        verify(hessian, arguments.verify, prepared.identity)
    for note in prepared.blocks.notes:
        say(f"note: {note}")
    spectra = _products(arguments, prepared, hessian)
    hessian.release()
    say(f"route: {hessian.route}")
    seconds = time.monotonic() - started
    spent = spectra.num_matvecs - sum(before.get(name, 0) for name in spectra)
    done = _done(arguments, len(left), len(spectra), before)
    say(f"{prepared.label}: {spent} {hessian.title}-vector products for {done}, {seconds:.0f} s")
    return spectra


def _announce(
    arguments: argparse.Namespace,
    prepared: _Run,
    hessian: EngineOperator,
    left: list[str],
) -> None:
    """Says what will be computed and how long it may take."""
    blocks = prepared.blocks
    say(f"plan: {prepared.described}: {len(left)} of {len(blocks)} blocks to compute")
    probes, steps = arguments.probes, arguments.steps
    limit = ""
    if arguments.tolerance:
        # how an adaptive run begins; few go on for much longer
        probes = FIRST_PROBES
        steps = max(READINGS[name].first_steps for name in arguments.reading)
        limit = ", at first"
    products = 0
    for name in left:
        size = blocks[name].numel
        is_exact = size <= max(probes * steps, arguments.exact or 0)
        products += size if is_exact else probes * min(steps, size)
    say(hessian.announcement(products, len(left)) + limit)


def _products(
    arguments: argparse.Namespace,
    prepared: _Run,
    hessian: EngineOperator,
) -> BlockSpectra:
    on_block = prepared.folder.journal.append if prepared.folder else None
    if arguments.tolerance is None:
        return blockwise_slq(
            hessian,
            prepared.blocks,
            num_probes=arguments.probes,
            num_steps=arguments.steps,
            seed=arguments.seed,
            probes=arguments.probe_kind,
            reorthogonalize=arguments.reorthogonalize,
            exact=arguments.exact or "auto",
            finished=prepared.finished,
            on_block=on_block,
        )
    adaptive = adaptive_js0(
        hessian,
        prepared.blocks,
        tolerance=arguments.tolerance,
        reading=arguments.reading,
        max_matvecs=arguments.probes * arguments.steps,
        max_steps=arguments.steps,
        seed=arguments.seed,
        probes=arguments.probe_kind,
        reorthogonalize=arguments.reorthogonalize,
        exact=arguments.exact or "auto",
        finished=prepared.finished,
        on_block=on_block,
    )
    say(str(adaptive))
    return adaptive.spectra


def _done(
    arguments: argparse.Namespace,
    num_left: int,
    num_blocks: int,
    before: dict[str, int],
) -> str:
    """How many blocks were computed, and what was there before."""
    if arguments.tolerance is not None:
        # blocks that an earlier run had begun may have grown further
        earlier = f" (after {sum(before.values())} before)" if before else ""
        return f"{num_blocks} blocks{earlier}"
    if num_left < num_blocks:
        return f"{num_left} blocks ({num_blocks - num_left} were finished before)"
    return f"{num_left} blocks"


def _add_options(command: argparse.ArgumentParser, default_blocks: str) -> None:
    add_network_options(command, nargs="+")
    add = command.add_argument_group("spectra").add_argument
    add(
        "--blocks",
        nargs="+",
        default=[default_blocks],
        metavar="PRESET|GLOB",
        help=f"a preset ({', '.join(PRESETS)}), or names and globs of blocks; model is the whole "
        f"Hessian as one block (default: {default_blocks}; paper: official)",
    )
    add(
        "--probes",
        **COUNT,
        help="random vectors a block (default: what --tolerance needs, or 4; paper: 10)",
    )
    add(
        "--steps",
        **COUNT,
        help="Lanczos steps a probe (default: what --tolerance needs, or 40; paper: 100)",
    )
    add(
        "--exact",
        **COUNT,
        help="blocks of at most N rows: exact spectra from N products (default: those that take no "
        "more products than probes would)",
    )
    add(
        "--probe-kind",
        choices=PROBE_KINDS,
        default="rademacher",
        help="distribution of the probes (default: rademacher, which has the least variance for "
        "traces, Hutchinson 1989; paper: gaussian)",
    )
    add(
        "--reorthogonalize",
        choices=REORTHOGONALIZE,
        default="full",
        help="full makes nodes countable, the others need less memory (default: full; paper: none)",
    )
    output = add_run_options(command, "config.json, result.json, result.npz and pictures")
    output.add_argument(
        "--normalize",
        action="store_true",
        help="draw each block divided by its tenth largest Ritz value, as the paper does (default: "
        "eigenvalues as they are)",
    )


def _add_tolerance(command: argparse.ArgumentParser) -> None:
    without = [name for name, measure in READINGS.items() if not measure.tolerable]
    add = command.add_argument_group("readings, and until they are good enough").add_argument
    add(
        "--tolerance",
        type=positive,
        metavar="FRACTION",
        help="add probes and steps where they are needed until the standard error of every "
        "reading, with what the last steps changed in it, is this fraction of it; a block then "
        "gets at most --probes times --steps products, 10 times 100 unless given (default: "
        f"{TOLERANCE}, or none where --probes or --steps is given)",
    )
    add(
        "--reading",
        nargs="+",
        choices=list(READINGS),
        help=f"what to read; {' and '.join(without)}, the literature's, have no tolerance and "
        "change when the loss is multiplied by a constant (default: "
        f"{' '.join(DEFAULT)}, which few products resolve)",
    )
