"""The table of rules: how to differentiate an operation, by its name in ATen.

To teach the package another operation, write a rule beside those of its kind (``products``,
``shapes``, ``layers``) with what the builder offers
(:mod:`hessian_tools.curvature.tangent.builder`), and enter it here. Most operations need none:
elementwise ones are differentiated by autograd, all others by torch's own forward derivative.
"""

from operator import getitem

import torch
from torch._ops import OpOverload

from hessian_tools.curvature.tangent import layers, products, shapes
from hessian_tools.curvature.tangent.builder import Rule
from hessian_tools.curvature.tangent.elementwise import elementwise
from hessian_tools.curvature.tangent.generic import by_jvp, by_vmap, by_vmap_of_first
from hessian_tools.curvature.tangent.graph import Node, Untraceable, arguments, name_of

_IDENTITY = "clone alias detach lift_fresh lift_fresh_copy".split()
_CONSTANT = """
    full_like zeros_like ones_like empty_like new_zeros new_ones new_full new_empty
""".split()
_RESHAPED = "view _unsafe_view squeeze unsqueeze".split()
# elementwise, but not tagged so in all versions of torch
_ELEMENTWISE = "gelu_backward threshold_backward where masked_fill".split()
# linear in their one moving argument; torch.vmap knows them
_LINEAR = """
    slice slice_backward select select_backward split split_with_sizes unbind scatter
    index index_select gather flip roll repeat constant_pad_nd unfold unfold_backward im2col col2im
    diagonal diagonal_backward trace tril triu cumsum pixel_shuffle
    avg_pool2d _adaptive_avg_pool2d upsample_nearest2d upsample_bilinear2d
""".split()

RULES: dict[str, Rule] = {
    **dict.fromkeys(_IDENTITY, shapes.identity),
    **dict.fromkeys(_CONSTANT, shapes.nothing),
    **dict.fromkeys(_RESHAPED, shapes.reshape),
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    **dict.fromkeys(_LINEAR, by_vmap),
    "avg_pool2d_backward": by_vmap_of_first,
    "_adaptive_avg_pool2d_backward": by_vmap_of_first,
    "_to_copy": shapes.cast,
    "as_strided": shapes.strided,
    "permute": shapes.permute,
    "expand": shapes.expand,
    "copy": shapes.copy,
    "cat": shapes.cat,
    "slice_scatter": shapes.slice_scatter,
    "mm": products.matrix_product,
    "bmm": products.batched_product,
    "convolution": products.convolution,
    "sum": layers.reduction,
    "mean": layers.reduction,
    "_softmax": layers.softmax,
    "_log_softmax": layers.log_softmax,
    "embedding": layers.embedding,
    "embedding_dense_backward": layers.embedding_gradient,
    "max_pool2d_with_indices_backward": layers.max_pool_gradient,
}

# operations with several results: a rule for the node ``getitem(source, index)`` that picks one
PICKED: dict[str, Rule] = {
    **dict.fromkeys(_LINEAR, by_vmap),
    "convolution_backward": products.convolution_gradient,
    "max_pool2d_with_indices": layers.max_pool,
}


def rule_of(node: Node) -> Rule:
    """The rule for an operation, or for one result of an operation with several.

    Raises:
        Untraceable: where there is none.
    """
    op = node.target
    if op is getitem:
        return PICKED[name_of(arguments(node)[0])]
    if not isinstance(op, OpOverload):
        raise Untraceable(f"no rule for {op}")
    name = name_of(node)
    if isinstance(node.meta["val"], tuple | list):
        if name not in PICKED:
            raise Untraceable(f"no rule for {op}, which has several results")
        return shapes.nothing  # each result is differentiated where it is picked
    by_torch = elementwise if torch.Tag.pointwise in op.tags else by_jvp
    return RULES.get(name, by_torch)
