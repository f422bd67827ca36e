"""The builder: what a rule sees and calls while a gradient's graph is differentiated.

A rule ``rule(builder, node)`` says how the tangent of ``node``'s value follows from the tangents of
its arguments. It does so with one of

- :meth:`Builder.linear` for an operation linear in one argument,
- :meth:`Builder.product` for a product of arguments,
- :meth:`Builder.jointly` for an operation linear in several arguments together,
- :meth:`Builder.combine` for an elementwise operation, whose tangent is a combination of others,

and with :meth:`Builder.constant` for values that do not depend on the probes. A node of which no
rule says anything has the tangent zero. The builder knows no rules.

Letters: k probes. A tangent of a value of shape s is a tensor (k, *s).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, fx

from hessian_tools.curvature.tangent.forms import ONE, Coefficient, Form, combination, in_order
from hessian_tools.curvature.tangent.graph import Node, shape_of, value_of
from hessian_tools.curvature.tangent.program import Call, Step, Tangent, Tangents, Values

Rule = Callable[["Builder", Node], None]
Map = Callable[..., Tensor]  # (tangent, *constants) -> tangent
Addition = Callable[..., Tensor]  # (out or None, tangent, *constants) -> out plus a term
_ATEN = torch.ops.aten
_MOST_TERMS = 4  # of a combination; a longer one is added up at once


@dataclass(frozen=True)
class Half:
    """What an operand's tangent adds to the tangent of a product.

    ``add(out, tangent, *constants)`` is ``out`` plus that, and may be written into ``out``. The
    first half present gets None for ``out``. ``constants`` are those that this half reads: what
    only the half of an operand that does not move would read, is not computed.
    """

    operand: Node | None
    add: Addition
    constants: Sequence[Node] = ()


class Builder:
    """Collects the steps that compute tangents, and adds the constants they need to ``graph``."""

    def __init__(self, graph: fx.Graph) -> None:
        self.steps: list[Step] = []
        self.forms: dict[Node, Form] = {}  # of the nodes whose tangent is not zero
        self._graph = graph
        self._held: dict[Node, Tangent] = {}  # forms that have been added up
        self._products: dict[tuple[Node, Node], Node] = {}
        self._place: Node = next(iter(graph.nodes))  # new constants are inserted after it

    def add_input(self, node: Node) -> Tangent:
        """The tangent of a parameter, which the program is given."""
        tangent = _tangent_of(node)
        self.forms[node] = {tangent: ONE}
        return tangent

    def move_to(self, node: Node) -> None:
        """From now on constants are inserted after ``node``, whose value they may depend on."""
        self._place = node

    # ------------------------------------------------------------------- what a rule asks and says

    def moves(self, argument: object) -> TypeGuard[Node]:
        """Whether an argument of an operation is a value whose tangent is not zero."""
        return isinstance(argument, Node) and argument in self.forms

    def moving(self, arguments: Iterable[object]) -> list[Node]:
        """Those of them that move."""
        return [argument for argument in arguments if self.moves(argument)]

    def constant(
        self,
        function: Callable[..., object],
        args: tuple[object, ...],
        like: Node,
        shape: tuple[int, ...] | None = None,
    ) -> Node:
        """A value computed from earlier values, of ``like``'s dtype and, unless given, shape."""
        if shape is None:
            shape = shape_of(like)
        with self._graph.inserting_after(self._place):
            new = self._graph.call_function(function, args)  # type: ignore[arg-type]  # any object
        # fake, like all values of the trace: its shape and bytes are asked for later
        new.meta["val"] = value_of(like).new_empty(shape)
        # the next constant may be computed from this one
        self._place = new
        return new

    def constant_product(
        self,
        one: Node,
        two: Node,
        like: Node,
    ) -> Node:
        """The constant one * two, of ``like``'s dtype; computed once for all who ask."""
        pair = (one, two)
        if pair not in self._products:
            multiply = _ATEN.mul.Tensor
            shape = torch.broadcast_shapes(shape_of(one), shape_of(two))
            self._products[pair] = self.constant(multiply, pair, like, shape)
        return self._products[pair]

    def same(self, node: Node, source: Node) -> None:
        """``node`` has the tangent of ``source``."""
        self.forms[node] = self.forms[source]

    def linear(
        self,
        node: Node,
        argument: Node,
        call: Map,
        constants: Sequence[Node] = (),
        view: bool = False,
    ) -> None:
        """The tangent is ``call(tangent of argument, *constants)``, linear in the tangent.

        ``view`` says that the result shares the tangent's memory.
        """

        def applied(k: int, tangents: Tangents, values: Values) -> Tensor:
            return call(tangents[0], *values)

        tangent, factor = self._scaled(argument)
        self._add(node, [tangent], constants, applied, factor, view)

    def product(self, node: Node, halves: Sequence[Half]) -> None:
        """The product rule: the tangent is the sum of a half for each operand that moves."""
        present = [half for half in halves if self.moves(half.operand)]
        moving = self.moving(half.operand for half in present)
        constants = [node for half in present for node in half.constants]

        def call(k: int, tangents: Tangents, values: Values) -> Tensor:
            out = None
            rest = iter(values)
            for half, tangent in zip(present, tangents, strict=True):
                own = [next(rest) for _ in half.constants]
                if tangent is not None:
                    out = half.add(out, tangent, *own)
            assert out is not None  # a step runs only where some tangent is not zero
            return out

        tangents, factor = self._scaled_alike(moving)
        self._add(node, tangents, constants, call, factor)

    def jointly(
        self,
        node: Node,
        operands: Sequence[Node],
        constants: Sequence[Node],
        call: Call,
    ) -> None:
        """Linear in the tangents together: ``call(k, tangents of operands, constants)``.

        The tangent of an operand that does not move comes as None.
        """
        moving = self.moving(operands)

        def placed(k: int, tangents: Tangents, values: Values) -> Tensor:
            moved = dict(zip(moving, tangents, strict=True))
            full = [moved.get(operand) for operand in operands]
            return call(k, full, values)

        tangents = [self.held(operand) for operand in moving]
        self._add(node, tangents, constants, placed)

    def combine(self, node: Node, form: Form) -> None:
        """The tangent is the combination ``form``."""
        self.forms[node] = form
        read_twice = len(node.users) > 1  # or each reader would add it up again
        if len(form) > _MOST_TERMS or (len(form) > 1 and read_twice):
            self.held(node)

    def form_of(self, node: Node) -> Form:
        """The tangent of ``node`` as a combination: of itself where it has been added up."""
        if node in self._held:
            return {self._held[node]: ONE}
        return self.forms[node]

    def held(self, node: Node) -> Tangent:
        """The tangent of ``node`` as one tangent of its full shape."""
        if node not in self._held:
            self._held[node] = self._added_up(node)
        return self._held[node]

    # ---------------------------------------------------------------------------------- the steps

    def _added_up(self, node: Node) -> Tangent:
        whole = _tangent_of(node)
        form = in_order(self.forms[node], whole.shape)
        (first, coefficient), *others = form.items()
        if not others and coefficient == ONE and first.is_like(whole):
            return first
        constants = tuple(c.node for c in form.values() if c.node is not None)
        call = combination(form, whole.shape, whole.dtype)
        step = Step(whole, tuple(form), constants, call)
        self.steps.append(step)
        return whole

    def _scaled(self, node: Node) -> tuple[Tangent, float]:
        """The tangent of ``node`` as a number times one tangent of its full shape.

        A linear operation leaves the number to its result, which saves a pass over memory.
        """
        form = self.form_of(node)
        if len(form) == 1:
            ((tangent, coefficient),) = form.items()
            if coefficient.node is None and tangent.shape == shape_of(node):
                return tangent, coefficient.factor
        return self.held(node), 1.0

    def _scaled_alike(self, nodes: Sequence[Node]) -> tuple[list[Tangent], float]:
        """The tangents of ``nodes`` as one number times tangents of full shape."""
        scaled = [self._scaled(node) for node in nodes]
        factors = {factor for _, factor in scaled}
        if len(factors) > 1:
            # no number to leave to the result
            return [self.held(node) for node in nodes], 1.0
        return [tangent for tangent, _ in scaled], factors.pop()

    def _add(
        self,
        node: Node,
        tangents: Sequence[Tangent],
        constants: Sequence[Node],
        call: Call,
        factor: float = 1.0,
        view: bool = False,
    ) -> None:
        """A step; the tangent of ``node`` is ``factor`` times its result."""
        out = _tangent_of(node)
        step = Step(out, tuple(tangents), tuple(constants), call, view)
        self.steps.append(step)
        self.forms[node] = {out: Coefficient(factor)}


def tangent_axis(node: Node, dim: int) -> int:
    """Axis ``dim`` of the value of ``node``, which may count from the end, in its tangent."""
    return dim % value_of(node).ndim + 1


def _tangent_of(node: Node) -> Tangent:
    value = value_of(node)
    return Tangent(tuple(value.shape), value.dtype)
