"""What a blockwise JS0 run will cost, counted without a device.

The model is built of meta tensors, which have no data. Counted is the plain route: the gradient's
graph recorded once and differentiated again for every probe, step and block. Operations are those
of matrix products, traffic is what every operator reads and writes when none is fused with another,
memory is what autograd saves. A block of a fused tensor (GPT-2's q, k and v) costs what its tensor
costs.

Letters: k probes, m Lanczos steps, n size of a block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpu_measure import moves_data, operations
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hessian_tools.app.report import table
from hessian_tools.curvature.engine.memory import format_bytes
from hessian_tools.problem.losses import LossFunction

VECTOR_BYTES = 4  # Lanczos vectors are float32
WORK_VECTORS = 5  # of a probe, besides its basis
STEP_VECTORS = 20  # vectors that a Lanczos step reads or writes besides the basis


@dataclass(frozen=True)
class BlockCost:
    """One product of one probe with one tensor's block, and how many blocks there are in that
    tensor.
    """

    name: str
    size: int  # n
    blocks: int
    operations: int
    traffic: int  # bytes


@dataclass(frozen=True)
class Plan:
    """Counts of a run; a device's ``rate`` is in operations, its ``bandwidth`` in bytes a
    second.
    """

    parameters: int
    model_bytes: int
    forward_operations: int
    gradient_operations: int
    graph_bytes: (
        int  # saved by autograd for second derivatives, and the gradients of the chosen blocks
    )
    costs: tuple[BlockCost, ...]
    probes: int  # k
    steps: int  # m

    @property
    def num_products(self) -> int:
        return self.probes * self.steps * sum(cost.blocks for cost in self.costs)

    @property
    def operations(self) -> int:
        """Of the whole run."""
        products = sum(cost.blocks * cost.operations for cost in self.costs)
        return self.gradient_operations + self.probes * self.steps * products

    @property
    def product_traffic(self) -> int:
        """Bytes that all products move."""
        return self.probes * self.steps * sum(cost.blocks * cost.traffic for cost in self.costs)

    @property
    def lanczos_traffic(self) -> int:
        """Bytes that full re-orthogonalisation moves: step j reads j vectors, twice in each of two
        passes.
        """
        reads = 2 * self.steps * (self.steps + 1) + STEP_VECTORS * self.steps
        return (
            self.probes * reads * sum(cost.blocks * cost.size * VECTOR_BYTES for cost in self.costs)
        )

    @property
    def largest_basis(self) -> int:
        """Bytes of one probe of the largest block."""
        return (self.steps + WORK_VECTORS) * VECTOR_BYTES * max(cost.size for cost in self.costs)

    @property
    def memory(self) -> int:
        """Bytes with the graph recorded, one probe going through it (at most as much again) and its
        Lanczos basis.
        """
        return self.model_bytes + 2 * self.graph_bytes + self.largest_basis

    def seconds(self, rate: float, bandwidth: float) -> tuple[float, float, float]:
        """At a ``rate``: of the operations, of the products' traffic and of
        re-orthogonalisation's.
        """
        return (
            self.operations / rate,
            self.product_traffic / bandwidth,
            self.lanczos_traffic / bandwidth,
        )

    def report(self, rate: float, share: float, bandwidth: float) -> str:
        """The counts and the time at a share of the rate, in lines."""
        computing, moving, lanczos = self.seconds(share * rate, bandwidth)
        forward = self.forward_operations
        rows = [
            [
                c.name,
                f"{c.size:,}",
                str(c.blocks),
                f"{c.operations / forward:.2f}",
                format_bytes(c.traffic),
            ]
            for c in self.costs
        ]
        reach = f"at {share:.0%} of {rate / 1e12:.3g} TFLOP/s"
        return "\n".join(
            [
                table(("tensor", "entries of a block", "blocks", "F a product", "traffic"), rows),
                f"parameters {self.parameters:,} ({format_bytes(self.model_bytes)}); one "
                f"forward pass F is "
                f"{forward / 1e12:.3g} TFLOP",
                f"{self.num_products:,} products of {self.probes} probes and {self.steps} steps: "
                f"{self.operations / 1e15:.3g} PFLOP, {computing / 60:.1f} minutes {reach}",
                f"traffic of unfused operators {self.product_traffic / 1e12:.3g} TB, "
                f"{moving / 60:.1f} minutes at "
                f"{bandwidth / 1e12:.1f} TB/s; of re-orthogonalisation "
                f"{self.lanczos_traffic / 1e12:.3g} TB, "
                f"{lanczos / 60:.1f} minutes",
                f"together {(computing + moving + lanczos) / 60:.1f} minutes if nothing overlaps",
                f"memory {format_bytes(self.memory)}: model {format_bytes(self.model_bytes)}, "
                f"recorded graph "
                f"{format_bytes(self.graph_bytes)} and one probe through it (at most as "
                f"much), Lanczos basis of one probe "
                f"of the largest block {format_bytes(self.largest_basis)}",
            ]
        )


def counted(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    blocks: Mapping[str, int],
    *,
    probes: int,
    steps: int,
) -> Plan:
    """The Plan of a run on ``model`` and ``batch``, both of meta tensors; ``blocks``: how many of
    each tensor's equal parts are blocks, {parameter: count}, and no other parameter is
    differentiated.
    """
    named = dict(model.named_parameters())
    chosen = [named[name] for name in blocks]
    for name, parameter in named.items():
        parameter.requires_grad_(name in blocks)
    saved = _Storages(named.values())
    with (
        sdpa_kernel(SDPBackend.MATH),
        torch.enable_grad(),
        saved_tensors_hooks(saved.pack, lambda tensor: tensor),
    ):
        losses: list[Tensor] = []
        forward = operations(lambda: losses.append(loss_fn(model, batch)))
        gradients: list[Tensor] = []
        backward = operations(
            lambda: gradients.extend(torch.autograd.grad(losses, chosen, create_graph=True))
        )
    costs = tuple(
        _block_cost(name, count, *pair)
        for (name, count), *pair in zip(blocks.items(), chosen, gradients, strict=True)
    )
    return Plan(
        sum(p.numel() for p in named.values()),
        sum(p.nbytes for p in named.values()),
        forward,
        forward + backward,
        saved.nbytes + sum(g.nbytes for g in gradients),
        costs,
        probes,
        steps,
    )


def _block_cost(name: str, count: int, parameter: Tensor, gradient: Tensor) -> BlockCost:
    vector = torch.zeros_like(gradient)[None]

    def product() -> None:
        torch.autograd.grad(
            [gradient], [parameter], [vector], retain_graph=True, is_grads_batched=True
        )

    with _Traffic() as traffic:
        counted = operations(product)
    return BlockCost(name, parameter.numel() // count, count, counted, traffic.nbytes)


class _Storages:
    """Bytes of the distinct storages that autograd saves, the parameters' left out; meta tensors
    have no address.
    """

    def __init__(self, exclude: Sequence[Tensor]) -> None:
        self._seen = {t.untyped_storage()._cdata: t.untyped_storage() for t in exclude}
        self.nbytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = storage
            self.nbytes += storage.nbytes()
        return tensor


class _Traffic(TorchDispatchMode):
    """Bytes of what each operator reads and writes; a broadcast tensor counts what it really
    holds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if moves_data(function):
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.nbytes += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)
        return result
