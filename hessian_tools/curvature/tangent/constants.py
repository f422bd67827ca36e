"""The constants of a tangent program: everything its steps need besides tangents."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx

from hessian_tools.curvature.tangent.graph import Node, storage_of, values_of


class Constants:
    """Computes the values of ``wanted`` nodes from parameters and a batch's tensors.

    Takes ``graph`` over: its outputs become those values, and what they do not need is removed.
    """

    def __init__(self, graph: fx.Graph, wanted: Sequence[Node]) -> None:
        self._graph = graph
        self._wanted = wanted
        graph.output_node().args = (tuple(wanted),)
        graph.eliminate_dead_code()
        # parameters, the batch, and constants that the trace came with
        given = [node for node in graph.nodes if node.op != "call_function"]
        self._given = _storages(given)
        self._operations = [node for node in graph.nodes if node.op == "call_function"]
        # a GraphModule looks up by name the tensors that are in no input
        holder = torch.nn.Module()
        for node in graph.find_nodes(op="get_attr"):
            setattr(holder, node.target, node.meta["constant"])
        self._module = fx.GraphModule(holder, graph)

    def values(
        self,
        parameters: Sequence[Tensor],
        tensors: Sequence[Tensor],
    ) -> dict[Node, Tensor]:
        """For these parameters and this batch's tensors."""
        with torch.no_grad():
            values = self._module(*parameters, *tensors)
        return dict(zip(self._wanted, values, strict=True))

    def kept_bytes(self) -> int:
        """Bytes of all constants, besides the parameters and the batch."""
        return sum(self._sizes(self._wanted).values())

    def recording_bytes(self) -> int:
        """Most bytes beside the constants', the parameters' and the batch's, while computing."""
        kept = _storages(self._wanted)
        freed = self._freed_after()
        alive: dict[int, int] = {}
        most = 0
        for node in self._operations:
            # a view adds nothing: its storage is there already
            alive.update(self._sizes([node]))
            most = max(most, sum(alive.values()))
            for storage in freed[node] - kept:
                alive.pop(storage, None)
        return most - self.kept_bytes()

    def _sizes(self, nodes: Iterable[Node]) -> dict[int, int]:
        """By storage: the bytes of the nodes' values, without those that were given."""
        return {
            storage_of(value): value.untyped_storage().nbytes()
            for node in nodes
            for value in values_of(node)
            if storage_of(value) not in self._given
        }

    def _freed_after(self) -> dict[Node, set[int]]:
        """By operation: the storages that no later operation reads."""
        last: dict[int, Node] = {}
        for node in self._operations:
            read_or_written = _storages([node, *node.all_input_nodes])
            last.update(dict.fromkeys(read_or_written, node))
        freed: dict[Node, set[int]] = defaultdict(set)
        for storage, node in last.items():
            freed[node].add(storage)
        return freed


def _storages(nodes: Iterable[Node]) -> set[int]:
    return {storage_of(value) for node in nodes for value in values_of(node)}
