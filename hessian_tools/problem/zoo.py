"""Networks by name, ready with a loss and real data.

They are the families of the published JS0 table and small siblings of them. All start at random (no
package carries pretrained weights of these), offline, from ``seed``, which also draws the data.
"""

import difflib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from hessian_tools.problem import data as real_data
from hessian_tools.problem.losses import LossFunction, cross_entropy
from hessian_tools.problem.specs import SPECS, DataKind, ModelSpec

Settings = dict[str, str | int]  # JSON-able


@dataclass(frozen=True)
class ZooModel:
    """A model in eval mode with its loss and batches.

    ``Problem(model, loss_fn, batches, batch_stats=batch_stats)`` takes it.
    """

    model: nn.Module
    loss_fn: LossFunction
    batches: list[real_data.LabelledBatch]
    batch_stats: bool | None
    description: str
    settings: Settings  # every choice as resolved


def names() -> list[str]:
    """Names that :func:`load` takes, full-size models first."""
    return list(SPECS)


def describe() -> list[Settings]:
    """A table row for each model: name, family, parameters, data (the default), description."""
    return [
        {
            "name": spec.name,
            "family": spec.family,
            "parameters": spec.num_parameters(),
            "data": spec.default_data,
            "description": spec.description,
        }
        for spec in SPECS.values()
    ]


def load(
    name: str,
    *,
    seed: int = 0,
    num_examples: int | None = None,
    batch_size: int | None = None,
    context: int | None = None,
    image_size: int | None = None,
    data: str | None = None,
    tokenizer: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ZooModel:
    """A network of the zoo at random initialisation, with mean cross-entropy (nats) on real data.

    Args:
        name: one of :func:`names`.
        seed: decides the weights and the choice of data. The weights are drawn in float32 on the
            CPU, then moved.
        num_examples: sequences or images in all.
        batch_size: sequences or images in a batch; default: all in one.
        context: tokens of a sequence; text models only.
        image_size: side in pixels; image models only.
        data: path of the user's own data, see :func:`hessian_tools.problem.data.text_tokens` and
            ``image_source``; None: the packaged data.
        tokenizer: "bpe" or "byte"; text models only.
        device: where the model and the batches go.
        dtype: floating-point type of the weights and the images.

    Raises:
        ValueError: an unknown name, a value out of range or for the other kind of model, data that
            cannot be read, a device that this machine does not have.
    """
    spec = _spec(name)
    if spec.data is DataKind.IMAGES:
        _refuse_given(spec, context=context, tokenizer=tokenizer)
        given_size = image_size
    else:
        _refuse_given(spec, image_size=image_size)
        given_size = context
    size = spec.size if given_size is None else given_size
    count = spec.num_examples if num_examples is None else num_examples
    knobs = {
        "num_examples": count,
        "batch_size": count if batch_size is None else batch_size,
        "seed": seed,
    }
    device = _usable(device, dtype)
    # Neither the caller's random numbers nor a default device of theirs may change what is drawn.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        drawn = _draw_data(spec, size, data, tokenizer or spec.tokenizer, knobs)
        torch.default_generator.manual_seed(seed)
        model = spec.build(drawn.classes, size)
    batches = []
    for inputs, targets in drawn.batches:
        inputs_dtype = dtype if inputs.is_floating_point() else None
        batches.append((inputs.to(device, inputs_dtype), targets.to(device)))
    settings: Settings = {
        "model": name,
        **knobs,
        **drawn.settings,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
    }
    return ZooModel(
        model=model.to(device, dtype).eval(),
        loss_fn=cross_entropy,
        batches=batches,
        batch_stats=spec.batch_stats,
        description=f"{spec.description}, at random initialisation, on {settings['data']}",
        settings=settings,
    )


class _Drawn(NamedTuple):
    batches: list[real_data.LabelledBatch]
    classes: int  # or tokens of the vocabulary
    settings: Settings


def _spec(name: str) -> ModelSpec:
    if name in SPECS:
        return SPECS[name]
    close = difflib.get_close_matches(str(name), SPECS, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ValueError(f"model {name!r} is not in the zoo; {hint}it has {', '.join(SPECS)}")


def _refuse_given(spec: ModelSpec, **unused: str | int | None) -> None:
    for knob, value in unused.items():
        if value is not None:
            raise ValueError(
                f"{knob} does not apply to {spec.name}, which reads {spec.data}; leave it out"
            )


def _draw_data(
    spec: ModelSpec,
    size: int,
    path: str | None,
    tokenizer: str,
    knobs: dict[str, int],
) -> _Drawn:
    if spec.data is DataKind.IMAGES:
        return _draw_images(spec, size, path, knobs)
    return _draw_text(spec, size, path, tokenizer, knobs)


def _draw_images(spec: ModelSpec, size: int, path: str | None, knobs: dict[str, int]) -> _Drawn:
    source = real_data.image_source(path)
    batches = real_data.image_batches(source, image_size=size, channels=spec.channels, **knobs)
    if size % spec.step:
        raise ValueError(
            f"image_size must be a multiple of {spec.step} for {spec.name}, got {size}"
        )
    return _Drawn(
        batches,
        len(source.classes),
        {"image_size": size, "data": path or source.name},
    )


def _draw_text(
    spec: ModelSpec,
    size: int,
    path: str | None,
    tokenizer: str,
    knobs: dict[str, int],
) -> _Drawn:
    tokens = real_data.text_tokens(tokenizer, path)
    vocabulary = real_data.TOKENIZERS[tokenizer]
    if spec.data is DataKind.TEXT:
        batches = real_data.language_batches(tokens, context=size, **knobs)
    else:
        batches = real_data.masked_language_batches(tokens, vocabulary, context=size, **knobs)
    if spec.longest is not None and size > spec.longest:
        raise ValueError(f"context must be at most {spec.longest} for {spec.name}, got {size}")
    return _Drawn(
        batches,
        vocabulary.size,
        {"context": size, "tokenizer": tokenizer, "data": path or "the packaged plays"},
    )


def _usable(device: torch.device | str, dtype: torch.dtype) -> torch.device:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f"dtype must be a floating torch dtype such as torch.float64, got {dtype!r}"
        )
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device must be one this machine has, such as 'cpu', got {str(device)!r}: {reason}"
        ) from None
