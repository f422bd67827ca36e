"""The builder: what a rule sees and calls while a gradient's graph is differentiated.

A rule ``rule(builder, node)`` says how the tangent of ``node``'s value follows from the tangents of
its arguments. It does so with one of

- :meth:`Builder.linear` for an operation linear in one argument,
- :meth:`Builder.bilinear` for a product of arguments,
- :meth:`Builder.jointly` for an operation linear in several arguments together,
- :meth:`Builder.combine` for an elementwise operation, whose tangent is a combination of others,

and with :meth:`Builder.constant` for values that do not depend on the probes. A node of which no
rule says anything has the tangent zero. The builder knows no rules.

Letters: k probes. A tangent of a value of shape s is a tensor (k, *s).
"""

from collections.abc import Callable, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, fx

from hessian_tools.curvature.tangent.forms import ONE, Coefficient, Form, combination
from hessian_tools.curvature.tangent.graph import Node, shape_of, value_of
from hessian_tools.curvature.tangent.program import Call, Step, Tangent, Tangents, Values

Rule = Callable[["Builder", Node], None]
Map = Callable[..., Tensor]  # (tangent, *constants) -> tangent
_ATEN = torch.ops.aten
_MOST_TERMS = 4  # of a combination; a longer one is added up at once


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

    def constant(
        self,
        function: Callable[..., object],
        args: tuple[object, ...],
        like: Node,
        shape: tuple[int, ...] | None = None,
    ) -> Node:
        """A value computed from earlier values, of ``like``'s dtype and, unless given, shape."""
        with self._graph.inserting_after(self._place):
            new = self._graph.call_function(function, args)  # type: ignore[arg-type]  # any object
        new.meta["val"] = value_of(like).new_empty(shape_of(like) if shape is None else shape)
        self._place = new
        return new

    def product(self, one: Node, two: Node, like: Node) -> Node:
        """The constant one * two, of ``like``'s dtype; computed once for all who ask."""
        if (one, two) not in self._products:
            shape = torch.broadcast_shapes(shape_of(one), shape_of(two))
            self._products[one, two] = self.constant(_ATEN.mul.Tensor, (one, two), like, shape)
        return self._products[one, two]

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

    def bilinear(
        self,
        node: Node,
        operands: Sequence[Node | None],
        constants: Sequence[Node],
        call: Call,
    ) -> None:
        """The product rule: ``call(k, tangents of operands, constants)``, None for zero."""
        moving = [operand for operand in operands if self.moves(operand)]
        scaled = [self._scaled(operand) for operand in moving]
        factors = {factor for _, factor in scaled}
        if len(factors) == 1:
            tangents = [tangent for tangent, _ in scaled]
            common = factors.pop()
        else:
            tangents = [self.held(operand) for operand in moving]
            common = 1.0
        self._add(node, tangents, constants, self._placed(operands, call), common)

    def jointly(
        self,
        node: Node,
        operands: Sequence[Node],
        constants: Sequence[Node],
        call: Call,
    ) -> None:
        """Linear in the tangents together: ``call(k, tangents of operands, constants)``."""
        tangents = [self.held(operand) for operand in operands if self.moves(operand)]
        self._add(node, tangents, constants, self._placed(operands, call))

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
        form = self.forms[node]
        whole = _tangent_of(node)
        tangent, coefficient = next(iter(form.items()))
        is_itself = len(form) == 1 and coefficient == ONE
        if is_itself and (tangent.shape, tangent.dtype) == (whole.shape, whole.dtype):
            return tangent
        constants = [c.node for c in form.values() if c.node is not None]
        call = combination(form, whole.shape, whole.dtype)
        self.steps.append(Step(whole, tuple(form), tuple(constants), call))
        return whole

    def _scaled(self, node: Node) -> tuple[Tangent, float]:
        """The tangent of ``node`` as a number times one tangent of its full shape.

        A linear operation leaves the number to its result, which saves a pass over memory.
        """
        form = self.forms[node]
        if node not in self._held and len(form) == 1:
            tangent, coefficient = next(iter(form.items()))
            if coefficient.node is None and tangent.shape == shape_of(node):
                return tangent, coefficient.factor
        return self.held(node), 1.0

    def _placed(self, operands: Sequence[Node | None], call: Call) -> Call:
        """``call`` with the tangents of all operands, from those that move: None for the others."""
        places = [place for place, operand in enumerate(operands) if self.moves(operand)]

        def placed(k: int, tangents: Tangents, values: Values) -> Tensor:
            full: list[Tensor | None] = [None] * len(operands)
            for place, tangent in zip(places, tangents, strict=True):
                full[place] = tangent
            return call(k, full, values)

        return placed

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
        self.steps.append(Step(out, tuple(tangents), tuple(constants), call, view))
        self.forms[node] = {out: Coefficient(factor)}


def _tangent_of(node: Node) -> Tangent:
    value = value_of(node)
    return Tangent(tuple(value.shape), value.dtype)
