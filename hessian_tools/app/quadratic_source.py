"""The quadratic that ``hessian-tools quadratic`` is asked for: a case, a file, a measured
network."""

import argparse
import json
from fnmatch import fnmatchcase
from pathlib import Path

from hessian_tools.quadratic.cases import CASES, KAPPA_OF_MEASURED, case, from_spectra
from hessian_tools.quadratic.construction import from_blocks
from hessian_tools.quadratic.problems import Quadratic
from hessian_tools.results import load
from hessian_tools.spectra.quadrature import BlockSpectra


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
    if arguments.measured is not None:
        problem = _from_network(arguments)
    elif arguments.blocks:
        raise ValueError("--blocks chooses among the blocks of --from; leave it out")
    elif arguments.source.isdigit():
        problem = _from_case(arguments)
    else:
        problem = _from_file(arguments)
    return problem.to(arguments.device)


def _from_case(arguments: argparse.Namespace) -> Quadratic:
    number = int(arguments.source)
    if number not in CASES:
        raise ValueError(
            f"CASE is {arguments.source}; the cases are 1, 2, 3 and 4, anything else is a file"
        )
    return case(number, kappa=arguments.kappa, seed=arguments.seed, shift=arguments.shift)


def _from_network(arguments: argparse.Namespace) -> Quadratic:
    spectra = _block_spectra(arguments.measured)
    globs = arguments.blocks or ["*"]
    chosen = {name: spectrum for name, spectrum in spectra.items() if _matches(name, globs)}
    if not chosen:
        raise ValueError(f"--blocks {' '.join(globs)} matches none of {', '.join(spectra)}")
    return from_spectra(
        chosen,
        per_block=arguments.per_block,
        kappa=arguments.kappa or KAPPA_OF_MEASURED,
        draw=arguments.draw,
        shift=arguments.shift,
        seed=arguments.seed,
        name=str(arguments.measured),
    )


def _matches(name: str, globs: list[str]) -> bool:
    """Whether ``name``, whose brackets are no glob's, is one of ``globs`` or matches one."""
    return name in globs or any(fnmatchcase(name, glob) for glob in globs)


def _block_spectra(path: Path) -> BlockSpectra:
    """The BlockSpectra in a run's folder or a saved result."""
    try:
        result = load(path / "result" if path.is_dir() else path)
    except FileNotFoundError as error:
        raise ValueError(
            f"--from {path}: there is no such result; give what `hessian-tools js0 --out` wrote"
        ) from error
    spectra = result.get("spectra") if isinstance(result, dict) else result
    if not isinstance(spectra, BlockSpectra):
        raise ValueError(
            f"--from {path} holds no block spectra; give what `hessian-tools js0 --out` wrote"
        )
    return spectra


def _from_file(arguments: argparse.Namespace) -> Quadratic:
    path = Path(arguments.source)
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
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    named = isinstance(content, dict)
    blocks = list(content.values()) if named else content
    if not isinstance(blocks, list) or not all(isinstance(block, list) for block in blocks):
        raise ValueError(
            f"{path} holds no lists of eigenvalues; "
            "write [[1, 2, 3], [99, 100, 101]] or the same by name"
        )
    names = list(content) if named else None
    return from_blocks(blocks, names=names, name=path.stem, seed=arguments.seed)
