"""What the experiments share: the arguments of the command, and where result and table go."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hessian_tools as ht


@dataclass(frozen=True)
class Run:
    """One run of an experiment: which size, and which folder it writes to."""

    smoke: bool  # the small run that only shows that everything works
    out: Path
    options: argparse.Namespace  # all arguments as given

    def save(self, result: Any, config: dict[str, Any]) -> None:
        """Write ``result`` and the settings that led to it to OUT/result.json and .npz."""
        ht.save(result, self.out / "result", config=config)

    def print_table(self, text: str) -> None:
        """Print ``text`` and write it to OUT/table.txt."""
        (self.out / "table.txt").write_text(text + "\n")
        print(text)


class Script(argparse.ArgumentParser):
    """The command line of an experiment: ``--smoke``, ``--out``, and what is added to it.

    Without ``--out`` a run writes to ``folder``, with ``--smoke`` to ``folder``/smoke, so that a
    small run never overwrites a full one. ``smoke`` says what is small in it and how long it takes.
    """

    def __init__(self, description: str | None, folder: Path, smoke: str) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.folder = folder
        self.add_argument("--smoke", action="store_true", help=smoke)
        default = f"folder of the result (default {folder}, with --smoke {folder}/smoke)"
        self.add_argument("--out", type=Path, help=default)

    def run(self) -> Run:
        options = self.parse_args()
        default = self.folder / "smoke" if options.smoke else self.folder
        return Run(options.smoke, options.out or default, options)
