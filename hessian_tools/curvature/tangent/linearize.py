"""Differentiates a gradient's graph forward, once and for all, and compiles the result.

For fixed weights the map from a tangent of the parameters to the tangent of the gradient, v -> H v,
is linear. It is compiled here from the gradient's graph
(:mod:`hessian_tools.curvature.tangent.graph`) into a list of linear steps:

- What does not depend on v is computed once and kept: operands of matrix products, and the
  coefficients of elementwise chains (:mod:`hessian_tools.curvature.tangent.forms`).
- Matrix products and convolutions accumulate both halves of the product rule into one result, all
  probes in one call where the constant operand is shared.
- A block's product runs only the steps between the block and its own gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import getitem

from torch import fx

from hessian_tools.curvature.tangent.builder import Builder
from hessian_tools.curvature.tangent.constants import Constants, merge_equal
from hessian_tools.curvature.tangent.graph import Trace, arguments, values_of
from hessian_tools.curvature.tangent.program import Program, Scheduled, Step, Tangent
from hessian_tools.curvature.tangent.rules import rule_of


@dataclass(frozen=True, eq=False)
class Linearisation:
    """All steps of a gradient's graph; :meth:`program` picks those between some parameters."""

    steps: list[Step]
    inputs: list[Tangent]  # by parameter
    outputs: list[Tangent | None]  # by parameter: that of its gradient, None for zero
    constants: Constants

    def program(self, parameters: Sequence[int]) -> Program:
        """From the tangents of ``parameters`` (their indices) to those of the same gradients."""
        inputs = [self.inputs[i] for i in parameters]
        outputs = [self.outputs[i] for i in parameters]
        return _compiled(self.steps, inputs, outputs)


def linearize(trace: Trace, num_parameters: int) -> Linearisation:
    """The derivative of a trace, whose graph is taken over, with respect to its parameters.

    Raises:
        Untraceable: for an operation without a rule.
    """
    graph = trace.graph
    builder = Builder(graph)
    # the other inputs are constants: the parameters' twins and the batch's tensors
    given = graph.find_nodes(op="placeholder")
    parameters = given[:num_parameters]
    inputs = [builder.add_input(node) for node in parameters]
    _apply_rules(graph, builder)
    (gradients,) = arguments(graph.output_node())
    outputs = [builder.held(node) if builder.moves(node) else None for node in gradients]
    # steps that lead to no gradient go, and with them constants that only they need
    everything = _compiled(builder.steps, inputs, outputs)
    steps = [scheduled.step for scheduled in everything.steps]
    wanted = list(dict.fromkeys(node for step in steps for node in step.constants))
    if trace.twins:
        twins = given[num_parameters : 2 * num_parameters]
        same = merge_equal(graph, wanted, dict(zip(twins, parameters, strict=True)))
        steps = [replace(step, constants=tuple(same[n] for n in step.constants)) for step in steps]
        wanted = list(dict.fromkeys(same.values()))
    constants = Constants(graph, wanted)
    return Linearisation(steps, inputs, outputs, constants)


def _apply_rules(graph: fx.Graph, builder: Builder) -> None:
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        # one of several results moves if some argument of their operation does
        picks = node.target is getitem
        source = arguments(node)[0] if picks else node
        moving = builder.moving(source.all_input_nodes)
        # integers, such as the places of maxima, have no tangent
        differentiable = any(value.is_floating_point() for value in values_of(node))
        if moving and differentiable:
            builder.move_to(node)
            apply_rule = rule_of(node)
            apply_rule(builder, node)


def _compiled(
    steps: Sequence[Step],
    inputs: list[Tangent],
    outputs: Sequence[Tangent | None],
) -> Program:
    """The steps that lead from some input to some output, each with what is free after it."""
    moving = _moving(steps, inputs)
    reached = [tangent if tangent in moving else None for tangent in outputs]
    # what is read later on; the inputs are the caller's, and never free
    needed = {*inputs, *reached}
    schedule = []
    for step in reversed(steps):
        if step.out not in needed:
            continue
        live = tuple(tangent in moving for tangent in step.inputs)
        used = dict.fromkeys(tangent for tangent in step.inputs if tangent in moving)
        finished = tuple(tangent for tangent in used if tangent not in needed)
        schedule.append(Scheduled(step, live, finished))
        needed.update(used)
    return Program(schedule[::-1], inputs, reached)


def _moving(
    steps: Sequence[Step],
    inputs: Sequence[Tangent],
) -> set[Tangent]:
    """The tangents that depend on some input."""
    moving = set(inputs)
    for step in steps:
        if not moving.isdisjoint(step.inputs):
            moving.add(step.out)
    return moving
