"""The command line: parse, run, explain.

Commands: ``hessian-tools js0 | spectrum | partition | quadratic | models``.

Exit codes: 0 done, 1 a partition is contradicted, 2 bad input (one line on stderr), 3 numerical
failure (reported), 130 interrupted (--out resumes).
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hessian_tools.app import partition_command, quadratic_command, spectra_command
from hessian_tools.app.options import say
from hessian_tools.curvature.engine.memory import is_out_of_memory
from hessian_tools.errors import NumericalError
from hessian_tools.problem import zoo
from hessian_tools.tables import table

DONE = 0
BAD_INPUT = 2
NUMERICAL_FAILURE = 3
INTERRUPTED = 130
TRACEBACK = "HESSIAN_TOOLS_TRACEBACK"
_ABOUT = "Hessian spectra of neural networks, block by block, and what they say."
_EPILOG = f"""Defaults are this package's own choices, for a first answer in minutes; where a source
has others they are named: "paper" is Zhang et al., Why Transformers Need Adam, NeurIPS 2024, arXiv
2402.16788. Exit codes: 0 done, 1 a partition is contradicted, 2 bad input (one line says what to
change), 3 numerical failure, 130 interrupted. {TRACEBACK}=1 in the environment shows where in the
code an error came from."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # one line, where argparse would print its usage as well
        raise ValueError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    out: Path | None = None
    try:
        arguments = _parser().parse_args(argv)
        out = arguments.out
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code or DONE
    except KeyboardInterrupt:
        say(f"hessian-tools: interrupted; {_resumable(out)}")
        return INTERRUPTED
    except BrokenPipeError:  # `hessian-tools ... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        explained = _explained(error)
        if explained is None or os.environ.get(TRACEBACK):
            raise
        code, words = explained
        say(f"hessian-tools: {words.splitlines()[0]}")
        return code


def _resumable(out: Path | None) -> str:
    if out is None:
        return "with --out it could go on"
    return f"finished blocks are kept in {out}, the same command goes on"


def _explained(error: Exception) -> tuple[int, str] | None:
    """Exit code and words; None for what is a bug, neither the input's fault nor the numbers'."""
    if isinstance(error, NumericalError):
        return NUMERICAL_FAILURE, f"numerical failure: {error}"
    if is_out_of_memory(error):
        kind = type(error).__name__
        advice = "give a smaller --memory, --batch-size or --probes"
        return BAD_INPUT, f"out of memory ({kind}); {advice}"
    if isinstance(error, ValueError | OSError | ImportError):
        return BAD_INPUT, str(error) or type(error).__name__
    return None


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _Parser(
        prog="hessian-tools", description=_ABOUT, epilog=_EPILOG
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    spectra_command.add(commands, _EPILOG)
    partition_command.add(commands, _EPILOG)
    quadratic_command.add(commands, _EPILOG)
    models = commands.add_parser("models", help="the networks that --model knows")
    models.add_argument(
        "--json",
        action="store_true",
        help="print JSON on stdout instead of a table",
    )
    models.set_defaults(run=_models, out=None)
    return parser


def _models(arguments: argparse.Namespace) -> None:
    rows = zoo.describe()
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    header = ("name", "family", "parameters", "default data", "description")
    columns = ("name", "family", "parameters", "data", "description")
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    print(table(header, cells, left=2))


def _cell(value: str | int) -> str:
    return f"{value:,}" if isinstance(value, int) else value
