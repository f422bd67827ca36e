"""Route: products with a micro-batch's Hessian by differentiating the graph of its gradient again.

    H v = d/dw <g(w), v>,  g = dL/dw                        (Pearlmutter 1994, "double backward")

The graph of g is recorded once per micro-batch and is then differentiated again for every probe,
every Lanczos step and every block: 6 F a probe for the whole Hessian, F being the cost of one
forward pass. For a diagonal block only d g_block / d w_block is asked for, so autograd prunes to
what lies downstream of the block: about 1 to 2 F.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hessian_tools.curvature.engine.recorded import RecordedRoute
from hessian_tools.problem.batches import Batch

Gradients = dict[str, Tensor]  # by the parameter's name, each with its graph


class DoubleBackward(RecordedRoute[Gradients]):
    """Second derivatives of a Problem's loss on one micro-batch at a time."""

    kind = "double backward"

    def _record(self, batch: Batch, names: Sequence[str]) -> Gradients:
        parameters = [self.problem.parameters[name] for name in names]
        with torch.enable_grad():
            with self._noticing_recomputation():
                loss = self.problem.batch_loss(batch)
            if not loss.requires_grad:  # it depends on none of these
                return {}
            gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        used = {name: g for name, g in zip(names, gradients, strict=True) if g is not None}
        self._check_finite(used, lambda: f"the loss is {loss.item():.6g}")
        # A gradient without a graph is constant, so its rows of the Hessian are zero.
        return {name: gradient for name, gradient in used.items() if gradient.requires_grad}

    def _tensors(self, graph: Gradients) -> Iterable[Tensor]:
        return graph.values()

    def _differentiated(
        self,
        graph: Gradients,
        names: Sequence[str],
        cotangents: Sequence[Tensor | None],
    ) -> Sequence[Tensor | None]:
        pairs = [
            (graph[name], cotangent)
            for name, cotangent in zip(names, cotangents, strict=True)
            if name in graph and cotangent is not None
        ]
        if not pairs:
            return [None] * len(names)
        outputs = [gradient for gradient, _ in pairs]
        vectors = [cotangent.to(gradient.dtype) for gradient, cotangent in pairs]
        inputs = [self.problem.parameters[name] for name in names]
        return self._derivatives(outputs, inputs, vectors)
