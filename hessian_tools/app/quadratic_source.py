"""The quadratic that ``hessian-tools quadratic`` is asked for: a case, a file, a measured
network."""

import argparse
import json
import math
import re
from collections.abc import Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from hessian_tools.app.terminal import say
from hessian_tools.quadratic.cases import (
    CASES,
    KAPPA_OF_MEASURED,
    case,
    drawn_eigenvalues,
    from_spectra,
)
from hessian_tools.quadratic.construction import from_blocks
from hessian_tools.quadratic.problems import Quadratic
from hessian_tools.results import Json, load
from hessian_tools.spectra.quadrature import Quadrature

PER_BLOCK = 30  # eigenvalues drawn for a block, the paper's
LARGEST = 10_000  # eigenvalues in all: the matrix takes 0.8 GB
LARGEST_KAPPA = 1e12  # beyond it float64 has no digits left for the small eigenvalues
MOST_EIGENVALUES = 300  # of all blocks together unless --per-block says so: minutes, not an hour
ROOM = 10  # each block's own condition number where kappa has to be raised
_FLAT = 1e-6  # of the widest range: about the rounding of float32 products
_SHOWN = 6  # names in a message
_WRITTEN = "give what `hessian-tools js0 --out` or `spectrum --out` wrote"

Spectra = Mapping[str, Quadrature]


def problem_of(arguments: argparse.Namespace) -> Quadratic:
    """The quadratic of CASE, FILE or ``--from``, on its device.

    Raises:
        ValueError: for options that do not go together, or a source that cannot be used.
    """
    if (arguments.source is None) == (arguments.measured is None):
        raise ValueError(
            "give either CASE|FILE or --from RESULT: a case is 1, 2, 3 or 4 "
            "(see hessian-tools quadratic --help)"
        )
    if arguments.kappa is not None and arguments.kappa > LARGEST_KAPPA:
        raise ValueError(
            f"--kappa is {arguments.kappa:g}; float64 can tell eigenvalues apart up to "
            f"{LARGEST_KAPPA:g}"
        )
    if arguments.measured is not None:
        problem = _from_network(arguments)
    elif arguments.blocks:
        raise ValueError("--blocks chooses among the blocks of --from; leave it out")
    elif arguments.per_block is not None:
        raise ValueError("--per-block is of blocks that are drawn from --from; leave it out")
    elif re.fullmatch("[0-9]+", arguments.source):
        problem = _from_case(arguments)
    else:
        problem = _from_file(arguments)
    return problem.to(arguments.device)


def _from_case(arguments: argparse.Namespace) -> Quadratic:
    numbers = {str(number): number for number in CASES}
    if arguments.source not in numbers:
        raise ValueError(
            f"CASE is {arguments.source:.20}; the cases are 1, 2, 3 and 4, anything else is a file"
        )
    number = numbers[arguments.source]
    return case(number, kappa=arguments.kappa, seed=arguments.seed, shift=arguments.shift)


def _from_network(arguments: argparse.Namespace) -> Quadratic:
    spectra = _chosen(_block_spectra(arguments.measured), arguments.blocks)
    per_block = arguments.per_block or _per_block(len(spectra))
    if per_block == 1 and arguments.shift == "blocks":
        raise ValueError(
            "--per-block is 1; a single eigenvalue has no range to be kept: give 2 or more, or "
            "--shift joint"
        )
    if per_block * len(spectra) > LARGEST:
        raise ValueError(
            f"{per_block:,} eigenvalues of each of {len(spectra)} blocks make a matrix of "
            f"{per_block * len(spectra):,} rows, of {LARGEST:,} at most; give a smaller "
            "--per-block, or fewer --blocks"
        )
    drawn = {
        name: drawn_eigenvalues(spectrum, per_block, arguments.draw, arguments.seed, name)
        for name, spectrum in spectra.items()
    }
    ranges = {name: float(np.ptp(values)) for name, values in drawn.items()}
    kappa = arguments.kappa or KAPPA_OF_MEASURED
    if arguments.shift == "blocks":
        ranges = _with_a_range(ranges)
        kappa = _sufficient_kappa(arguments.kappa, ranges)
    return from_spectra(
        {name: spectra[name] for name in ranges},
        per_block=per_block,
        kappa=kappa,
        draw=arguments.draw,
        shift=arguments.shift,
        seed=arguments.seed,
        name=str(arguments.measured),
    )


def _chosen(spectra: Spectra, globs: list[str] | None) -> Spectra:
    """The blocks that ``--blocks`` names, all without it."""
    if globs is None:
        return spectra
    for glob in globs:
        if not any(_matches(name, [glob]) for name in spectra):
            close = get_close_matches(glob, spectra, n=3)
            words = f"; close: {', '.join(close)}" if close else ""
            raise ValueError(f"--blocks {glob} matches none of {_listed(spectra)}{words}")
    return {name: spectrum for name, spectrum in spectra.items() if _matches(name, globs)}


def _matches(name: str, globs: list[str]) -> bool:
    """Whether ``name``, whose brackets are no glob's, is one of ``globs`` or matches one."""
    return name in globs or any(fnmatchcase(name, glob) for glob in globs)


def _listed(names: Mapping[str, object]) -> str:
    """The first few names."""
    first = ", ".join(list(names)[:_SHOWN])
    left = len(names) - _SHOWN
    return f"{first} and {left} more" if left > 0 else first


def _per_block(num_blocks: int) -> int:
    """Eigenvalues a block, so that all together are no more than can be run in minutes."""
    fitting = max(2, min(PER_BLOCK, MOST_EIGENVALUES // num_blocks))
    if fitting < PER_BLOCK:
        say(
            f"note: {fitting} eigenvalues are drawn for each of {num_blocks} blocks, for a run of "
            f"minutes; --per-block {PER_BLOCK} draws as many as the paper"
        )
    return fitting


def _with_a_range(ranges: dict[str, float]) -> dict[str, float]:
    """Without blocks of equal eigenvalues, which no shift and scale can keep."""
    widest = max(ranges.values())
    if widest == 0:
        raise ValueError(
            f"no block of {_listed(ranges)} has two different eigenvalues, so that there is no "
            "range to be scaled; choose other --blocks, or --shift joint"
        )
    flat = {name: width for name, width in ranges.items() if width <= _FLAT * widest}
    if flat:
        say(
            f"note: {len(flat)} of {len(ranges)} blocks are left out, whose eigenvalues are equal "
            f"to {_FLAT:g} of the widest block's range: {_listed(flat)}"
        )
    return {name: width for name, width in ranges.items() if name not in flat}


def _sufficient_kappa(asked: float | None, ranges: dict[str, float]) -> float:
    """A condition number at which every block keeps its scale: KAPPA_OF_MEASURED or above."""
    low, high = min(ranges.values()), max(ranges.values())
    ratio = high / low
    told = f"blocks' ranges of eigenvalues go from {low:.3g} to {high:.3g}"
    if asked is not None:
        if asked > ratio:
            return asked
        raise ValueError(
            f"--kappa {asked:g} is too small: {told}, and blocks keep their scales above "
            f"{ratio:.6g} only; raise it, leave it out, choose fewer --blocks, or --shift joint"
        )
    if ratio < KAPPA_OF_MEASURED:
        return KAPPA_OF_MEASURED
    kappa = _rounded_up(ROOM * ratio)
    say(
        f"note: kappa is {kappa:g} instead of {KAPPA_OF_MEASURED}: {told}, and each block keeps "
        f"its scale, with a condition number of about {ROOM}; --kappa, --blocks or --shift joint "
        "choose otherwise"
    )
    return kappa


def _rounded_up(number: float) -> float:
    """To two digits."""
    digit = 10.0 ** (math.floor(math.log10(number)) - 1)
    return math.ceil(number / digit) * digit


def _block_spectra(path: Path) -> Spectra:
    """The blocks' spectra in a run's folder or a saved result."""
    result = _loaded(path)
    found = result.get("spectra", result) if isinstance(result, dict) else result
    found = getattr(found, "spectra", found)  # of an adaptive run
    if isinstance(found, Mapping) and found and _are_spectra(found):
        return found
    held = f"a {type(result).__name__}"
    if isinstance(result, dict):
        held = f"{', '.join(map(str, result))}" or "nothing"
    raise ValueError(f"--from {path} holds no block spectra but {held:.100}; {_WRITTEN}")


def _are_spectra(found: Mapping[str, Json]) -> bool:
    return all(isinstance(spectrum, Quadrature) for spectrum in found.values())


def _loaded(path: Path) -> Json:
    file = path / "result.json" if path.is_dir() else path
    stem = file.with_suffix("") if file.suffix in (".json", ".npz") else file
    file = stem.with_name(f"{stem.name}.json")
    if not file.is_file():
        raise ValueError(f"--from {path}: there is no such result{_nearby(path)}; {_WRITTEN}")
    try:
        if isinstance(json.loads(file.read_bytes()), list):
            raise ValueError("it is a list; a file of eigenvalues is given without --from")
        return load(file)
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"--from {path}: {error}") from error


def _nearby(path: Path) -> str:
    """What is there instead of a result."""
    if (path / "blocks.jsonl").exists():
        return " yet, its run is not finished: the same command with this --out goes on"
    inside = sorted(path.glob("*/result.json"))
    if inside:
        return f", but in {_listed({str(file.parent): file for file in inside})}"
    return ""


def _from_file(arguments: argparse.Namespace) -> Quadratic:
    path = Path(arguments.source)
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder; --from {path} takes that of a run, and FILE is JSON with "
            "eigenvalues by block"
        )
    if not path.is_file():
        raise ValueError(
            f"there is no file {str(path)!r}; "
            "give 1, 2, 3, 4 or a JSON file of eigenvalues by block"
        )
    if arguments.kappa is not None:
        raise ValueError(
            "--kappa does not apply to a file, whose eigenvalues are taken as they are; "
            "leave it out"
        )
    content = _eigenvalues(path)
    names = list(content) if isinstance(content, dict) else None
    blocks = list(content.values()) if isinstance(content, dict) else content
    values = [[_as_float(value) for value in block] for block in blocks]
    return from_blocks(values, names=names, name=path.stem, seed=arguments.seed)


def _eigenvalues(path: Path) -> list[list[float]] | dict[str, list[float]]:
    """What a JSON file of eigenvalues holds."""
    try:
        content: Json = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if isinstance(content, dict) and "arrays_sha256" in content:
        raise ValueError(f"{path} is a saved result, not a list of eigenvalues; give --from {path}")
    blocks = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(blocks, list) or not blocks or not all(map(_is_numbers, blocks)):
        raise ValueError(
            f"{path} holds no lists of eigenvalues; "
            "write [[1, 2, 3], [99, 100, 101]] or the same by name"
        )
    numbers: list[list[float]] | dict[str, list[float]] = content
    return numbers


def _is_numbers(block: Json) -> bool:
    return isinstance(block, list) and all(type(value) in (int, float) for value in block)


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of more than 308 digits
        return math.inf
