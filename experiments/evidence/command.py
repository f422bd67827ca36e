"""What the commands of this experiment share: which pairs, and how many processes.

Held-out families are left alone unless --held-out names them.
"""

import argparse
import fnmatch
import multiprocessing
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from evidence import FAMILIES, HELD_OUT, INTERVENTIONS, SUITE, Pair
from evidence.tuning import use_one_thread
from hessian_tools.results import Json


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--pairs", nargs="+", metavar="GLOB", help="such as 'mlp/*' (default: all)")
    add("--families", nargs="+", metavar="FAMILY", help="(default: all that are not held out)")
    add("--held-out", action="store_true", help="the held-out families, and only these")
    add("--interventions", action="store_true", help="these in place of the suite")
    add("--workers", type=int, default=1, metavar="N", help="processes, a thread each (default: 1)")


def selected(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Pair]:
    """The pairs that the options name, in the order of the suite."""
    if options.workers < 1:
        parser.error(f"--workers must be at least 1, got {options.workers}")
    if options.interventions:
        return _matching(INTERVENTIONS.values(), options.pairs)
    unknown = set(options.families or ()) - set(FAMILIES)
    if unknown:
        parser.error(f"no family is named {', '.join(sorted(unknown))}; {', '.join(FAMILIES)} are")
    found = [
        pair
        for pair in _matching(SUITE.values(), options.pairs)
        if (pair.family in HELD_OUT) == options.held_out
        and pair.family in (options.families or FAMILIES)
    ]
    if not found:
        parser.error(
            f"no pair is left of {len(SUITE)}; held out, and asked for by --held-out, are "
            f"{', '.join(sorted(HELD_OUT))}"
        )
    return found


def _matching(pairs: Iterable[Pair], globs: Sequence[str] | None) -> list[Pair]:
    return [
        pair for pair in pairs if any(fnmatch.fnmatch(pair.name, glob) for glob in globs or "*")
    ]


def done(
    job: Callable[..., Json],
    arguments: Sequence[tuple[object, ...]],
    workers: int,
) -> Iterator[tuple[tuple[object, ...], Json, str]]:
    """(arguments, result, error) of ``job(*arguments)``, as they come; an error stops no other."""
    if workers == 1:
        use_one_thread()
        for given in arguments:
            yield given, *_tried(job, given)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=use_one_thread) as pool:
        futures = {pool.submit(_tried, job, given): given for given in arguments}
        for future in as_completed(futures):
            yield futures[future], *future.result()


def _tried(job: Callable[..., Json], given: tuple[object, ...]) -> tuple[Json, str]:
    try:
        return job(*given), ""
    except Exception as error:  # whatever a pair does, the others go on
        where = traceback.extract_tb(error.__traceback__)[-1]
        return None, f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
