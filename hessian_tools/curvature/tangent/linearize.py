"""Products with second derivatives by a tangent program: the gradient's graph, differentiated forward once and for all.

For fixed weights the map from a tangent of the parameters to the tangent of the gradient, v -> H v, is linear. It is
compiled here from the gradient's graph (:mod:`hessian_tools.curvature.tangent.graph`) into a list of linear steps:

- What does not depend on v is computed once and kept: operands of matrix products, and *coefficients*. A chain of
  elementwise operations, whatever its length, has as its tangent a combination sum_i c_i * t_i of few tangents with
  known coefficients, so it costs one pass over memory a term; multiplied-out coefficients are computed once.
- Matrix products and convolutions accumulate both halves of the product rule into one result, all probes in one call
  where the constant operand is shared.
- A block's product runs only the steps between the block and its own gradient.

Rules for other operations come from torch itself (``torch.func.jvp`` under ``vmap``, for one operation at a time).

Letters: k probes. A tangent of a value of shape s is a tensor (k, *s).
"""

from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from hessian_tools.curvature.tangent.graph import Untraceable
from hessian_tools.curvature.tangent.program import (
    Base,
    Call,
    Coefficient,
    Form,
    Node,
    Program,
    Step,
    weighted,
)
from hessian_tools.curvature.tangent.rules import PICKED, RULES

_ATEN = torch.ops.aten
_IDENTITY = {"clone", "alias", "detach", "lift_fresh", "lift_fresh_copy", "contiguous"}
_RESHAPED = {"view", "_unsafe_view", "reshape", "squeeze", "unsqueeze", "flatten"}
_BATCHED_LINEAR = {  # linear in their one active argument; torch.vmap knows them
    "slice", "select", "split", "split_with_sizes", "unbind", "chunk", "flip", "roll", "slice_backward",
    "select_backward", "constant_pad_nd", "index_select", "gather", "tril", "triu", "cumsum", "index", "repeat",
    "diagonal", "diagonal_backward", "avg_pool2d", "avg_pool2d_backward", "_adaptive_avg_pool2d",
    "_adaptive_avg_pool2d_backward", "avg_pool1d", "upsample_nearest2d", "upsample_bilinear2d", "pixel_shuffle",
    "unfold", "unfold_backward", "im2col", "col2im", "trace", "scatter",
}  # fmt: skip
_FIRST_ONLY = {
    "avg_pool2d_backward",
    "_adaptive_avg_pool2d_backward",
}  # only the shape of the second is read
_CONSTANT = {
    "full_like",
    "zeros_like",
    "ones_like",
    "empty_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
}
_POINTWISE = {
    "gelu_backward",
    "threshold_backward",
    "where",
    "masked_fill",
}  # not all versions of torch tag them
_MOST_TERMS = 4


class Linearisation:
    """All steps of a gradient's graph; :meth:`program` picks those that lead from some parameters to some gradients.

    ``graph`` is extended by the coefficients; :meth:`constants` computes everything that the steps need besides
    tangents.

    Raises:
        Untraceable: for an operation without a rule.
    """

    def __init__(self, graph: fx.Graph, num_parameters: int) -> None:
        self.graph = graph
        self.steps: list[Step] = []
        self.forms: dict[Node, Form] = {}
        self._held_forms: dict[Node, Base] = {}  # forms that were computed already
        self._picked: set[Node] = set()  # operations with several results, some of them moving
        self._products: dict[tuple[Node, Node], Node] = {}
        self._at: Node = next(iter(graph.nodes))  # new coefficients are inserted after it
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        self.inputs = []
        for node in placeholders[:num_parameters]:
            base = Base(tuple(node.meta["val"].shape), node.meta["val"].dtype)
            self.inputs.append(base)
            self.forms[node] = {base: Coefficient()}
        output = next(node for node in graph.nodes if node.op == "output")
        for node in list(graph.nodes):
            moving = (a in self.forms or a in self._picked for a in node.all_input_nodes)
            if node.op == "call_function" and any(moving):
                self._at = node
                self._differentiate(node)
        self.outputs = [self.held(node) if node in self.forms else None for node in output.args[0]]
        self._close(output)

    # ------------------------------------------------------------------------------------------------ programs
    def program(self, parameters: Sequence[int]) -> Program:
        """From the tangents of ``parameters`` (their indices) to those of the same parameters' gradients."""
        alive = {self.inputs[i] for i in parameters}
        chosen: list[tuple[Step, tuple[bool, ...]]] = []
        for step in self.steps:
            live = tuple(base in alive for base in step.inputs)
            if any(live):
                alive.add(step.out)
                chosen.append((step, live))
        outputs = [base if (base := self.outputs[i]) in alive else None for i in parameters]
        needed, kept = {base for base in outputs if base is not None}, []
        last: set[Base] = set(needed) | {self.inputs[i] for i in parameters}
        for step, live in reversed(chosen):
            if step.out in needed:
                used = [base for base, alive_ in zip(step.inputs, live, strict=True) if alive_]
                finished = tuple(base for base in dict.fromkeys(used) if base not in last)
                needed.update(used)
                last.update(used)
                kept.append((step, live, finished))
        return Program(kept[::-1], [self.inputs[i] for i in parameters], outputs)

    def constants(self, parameters: Sequence[Tensor], tensors: Sequence[Tensor]) -> dict[Node, Any]:
        """Values of all constants, for these parameters and this batch's tensors."""
        with torch.no_grad():
            values = self._module(*parameters, *tensors)
        return dict(zip(self._wanted, values, strict=True))

    def constant_bytes(self) -> int:
        """Bytes of all constants, besides the parameters and the batch."""
        given = {
            _storage(v)
            for node in self.graph.nodes
            if node.op != "call_function"
            for v in _tensors(node)
        }
        held = {
            _storage(v): v.untyped_storage().nbytes()
            for node in self._wanted
            for v in _tensors(node)
        }
        return sum(size for storage, size in held.items() if storage not in given)

    def recording_bytes(self) -> int:
        """Most bytes alive while the constants are computed, besides the parameters and the batch."""
        last: dict[int, Node] = {}
        order = [node for node in self.graph.nodes if node.op == "call_function"]
        for node in order:
            for user in (node, *node.all_input_nodes):
                last.update((_storage(value), node) for value in _tensors(user))
        kept = {_storage(value) for node in self._wanted for value in _tensors(node)}
        given = {
            _storage(v)
            for node in self.graph.nodes
            if node.op != "call_function"
            for v in _tensors(node)
        }
        ends: dict[Node, list[int]] = {}
        for storage, node in last.items():
            ends.setdefault(node, []).append(storage)
        alive: dict[int, int] = {}
        most = 0
        for node in order:
            for value in _tensors(node):
                if _storage(value) not in given:
                    alive[_storage(value)] = value.untyped_storage().nbytes()
            most = max(most, sum(alive.values()))
            for storage in ends.get(node, []):
                if storage not in kept:
                    alive.pop(storage, None)
        return most

    def _close(self, output: Node) -> None:
        """Steps that no gradient needs go, and with them the constants that nothing needs."""
        needed = {base for base in self.outputs if base is not None}
        kept = []
        for step in reversed(self.steps):
            if step.out in needed:
                needed.update(step.inputs)
                kept.append(step)
        self.steps = kept[::-1]
        wanted = dict.fromkeys(node for step in self.steps for node in step.constants)
        self._wanted = list(wanted)
        output.args = (tuple(self._wanted),)
        self.graph.eliminate_dead_code()
        holder = torch.nn.Module()
        for node in self.graph.nodes:
            if node.op == "get_attr":
                setattr(holder, node.target, node.meta["constant"])
        self._module = fx.GraphModule(holder, self.graph)

    # ------------------------------------------------------------------------------------------------ one operation
    def _differentiate(self, node: Node) -> None:
        value = node.meta.get("val")
        outputs = value if isinstance(value, tuple | list) else [value]
        if not any(isinstance(v, Tensor) and v.is_floating_point() for v in outputs):
            return
        if node.target is getitem:
            self._differentiate_item(node)
            return
        op = node.target
        if not isinstance(op, torch._ops.OpOverload):
            raise Untraceable(f"no rule for {op}")
        name = op._opname
        if isinstance(value, tuple | list):
            if name not in PICKED and name not in _BATCHED_LINEAR:
                raise Untraceable(f"no rule for {op}, which has several results")
            self._picked.add(node)  # its results are differentiated one by one, as they are picked
            return
        if name in _CONSTANT:
            return
        if rule := RULES.get(name):
            rule(self, node)
        elif name in _IDENTITY:
            self.forms[node] = self.forms[node.args[0]]
        elif name == "_to_copy":
            self._cast(node)
        elif name in _RESHAPED:
            shape = tuple(value.shape)
            self.linear(node, node.args[0], lambda k, t, c: t[0].reshape(k, *shape), view=True)
        elif name in _BATCHED_LINEAR:
            self.mapped_linear(node)
        elif torch.Tag.pointwise in op.tags or name in _POINTWISE:
            self._pointwise(node)
        else:
            self._by_jvp(node)

    def _differentiate_item(self, node: Node) -> None:
        source, index = node.args
        name = source.target._opname
        if rule := PICKED.get(name):
            rule(self, node, source, index)
        else:
            self.mapped_linear(node, source, index)

    def _cast(self, node: Node) -> None:
        dtype = node.meta["val"].dtype
        if dtype == node.args[0].meta["val"].dtype:
            self.forms[node] = self.forms[node.args[0]]
        else:
            self.linear(node, node.args[0], lambda k, t, c: t[0].to(dtype))

    def _pointwise(self, node: Node) -> None:
        form: Form = {}
        for index, argument in enumerate(node.args):
            if isinstance(argument, fx.Node) and argument in self.forms:
                coefficient = self._derivative(node, index)
                held = self._held_forms.get(argument)
                combined = self.forms[argument] if held is None else {held: Coefficient()}
                for base, inner in combined.items():
                    product = self._times(coefficient, inner, node)
                    form[base] = self._plus(form[base], product, node) if base in form else product
        if any(isinstance(a, fx.Node) and a in self.forms for a in node.kwargs.values()):
            raise Untraceable(f"{node.target} has a differentiable keyword")
        self.forms[node] = form
        if len(form) > _MOST_TERMS or (
            len(form) > 1 and len(node.users) > 1
        ):  # or each user would sum them again
            self.held(node)

    def _derivative(self, node: Node, index: int) -> Coefficient:
        """d node / d args[index], elementwise."""
        name, args = node.target._opname, node.args
        if name in ("add", "sub", "rsub"):
            alpha = float(node.kwargs.get("alpha", 1))
            minus = {"add": (1.0, alpha), "sub": (1.0, -alpha), "rsub": (-alpha, 1.0)}[name]
            return Coefficient(minus[index])
        if name == "neg":
            return Coefficient(-1.0)
        if name == "mul":
            other = args[1 - index]
            return (
                Coefficient(1.0, other) if isinstance(other, fx.Node) else Coefficient(float(other))
            )
        if name == "div" and index == 0 and not isinstance(args[1], fx.Node) and not node.kwargs:
            return Coefficient(1.0 / float(args[1]))
        return Coefficient(
            1.0,
            self.insert(_derivative_values, (node.target, index, args, dict(node.kwargs)), node),
        )

    def insert(
        self, function: Callable[..., Any], args: tuple[Any, ...], like: Node, shape: Any = None
    ) -> Node:
        """A constant computed from earlier values, of ``like``'s dtype and, unless given, shape."""
        with self.graph.inserting_after(self._at):
            new = self.graph.call_function(function, args)
        value = like.meta["val"]
        new.meta["val"] = value.new_empty(value.shape if shape is None else shape)
        self._at = new
        return new

    def _times(self, outer: Coefficient, inner: Coefficient, node: Node) -> Coefficient:
        factor = outer.factor * inner.factor
        if outer.node is None or inner.node is None:
            return Coefficient(factor, outer.node if inner.node is None else inner.node)
        key = (outer.node, inner.node)
        if key not in self._products:
            shape = torch.broadcast_shapes(
                outer.node.meta["val"].shape, inner.node.meta["val"].shape
            )
            self._products[key] = self.insert(_ATEN.mul.Tensor, key, node, shape)
        return Coefficient(factor, self._products[key])

    def _plus(self, one: Coefficient, two: Coefficient, node: Node) -> Coefficient:
        if one.node is two.node:
            return Coefficient(one.factor + two.factor, one.node)
        shapes = [c.node.meta["val"].shape if c.node is not None else () for c in (one, two)]
        terms = (one.factor, one.node, two.factor, two.node)
        return Coefficient(
            1.0, self.insert(_weighted_sum, terms, node, torch.broadcast_shapes(*shapes))
        )

    # ------------------------------------------------------------------------------------------------ steps
    def step(  # the methods below are what rules are written with
        self,
        like: Node,
        inputs: Sequence[Base],
        constants: Sequence[Node],
        call: Call,
        view: bool = False,
    ) -> Base:
        base = Base(tuple(like.meta["val"].shape), like.meta["val"].dtype)
        self.steps.append(Step(base, tuple(inputs), tuple(constants), call, view))
        return base

    def held(self, node: Node) -> Base:
        """The tangent of ``node`` as one base of its full shape."""
        if node in self._held_forms:
            return self._held_forms[node]
        form, shape = self.forms[node], tuple(node.meta["val"].shape)
        (base, coefficient), *others = form.items()
        if (
            others
            or coefficient != Coefficient()
            or base.shape != shape
            or base.dtype != node.meta["val"].dtype
        ):
            constants = [c.node for c in form.values() if c.node is not None]
            call = weighted(shape, node.meta["val"].dtype, list(form.items()))
            base = self.step(node, list(form), constants, call)
        self._held_forms[node] = base
        return base

    def _scaled(self, node: Node) -> tuple[Base, float]:
        """The tangent of ``node`` as a number times one base of its full shape."""
        if node not in self._held_forms and len(self.forms[node]) == 1:
            ((base, coefficient),) = self.forms[node].items()
            if coefficient.node is None and base.shape == tuple(node.meta["val"].shape):
                return base, coefficient.factor
        return self.held(node), 1.0

    def linear(
        self,
        node: Node,
        argument: Node,
        call: Call,
        constants: Sequence[Node] = (),
        view: bool = False,
    ) -> None:
        base, factor = self._scaled(argument)
        self.forms[node] = {self.step(node, [base], constants, call, view): Coefficient(factor)}

    def bilinear(
        self, node: Node, pair: Sequence[Node | None], constants: Sequence[Node], call: Call
    ) -> None:
        """``call`` takes the tangents of ``pair``, None where a tangent is zero."""
        active = [argument if argument in self.forms else None for argument in pair]
        scaled = [self._scaled(argument) if argument is not None else None for argument in active]
        factors = {s[1] for s in scaled if s is not None}
        if len(factors) > 1:
            scaled = [(self.held(a), 1.0) if a is not None else None for a in active]
            factors = {1.0}
        places = [i for i, s in enumerate(scaled) if s is not None]

        def placed(k: int, tangents: list[Tensor | None], values: list[Any]) -> Tensor:
            full: list[Tensor | None] = [None] * len(pair)
            for place, tangent in zip(places, tangents, strict=True):
                full[place] = tangent
            return call(k, full, values)

        inputs = [s[0] for s in scaled if s is not None]
        self.forms[node] = {self.step(node, inputs, constants, placed): Coefficient(factors.pop())}

    def several(
        self, node: Node, active: Sequence[Node], call: Call, constants: Sequence[Node] = ()
    ) -> None:
        """``call`` takes the tangents of all ``active`` arguments, None where a program has none."""
        inputs = [self.held(argument) for argument in active]
        self.forms[node] = {self.step(node, inputs, constants, call): Coefficient()}

    def mapped_linear(
        self, node: Node, source: Node | None = None, index: int | None = None
    ) -> None:
        """An operation linear in its one active argument, by torch.vmap over the probes."""
        source = node if source is None else source
        active = [a for a in source.all_input_nodes if a in self.forms]
        if source.target._opname in _FIRST_ONLY:
            active = [a for a in active if a is source.args[0]]
            if not active:
                return
        if len(active) != 1:
            raise Untraceable(
                f"no rule for {source.target} with {len(active)} differentiable arguments"
            )
        others = [a for a in source.all_input_nodes if a is not active[0]]
        op, args, kwargs = (
            source.target,
            source.args,
            source.kwargs,
        )  # a node that nothing needs loses its arguments

        def call(k: int, tangents: list[Tensor], values: list[Any]) -> Tensor:
            known = dict(zip(others, values, strict=True))

            def single(tangent: Tensor) -> Any:
                at = known | {active[0]: tangent}
                found = op(*map_arg(args, at.__getitem__), **map_arg(kwargs, at.__getitem__))
                return found if index is None else found[index]

            return torch.vmap(single)(tangents[0])

        self.linear(node, active[0], call, others)

    def _by_jvp(self, node: Node) -> None:
        """Any other operation with one result, by its own forward derivative."""
        active = [a for a in node.all_input_nodes if a in self.forms]
        others = [a for a in node.all_input_nodes if a not in active]
        op, args, kwargs = node.target, node.args, node.kwargs

        def call(k: int, tangents: list[Tensor | None], values: list[Any]) -> Tensor:
            primals, known = (
                values[: len(active)],
                dict(zip(others, values[len(active) :], strict=True)),
            )
            live = [i for i, t in enumerate(tangents) if t is not None]

            def function(*moving: Tensor) -> Tensor:
                at = known | dict(zip(active, primals, strict=True))
                at |= {active[i]: value for i, value in zip(live, moving, strict=True)}
                return op(*map_arg(args, at.__getitem__), **map_arg(kwargs, at.__getitem__))

            def tangent(*moving: Tensor) -> Tensor:
                return torch.func.jvp(function, tuple(primals[i] for i in live), moving)[1]

            return torch.vmap(tangent)(*(t for t in tangents if t is not None))

        self.several(node, active, call, [*active, *others])


def _tensors(node: Node) -> list[Tensor]:
    value = node.meta.get("val")
    return [
        v for v in (value if isinstance(value, tuple | list) else [value]) if isinstance(v, Tensor)
    ]


def _storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def _derivative_values(op: Any, index: int, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """Elementwise derivative of an elementwise operation with respect to one argument, in the result's shape."""
    with torch.enable_grad():
        shape = torch.broadcast_shapes(*(a.shape for a in args if isinstance(a, Tensor)))
        argument = args[index].expand(shape).detach().requires_grad_()
        result = op(*args[:index], argument, *args[index + 1 :], **kwargs)
        if not result.requires_grad:
            return torch.zeros_like(argument)
        return torch.autograd.grad(result, argument, torch.ones_like(result))[0]


def _weighted_sum(factor: float, value: Any, other_factor: float, other: Any) -> Any:
    one = factor if value is None else factor * value
    return one + (other_factor if other is None else other_factor * other)
