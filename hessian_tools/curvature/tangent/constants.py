"""The constants of a tangent program: everything its steps need besides tangents."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.node import map_arg

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


def merge_equal(
    graph: fx.Graph,
    wanted: Sequence[Node],
    twins: Mapping[Node, Node],
) -> dict[Node, Node]:
    """Computes equal values once: ``twins`` are inputs that equal others, and are removed.

    Returns, for each of ``wanted``, the node that has its value from now on. Outputs are given up.
    """
    graph.output_node().args = (tuple(wanted),)
    graph.eliminate_dead_code()
    same: dict[Node, Node] = dict(twins)
    first: dict[str, Node] = {}
    for node in graph.nodes:
        if node.op not in ("call_function", "get_attr"):
            continue
        node.args = map_arg(node.args, lambda argument: same.get(argument, argument))
        node.kwargs = map_arg(node.kwargs, lambda argument: same.get(argument, argument))
        same[node] = first.setdefault(_told(node), node)
    merged = {node: same.get(node, node) for node in wanted}
    graph.output_node().args = (tuple(merged.values()),)
    graph.eliminate_dead_code()
    for twin in twins:
        graph.erase_node(twin)
    return merged


def _told(node: Node) -> str:
    """All that the value of a node follows from; nodes in it are told by their names."""
    if node.op == "get_attr":
        return f"constant {id(node.meta['constant'])}"
    # functions of this package have no name that tells one from another
    target = node.target if isinstance(node.target, OpOverload) else id(node.target)
    return f"{target} {node.args} {node.kwargs}"
