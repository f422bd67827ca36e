"""``hessian-tools race``: optimizers on your own model and data, each at its best rate."""

import argparse
import contextlib
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from hessian_tools.app.models.saved_problem import stream_from_folder
from hessian_tools.app.options import (
    BATCH_STATS,
    COUNT,
    DTYPES,
    FORMAT,
    add_machine_options,
    add_model_options,
    folder_options,
    is_folder,
    is_users,
    load_problem,
    positive,
)
from hessian_tools.app.run_folder import RunFolder
from hessian_tools.app.terminal import say
from hessian_tools.optimizers.named import OPTIMIZERS
from hessian_tools.problem.problem import Problem
from hessian_tools.results import Journal, JsonObject, write_atomically
from hessian_tools.training.budget import Budget, budget_of
from hessian_tools.training.race_report import race_table, race_text, summary
from hessian_tools.training.races import Race, race
from hessian_tools.training.runs import MakeModel
from hessian_tools.training.schedule import SCHEDULES
from hessian_tools.training.stream import (
    BATCH_SIZE,
    TEXT_BATCH_SIZE,
    Stream,
    problem_stream,
    zoo_stream,
)
from hessian_tools.training.z_loss import ZLoss

# of all options, those that the numbers depend on besides network and data
_KNOBS = (
    "command",
    "optimizers",
    "batch_sizes",
    "seeds",
    "seed",
    "schedule",
    "clip",
    "z_loss",
)
# those that are made of a model alone
RACERS = [name for name in OPTIMIZERS if name not in ("blockwise_adam", "blockwise_sgd")]
_DEFAULT = ["sgd", "adam"]


def add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    epilog: str,
) -> None:
    """Adds the subcommand."""
    command = commands.add_parser(
        "race",
        help="a short tuned race of optimizers on your model and data",
        description=(
            "Trains the model with every optimizer on the same batches, finds each one's best "
            "learning rate by successive halving, and compares what they come to. Rates, betas, "
            "warm-up, cosine and clipping are those of arXiv 2407.07972 unless given."
        ),
        epilog=epilog,
    )
    group = command.add_argument_group("network and data").add_argument
    add_model_options(group)
    add_machine_options(group)
    _add_race(command.add_argument_group("race"))
    _add_output(command.add_argument_group("output"))
    command.set_defaults(run=run, num_examples=None, batch_size=None)


def _add_race(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--optimizers",
        nargs="+",
        choices=RACERS,
        metavar="NAME",
        default=_DEFAULT,
        help=f"of {', '.join(RACERS)} (default: {' '.join(_DEFAULT)})",
    )
    add(
        "--budget",
        type=_budget,
        default="5min",
        metavar="TIME|STEPS",
        help="90s, 5min, 1h: of the whole race, about; 500steps: of the longest runs, those of the "
        "last round (default: 5min)",
    )
    add(
        "--batch-sizes",
        nargs="+",
        **COUNT,
        help="each in a race of its own, to see where the order changes (default: "
        f"{BATCH_SIZE} images or {TEXT_BATCH_SIZE} sequences, your own batches' size for yours)",
    )
    add(
        "--seeds",
        **COUNT,
        default=1,
        help="of initialisation and order of the data, N of them from --seed on, for the best two "
        "rates of an optimizer (default: 1)",
    )
    add(
        "--schedule",
        choices=list(SCHEDULES),
        default="cosine",
        help="of the rate; cosine and linear warm up over 10 %% of the steps (default: cosine)",
    )
    add(
        "--clip",
        type=positive,
        default=1.0,
        metavar="NORM",
        help="the gradient's largest norm (default: 1)",
    )
    add(
        "--z-loss",
        type=positive,
        default=0.0,
        metavar="WEIGHT",
        help="of the squared log of the softmax's normaliser; paper: 1e-4 (default: none)",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for config.json, result.json, result.npz, table.txt and pictures; the same "
        "command with the same folder resumes an interrupted race (default: nothing is saved)",
    )
    add("--json", action="store_true", help="print JSON on stdout (default: a table)")
    add("--format", **FORMAT)


def run(arguments: argparse.Namespace) -> None:
    """The command."""
    # what a model of the user's prints is no result
    with contextlib.redirect_stdout(sys.stderr):
        problem, identity = load_problem(arguments, arguments.model)
        stream = _stream(arguments, problem)
        if arguments.z_loss:
            ZLoss(stream.loss_fn, arguments.z_loss)  # refuses what it cannot serve
        make_model = _model_maker(arguments, problem)
        folder = None
        if arguments.out:
            config = _config(arguments, identity, stream)
            folder = RunFolder(arguments.out, config, {"repeat": arguments.line})
        result = _kept_or_run(arguments, stream, make_model, folder)
        label = f"{arguments.model} ({problem.num_parameters:,} parameters, {stream.described})"
        took = f"runs took {result.seconds:.0f} s"
        text = f"{label}; {took}\n{race_table(result)}\n\n{race_text(result)}"
        if folder:
            write_atomically(folder.path / "table.txt", f"{text}\n".encode())
            _draw(folder, result, label, arguments.format)
    print(json.dumps(summary(result), indent=1) if arguments.json else text)


def _budget(text: str) -> Budget:
    try:
        return budget_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _stream(arguments: argparse.Namespace, problem: Problem) -> Stream:
    """All the data of a model of the zoo or of a folder; a Problem's own batches for a file's."""
    if is_users(arguments.model):
        return problem_stream(problem)
    if is_folder(arguments.model):
        return stream_from_folder(arguments.model, **folder_options(arguments, arguments.model))
    return zoo_stream(
        arguments.model,
        context=arguments.context,
        image_size=arguments.image_size,
        data=arguments.data,
        tokenizer=arguments.tokenizer,
        batch_stats=BATCH_STATS[arguments.batch_stats],
        device=arguments.device or "cpu",
        dtype=DTYPES.get(arguments.dtype) or torch.float32,
    )


def _model_maker(arguments: argparse.Namespace, problem: Problem) -> MakeModel:
    """Fresh models by seed; each is built once and then copied."""
    built: dict[int, nn.Module] = {arguments.seed: problem.model}

    def make_model(seed: int) -> nn.Module:
        if seed not in built:
            again = argparse.Namespace(**{**vars(arguments), "seed": seed})
            built[seed] = load_problem(again, arguments.model)[0].model
        return copy.deepcopy(built[seed])

    return make_model


def _config(arguments: argparse.Namespace, identity: JsonObject, stream: Stream) -> JsonObject:
    """What the numbers depend on."""
    knobs = {knob: getattr(arguments, knob) for knob in _KNOBS}
    knobs |= {"budget": str(arguments.budget), "stream": stream.described}
    return {**identity, **knobs}


def _kept_or_run(
    arguments: argparse.Namespace,
    stream: Stream,
    make_model: MakeModel,
    folder: RunFolder | None,
) -> Race:
    if folder is None:
        return _run(arguments, stream, make_model)
    if folder.result:
        say(f"{arguments.model}: finished before, nothing is run")
        kept: Race = folder.result["race"]
        return kept
    checkpoint = folder.path / "training.pt"
    result = _run(arguments, stream, make_model, folder.journal, checkpoint)
    folder.finish({"race": result})
    return result


def _run(
    arguments: argparse.Namespace,
    stream: Stream,
    make_model: Callable[[int], nn.Module],
    journal: Journal | None = None,
    checkpoint: Path | None = None,
) -> Race:
    first = arguments.seed
    return race(
        make_model,
        stream,
        arguments.optimizers,
        budget=arguments.budget,
        batch_sizes=arguments.batch_sizes,
        seeds=range(first, first + arguments.seeds),
        schedule=SCHEDULES[arguments.schedule],
        clip=arguments.clip,
        z_loss=arguments.z_loss,
        journal=journal,
        checkpoint=checkpoint,
        progress=True,
        say=say,
    )


def _draw(folder: RunFolder, result: Race, title: str, kind: str) -> None:
    # matplotlib takes seconds to import
    from hessian_tools.plots import training as plots

    pictures = plots.draw(folder.path, result, title, kind)
    say(f"saved: {folder.path / 'result.json'}, {', '.join(map(str, pictures))}")
