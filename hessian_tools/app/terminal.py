"""Lines to whoever runs a command."""

import sys


def say(line: str) -> None:
    """A line on stderr."""
    print(line, file=sys.stderr, flush=True)
