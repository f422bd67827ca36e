"""HessianOperator: products with the Hessian of a Problem's loss and with its diagonal blocks.

    H v = d/dw <g(w), v>,  g = dL/dw                                  (Pearlmutter 1994, "double backward")

The graph of g is recorded once per (micro-)batch and is then differentiated again for every probe, every Lanczos step
and every block: 6 F a probe for the whole Hessian, F being the cost of one forward pass. For a diagonal block only
d g_block / d w_block is asked for, so autograd prunes to what lies downstream of the block: about 1 to 2 F. Probes go
through as one batch (``is_grads_batched``), or one after the other where a model has no batching rule.

Letters: P parameters, k probes, n size of a block, B blocks of a cut, r = B k rows.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessian_tools.errors import NotTwiceDifferentiable, NumericalError
from hessian_tools.memory import budget_bytes, counting_saved_bytes, format_bytes
from hessian_tools.operators import SymmetricOperator
from hessian_tools.partition import Block, Cut
from hessian_tools.problem import Problem, batch_length
from hessian_tools.verification import Verification, verify

MAX_ROWS = 64  # more probes at once bring no further speed and cost memory


@dataclass(frozen=True)
class Plan:
    """How products are computed within the memory budget; bytes are counted from what autograd saves."""

    recorded: bool  # graphs of the gradient kept for all products (else rebuilt for each)
    pieces: tuple[tuple[float, Any], ...]  # (weight in L, micro-batch)
    rows: int  # probes that go through together
    graph_bytes: int  # of all graphs (recorded) or of the largest (rebuilt)
    krylov_bytes: int  # what the budget leaves for Lanczos vectors

    def __str__(self) -> str:
        kind = "recorded once" if self.recorded else "rebuilt for every product"
        graphs = f"{len(self.pieces)} gradient graph(s) {kind} ({format_bytes(self.graph_bytes)})"
        return f"{graphs}, up to {self.rows} probes at once"


class _Engine:
    """Second derivatives of a Problem between chosen parameter tensors; shared by the Hessian and all its blocks."""

    def __init__(self, problem: Problem, memory: str | int, record: bool | None, microbatch: int | None) -> None:
        self.problem = problem
        self.batched, self.fallback = True, ""
        self.plan = self._planned(budget_bytes(memory, problem.device), record, microbatch)
        self.checked = False
        self._recorded: list[tuple[float, dict[str, Tensor]]] = []
        self._versions: tuple[int, ...] = ()

    def products(self, cotangents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """sum_b H_ab v_b for all parameters a and b in ``cotangents``: {name: (r, *shape)} both ways."""
        names = list(cotangents)
        chunks = list(zip(*(cotangents[name].split(self.plan.rows) for name in names), strict=True))
        total: dict[str, Tensor] = {}
        for weight, gradients in self._graphs(names):
            found = [self._differentiated(gradients, names, chunk) for chunk in chunks]
            for name, pieces in zip(names, zip(*found, strict=True), strict=True):
                if pieces[0] is None:
                    continue
                product = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
                # the first is a new tensor: a product may be the very vector that came in
                total[name] = total[name].add_(product, alpha=weight) if name in total else product * weight
        return {name: total[name] if name in total else torch.zeros_like(cotangents[name]) for name in names}

    def release(self) -> None:
        """Frees the recorded graphs; the next product records them again."""
        self._recorded = []

    @property
    def route(self) -> str:
        batching = "batched over probes" if self.batched else f"probes one by one ({self.fallback})"
        return f"double backward, {batching}; {self.plan}"

    def _planned(self, budget: int, record: bool | None, microbatch: int | None) -> Plan:
        problem = self.problem
        fixed, slope = self._graph_size()
        sizes = [fixed + slope * (batch_length(batch) or 1) for batch in problem.batches]
        total, largest = sum(sizes), max(sizes)
        # a product holds, for each probe, at most one cotangent for every tensor of the graph
        fits = total + largest <= 0.6 * budget
        recorded = fits if record is None else record
        size = microbatch
        if size is None and not recorded and 2 * largest > 0.5 * budget:
            size = int((0.25 * budget - fixed) / slope) if slope > 0 else 0
            if size < 1:
                one = fixed + slope
                raise ValueError(
                    f"memory={format_bytes(budget)} is too little: one example's gradient graph and a probe's pass "
                    f"over it take {format_bytes(2 * one)}; allow at least {format_bytes(4.1 * one)}"
                )
        pieces: list[tuple[float, Any]] = []
        for index in range(len(problem.batches)):
            pieces += problem.split(index, size) if size else [(problem.weights[index], problem.batches[index])]
        lengths = [fixed + slope * (batch_length(batch) or 1) for _, batch in pieces]
        graphs = sum(lengths) if recorded else max(lengths)
        rows = int(max(1, min(MAX_ROWS, (0.6 * budget - graphs) // max(lengths))))
        krylov = int(max(0, budget - graphs - rows * max(lengths)))
        return Plan(recorded, tuple(pieces), rows, int(graphs), krylov)

    def _graph_size(self) -> tuple[float, float]:
        """Bytes of a recorded gradient graph as (constant part, part per example), counted on one and two examples."""
        parameters = list(self.problem.parameters.values())
        counts = []
        with self.problem.evaluating(), torch.enable_grad(), counting_saved_bytes(parameters) as saved:
            for examples, loss in self.problem.small_losses():
                torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
                counts.append((examples, saved.taken()))
        (n, low), (m, high) = counts[0], counts[-1]
        if m == n:
            return 0.0, max(low, 1) / n
        slope = max((high - low) / (m - n), 1.0)
        return max(low - slope * n, 0.0), slope

    def _graphs(self, names: Sequence[str]) -> Iterator[tuple[float, dict[str, Tensor]]]:
        if not self.plan.recorded:
            for weight, batch in self.plan.pieces:
                yield weight, self._gradients(batch, names)
            return
        versions = tuple(p._version for p in self.problem.parameters.values())
        if not self._recorded or versions != self._versions:  # a step of an optimizer makes recorded graphs stale
            self._recorded = []
            self._recorded = [(w, self._gradients(b, list(self.problem.parameters))) for w, b in self.plan.pieces]
            self._versions = versions
        yield from self._recorded

    def _gradients(self, batch: Any, names: Sequence[str]) -> dict[str, Tensor]:
        parameters = [self.problem.parameters[name] for name in names]
        with self.problem.evaluating(), torch.enable_grad():
            loss = self.problem.batch_loss(batch)
            gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        found = {name: g for name, g in zip(names, gradients, strict=True) if g is not None}
        if not self.checked:  # once: on every product it would make the device wait
            for name, gradient in found.items():
                if not torch.isfinite(gradient).all():
                    raise NumericalError(f"the gradient of {name} is not finite, but the loss is {loss.item():.6g}")
            # autograd would leave these functions out of the second derivative without a word
            if once := [c.__name__ for c in _custom_functions([loss]) if _is_once_differentiable(c)]:
                raise NotTwiceDifferentiable(_undifferentiable(f"the backward of {once[0]} is once_differentiable", []))
            self.checked = True
        return {name: g for name, g in found.items() if g.requires_grad}  # others are constant: zero rows

    def _differentiated(
        self, gradients: dict[str, Tensor], names: list[str], cotangents: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        live = [i for i, name in enumerate(names) if name in gradients]
        if not live:
            return [None] * len(names)
        outputs = [gradients[names[i]] for i in live]
        vectors = [cotangents[i].to(gradients[names[i]].dtype) for i in live]
        inputs = [self.problem.parameters[name] for name in names]
        if self.batched:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="There is a performance drop")  # still correct, and told
                    return torch.autograd.grad(
                        outputs, inputs, vectors, retain_graph=True, allow_unused=True, is_grads_batched=True
                    )
            except RuntimeError as error:  # NotImplementedError is one as well
                if _is_out_of_memory(error):
                    raise
                self.batched, self.fallback = False, _first_line(error)
        try:
            rows = [
                torch.autograd.grad(outputs, inputs, row, retain_graph=True, allow_unused=True)
                for row in zip(*vectors, strict=True)
            ]
        except RuntimeError as error:
            if _is_out_of_memory(error):
                raise
            raise NotTwiceDifferentiable(_undifferentiable(_first_line(error), outputs)) from error
        return [None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)]


class HessianOperator(SymmetricOperator):
    """The (P, P) Hessian of L, the pooled mean loss of a Problem; vectors follow ``problem.parameters``' order.

    Args:
        problem: the Problem.
        memory: budget beyond model and data: "auto" (70 % of what is free), bytes, or "8GiB". It decides whether
            gradient graphs are recorded, how batches are cut, how many probes go together, and how Lanczos must save.
        record: force recording (True) or rebuilding (False) of the graphs; None lets the budget decide.
        microbatch: cut batches to at most so many examples; None lets the budget decide.

    ``route`` says in words how products are computed, ``krylov_bytes`` what the budget leaves for Lanczos vectors.

    Raises:
        ValueError: a budget too small for one example; a batch that must but cannot be cut.
        NotTwiceDifferentiable: at the first product, naming the operation or custom Function.
        NumericalError: at the first product, for a gradient that is not finite.
    """

    def __init__(
        self, problem: Problem, *, memory: str | int = "auto", record: bool | None = None, microbatch: int | None = None
    ) -> None:
        if not isinstance(problem, Problem):
            raise TypeError(f"problem is a {type(problem).__name__}; pass ht.Problem(model, loss_fn, batches)")
        super().__init__(problem.num_parameters, problem.dtype, problem.device)
        self.problem = problem
        self._engine = _Engine(problem, memory, record, microbatch)

    def _matmat(self, vectors: Tensor) -> Tensor:
        sizes = [p.numel() for p in self.problem.parameters.values()]
        pieces = zip(self.problem.parameters.items(), vectors.split(sizes, dim=1), strict=True)
        products = self._engine.products({name: piece.reshape(-1, *p.shape) for (name, p), piece in pieces})
        return torch.cat([p.reshape(vectors.shape[0], -1).to(self.dtype) for p in products.values()], dim=1)

    def block(self, block: Block) -> "StackedBlocks":
        """The diagonal block H_bb of one Block, an (n, n) operator."""
        return StackedBlocks(self, block.as_cut())

    def stacked(self, cut: Cut) -> "StackedBlocks":
        """All diagonal blocks of a Cut, whose products go through the engine together."""
        return StackedBlocks(self, cut)

    def verify(self, blocks: Sequence[Block] = (), *, seed: int = 0) -> Verification:
        """Holds this operator against finite differences of the gradient and against what a Hessian must fulfil.

        Costs about 100 forward passes and a float64 copy of the model. See :func:`hessian_tools.verification.verify`.
        """
        return verify(self, blocks, seed=seed)

    def release(self) -> None:
        """Frees the recorded graphs; the next product records them again."""
        self._engine.release()

    @property
    def route(self) -> str:
        return self._engine.route

    @property
    def krylov_bytes(self) -> int:
        return self._engine.plan.krylov_bytes


class StackedBlocks(SymmetricOperator):
    """The B diagonal blocks of a Cut side by side: row i of a batch of r = B k belongs to block i // k.

    One block (B = 1) is an (n, n) operator H_bb like any other; to Lanczos, which works row by row, several are one as
    well. ``names`` are the blocks'. ``matmat`` raises ValueError for a number of rows that is no multiple of B.
    """

    def __init__(self, hessian: HessianOperator, cut: Cut) -> None:
        super().__init__(cut.block_size, hessian.dtype, hessian.device)
        self._engine = hessian._engine
        self.cut, self.num_blocks, self.names = cut, cut.num_blocks, cut.names

    def _matmat(self, vectors: Tensor) -> Tensor:
        if vectors.shape[0] % self.num_blocks:
            raise ValueError(f"vectors has {vectors.shape[0]} rows; {self.num_blocks} blocks need a multiple of that")
        pieces = vectors.split([part.block_size for part in self.cut.parts], dim=1)
        if self.num_blocks == 1:
            products = self._products([piece[:, None] for piece in pieces])
            return torch.cat([p[:, 0] for p in products], dim=1)
        # a row is its block's vector in that block's place of the tensor, and zero elsewhere
        row = torch.arange(vectors.shape[0], device=self.device)
        owner = row // (vectors.shape[0] // self.num_blocks)
        out = torch.empty_like(vectors)
        rows = self._engine.plan.rows  # the spread-out rows are as large as the tensor: only so many at a time
        for first in range(0, len(row), rows):
            part = slice(first, first + rows)
            local = torch.arange(len(row[part]), device=self.device)
            spread = []
            for piece in pieces:
                wide = vectors.new_zeros(len(local), self.num_blocks, piece.shape[1])
                wide[local, owner[part]] = piece[part]
                spread.append(wide)
            out[part] = torch.cat([p[local, owner[part]] for p in self._products(spread)], dim=1)
        return out

    def _products(self, spread: list[Tensor]) -> list[Tensor]:
        """Per part of the cut, (r, B, n_part) -> (r, B, n_part)."""
        cotangents: dict[str, Tensor] = {}
        for part, rows in zip(self.cut.parts, spread, strict=True):
            if rows.shape[1:].numel() == math.prod(part.shape) and not part.axes:
                cotangents[part.parameter] = rows.reshape(-1, *part.shape)
                continue
            if part.parameter not in cotangents:
                cotangents[part.parameter] = rows.new_zeros(rows.shape[0], *part.shape)
            part.place(rows, cotangents[part.parameter])
        products = self._engine.products(cotangents)
        return [part.rows(products[part.parameter]).to(self.dtype) for part in self.cut.parts]


def _custom_functions(outputs: Sequence[Tensor]) -> list[type]:
    """The Python autograd Functions in the graph behind ``outputs``, by name."""
    seen: set[Any] = set()
    stack = [t.grad_fn for t in outputs]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [following for following, _ in node.next_functions]
    kinds = {type(node) for node in seen if isinstance(node, torch.autograd.function.BackwardCFunction)}
    return sorted((kind._forward_cls for kind in kinds), key=lambda c: c.__name__)  # type: ignore[attr-defined]


def _is_once_differentiable(function: type) -> bool:
    code = getattr(function.backward, "__code__", None)  # type: ignore[attr-defined]
    return code is not None and code.co_filename == torch.autograd.function.__file__  # the decorator's wrapper


def _undifferentiable(reason: str, outputs: Sequence[Tensor]) -> str:
    names = ", ".join(c.__name__ for c in _custom_functions(outputs))
    culprits = f"; it uses the custom autograd Function(s) {names}" if names else ""
    return (
        f"the model cannot be differentiated twice: {reason}{culprits}; replace that operation by one whose backward "
        "is itself made of differentiable operations"
    )


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0][:200]
