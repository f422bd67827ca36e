"""The examples of a saved model: the user's text or images, as its own tokenizer or processor has
them.

Letters: n examples, t tokens.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessian_tools.app.models.saved_model import (
    CAUSAL,
    IMAGES,
    LOCAL,
    MASKED,
    SavedModel,
    first_line,
    library,
    quiet,
)
from hessian_tools.problem.batches import Batch
from hessian_tools.problem.data import Vocabulary, image_source, masked, text_of

CONTEXT = 64  # tokens, where neither the user nor the model says fewer
TOKENIZERS = ("tokenizer.*", "vocab.*", "merges.txt", "*.model")  # files that hold one
_SEED = 0  # of the masks, which belong to the windows


@dataclass(frozen=True)
class Samples:
    """All examples there are, made when asked for by number."""

    size: int
    made: Callable[[Sequence[int]], Batch]  # dicts with labels
    described: str


def samples(saved: SavedModel, data: str | None, context: int | None) -> Samples:
    """The examples that ``data`` holds for a saved model.

    Text is cut into windows of ``context`` tokens that do not overlap. For classes of sequences,
    ``data`` is a text file of lines "LABEL<tab>TEXT"; for images, as for the zoo.

    Raises:
        ValueError: data, tokenizer or processor that are missing or do not fit the model.
    """
    if saved.task == IMAGES:
        if context is not None:
            raise ValueError(f"--context {context} does not apply to a model of images")
        return _images(saved, data)
    tokens = _context(saved, context)
    if saved.task in (CAUSAL, MASKED):
        return _windows(saved, data, tokens)
    return _sequences(saved, data, tokens)


def _context(saved: SavedModel, asked: int | None) -> int:
    longest = saved.longest
    if asked is not None and longest is not None and asked > longest:
        raise ValueError(
            f"--context is {asked}, and the model has positions for {longest} tokens; ask for fewer"
        )
    return asked or min(CONTEXT, longest or CONTEXT)


def _windows(saved: SavedModel, data: str | None, context: int) -> Samples:
    tokenizer = _tokenizer(saved)
    with quiet():  # a text is longer than the model's context, which is no mistake here
        numbers = tokenizer(text_of(data), add_special_tokens=False)["input_ids"]
    _check_vocabulary(saved, numbers)
    if len(numbers) < context:
        raise ValueError(
            f"--data holds {len(numbers)} tokens, fewer than one window of {context}; give a "
            "longer text or a smaller --context"
        )
    windows = torch.tensor(numbers, dtype=torch.int64).unfold(0, context, context)
    described = f"{len(windows)} windows of {context} tokens of {data or 'the packaged plays'}"
    if saved.task == CAUSAL:
        return Samples(len(windows), lambda n: _labelled(windows[n], windows[n]), described)
    if tokenizer.mask_token_id is None:
        raise ValueError(
            f"{saved.architecture} predicts masked tokens, and its tokenizer has no mask token; "
            "save the tokenizer that it was trained with"
        )
    _check_vocabulary(saved, [tokenizer.mask_token_id])
    size = min(len(tokenizer), saved.config.vocab_size)  # what takes another token's place
    vocabulary = Vocabulary(size, tokenizer.mask_token_id)
    generator = torch.Generator().manual_seed(_SEED)
    uniform = torch.rand(len(windows), 3, context, generator=generator)
    inputs, targets = masked(windows, vocabulary, uniform)
    return Samples(len(windows), lambda n: _labelled(inputs[n], targets[n]), described)


def _labelled(inputs: Tensor, labels: Tensor) -> Batch:
    return {"input_ids": inputs, "labels": labels}


def _check_vocabulary(saved: SavedModel, numbers: Sequence[int]) -> None:
    size = getattr(saved.config, "vocab_size", None)
    if numbers and isinstance(size, int) and max(numbers) >= size:
        raise ValueError(
            f"its tokenizer gives token {max(numbers)}, and the model has {size}; save the "
            "tokenizer that the model was trained with"
        )


def _sequences(saved: SavedModel, data: str | None, context: int) -> Samples:
    if data is None:
        raise ValueError(
            f"{saved.architecture} needs labelled texts: give --data FILE, whose lines are "
            "LABEL<tab>TEXT"
        )
    tokenizer = _tokenizer(saved)
    pairs = [_parted(saved, number, line) for number, line in _lines(data)]
    if not pairs:
        raise ValueError(f"--data {data} is empty; its lines must be LABEL<tab>TEXT")
    labels, texts = zip(*pairs, strict=True)
    padding = "max_length" if tokenizer.pad_token_id is not None else False
    if not padding and len(texts) > 1:
        raise ValueError(
            "its tokenizer has no padding token, so that texts cannot share a batch; set "
            "tokenizer.pad_token and model.config.pad_token_id, and save both again"
        )
    made = tokenizer(list(texts), padding=padding, truncation=True, max_length=context)
    columns = {name: torch.tensor(values) for name, values in made.items()}
    columns["labels"] = torch.tensor(labels)
    described = f"{len(texts)} texts of {data}"
    return Samples(len(texts), lambda n: {k: v[n] for k, v in columns.items()}, described)


def _lines(data: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text_of(data).splitlines(), start=1):
        if line.strip():
            yield number, line


def _parted(saved: SavedModel, number: int, line: str) -> tuple[int | float, str]:
    """The label of a line and its text."""
    label, tab, text = line.partition("\t")
    known = {str(name): value for name, value in saved.config.label2id.items()}
    if tab and saved.config.num_labels == 1:
        with contextlib.suppress(ValueError):
            return float(label), text
    if tab and label in known:
        return known[label], text
    if tab and label.isdecimal() and int(label) < saved.config.num_labels:
        return int(label), text
    allowed = "a number" if saved.config.num_labels == 1 else " or ".join([*known][:6])
    raise ValueError(
        f"line {number} of --data is {line[:40]!r}; it must be LABEL<tab>TEXT with {allowed} as "
        "label"
    )


def _images(saved: SavedModel, data: str | None) -> Samples:
    processor = _part(saved, "AutoImageProcessor", "preprocessor_config.json", "image processor")
    source = image_source(data)
    classes = len(source.classes)
    if classes > saved.config.num_labels:
        raise ValueError(
            f"--data has {classes} classes, and the model {saved.config.num_labels}; give images "
            "of its classes, in their order"
        )

    def made(numbers: Sequence[int]) -> Batch:
        pixels, labels = zip(*map(source.read, numbers), strict=True)
        batch = dict(processor(images=[p.copy() for p in pixels], return_tensors="pt"))
        return batch | {"labels": torch.tensor(labels)}

    return Samples(source.size, made, f"{source.size} images of {source.name}")


def _tokenizer(saved: SavedModel) -> Any:
    missing = ValueError(
        "no tokenizer is in it; save the one that the model was trained with into the same "
        "folder, with tokenizer.save_pretrained"
    )
    files = [file for pattern in TOKENIZERS for file in saved.folder.glob(pattern)]
    if files or "gguf_file" in saved.source:
        return _part(saved, "AutoTokenizer", "tokenizer.json", "tokenizer")
    if not (saved.folder / "tokenizer_config.json").is_file():
        raise missing
    found = _part(saved, "AutoTokenizer", "tokenizer.json", "tokenizer")
    # without their files, some classes make an empty tokenizer and say nothing; those of bytes
    # have none
    if found.vocab_files_names:
        raise missing
    return found


def _part(saved: SavedModel, kind: str, file: str, what: str) -> Any:
    """What is saved beside the weights; of transformers, whose classes differ."""
    gguf = {key: value for key, value in saved.source.items() if key == "gguf_file"}
    try:
        with quiet():
            return getattr(library(), kind).from_pretrained(saved.folder, **LOCAL, **gguf)
    except Exception as error:  # each has errors of its own
        raise ValueError(
            f"its {what} cannot be read ({first_line(error)}); save it into the same folder with "
            f"{what.split()[-1]}.save_pretrained, which writes {file}"
        ) from error
