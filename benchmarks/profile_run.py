"""Where the time of a whole JS0 run goes, from the start of the interpreter to the pictures.

`python benchmarks/profile_run.py` runs `hessian-tools js0` on the 6-layer GPT of the benchmark in a
process of its own, with clocks around its parts, and writes benchmarks/results/profile.txt.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "profile.txt"
ARGUMENTS = ("--probes", "3", "--steps", "20")
HERE = Path(__file__).resolve().parent


def problem() -> Any:
    """The Problem that the command line is pointed to."""
    sys.path.insert(0, str(HERE))
    import torch
    from contest.cases import build

    return build("gpt", "cpu", torch.float32, bool(os.environ.get("PROFILE_SMOKE"))).problem()


def clocked(spent: dict[str, float], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with its time, less that of clocked parts inside it, added to
    ``spent[name]``.
    """

    def call(*arguments: Any, **keywords: Any) -> Any:
        inside = sum(spent.values())
        started = time.perf_counter()
        try:
            return function(*arguments, **keywords)
        finally:
            spent[name] += time.perf_counter() - started - (sum(spent.values()) - inside)

    return call


def run(start: float) -> None:
    """The run itself; prints the table."""
    from hessian_tools.app import cli, spectra_command
    from hessian_tools.curvature.engine import double_backward, engine
    from hessian_tools.curvature.tangent import route as tangent_route
    from hessian_tools.plots import spectra as plotting
    from hessian_tools.spectra import slq

    spent: dict[str, float] = defaultdict(float)
    spent["imports"] = time.time() - start
    differentiated = double_backward.DoubleBackward._differentiated
    double_backward.DoubleBackward._differentiated = clocked(
        spent, "second-order passes", differentiated
    )
    tangent_route.Program.__call__ = clocked(
        spent, "second-order passes", tangent_route.Program.__call__
    )
    engine.choose = clocked(spent, "planning", engine.choose)
    engine.Engine._take_tangent = clocked(
        spent, "tracing and checking the tangent program", engine.Engine._take_tangent
    )
    spectra_command.verify = clocked(spent, "verification", spectra_command.verify)
    slq.lanczos = clocked(spent, "Lanczos besides the products", slq.lanczos)
    compared = spectra_command.js_heterogeneity
    spectra_command.js_heterogeneity = clocked(spent, "heterogeneity", compared)
    plotting.draw = clocked(spent, "pictures", plotting.draw)
    with tempfile.TemporaryDirectory() as folder:
        model = f"{Path(__file__).resolve()}:problem"
        code = cli.main(["js0", "--model", model, *ARGUMENTS, "--out", str(Path(folder) / "out")])
    total = time.time() - start
    spent["all else"] = total - sum(spent.values())
    print(
        f"\nhessian-tools js0 --model benchmarks/profile_run.py:problem "
        f"{' '.join(ARGUMENTS)}, exit code {code}"
    )
    for name, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"{name:<42}{seconds / total:8.1%}")
    print(f"{'whole process':<42}{total:7.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny network; shares mean nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    found = parser.parse_args()
    environment = os.environ | {
        "PROFILE_START": repr(time.time()),
        "PROFILE_SMOKE": "1" if found.smoke else "",
    }
    ran = subprocess.run(
        [sys.executable, __file__, "--run"],
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    text = ran.stdout[ran.stdout.index("\nhessian-tools js0") + 1 :]
    found.out.parent.mkdir(parents=True, exist_ok=True)
    found.out.write_text(text)
    print(text)


if __name__ == "__main__":
    run(float(os.environ["PROFILE_START"])) if "--run" in sys.argv else main()
