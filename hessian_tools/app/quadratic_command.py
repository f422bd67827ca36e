"""``hessian-tools quadratic``: methods on a quadratic, theory beside practice."""

import argparse
import json
from pathlib import Path
from typing import cast

from hessian_tools.app import quadratic_text
from hessian_tools.app.options import COUNT, FORMAT, device, positive, whole_number
from hessian_tools.app.quadratic_source import MOST_EIGENVALUES, PER_BLOCK, problem_of
from hessian_tools.app.quadratic_text import QuadraticResult
from hessian_tools.app.run_folder import RunFolder
from hessian_tools.app.terminal import say
from hessian_tools.quadratic.cases import DRAWS, SHIFTS
from hessian_tools.quadratic.lineup import LINEUP, compare, standings
from hessian_tools.quadratic.practice import check_adam_bound, check_gd_bound
from hessian_tools.quadratic.problems import Quadratic
from hessian_tools.quadratic.runs import Runs
from hessian_tools.quadratic.theory import constants
from hessian_tools.results import Journal, JsonObject

# of all options, those that the numbers depend on; --from comes as text
_KNOBS = (
    "command",
    "source",
    "kappa",
    "methods",
    "tuned",
    "starts",
    "steps",
    "tolerance",
    "seed",
    "blocks",
    "per_block",
    "draw",
    "shift",
)
_STARTS_OF_ADAM_BOUND = 20
_STEPS_OF_ADAM_BOUND = 500


def add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    epilog: str,
) -> None:
    """Adds the subcommand."""
    command = commands.add_parser(
        "quadratic",
        help="gradient descent against Adam on a quadratic, theory beside practice",
        description=(
            "Runs optimizers on f(w) = w'Hw / 2, H block-diagonal with given eigenvalues and "
            "random orthogonal bases, and holds the theorems of arXiv 2402.16788 against every "
            "step. CASE is 1 to 4, of that paper: 1 has spectra of GPT-2, 2 of ResNet-18, 3 is "
            "the heterogeneous and 4 the homogeneous arrangement of nine eigenvalues. FILE is "
            "JSON: a list of lists of eigenvalues, one a block, or an object of such lists by "
            "name. --from takes the blocks of a measured network."
        ),
        epilog=epilog,
    )
    _add_problem(command.add_argument_group("problem"))
    _add_runs(command.add_argument_group("runs"))
    _add_output(command.add_argument_group("machine and output"))
    command.set_defaults(run=run)


def _add_problem(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "source",
        nargs="?",
        metavar="CASE|FILE",
        help="1, 2, 3, 4, or a JSON file of eigenvalues by block",
    )
    add(
        "--from",
        dest="measured",
        type=Path,
        metavar="RESULT",
        help="folder or file that `js0 --out` or `spectrum --out` wrote, or a saved BlockSpectra "
        "(default: none, CASE or FILE is run)",
    )
    add(
        "--blocks",
        nargs="+",
        metavar="GLOB",
        help="with --from: only these blocks (default: all)",
    )
    add(
        "--per-block",
        **COUNT,
        help=f"with --from: eigenvalues drawn for each block (default: {PER_BLOCK}, fewer where "
        f"all blocks would have more than {MOST_EIGENVALUES})",
    )
    add(
        "--draw",
        choices=DRAWS,
        default="nodes",
        help="with --from: each Ritz value of a block is drawn with the same probability, or with "
        "that of its weight, which nearly always draws the bulk (default: nodes)",
    )
    add(
        "--shift",
        choices=SHIFTS,
        default="blocks",
        help="with --from and cases 1 and 2: each block is shifted to be positive on its own and "
        "keeps its scale, or all together (default: blocks; the paper does not say)",
    )
    add(
        "--kappa",
        type=positive,
        metavar="NUMBER",
        help="condition number (default: 5000; cases 3 and 4: 2000; a file's own; paper: 5000, "
        "thesis: 2000); with --from and --shift blocks it is raised where scales lie further apart",
    )


def _add_runs(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--methods",
        nargs="+",
        choices=LINEUP,
        metavar="NAME",
        default=list(LINEUP),
        help=f"of {', '.join(LINEUP)} (default: all)",
    )
    add(
        "--tuned",
        action="store_true",
        help="the best step of a sweep for every method (default: from theory where there is one, "
        "gd 2 / (mu + L), adam_frozen 1 / lambda_max of each start's preconditioned H)",
    )
    add(
        "--starts",
        **COUNT,
        default=100,
        help="random starts from N(0, I) (default: 100)",
    )
    add(
        "--steps",
        **COUNT,
        default=20_000,
        help="steps of each run (default: 20000)",
    )
    add(
        "--tolerance",
        type=positive,
        metavar="F",
        default=1e-6,
        help="iterations are counted to f / f(start) <= F (default: 1e-6)",
    )
    add(
        "--seed",
        type=whole_number(0),
        metavar="N",
        default=0,
        help="of bases, starts and draws (default: 0)",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--device",
        type=device,
        default="cpu",
        help="cpu, cuda, cuda:1, ... (default: cpu); float64 throughout",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for config.json, result.json, result.npz and quadratic.png; the same command "
        "resumes an interrupted run and reads a finished one (default: nothing is saved)",
    )
    add(
        "--json",
        action="store_true",
        help="print JSON on stdout (default: tables)",
    )
    add("--format", **FORMAT)


def run(arguments: argparse.Namespace) -> None:
    """The command."""
    if not arguments.tolerance < 1:
        raise ValueError(
            f"--tolerance is {arguments.tolerance:g}; a relative loss below 1 is needed"
        )
    problem = problem_of(arguments)
    if arguments.out:
        commands = {"repeat": arguments.line}
        folder = RunFolder(arguments.out, _config(arguments, problem), commands)
        result = _kept_or_computed(folder, arguments, problem)
        _draw(folder, problem, result, arguments.format)
    else:
        result = _computed(arguments, problem, None)
    places = standings(result["runs"], arguments.tolerance)
    if arguments.json:
        print(json.dumps(quadratic_text.summary(problem, result, places), indent=1))
    else:
        print(quadratic_text.tables(problem, result, places, arguments.tolerance))


def _config(arguments: argparse.Namespace, problem: Quadratic) -> JsonObject:
    """What the numbers depend on."""
    config = {knob: getattr(arguments, knob) for knob in _KNOBS}
    config["measured"] = str(arguments.measured or "")
    config["eigenvalues"] = {name: e.tolist() for name, e in problem.by_block().items()}
    return config


def _kept_or_computed(
    folder: RunFolder,
    arguments: argparse.Namespace,
    problem: Quadratic,
) -> QuadraticResult:
    if folder.result:
        return cast(QuadraticResult, folder.result)
    result = _computed(arguments, problem, folder.journal)
    folder.finish(result)
    return result


def _computed(
    arguments: argparse.Namespace,
    problem: Quadratic,
    journal: Journal | None,
) -> QuadraticResult:
    runs: dict[str, Runs] = {}
    for name in dict.fromkeys(arguments.methods):
        runs |= _runs_of(name, arguments, problem, journal)
    of_gd = check_gd_bound(problem)
    of_adam = check_adam_bound(
        problem,
        num_starts=_STARTS_OF_ADAM_BOUND,
        num_steps=_STEPS_OF_ADAM_BOUND,
        seed=arguments.seed,
    )
    several = len(problem.block_names) > 1
    return {
        "runs": runs,
        "constants": constants(problem, num_starts=arguments.starts, seed=arguments.seed),
        "checks": (*of_gd, *of_adam),
        "heterogeneity": problem.heterogeneity() if several else None,
        "eigenvalues": problem.by_block(),
    }


def _runs_of(
    name: str,
    arguments: argparse.Namespace,
    problem: Quadratic,
    journal: Journal | None,
) -> dict[str, Runs]:
    """One method's runs, by its name; those that an interrupted run has left are not run again."""
    if journal and name in journal.finished:
        say(f"{name}: finished before")
        kept: dict[str, Runs] = journal.finished[name]
        return kept
    say(f"{name}: {arguments.starts} starts, {arguments.steps:,} steps")
    runs = compare(
        problem,
        [name],
        tuned=arguments.tuned,
        num_starts=arguments.starts,
        num_steps=arguments.steps,
        tolerance=arguments.tolerance,
        seed=arguments.seed,
    )
    if journal:
        journal.append(name, runs)
    return runs


def _draw(folder: RunFolder, problem: Quadratic, result: QuadraticResult, kind: str) -> None:
    # matplotlib takes longer to import than many runs to compute
    from hessian_tools.plots import quadratic as plots

    runs, constants = result["runs"], result["constants"]
    picture = plots.draw(folder.path, problem, runs, constants, str(problem), kind)
    say(f"saved: {folder.path / 'result.json'}, {picture}")
