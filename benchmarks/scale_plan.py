"""JS0 by block of 7 B, 70 B and 1 T networks on 1 to 1,024 devices, on paper.

Operations and the bytes of a recorded graph are counted on two and three layers at full width, as
meta tensors (:mod:`gpu_plan`): more layers add the same. Nothing is computed, no device is needed.
Rates are planned, not measured: --rate is what products reach, --near and --far what a device
receives.

The plan: a group of devices, the fewest that hold it, shares one copy of the float32 weights and
gathers them matrix by matrix, every device with a sequence of its own; groups share the blocks and
do not talk. Each layer's graph is made again for each block and step, as many probes at once as
fit, so that a device keeps what goes in and out of layers and one layer's graph. What takes longer,
computing or receiving, sets the time. A group has at least one sequence a device.

`python benchmarks/scale_plan.py [--smoke]` prints the tables of docs/concepts/scale.md and writes
them to results/scale_plan/table.txt.
"""

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from gpu_plan import Plan, counted
from torch import Tensor, nn

from hessian_tools.app.report import table
from hessian_tools.curvature.engine.memory import format_bytes
from hessian_tools.problem.vision import repair
from hessian_tools.results import write_atomically

OUT = Path("results/scale_plan/table.txt")

BYTES = 4  # of a number: float32, multiplied in TF32
DEVICES = (1, 8, 64, 256, 1024)
NODE = 8  # devices that are near each other
USABLE = 0.9  # of a device's memory
WORK_VECTORS = 5  # of a probe, beside its basis


class Shape(NamedTuple):
    """A decoder, and the sequences that a device holds."""

    name: str
    source: str
    layers: int
    width: int
    mlp: int
    heads: int
    key_heads: int
    vocabulary: int
    gated: bool
    context: int = 2048


SHAPES = (
    Shape("7 B", "Llama 2, arXiv 2307.09288", 32, 4096, 11008, 32, 32, 32000, True),
    Shape("70 B", "Llama 2, arXiv 2307.09288", 80, 8192, 28672, 64, 8, 32000, True),
    Shape("1 T", "Megatron-LM, arXiv 2104.04473", 128, 25600, 102400, 160, 160, 51200, False, 512),
)
SMOKE_SHAPES = (Shape("small", "none", 3, 32, 88, 2, 2, 64, True, 16),)


class Asked(NamedTuple):
    """What is computed of every block."""

    name: str
    probes: int
    steps: int


ASKED = (Asked("scale and curvature", 4, 2), Asked("spectra, as published", 10, 100))


class Rates(NamedTuple):
    """A device: operations and received bytes a second, bytes of memory."""

    compute: float
    near: float
    far: float
    memory: float


def model_of(shape: Shape, layers: int) -> nn.Module:
    """On meta, with ``layers`` layers."""
    repair()
    import transformers

    common = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.mlp,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": False,
        "use_cache": True,  # without, transformers reads a value of its mask, which meta has not
    }
    if shape.gated:
        config = transformers.LlamaConfig(**common, num_key_value_heads=shape.key_heads)
        kind = transformers.LlamaForCausalLM
    else:  # a plain decoder: two matrices in an MLP, biases
        config = transformers.GPTNeoXConfig(**common)
        kind = transformers.GPTNeoXForCausalLM
    with torch.device("meta"):
        made: nn.Module = kind._from_config(config).eval()
    return made


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


class Layout(NamedTuple):
    """Devices that share one copy of the weights, and probes that go through at once."""

    group: int
    rows: int


@dataclass(frozen=True)
class Counts:
    """One sequence through a network of L layers; operations, bytes and entries.

    Attributes:
        layer: operations of a layer's forward pass; head: of all outside layers.
        layer_size, outside: entries of a layer's parameters, and of all others.
        blocks: of a layer, with those of q, k and v apart.
        product: operations of one probe's product, mean over a block in layer 0 and in the last.
        graph: bytes that one layer's graph keeps for second derivatives.
    """

    shape: Shape
    layer: float
    head: float
    layer_size: int
    outside: int
    blocks: int
    products: tuple[float, float]
    graph: float

    @property
    def parameters(self) -> int:
        return self.shape.layers * self.layer_size + self.outside

    @property
    def num_blocks(self) -> int:
        return self.shape.layers * self.blocks + 2

    @property
    def forward(self) -> float:
        return self.shape.layers * self.layer + self.head

    @property
    def mean_product(self) -> float:
        """Of one probe and sequence: it grows evenly from the last layer to the first."""
        return sum(self.products) / 2

    @property
    def mean_graph_pass(self) -> float:
        """Operations of the graph of all layers from a block on, made again: forward, backward."""
        return 3 * (self.shape.layers / 2 * self.layer + self.head)

    def operations(self, asked: Asked, layout: Layout) -> float:
        """Of a sequence and all blocks."""
        made = math.ceil(asked.probes / layout.rows) * self.mean_graph_pass
        return self.num_blocks * asked.steps * (made + asked.probes * self.mean_product)

    def received(self, asked: Asked, layout: Layout) -> float:
        """Bytes of a device for all blocks and one sequence.

        The layers from a block on are gathered four times: forward, backward, and both again for
        the second derivative; the product of a block, of all probes, is summed over devices.
        """
        gathered = 4 * (self.shape.layers / 2 * self.layer_size + self.outside) * BYTES
        summed = 2 * asked.probes * self.layer_size / self.blocks * BYTES
        a_step = math.ceil(asked.probes / layout.rows) * gathered + summed
        elsewhere = (layout.group - 1) / layout.group
        return self.num_blocks * asked.steps * a_step * elsewhere

    def memory(self, asked: Asked, layout: Layout) -> float:
        """Bytes of a device."""
        group, rows = layout
        largest = self.shape.width * max(self.shape.mlp, self.shape.vocabulary)
        weights = (self.parameters / group + 2 * largest) * BYTES  # one used, the next one coming
        kept = self.shape.layers * self.shape.context * self.shape.width * BYTES
        # the states between layers, of the gradient and of each probe, and one layer's graph
        states = (2 + 2 * rows) * kept + (1 + rows) * self.graph
        vectors = rows * (asked.steps + WORK_VECTORS) * largest * BYTES
        return weights + states + vectors / group

    def layout(self, asked: Asked, memory: float) -> Layout:
        """The fewest devices, a power of two, that hold one copy; then as many probes as fit."""
        for power in range(20):
            layouts = [Layout(2**power, rows) for rows in range(asked.probes, 0, -1)]
            fitting = (some for some in layouts if self.memory(asked, some) <= USABLE * memory)
            if found := next(fitting, None):
                return found
        raise ValueError(f"{self.shape.name}: one layer does not fit a device; give it more memory")

    def hours(self, asked: Asked, rates: Rates, devices: int, sequences: int) -> float | None:
        """On ``devices``; None where they do not hold one copy."""
        layout = self.layout(asked, rates.memory)
        if devices < layout.group:
            return None
        computing = self.operations(asked, layout) * sequences / (devices * rates.compute)
        link = rates.near if layout.group <= NODE else rates.far
        receiving = self.received(asked, layout) * sequences / (devices * link)
        return max(computing, receiving) / 3600


def counts_of(shape: Shape) -> Counts:
    """From networks of two and of three layers at full width: all is linear in the layers."""
    two, three = (_plan(shape, layers) for layers in (2, 3))
    layer = three.forward_operations - two.forward_operations
    layer_size = three.parameters - two.parameters
    first, last = (_mean_product(three, number) for number in (0, 2))
    grows = (first - last) / 2
    return Counts(
        shape,
        layer,
        two.forward_operations - 2 * layer,
        layer_size,
        two.parameters - 2 * layer_size,
        7 if shape.gated else 6,
        (last + (shape.layers - 1) * grows, last),
        # the plan has the gradients of all blocks in it, a product needs one of them
        three.graph_bytes - two.graph_bytes - layer_size * BYTES,
    )


def _plan(shape: Shape, layers: int) -> Plan:
    model = model_of(shape, layers)
    tokens = torch.zeros(1, shape.context, dtype=torch.int64, device="meta")
    fused = {name: 3 for name, p in model.named_parameters() if "query_key_value.weight" in name}
    blocks = {
        name: fused.get(name, 1)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and "layers." in name
    }
    return counted(model, loss, tokens, blocks, probes=1, steps=1)


def _mean_product(plan: Plan, layer: int) -> float:
    chosen = [cost for cost in plan.costs if f"layers.{layer}." in cost.name]
    return sum(c.blocks * c.operations for c in chosen) / sum(c.blocks for c in chosen)


# ------------------------------------------------------------------------------------- the tables


def counts_table(found: Iterable[Counts]) -> str:
    header = ("shape", "parameters", "blocks", "tokens", "F", "a product", "differences")
    rows = [
        [
            counts.shape.name,
            f"{counts.parameters / 1e9:,.1f} B",
            f"{counts.num_blocks:,}",
            f"{counts.shape.context:,}",
            f"{counts.forward / 1e12:,.3g} TFLOP",
            f"{counts.mean_product / counts.forward:.2f} F",
            f"{_differences(counts):.2f} F",
        ]
        for counts in found
    ]
    return table(header, rows)


def _differences(counts: Counts) -> float:
    """A block's product by central differences, in F: two forward passes, two backward passes."""
    backward = counts.mean_graph_pass / 3 * 2
    return 2 * (counts.forward + backward) / counts.forward


def time_table(found: Iterable[Counts], rates: Rates, sequences: int) -> str:
    header = ["shape", "asked for", "PFLOP", "group", "probes", "memory", "received"]
    rows = []
    for counts in found:
        for asked in ASKED:
            layout = counts.layout(asked, rates.memory)
            number = max(sequences, layout.group)
            hours = [counts.hours(asked, rates, devices, number) for devices in DEVICES]
            rows.append(
                [
                    counts.shape.name,
                    asked.name,
                    f"{counts.operations(asked, layout) * number / 1e15:,.3g}",
                    *map(str, layout),
                    format_bytes(int(counts.memory(asked, layout))),
                    format_bytes(int(counts.received(asked, layout))),
                    *map(duration, hours),
                ]
            )
    return table([*header, *map(str, DEVICES)], rows, left=2)


def duration(hours: float | None) -> str:
    """In the largest unit of which there is one; "-" for None."""
    if hours is None:
        return "-"
    units = (("y", 24 * 365), ("d", 24), ("h", 1), ("min", 1 / 60))
    name, size = next(((n, s) for n, s in units if hours >= s), ("s", 1 / 3600))
    return f"{hours / size:.2g} {name}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="one small network: seconds")
    parser.add_argument("--rate", type=float, default=200e12, help="operations a second (200e12)")
    parser.add_argument("--near", type=float, default=300e9, help="bytes a second, up to 8 devices")
    parser.add_argument("--far", type=float, default=40e9, help="bytes a second, beyond 8")
    parser.add_argument("--memory", type=float, default=80e9, help="bytes of a device")
    parser.add_argument("--sequences", type=int, default=16, help="in all")
    options = parser.parse_args()
    rates = Rates(options.rate, options.near, options.far, options.memory)
    found = [counts_of(shape) for shape in (SMOKE_SHAPES if options.smoke else SHAPES)]
    text = f"{counts_table(found)}\n\n{time_table(found, rates, options.sequences)}"
    print(text)
    if not options.smoke:
        OUT.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(OUT, f"{text}\n".encode())


if __name__ == "__main__":
    main()
