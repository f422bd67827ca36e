"""Random probe vectors that depend on (seed, block name, probe index) and on nothing else.

Every probe has a random stream of its own, keyed by these three. So a seed gives the same probes on
every device, in every dtype and for every grouping of blocks, and asking for more probes keeps the
first ones.

Shapes: n entries of the block, k probes.
"""

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PROBE_KINDS = ("rademacher", "gaussian")


def draw_probes(
    kind: str,
    seed: int,
    name: str,
    num_probes: int,
    size: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The first ``num_probes`` probes of block ``name``, (k, n), not normalised.

    Entries have variance 1: "rademacher" ones are +-1 (Hutchinson 1990: the least variance of v'Av
    among independent entries), "gaussian" ones N(0, 1). Both are drawn in at most float32 and are
    exact in wider types, so float32 and float64 runs see the same vectors. One probe at a time is
    held on the host (1 byte an entry for Rademacher, 4 for Gaussian).

    Raises:
        ValueError: for an unknown ``kind`` or counts below 1.
    """
    if kind not in PROBE_KINDS:
        allowed = " and ".join(map(repr, PROBE_KINDS))
        raise ValueError(f"probes is {kind!r}; allowed are {allowed}")
    if num_probes < 1 or size < 1:
        raise ValueError(f"num_probes is {num_probes} and size {size}; both must be at least 1")
    draw = _signs if kind == "rademacher" else _normals
    probes = torch.empty(num_probes, size, dtype=dtype, device=device)
    for index in range(num_probes):
        entries = draw(keyed_stream(seed, name, index), size)
        probes[index] = torch.from_numpy(entries).to(device)
    return probes


def keyed_stream(*keys: object) -> np.random.Philox:
    """The random bits that belong to ``keys`` (as they print), the same on every machine.

    One counter-based stream a key, Philox 4x64 (Salmon et al., SC 2011), whose key is the BLAKE2
    digest of ``keys``: streams of different keys are independent, and none depends on what else is
    drawn.
    """
    text = "\0".join(map(str, keys))
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little"))


def _signs(stream: np.random.Philox, size: int) -> NDArray[np.int8]:
    """(n,) int8 entries +-1, one raw bit each."""
    raw = stream.random_raw(-(-size // 64)).astype("<u8", copy=False).view(np.uint8)
    bits = np.unpackbits(raw, count=size).view(np.int8)
    bits *= 2
    bits -= 1
    return bits


def _normals(stream: np.random.Philox, size: int) -> NDArray[np.float32]:
    """(n,) float32 entries N(0, 1)."""
    return np.random.Generator(stream).standard_normal(size, np.float32)
