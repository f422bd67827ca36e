"""The decoders, and the text they are trained on.

The text is coded by the first 2,048 tokens of the packaged byte-level BPE: with its 8,192, a
decoder of a million parameters would be all embedding.

Letters: n tokens of a text.
"""

import gzip
import importlib.resources
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

import hessian_tools as ht
from hessian_tools.problem.networks import NanoGPT
from hessian_tools.training.sources import Text
from hessian_tools.training.stream import Stream

VOCABULARY = 2048
CONTEXT = 128


class Size(NamedTuple):
    layers: int
    d: int
    heads: int
    steps: int
    momentum_steps: int  # of the runs that sweep momenta too


class Variant(NamedTuple):
    """With both it is the "standard" setting of arXiv 2407.07972."""

    qk_norm: bool
    z_loss: float


SIZES = {
    "1M": Size(layers=3, d=128, heads=4, steps=1000, momentum_steps=400),
    "6M": Size(layers=6, d=256, heads=8, steps=500, momentum_steps=200),
}
VARIANTS = {"standard": Variant(True, 1e-4), "plain": Variant(False, 0.0)}


def decoder(size: str, variant: str, seed: int) -> NanoGPT:
    """Untied, so that the last layer has second moments of its own."""
    torch.manual_seed(seed)
    shape = SIZES[size]
    return NanoGPT(
        VOCABULARY,
        CONTEXT,
        shape.layers,
        shape.d,
        shape.heads,
        tied=False,
        qk_norm=VARIANTS[variant].qk_norm,
    )


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def tokenizer() -> Tokenizer:
    """The packaged BPE without the merges that make a token of number 2,048 or more."""
    folder = importlib.resources.files("hessian_tools") / "assets"
    spec = json.loads(gzip.decompress((folder / "bpe8192.json.gz").read_bytes()))
    vocabulary = spec["model"]["vocab"].items()
    kept = {token: number for token, number in vocabulary if number < VOCABULARY}
    spec["model"]["vocab"] = kept
    spec["model"]["merges"] = [
        [left, right] for left, right in spec["model"]["merges"] if left + right in kept
    ]
    made = Tokenizer.from_str(json.dumps(spec))
    made.encode_special_tokens = True  # "<mask>" written in a text is text
    return made


def tokens_of(
    texts: Sequence[Path],
    cache: Path,
    first: int | None = None,
) -> Tensor:
    """(n,) int64 of all texts, or the ``first`` of them; kept in the file ``cache``.

    Half a page of one text follows half a page of the next, so that what is held out, the last
    tenth, is of all of them.
    """
    if not cache.exists():
        coded = [tokenizer().encode(path.read_text("utf-8")).ids for path in texts]
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.save(cache, np.array(interleaved(coded)[:first], np.int16))
    return torch.from_numpy(np.load(cache).astype(np.int64))


def interleaved(texts: Sequence[Sequence[int]], piece: int = 1024) -> list[int]:
    """Pieces of the texts in turn, each text's spread evenly over the whole."""
    places = [
        ((start + piece / 2) / len(text), number, start)
        for number, text in enumerate(texts)
        for start in range(0, len(text), piece)
    ]
    mixed: list[int] = []
    for _, number, start in sorted(places):
        mixed += texts[number][start : start + piece]
    return mixed


def stream(tokens: Tensor, batch_size: int, device: str) -> Stream:
    source = Text(tokens, CONTEXT)
    described = f"{source.size} windows of {CONTEXT} tokens"
    return Stream(source, batch_size, ht.cross_entropy, device=device, described=described)
