"""``hessian-tools partition``: does a partition follow the Hessian, and what would?

Exit code 1 when any tensor's blocks are too coarse, too fine or along the wrong axis, so that it
can guard a training repository's CI; 0 when none is, undecided ones included.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hessian_tools.app.options import (
    add_network_options,
    add_run_options,
    load_problem,
    matrix_setting,
    operator_for,
    positive,
    whole_number,
)
from hessian_tools.app.partition_text import (
    Conditions,
    conditioning_summary,
    conditioning_table,
    suggestion_text,
    summary,
)
from hessian_tools.app.run_folder import RunFolder
from hessian_tools.app.terminal import say
from hessian_tools.app.verified import verify
from hessian_tools.blocks.partition import Partition
from hessian_tools.blocks.presets import PRESETS, partition
from hessian_tools.blocks.projection import Heads, parse_heads
from hessian_tools.blocks.specification import AXES
from hessian_tools.curvature.engine_operator import EngineOperator
from hessian_tools.problem.problem import Problem
from hessian_tools.results import JsonObject, write_atomically
from hessian_tools.structure.check import EXACT_WORTH, MOST_EXACT, check_partition, planned_products
from hessian_tools.structure.conditioning import MOST_ENTRIES, block_conditioning, block_extremes
from hessian_tools.structure.coupling import coupling
from hessian_tools.structure.coupling_result import Coupling
from hessian_tools.structure.dense import DenseBlock, dense_block
from hessian_tools.structure.report import PartitionReport, TensorReport

MOST_DENSE = 1024  # entries of a model whose whole dense Hessian is drawn
CONDITIONED = 4  # blocks of each cut whose kappa and tau are computed with --conditioning
# of all options, those that the numbers depend on
_KNOBS = (
    "command",
    "preset",
    "check",
    "only",
    "heads",
    "probes",
    "blocks",
    "exact",
    "alpha",
    "contrast",
    "diagonal",
    "seed",
    "precision",
    "conditioning",
    "coupling",
)


def add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    epilog: str,
) -> None:
    """Adds the subcommand."""
    command = commands.add_parser(
        "partition",
        help="does a partition follow the Hessian's dense sub-blocks, and which would",
        description=(
            "Judges each tensor's blocks by the share of its Hessian's mass inside them, against "
            "every other cut and what a Hessian without structure would hold (principle: one "
            "learning rate a dense sub-block, Adam-mini, arXiv 2406.16793). Exit code 1 when a "
            "claim is contradicted."
        ),
        epilog=epilog,
    )
    add_network_options(command)
    group = command.add_argument_group("partition")
    _add_claim(group)
    _add_tests(group)
    files = "config.json, result.json, suggestion.json, optimizer.txt and pictures"
    output = add_run_options(command, files)
    output.add_argument(
        "--coupling",
        type=whole_number(0),
        metavar="N",
        default=2,
        help="with --out, products a tensor for the matrix of coupling between tensors; of models "
        f"up to {MOST_DENSE} entries the dense Hessian is drawn instead (default: 2; 0: none)",
    )
    command.set_defaults(run=run)


def _add_claim(group: argparse._ArgumentGroup) -> None:
    """What is judged."""
    group.add_argument(
        "--preset",
        metavar="NAME|FILE.json",
        help=f"what is claimed: {', '.join(PRESETS)}, or a file written by Partition.to_json "
        "(default: adam_mini)",
    )
    group.add_argument(
        "--check",
        nargs="+",
        metavar="NAME=AXIS",
        help="claim this alone: parameter names or globs, each with whole, role, head, row, "
        "column, expert, element, the number of the tensor's axis whose places are blocks, or "
        "'heads(8)' as in --heads (default: what --preset claims)",
    )
    group.add_argument(
        "--heads",
        nargs="+",
        metavar="NAME=COUNT",
        help="heads of tensors whose layout is not recognised, which override the preset: "
        "parameter names or globs, each with '8', if need be with axis=1, fused=qkv, kv_count=2, "
        "groups=8 or sizes=128+64 after commas (default: none)",
    )
    group.add_argument(
        "--only",
        nargs="+",
        metavar="GLOB",
        help="judge only these blocks or parameters of the preset (default: all)",
    )


def _add_tests(group: argparse._ArgumentGroup) -> None:
    """How it is judged."""
    group.add_argument(
        "--probes",
        type=whole_number(3),
        metavar="N",
        default=8,
        help="products with each whole tensor (default: 8)",
    )
    group.add_argument(
        "--blocks",
        type=whole_number(4),
        metavar="N",
        default=32,
        help="products with single blocks of each way to cut a tensor (default: 32)",
    )
    group.add_argument(
        "--exact",
        action="store_true",
        help="masses from each tensor's dense Hessian, without error, for tensors up to "
        f"{MOST_EXACT:,} entries (default: where that takes at most {EXACT_WORTH} times the "
        "products)",
    )
    group.add_argument(
        "--alpha",
        type=_fraction,
        metavar="P",
        default=0.05,
        help="chance that a statement behind a tensor's verdict is wrong (default: 0.05)",
    )
    group.add_argument(
        "--contrast",
        type=positive,
        metavar="RATIO",
        default=4.0,
        help="mean square of a dense block's entries over that of those outside, from which "
        "blocks are told apart (default: 4)",
    )
    group.add_argument(
        "--diagonal",
        type=_fraction,
        metavar="SHARE",
        default=0.5,
        help="share of the mass from which the diagonal makes a block one of single entries "
        "(default: 0.5)",
    )
    group.add_argument(
        "--conditioning",
        action="store_true",
        help="kappa with and without Adam's preconditioner and tau of small blocks "
        f"({CONDITIONED} a cut), and the extreme eigenvalues of all (default: not computed)",
    )


@dataclass(frozen=True)
class _Run:
    """What is checked, and how."""

    arguments: argparse.Namespace
    hessian: EngineOperator
    identity: JsonObject  # of network and data
    claimed: Partition
    folder: RunFolder | None
    described: str

    @property
    def finished(self) -> dict[str, Any] | None:  # results of this package, by name
        """What an earlier run with the same arguments left, if it came to an end."""
        return self.folder.result if self.folder else None


def run(arguments: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    if not arguments.contrast > 1:
        raise ValueError(
            f"--contrast is {arguments.contrast:g}; it must exceed 1, which is no structure at all"
        )
    with contextlib.redirect_stdout(sys.stderr):  # what a model of the user's prints is no result
        this_run = _prepared(arguments)
        report = _report(this_run)
        conditions = _conditions(this_run) if arguments.conditioning else None
    problem = this_run.hessian.problem
    if arguments.json:
        print(json.dumps(summary(report) | conditioning_summary(conditions), indent=1))
    else:
        print(f"{this_run.described}\n{report}\n\n{suggestion_text(problem, report)}")
        if conditions is not None:
            print(f"\n{conditioning_table(*conditions)}")
    if this_run.folder:
        _save(this_run, this_run.folder, report, conditions)
    this_run.hessian.release()
    return 1 if report.contradicted else 0


def _prepared(arguments: argparse.Namespace) -> _Run:
    problem, settings = load_problem(arguments, arguments.model)
    claimed = _claimed(arguments, problem)
    folder = None
    if arguments.out:
        config = {knob: getattr(arguments, knob) for knob in _KNOBS} | matrix_setting(arguments)
        folder = RunFolder(arguments.out, config | settings, {"repeat": arguments.line})
    data = settings.get("data", "data of its own")
    size = f"{problem.num_parameters:,} parameters"
    described = f"{arguments.model} ({size}, {data}, loss {problem.loss:.4g})"
    hessian = operator_for(arguments, problem)
    return _Run(arguments, hessian, settings, claimed, folder, described)


def _claimed(arguments: argparse.Namespace, problem: Problem) -> Partition:
    if arguments.check:
        return _checked_claims(arguments, problem)
    preset = arguments.preset or "adam_mini"
    if preset.endswith(".json"):
        return _claim_of_file(preset, arguments, problem)
    if preset not in PRESETS:
        raise ValueError(
            f"--preset {preset}: presets are {', '.join(PRESETS)}; a file's name ends in .json"
        )
    try:
        stated = dict(_stated(text) for text in arguments.heads or ())
        return partition(problem.model, preset, only=arguments.only, heads=stated)
    except ValueError as error:
        raise ValueError(f"--preset {preset}: {error}") from error


def _stated(text: str) -> tuple[str, Heads]:
    name, equals, heads = text.partition("=")
    if not equals or not name:
        raise ValueError(f"--heads {text}: NAME=COUNT is needed, such as '*.q_proj.weight=8'")
    return name, parse_heads(heads)


def _checked_claims(arguments: argparse.Namespace, problem: Problem) -> Partition:
    if arguments.preset or arguments.only or arguments.heads:
        raise ValueError(
            "--check makes a claim of its own; leave out --preset and --only, and --heads"
        )
    claims = dict(_claim(text) for text in arguments.check)
    try:
        return partition(problem.model, claims)
    except ValueError as error:
        raise ValueError(f"--check {' '.join(arguments.check)}: {error}") from error


def _claim_of_file(file: str, arguments: argparse.Namespace, problem: Problem) -> Partition:
    if arguments.only:
        raise ValueError("--only chooses of a preset; leave it out with a file")
    if arguments.heads:
        raise ValueError("--heads overrides a preset; leave it out with a file")
    if not Path(file).is_file():
        raise ValueError(
            f"--preset {file}: there is no such file; name one that Partition.to_json wrote"
        )
    return Partition.from_json(file, problem.model)


def _claim(text: str) -> tuple[str, str | int | Heads]:
    of_heads, _, stated = text.partition("=heads(")
    if of_heads and stated.endswith(")"):
        return of_heads, parse_heads(f"heads({stated}")
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


def _report(this_run: _Run) -> PartitionReport:
    if this_run.finished:
        say("finished before, nothing is computed")
        return this_run.finished["report"]
    arguments = this_run.arguments
    hessian = this_run.hessian
    folder = this_run.folder
    started = time.monotonic()
    finished = dict(folder.journal.finished) if folder else {}
    _announce(this_run, finished)

    def keep(name: str, report: TensorReport) -> None:
        if folder:
            folder.journal.append(name, report)

    report = check_partition(
        hessian,
        this_run.claimed,
        seed=arguments.seed,
        num_probes=arguments.probes,
        num_blocks=arguments.blocks,
        exact=arguments.exact or None,
        alpha=arguments.alpha,
        contrast=arguments.contrast,
        diagonal=arguments.diagonal,
        finished=finished,
        on_tensor=keep,
    )
    say(f"route: {hessian.route}")
    spent = report.num_matvecs - sum(done.num_matvecs for done in finished.values())
    say(f"{spent} {hessian.title}-vector products, {time.monotonic() - started:.0f} s")
    return report


def _announce(this_run: _Run, finished: Mapping[str, TensorReport]) -> None:
    """Prints the plan, and checks the products that it needs."""
    arguments = this_run.arguments
    hessian = this_run.hessian
    claimed = this_run.claimed
    products = planned_products(
        hessian.problem,
        claimed,
        arguments.probes,
        arguments.blocks,
        arguments.exact or None,
        finished,
    )
    blocks = f"{len(claimed):,} blocks in {len(claimed.cuts)} cuts"
    say(f"plan: {this_run.described}: {blocks}, {len(finished)} tensors done before")
    if products:
        say(hessian.announcement(products, len(hessian.problem.parameters)))
        verify(hessian, arguments.verify, this_run.identity)


def _conditions(this_run: _Run) -> Conditions:
    if this_run.finished:
        return this_run.finished["conditioning"]
    hessian = this_run.hessian
    claimed = this_run.claimed
    seed = this_run.arguments.seed
    small = None
    if min(cut.block_size for cut in claimed.cuts) <= MOST_ENTRIES:
        small = block_conditioning(hessian, claimed, num_blocks=CONDITIONED, seed=seed)
    else:
        say(f"no kappa: every block has more than {MOST_ENTRIES} entries")
    return small, block_extremes(hessian, claimed, seed=seed)


def _save(
    this_run: _Run,
    folder: RunFolder,
    report: PartitionReport,
    conditions: Conditions | None,
) -> None:
    if folder.result:
        drawn = folder.result["drawn"]
    else:
        with contextlib.redirect_stdout(sys.stderr):
            drawn = _drawn(this_run, report)
        folder.finish({"report": report, "drawn": drawn, "conditioning": conditions})
    report.suggestion.to_json(folder.path / "suggestion.json")
    text = suggestion_text(this_run.hessian.problem, report, full=True)
    write_atomically(folder.path / "optimizer.txt", f"{text}\n".encode())
    # matplotlib takes longer to import than many runs to compute
    from hessian_tools.plots import partition as partition_plotting

    kind = this_run.arguments.format
    pictures = partition_plotting.draw(folder.path, report, drawn, this_run.described, kind)
    files = [folder.path / name for name in ("result.json", "suggestion.json", "optimizer.txt")]
    say(f"saved: {', '.join(map(str, [*files, *pictures]))}")


def _drawn(this_run: _Run, report: PartitionReport) -> DenseBlock | Coupling | None:
    """What a picture shows: the dense Hessian of a small model, else the coupling of tensors."""
    hessian = this_run.hessian
    claimed = this_run.claimed
    probes = this_run.arguments.coupling
    if sum(cut.numel for cut in claimed.cuts) <= MOST_DENSE:
        return dense_block(hessian, claimed)
    if not probes:
        return None
    names = dict.fromkeys(tensor.parameter for tensor in report.tensors)
    tensors = partition(hessian.problem.model, list(names))
    return coupling(hessian, tensors, num_probes=probes, seed=this_run.arguments.seed)


def _fraction(text: str) -> float:
    value = positive(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1")
    return value
