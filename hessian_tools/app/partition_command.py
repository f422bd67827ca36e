"""``hessian-tools partition``: does a partition follow the Hessian, and what would?

Exit code 1 when any tensor's blocks are too coarse, too fine or along the wrong axis, so that it can guard a training
repository's CI; 0 when none is, undecided ones included.
"""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from hessian_tools.app.options import (
    COUNT,
    add_network_options,
    add_run_options,
    load_problem,
    positive,
    say,
    verify,
    whole_number,
)
from hessian_tools.app.partition_text import (
    Conditions,
    conditioning_summary,
    conditioning_table,
    suggestion_text,
    summary,
)
from hessian_tools.app.runs import RunFolder
from hessian_tools.blocks.partition import Partition
from hessian_tools.blocks.presets import PRESETS, partition
from hessian_tools.blocks.specification import AXES
from hessian_tools.curvature.engine.precision import PRECISIONS
from hessian_tools.curvature.hessian import HessianOperator
from hessian_tools.problem.problem import Problem
from hessian_tools.results import write_atomically
from hessian_tools.structure.check import EXACT_WORTH, MOST_EXACT, check_partition, planned_products
from hessian_tools.structure.conditioning import MOST_ENTRIES, block_conditioning, block_extremes
from hessian_tools.structure.coupling import Coupling, coupling
from hessian_tools.structure.dense import DenseBlock, dense_block
from hessian_tools.structure.report import PartitionReport, TensorReport

MOST_DENSE = 1024  # entries of a model whose whole dense Hessian is drawn
CONDITIONED = 4  # blocks of each cut whose kappa and tau are computed with --conditioning
_KNOBS = tuple(
    "command preset check only probes blocks exact alpha contrast diagonal seed precision conditioning coupling".split()
)


def add(commands: Any, epilog: str) -> None:
    """Adds the subcommand."""
    about = (
        "Judges each tensor's blocks by the share of its Hessian's mass inside them, against every other cut and what "
        "a Hessian without structure would hold (principle: one learning rate a dense sub-block, Adam-mini, arXiv "
        "2406.16793). Exit code 1 when a claim is contradicted."
    )
    short = "does a partition follow the Hessian's dense sub-blocks, and which would"
    command = commands.add_parser("partition", help=short, description=about, epilog=epilog)
    add_network_options(command)
    # fmt: off
    add = command.add_argument_group("partition").add_argument
    add("--preset", metavar="NAME|FILE.json", help=f"what is claimed: {', '.join(PRESETS)}, or a file written by "
        "Partition.to_json (default: adam_mini)")
    add("--check", nargs="+", metavar="NAME=AXIS", help="claim this alone: parameter names or globs, each with whole, "
        "role, head, row, column, expert, element, or the number of the tensor's axis whose places are blocks "
        "(default: what --preset claims)")
    add("--only", nargs="+", metavar="GLOB", help="judge only these blocks or parameters of the preset (default: all)")
    add("--probes", type=whole_number(3), metavar="N", default=8, help="products with each whole tensor (default: 8)")
    add("--blocks", type=whole_number(4), metavar="N", default=32, help="products with single blocks of each way to "
        "cut a tensor (default: 32)")
    add("--exact", action="store_true", help="masses from each tensor's dense Hessian, without error, for tensors up "
        f"to {MOST_EXACT:,} entries (default: where that takes at most {EXACT_WORTH} times the products)")
    add("--alpha", type=_fraction, metavar="P", default=0.05, help="chance that a statement behind a tensor's verdict "
        "is wrong (default: 0.05)")
    add("--contrast", type=positive, metavar="RATIO", default=4.0, help="mean square of a dense block's entries over "
        "that of those outside, from which blocks are told apart (default: 4)")
    add("--diagonal", type=_fraction, metavar="SHARE", default=0.5, help="share of the mass from which the diagonal "
        "makes a block one of single entries (default: 0.5)")
    add("--conditioning", action="store_true", help="kappa with and without Adam's preconditioner and tau of small "
        f"blocks ({CONDITIONED} a cut), and the extreme eigenvalues of all (default: not computed)")
    output = add_run_options(command, "config.json, result.json, suggestion.json, optimizer.txt and pictures")
    output.add_argument(
        "--coupling", **{**COUNT, "type": whole_number(0)}, default=2, help="with --out, products a tensor for the "
        f"matrix of coupling between tensors; of models up to {MOST_DENSE} entries the dense Hessian is drawn instead "
        "(default: 2; 0: none)")
    # fmt: on
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    if not arguments.contrast > 1:
        raise ValueError(
            f"--contrast is {arguments.contrast:g}; it must exceed 1, which is no structure at all"
        )
    with contextlib.redirect_stdout(sys.stderr):  # what a model of the user's prints is no result
        problem, settings = load_problem(arguments, arguments.model)
        claimed = _claimed(arguments, problem)
        folder = None
        if arguments.out:
            folder = RunFolder(
                arguments.out, {knob: getattr(arguments, knob) for knob in _KNOBS} | settings
            )
        data = settings.get("data", "data of its own")
        described = f"{arguments.model} ({problem.num_parameters:,} parameters, {data}, loss {problem.loss:.4g})"
        hessian = HessianOperator(
            problem, memory=arguments.memory, precision=arguments.precision or PRECISIONS[0]
        )
        report = _report(arguments, hessian, claimed, folder, described)
        measured = (
            _conditioning(arguments, hessian, claimed, folder) if arguments.conditioning else None
        )
    if arguments.json:
        print(json.dumps(summary(report) | conditioning_summary(measured), indent=1))
    else:
        print(f"{described}\n{report}\n\n{suggestion_text(problem, report)}")
        if measured is not None:
            print(f"\n{conditioning_table(*measured)}")
    if folder:
        _save(arguments, folder, hessian, claimed, report, measured, described)
    hessian.release()
    return 1 if report.contradicted else 0


def _claimed(arguments: argparse.Namespace, problem: Problem) -> Partition:
    if arguments.check:
        if arguments.preset or arguments.only:
            raise ValueError("--check makes a claim of its own; leave out --preset and --only")
        claims = dict(_claim(text) for text in arguments.check)
        try:
            return partition(problem.model, claims)
        except ValueError as error:
            raise ValueError(f"--check {' '.join(arguments.check)}: {error}") from error
    preset = arguments.preset or "adam_mini"
    if preset.endswith(".json"):
        if arguments.only:
            raise ValueError("--only chooses of a preset; leave it out with a file")
        if not Path(preset).is_file():
            raise ValueError(
                f"--preset {preset}: there is no such file; name one that Partition.to_json wrote"
            )
        return Partition.from_json(preset, problem.model)
    if preset not in PRESETS:
        raise ValueError(
            f"--preset {preset}: presets are {', '.join(PRESETS)}; a file's name ends in .json"
        )
    try:
        return partition(problem.model, preset, only=arguments.only)
    except ValueError as error:
        raise ValueError(f"--preset {preset}: {error}") from error


def _claim(text: str) -> tuple[str, str | int]:
    name, equals, axis = text.rpartition("=")
    if not equals or not name or not axis:
        raise ValueError(
            f"--check {text}: NAME=AXIS is needed, such as 'fc.weight=row' or 'fc.weight=0'"
        )
    if axis.lstrip("-").isdigit():
        return name, int(axis)
    if axis.removesuffix("s") not in AXES:
        raise ValueError(f"--check {text}: axes are {', '.join(AXES)}, and numbers")
    return name, axis


def _report(
    arguments: argparse.Namespace, hessian: HessianOperator, claimed: Partition, folder: RunFolder | None,
    described: str,
) -> PartitionReport:  # fmt: skip
    if folder and folder.result:
        say("finished before, nothing is computed")
        return folder.result["report"]
    started, finished = time.monotonic(), dict[str, Any](folder.journal.finished) if folder else {}
    settings: dict[str, Any] = {"num_probes": arguments.probes, "num_blocks": arguments.blocks}
    settings["exact"] = arguments.exact or None
    products = planned_products(hessian.problem, claimed, **settings, finished=finished)
    say(
        f"plan: {described}: {len(claimed):,} blocks in {len(claimed.cuts)} cuts, {len(finished)} tensors done before"
    )
    if products:
        say(hessian.announcement(products, len(hessian.problem.parameters)))
        if arguments.verify:
            verify(hessian)

    def keep(name: str, report: TensorReport) -> None:
        if folder:
            folder.journal.append(name, report)

    report = check_partition(
        hessian, claimed, seed=arguments.seed, alpha=arguments.alpha, contrast=arguments.contrast,
        diagonal=arguments.diagonal, finished=finished, on_tensor=keep, **settings,
    )  # fmt: skip
    say(f"route: {hessian.route}")
    spent = report.num_matvecs - sum(done.num_matvecs for done in finished.values())
    say(f"{spent} Hessian-vector products, {time.monotonic() - started:.0f} s")
    return report


def _conditioning(
    arguments: argparse.Namespace,
    hessian: HessianOperator,
    claimed: Partition,
    folder: RunFolder | None,
) -> Conditions:
    if folder and folder.result:
        return folder.result["conditioning"]
    small = None
    if min(cut.block_size for cut in claimed.cuts) <= MOST_ENTRIES:
        small = block_conditioning(hessian, claimed, num_blocks=CONDITIONED, seed=arguments.seed)
    else:
        say(f"no kappa: every block has more than {MOST_ENTRIES} entries")
    return small, block_extremes(hessian, claimed, seed=arguments.seed)


def _save(
    arguments: argparse.Namespace, folder: RunFolder, hessian: HessianOperator, claimed: Partition,
    report: PartitionReport, measured: Conditions | None, described: str,
) -> None:  # fmt: skip
    drawn: DenseBlock | Coupling | None = None
    if folder.result:
        drawn = folder.result["drawn"]
    else:
        with contextlib.redirect_stdout(sys.stderr):
            if (
                sum(part.num_blocks * part.block_size for cut in claimed.cuts for part in cut.parts)
                <= MOST_DENSE
            ):
                drawn = dense_block(hessian, claimed)
            elif arguments.coupling:
                tensors = partition(
                    hessian.problem.model, list(dict.fromkeys(t.parameter for t in report.tensors))
                )
                drawn = coupling(
                    hessian, tensors, num_probes=arguments.coupling, seed=arguments.seed
                )
        folder.finish({"report": report, "drawn": drawn, "conditioning": measured})
    report.suggestion.to_json(folder.path / "suggestion.json")
    text = suggestion_text(hessian.problem, report, full=True)
    write_atomically(folder.path / "optimizer.txt", f"{text}\n".encode())
    from hessian_tools.plots import (
        partition as partition_plotting,  # matplotlib takes longer to import than many runs to compute
    )

    pictures = partition_plotting.draw(folder.path, report, drawn, described)
    files = [folder.path / name for name in ("result.json", "suggestion.json", "optimizer.txt")]
    say(f"saved: {', '.join(map(str, [*files, *pictures]))}")


def _fraction(text: str) -> float:
    value = positive(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1")
    return value
