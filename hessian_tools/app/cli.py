"""The command line: parse, run, explain.

Commands: ``hessian-tools js0 | spectrum | partition | quadratic | race | report | models``.

Exit codes: 0 done, 1 a partition is contradicted, 2 bad input (one line on stderr), 3 a failure
while computing, numerical or other (one line), 130 interrupted (--out resumes).
"""

import argparse
import contextlib
import io
import json
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hessian_tools.app import (
    partition_command,
    quadratic_command,
    race_command,
    report_command,
    spectra_command,
)
from hessian_tools.app.run_folder import close_all
from hessian_tools.app.terminal import say
from hessian_tools.curvature.engine.memory import is_out_of_memory
from hessian_tools.errors import NumericalError
from hessian_tools.interruption import Interruption, answered
from hessian_tools.problem import zoo
from hessian_tools.tables import table

DONE = 0
BAD_INPUT = 2
NUMERICAL_FAILURE = 3
TRACEBACK = "HESSIAN_TOOLS_TRACEBACK"
_ABOUT = "Hessian spectra of neural networks, block by block, and what they say."
_EPILOG = f"""Defaults are this package's own choices, for a first answer in minutes; where a source
has others they are named: "paper" is Zhang et al., Why Transformers Need Adam, NeurIPS 2024, arXiv
2402.16788. Exit codes: 0 done, 1 a partition is contradicted, 2 bad input (one line says what to
change), 3 numerical failure or another while computing, 130 interrupted. {TRACEBACK}=1 in the
environment shows where in the code an error came from."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # one line, where argparse would print its usage as well
        raise ValueError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code.

    Without ``argv``, as the program itself, it also answers signals and closed pipes.
    """
    interruption = Interruption()
    if argv is not None:
        return _flushed(_code_of(argv, interruption))
    try:
        with answered(interruption):
            _settle_streams()
            return _flushed(_code_of(sys.argv[1:], interruption))
    except SystemExit:  # argparse has printed its help
        return _flushed(DONE)
    except KeyboardInterrupt:  # while words were said, or files closed
        _tell("interrupted")
        return interruption.exit_code


def _code_of(argv: Sequence[str], interruption: Interruption) -> int:
    """Runs a command, and explains whatever comes out of it."""
    arguments = argparse.Namespace(out=None)
    try:
        try:
            _parser().parse_args(argv, arguments)
            arguments.line = shlex.join(["hessian-tools", *argv])
            return arguments.run(arguments) or DONE
        finally:
            close_all()
    except BaseException as error:
        if _is_help(error, arguments):
            raise
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        if interruption.is_cause_of(error):
            _tell(f"interrupted; {_resumable(arguments.out)}")
            return interruption.exit_code
        code, words = _explained(error)
        _tell(words)
        return code


def _is_help(error: BaseException, arguments: argparse.Namespace) -> bool:
    """Whether argparse has printed what was asked for, and leaves."""
    return isinstance(error, SystemExit) and not hasattr(arguments, "run")


def _tell(words: str) -> None:
    """One line on stderr, for as long as somebody reads it."""
    lines = words.splitlines() or [""]
    with contextlib.suppress(OSError, ValueError):
        say(f"hessian-tools: {lines[0]}")


def _resumable(out: Path | None) -> str:
    if out is None:
        return "with --out it could go on"
    if not out.exists():
        return "nothing was computed yet"
    return f"finished blocks are kept in {out}, the same command goes on"


def _explained(error: BaseException) -> tuple[int, str]:
    """Exit code and words."""
    if isinstance(error, NumericalError):
        return NUMERICAL_FAILURE, f"numerical failure: {error}"
    if isinstance(error, Exception) and is_out_of_memory(error):
        kind = type(error).__name__
        advice = (
            "give a smaller --memory, --batch-size or --probes (quadratic: --starts; race: "
            "--batch-sizes)"
        )
        return BAD_INPUT, f"out of memory ({kind}); {advice}"
    if isinstance(error, ValueError | OSError | ImportError):
        return BAD_INPUT, str(error) or type(error).__name__
    # neither known as the input's fault nor as the numbers': a bug, here or in the user's model
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(frame.filename).name}, line {frame.lineno}"
    first = (str(error).splitlines() or [""])[0]
    words = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return NUMERICAL_FAILURE, f"failed in {where}: {words} ({TRACEBACK}=1 shows the way there)"


class _UntilHungUp(io.TextIOWrapper):
    """A stream whose reader may hang up, as `head` does: what is written then goes nowhere.

    The run goes on: files are still wanted, and so is the exit code.
    """

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            _to_nowhere(self.fileno())
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            _to_nowhere(self.fileno())


def _to_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _settle_streams() -> None:
    """Streams take whatever comes: without a reader, or letters that their encoding lacks."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell, `>&-`
            settled = open(os.devnull, "w")  # noqa: SIM115  # as long as the process lives
        elif type(stream) is io.TextIOWrapper:
            stream.flush()
            encoding, by_line = stream.encoding, stream.line_buffering
            settled = _UntilHungUp(
                stream.detach(),
                encoding=encoding,
                errors="backslashreplace",
                line_buffering=by_line,
            )
        else:
            continue
        setattr(sys, name, settled)


def _flushed(code: int) -> int:
    """``code``, once all that was printed has gone out; else says so."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _to_nowhere(sys.stdout.fileno())  # which Python flushes once more at its end
        _tell(f"standard output cannot be written: {error}")
        return BAD_INPUT
    return code


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _Parser(
        prog="hessian-tools", description=_ABOUT, epilog=_EPILOG
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    spectra_command.add(commands, _EPILOG)
    partition_command.add(commands, _EPILOG)
    quadratic_command.add(commands, _EPILOG)
    race_command.add(commands, _EPILOG)
    report_command.add(commands, _EPILOG)
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
