"""Operations of PyTorch whose second derivative is missing or wrong, and what is used instead.

The table is what ``python experiments/twice_differentiable.py`` finds with gradgradcheck;
docs/evidence/twice_differentiable.md lists all operations tried, with the version of PyTorch. For a
call, :func:`twice_differentiable_kernels` gives the composite formulas to PyTorch's dispatcher.
That catches an operation by whatever door it is called (``torch.nn.functional``, a module,
TorchScript, a name imported earlier, a checkpoint that runs again in the backward pass) and costs
other operations nothing; a TorchFunctionMode would miss the last two and slow everything.
"""

import contextlib
import functools
import importlib
import importlib.util
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from hessian_tools.problem import composites

# dispatch keys, at which PyTorch has
AUTOGRAD = "Autograd"  # a kernel together with its derivative
IMPLICIT = "CompositeImplicitAutograd"  # a formula of other operators
CHUNKED = "torch.nn.modules.linear_cross_entropy"  # in newer versions only


@dataclass(frozen=True)
class Replacement:
    """An operator of PyTorch with the formula that is used instead of it.

    ``fault`` says what PyTorch makes of the second derivative: "wrong" or "missing". The operator
    may be itself a backward pass, which is then all that has no derivative.
    """

    operation: str  # the name that users know
    fault: str
    operator: str
    formula: Callable[..., object]
    key: str = AUTOGRAD


REPLACEMENTS = (
    Replacement("weight_norm", "wrong", "aten::_weight_norm_interface", composites.weight_norm),
    Replacement(
        "scaled_dot_product_attention",
        "missing",
        "aten::scaled_dot_product_attention",
        composites.attention,
        IMPLICIT,
    ),
    Replacement(
        "linear_cross_entropy",
        "wrong",
        "torch_nn::_linear_cross_entropy_batch_chunked",
        composites.linear_cross_entropy,
    ),
    Replacement(
        "linear_cross_entropy",
        "missing",
        "torch_nn::_linear_cross_entropy_batch_chunked_no_reduction",
        composites.linear_cross_entropies,
    ),
    # by cuDNN wrong: its loss' gradient counts as a constant
    Replacement("ctc_loss", "missing", "aten::ctc_loss.IntList", composites.ctc_loss, IMPLICIT),
    Replacement("ctc_loss", "missing", "aten::ctc_loss.Tensor", composites.ctc_loss, IMPLICIT),
    Replacement(
        "hardsigmoid",
        "missing",
        "aten::hardsigmoid_backward",
        composites.hardsigmoid_backward,
    ),
    Replacement(
        "multi_margin_loss",
        "missing",
        "aten::multi_margin_loss",
        composites.multi_margin_loss,
    ),
    Replacement(
        "multilabel_margin_loss",
        "missing",
        "aten::multilabel_margin_loss_forward",
        composites.multilabel_margin_loss,
    ),
    Replacement("cdist", "missing", "aten::_cdist_forward", composites.cdist),
    Replacement("pdist", "missing", "aten::_pdist_forward", composites.pdist),
    Replacement(
        "embedding_bag",
        "missing",
        "aten::_embedding_bag_backward",
        composites.embedding_bag_backward,
    ),
    Replacement(
        "embedding_bag",
        "missing",
        "aten::_embedding_bag_per_sample_weights_backward",
        composites.embedding_bag_weights_backward,
    ),
    Replacement("segment_reduce", "missing", "aten::segment_reduce", composites.segment_reduce),
    Replacement("grouped_mm", "missing", "aten::_grouped_mm", composites.grouped_mm),
)


@contextlib.contextmanager
def twice_differentiable_kernels() -> Iterator[None]:
    """The formulas of ``REPLACEMENTS`` instead of PyTorch's kernels, in the whole process."""
    _FORMULAS.enter()
    try:
        yield
    finally:
        _FORMULAS.leave()


class _Formulas:
    """Registers the formulas for the first who needs them, and removes them after the last."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.libraries: list[torch.library.Library] = []

    def enter(self) -> None:
        with self.lock:
            if not self.users:
                self.libraries = _registered()
            self.users += 1

    def leave(self) -> None:
        with self.lock:
            self.users -= 1
            if not self.users:
                for library in self.libraries:
                    library._destroy()
                self.libraries = []


_FORMULAS = _Formulas()


def _registered() -> list[torch.library.Library]:
    present = _present()
    namespaces = {replacement.operator.partition("::")[0] for replacement in present}
    libraries = {name: torch.library.Library(name, "IMPL") for name in sorted(namespaces)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for replacement in present:
            namespace, _, operator = replacement.operator.partition("::")
            libraries[namespace].impl(operator, replacement.formula, replacement.key)
    return list(libraries.values())


@functools.cache
def _present() -> list[Replacement]:
    """The replacements whose operator this version of PyTorch has."""
    if importlib.util.find_spec(CHUNKED):
        importlib.import_module(CHUNKED)  # defines its operators; PyTorch does so at the first call
    names = set(torch._C._dispatch_get_all_op_names())
    return [replacement for replacement in REPLACEMENTS if replacement.operator in names]
