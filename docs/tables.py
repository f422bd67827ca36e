"""Puts tables into the pages of docs/, from results/ or as a benchmark prints them.

    python docs/tables.py

fills what stands between a marker and ``<!-- end -->``:
``<!-- table: results/NAME/table.txt -->`` includes a file, ``...:N`` its first N lines;
``<!-- printed: benchmarks/NAME.py ARGUMENTS -->`` includes what that command prints (a few seconds
each). A test holds that the pages are up to date.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- (table|printed): (.*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def main() -> None:
    for page in sorted((ROOT / "docs").rglob("*.md")):
        text = page.read_text()
        filled = MARKED.sub(_filled, text)
        if filled != text:
            page.write_text(filled)
            print(f"{page.relative_to(ROOT)} brought up to date")


def table(source: str) -> str:
    """The lines of a file in results/, or its first ones."""
    path, _, count = source.partition(":")
    lines = (ROOT / path).read_text().rstrip().splitlines()
    return _fenced("\n".join(lines[: int(count)] if count else lines))


def printed(command: str) -> str:
    """What a script of the repository prints; Markdown as it is."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    output = subprocess.run(
        [sys.executable, *command.split()],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.rstrip()
    return output + "\n" if output.lstrip().startswith(("|", "#")) else _fenced(output)


def _fenced(text: str) -> str:
    return f"```text\n{text}\n```\n"


def _filled(match: re.Match[str]) -> str:
    marker, kind, source, _, end = match.groups()
    return marker + (table(source) if kind == "table" else printed(source)) + end


if __name__ == "__main__":
    main()
