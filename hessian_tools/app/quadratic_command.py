"""``hessian-tools quadratic``: gradient descent, Adam and others on a quadratic, theory beside practice."""

import argparse
import json
import math
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from hessian_tools.app import report
from hessian_tools.app.options import COUNT, device, positive, say, whole_number
from hessian_tools.app.run_folder import RunFolder
from hessian_tools.heterogeneity.block_heterogeneity import JSHeterogeneity
from hessian_tools.quadratic import (
    BoundCheck,
    Constants,
    Quadratic,
    Runs,
    case,
    check_adam_bound,
    check_gd_bound,
    from_blocks,
    from_spectra,
)
from hessian_tools.quadratic import constants as constants_of
from hessian_tools.quadratic.cases import CASES, DRAWS, SHIFTS
from hessian_tools.quadratic.lineup import LINEUP, Standing, compare, standings
from hessian_tools.results import load
from hessian_tools.spectra.quadrature import BlockSpectra

_ABOUT = """Runs optimizers on f(w) = w'Hw / 2, H block-diagonal with given eigenvalues and random orthogonal bases, and
holds the theorems of arXiv 2402.16788 against every step. CASE is 1 to 4, of that paper: 1 has spectra of GPT-2, 2 of
ResNet-18, 3 is the heterogeneous and 4 the homogeneous arrangement of nine eigenvalues. FILE is JSON: a list of lists
of eigenvalues, one a block, or an object of such lists by name. --from takes the blocks of a measured network."""
_KNOBS = (
    "command", "source", "kappa", "methods", "tuned", "starts", "steps", "tolerance", "seed", "blocks", "per_block",
    "draw", "shift",
)  # fmt: skip
_DUELS = (
    ("without momentum", ("gd",), ("adam_frozen", "sign")),
    ("with momentum", ("heavy_ball", "nesterov"), ("adam",)),
)
_CHECKED = (20, 500)  # starts and steps of Adam's bound


def add(commands: Any, epilog: str) -> None:
    """Adds the subcommand."""
    short = "gradient descent against Adam on a quadratic, theory beside practice"
    command = commands.add_parser("quadratic", help=short, description=_ABOUT, epilog=epilog)
    # fmt: off
    add = command.add_argument_group("problem").add_argument
    add("source", nargs="?", metavar="CASE|FILE", help="1, 2, 3, 4, or a JSON file of eigenvalues by block")
    add("--from", dest="measured", type=Path, metavar="RESULT", help="folder or file that `js0 --out` or `spectrum "
        "--out` wrote, or a saved BlockSpectra (default: none, CASE or FILE is run)")
    add("--blocks", nargs="+", metavar="GLOB", help="with --from: only these blocks (default: all)")
    add("--per-block", **COUNT, default=30, help="with --from: eigenvalues drawn for each block (default: 30)")
    add("--draw", choices=DRAWS, default="nodes", help="with --from: eigenvalues are drawn among a block's Ritz values "
        "alike, or by their weights, which nearly always draws the bulk (default: nodes)")
    add("--shift", choices=SHIFTS, default="blocks", help="with --from and cases 1 and 2: each block is shifted to be "
        "positive on its own and keeps its scale, or all together (default: blocks; the paper does not say)")
    add("--kappa", type=positive, metavar="NUMBER", help="condition number (default: 5000; cases 3 and 4: 2000; a "
        "file's own; paper: 5000, thesis: 2000)")
    add = command.add_argument_group("runs").add_argument
    add("--methods", nargs="+", choices=LINEUP, metavar="NAME", default=list(LINEUP),
        help=f"of {', '.join(LINEUP)} (default: all)")
    add("--tuned", action="store_true", help="the best step of a sweep for every method (default: from theory "
        "where there is one, gd 2 / (mu + L), adam_frozen 1 / lambda_max of each start's preconditioned H)")
    add("--starts", **COUNT, default=100, help="random starts from N(0, I) (default: 100)")
    add("--steps", **COUNT, default=20_000, help="steps of each run (default: 20000)")
    add("--tolerance", type=positive, metavar="F", default=1e-6, help="iterations are counted to f / f(start) <= F "
        "(default: 1e-6)")
    add("--seed", type=whole_number(0), metavar="N", default=0, help="of bases, starts and draws (default: 0)")
    add = command.add_argument_group("machine and output").add_argument
    add("--device", type=device, default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu); float64 throughout")
    add("--out", type=Path, metavar="DIR", help="folder for config.json, result.json, result.npz and quadratic.png; "
        "the same command reads a finished result (default: nothing is saved)")
    add("--json", action="store_true", help="print JSON on stdout (default: tables)")
    # fmt: on
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """The command."""
    if not arguments.tolerance < 1:
        raise ValueError(
            f"--tolerance is {arguments.tolerance:g}; a relative loss below 1 is needed"
        )
    problem = _problem(arguments)
    config = {knob: getattr(arguments, knob) for knob in _KNOBS} | {
        "measured": str(arguments.measured or "")
    }
    config["eigenvalues"] = {name: e[0].tolist() for name, e in _by_block(problem)}
    folder = RunFolder(arguments.out, config) if arguments.out else None
    result = folder.result if folder and folder.result else _computed(arguments, problem)
    if folder and not folder.result:
        folder.finish(result)
    if folder:
        from hessian_tools.plots import (
            quadratic as quadratic_plotting,  # matplotlib takes longer to import than many runs to compute
        )

        picture = quadratic_plotting.draw(
            folder.path, problem, result["runs"], result["constants"], str(problem)
        )
        say(f"saved: {folder.path / 'result.json'}, {picture}")
    places = standings(result["runs"], arguments.tolerance)
    if arguments.json:
        print(json.dumps(summary(problem, result, places), indent=1))
        return
    print("\n\n".join(_texts(problem, result, places, arguments.tolerance)))


def _problem(arguments: argparse.Namespace) -> Quadratic:
    """The quadratic that was asked for, on its device."""
    if (arguments.source is None) == (arguments.measured is None):
        raise ValueError(
            "give either CASE|FILE or --from RESULT: a case is 1, 2, 3 or 4 (see hessian-tools quadratic --help)"
        )
    if arguments.measured is not None:
        spectra = _spectra(arguments.measured)
        chosen = arguments.blocks or ["*"]
        kept = {
            n: q
            for n, q in spectra.items()
            if any(n == glob or fnmatchcase(n, glob) for glob in chosen)
        }
        if not kept:
            raise ValueError(f"--blocks {' '.join(chosen)} matches none of {', '.join(spectra)}")
        made = from_spectra(kept, per_block=arguments.per_block, kappa=arguments.kappa or 5000, draw=arguments.draw,
                            shift=arguments.shift, seed=arguments.seed, name=str(arguments.measured))  # fmt: skip
    elif arguments.blocks:
        raise ValueError("--blocks chooses among the blocks of --from; leave it out")
    elif arguments.source.isdigit():
        if int(arguments.source) not in CASES:
            raise ValueError(
                f"CASE is {arguments.source}; the cases are 1, 2, 3 and 4, anything else is a file"
            )
        made = case(
            int(arguments.source), kappa=arguments.kappa, seed=arguments.seed, shift=arguments.shift
        )
    else:
        made = _from_file(Path(arguments.source), arguments)
    return made.to(arguments.device)


def _from_file(path: Path, arguments: argparse.Namespace) -> Quadratic:
    if not path.is_file():
        raise ValueError(
            f"there is no file {str(path)!r}; give 1, 2, 3, 4 or a JSON file of eigenvalues by block"
        )
    if arguments.kappa is not None:
        raise ValueError(
            "--kappa does not apply to a file, whose eigenvalues are taken as they are; leave it out"
        )
    try:
        given = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    names, blocks = (
        (list(given), list(given.values())) if isinstance(given, dict) else (None, given)
    )
    if not isinstance(blocks, list) or not all(isinstance(block, list) for block in blocks):
        raise ValueError(
            f"{path} holds no lists of eigenvalues; write [[1, 2, 3], [99, 100, 101]] or the same by name"
        )
    return from_blocks(blocks, names=names, name=path.stem, seed=arguments.seed)


def _spectra(path: Path) -> BlockSpectra:
    """The BlockSpectra in a run's folder or a saved result."""
    try:
        found = load(path / "result" if path.is_dir() else path)
    except FileNotFoundError as error:
        raise ValueError(
            f"--from {path}: there is no such result; give what `hessian-tools js0 --out` wrote"
        ) from error
    found = found.get("spectra") if isinstance(found, dict) else found
    if not isinstance(found, BlockSpectra):
        raise ValueError(
            f"--from {path} holds no block spectra; give what `hessian-tools js0 --out` wrote"
        )
    return found


def _computed(arguments: argparse.Namespace, problem: Quadratic) -> dict[str, Any]:
    """All that is saved."""
    settings = {
        "num_starts": arguments.starts,
        "num_steps": arguments.steps,
        "tolerance": arguments.tolerance,
    }
    runs: dict[str, Runs] = {}
    for name in arguments.methods:
        say(f"{name}: {arguments.starts} starts, {arguments.steps:,} steps")
        runs |= compare(problem, [name], tuned=arguments.tuned, seed=arguments.seed, **settings)
    starts, steps = _CHECKED
    checks = [
        *check_gd_bound(problem),
        *check_adam_bound(problem, num_starts=starts, num_steps=steps, seed=arguments.seed),
    ]
    many = len(problem.block_names) > 1
    return {
        "runs": runs, "constants": constants_of(problem, num_starts=arguments.starts, seed=arguments.seed),
        "checks": tuple(checks), "heterogeneity": problem.heterogeneity() if many else None,
        "eigenvalues": {name: e[0].cpu().numpy() for name, e in _by_block(problem)},
    }  # fmt: skip


def _texts(
    problem: Quadratic, result: dict[str, Any], places: list[Standing], tolerance: float
) -> list[str]:
    """The command's tables."""
    texts = [
        str(problem),
        methods_table(places, tolerance),
        winner(places),
        theory_table(result["constants"]),
    ]
    texts.append(checks_table(result["checks"]))
    js: JSHeterogeneity | None = result["heterogeneity"]
    if js is not None:
        texts.append(report.readings_table({problem.name: js}))
    return texts


def methods_table(places: list[Standing], tolerance: float) -> str:
    """A row a method, fastest first."""
    header = (
        "method",
        "step size",
        "eta",
        f"iterations to {tolerance:g}",
        "quartiles",
        "diverged",
        "times faster than gd",
    )
    rows = []
    for p in places:
        low, middle, high = (
            f"{q:,.0f}" if math.isfinite(q) else "not reached" for q in p.quartiles
        )
        rows.append(
            [
                p.name,
                p.step,
                f"{p.eta:.3g}",
                middle,
                f"{low} - {high}",
                f"{p.diverged:.0%}",
                f"{p.speedup:.3g}",
            ]
        )
    return report.table(header, rows, left=2)


def winner(places: list[Standing]) -> str:
    """Gradient descent against Adam, without momentum and with it, and by what factor; momentum alone is worth much."""
    medians, told = {p.name: p.quartiles[1] for p in places}, []
    for kind, ours, theirs in _DUELS:
        left, right = ({n: medians[n] for n in names if n in medians} for names in (ours, theirs))
        if left and right:
            told.append(
                f"{kind}: {_duel(*min(left.items(), key=_value), *min(right.items(), key=_value))}."
            )
    return "\n".join(told) or f"Fastest: {places[0].name}."


def _duel(one: str, first: float, other: str, second: float) -> str:
    if first == second:
        both = (
            "are even"
            if math.isfinite(first)
            else "both do not come to the tolerance; allow more --steps"
        )
        return f"{one} and {other} {both}"
    (ahead, fast), (behind, slow) = sorted(((one, first), (other, second)), key=_value)
    by = (
        f"{slow / fast:.3g} times fewer iterations"
        if math.isfinite(slow)
        else "which does not come to the tolerance"
    )
    return f"{ahead} beats {behind}, {by}"


def _value(pair: tuple[str, float]) -> float:
    return pair[1]


def theory_table(found: Constants) -> str:
    """The theorems' constants; those of Adam are medians over starts."""
    middle = {
        name: float(np.median(getattr(found, name)))
        for name in ("r", "tight_r", "adam_upper", "adam_upper_tight")
    }
    worst = float(found.block_kappas.max())
    rows = [
        ["kappa", f"{found.kappa[0]:.6g}"],
        ["max kappa_l", f"{worst:.6g}"],
        ["r = max C2^2 / min C1^2 (median)", f"{middle['r']:.4g}"],
        ["r' = max C2 / min C1 (median)", f"{middle['tight_r']:.4g}"],
        ["r max kappa_l (median)", f"{middle['r'] * worst:.4g}"],
        [
            "starts with r max kappa_l <= kappa, where theory has Adam win",
            f"{np.mean(found.adam_wins):.0%}",
        ],
        [
            "GD, factor of f a step, worst start at any step size, at least",
            f"{found.gd_lower[0]:.8g}",
        ],
        ["Adam, factor of f a step, at most (median)", f"{middle['adam_upper']:.8g}"],
        ["the same by r', squared", f"{middle['adam_upper_tight']:.8g}"],
    ]
    return report.table(("theory (Adam: beta1 = 0, beta2 = 1)", "value"), rows)


def checks_table(checks: tuple[BoundCheck, ...]) -> str:
    """A row a bound: steps it was held against, and violations."""
    rows = []
    for index, c in enumerate(checks):
        which = "GD lower bound" if index < 3 else "Adam upper bound"
        rows.append([f"{which}: {c.name}", f"{c.steps:,}", f"{c.violations:,}", f"{c.margin:.2g}"])
    return report.table(("bound", "steps judged", "violations", "least margin (log)"), rows)


def summary(problem: Quadratic, result: dict[str, Any], places: list[Standing]) -> dict[str, Any]:
    """The numbers of all tables, JSON-able."""
    found: Constants = result["constants"]
    js: JSHeterogeneity | None = result["heterogeneity"]
    readings = (
        {}
        if js is None
        else {n: r.mean for n, r in js.readings.items()} | {"scale_spread": js.scale_spread.value}
    )
    return {
        "problem": {"name": problem.name, "size": problem.size, "kappa": float(found.kappa[0]),
                    "block_kappas": dict(zip(problem.block_names, found.block_kappas[0].tolist(), strict=True))},
        "methods": [{"name": p.name, "step": p.step, "eta": p.eta, "quartiles": [_number(q) for q in p.quartiles],
                     "diverged": p.diverged, "times_faster_than_gd": _number(p.speedup)} for p in places],
        "winner": winner(places),
        "theory": {"r": float(np.median(found.r)), "tight_r": float(np.median(found.tight_r)),
                   "adam_wins_predicted": float(np.mean(found.adam_wins)), "gd_lower": float(found.gd_lower[0]),
                   "adam_upper": float(np.median(found.adam_upper))},
        "bounds": [{"name": c.name, "steps": c.steps, "violations": c.violations, "margin": _number(c.margin)}
                   for c in result["checks"]],
        "heterogeneity": {name: _number(value) for name, value in readings.items()},
    }  # fmt: skip


def _by_block(problem: Quadratic) -> list[tuple[str, Any]]:
    return list(zip(problem.block_names, problem.eigenvalues, strict=True))


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
