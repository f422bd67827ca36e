"""``hessian-tools report``: one HTML page of a folder's runs."""

import argparse
from pathlib import Path

from hessian_tools.app.terminal import say
from hessian_tools.page.writing import FILE, write_report

LARGE = 3 * 2**20  # bytes


def add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    epilog: str,
) -> None:
    """Adds the subcommand."""
    command = commands.add_parser(
        "report",
        help="one HTML page of runs, to look at, to print and to pass on",
        description=(
            "Writes one HTML file of what js0, spectrum, partition, race and quadratic leave in "
            "--out, of saved results and of a Tracker's journal, in DIR and the folders in it: "
            "verdicts first, tables that sort and filter, spectra to compare, heat maps, curves, "
            "and the commands that repeat the runs. It needs no network. A run that was "
            "interrupted is shown as far as it came. Prints the file's path."
        ),
        epilog=epilog,
    )
    add = command.add_argument
    add("folder", type=Path, metavar="DIR", help="folder of one run or of several")
    add(
        "--to",
        type=Path,
        metavar="FILE",
        help=f"the file to write (default: {FILE} in DIR)",
    )
    command.set_defaults(run=run, out=None)


def run(arguments: argparse.Namespace) -> None:
    """The command."""
    written = write_report(arguments.folder, arguments.to)
    size = written.stat().st_size
    say(f"saved: {written}, {size / 2**20:.1f} MiB; open it in a browser")
    if size > LARGE:
        say("note: a page of so many runs is slow to read; report the folders in it one by one")
    print(written)
