"""How a model is evaluated: so that second derivatives exist, and so that it comes back unchanged.

Every context manager here sees to one concern and puts back what it changed, also after an
exception; :func:`evaluating` enters them all.
"""

import contextlib
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._C import DispatchKey
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import checkpoint

from hessian_tools.problem.kernels import twice_differentiable_kernels

# implementations by transformers that have no second derivative, or only on some devices
ONCE_DIFFERENTIABLE_ATTENTION = (
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
)
ONCE_DIFFERENTIABLE_EXPERTS = ("grouped_mm", "sonicmoe", "deepgemm")
# model types of transformers whose layers write the states that they keep in place
STATES_IN_PLACE = ("rwkv",)


@contextlib.contextmanager
def evaluating(
    model: nn.Module,
    batch_stats: bool | None,
    modes: Mapping[nn.Module, bool] | None = None,
) -> Iterator[None]:
    """``model`` as it is differentiated; derivatives are taken inside, too.

    ``modes``: in training (True) or not, by module; None as they are.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(in_modes(modes or {}))
        stack.enter_context(dense_gradients(model))
        stack.enter_context(buffers_put_back(model))
        stack.enter_context(batch_norm_mode(model, batch_stats))
        stack.enter_context(twice_differentiable_attention(model))
        stack.enter_context(twice_differentiable_experts(model))
        if _writes_states_in_place(model):
            # the backward pass needs the states as they were
            stack.enter_context(without_cache(model))
        stack.enter_context(twice_differentiable_kernels())
        stack.enter_context(uncompiled())
        stack.enter_context(dense_flex_attention())
        stack.enter_context(fast_path_off())
        stack.enter_context(reentrant_checkpoints_off())
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(cudnn_off())
        # the fused kernels of scaled_dot_product_attention have no second derivative
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


@contextlib.contextmanager
def buffers_put_back(model: nn.Module) -> Iterator[None]:
    """What happens to the values of buffers inside is undone."""
    before = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, version, value in before:
                # writing raises the version, which a graph that has saved the buffer would refuse
                if buffer._version != version:
                    buffer.copy_(value)


@contextlib.contextmanager
def in_modes(modes: Mapping[nn.Module, bool]) -> Iterator[None]:
    """Modules in training, or not, as given; their own modes are put back."""
    before = {module: module.training for module in modes}
    try:
        for module, training in modes.items():
            module.training = training
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextlib.contextmanager
def dense_gradients(model: nn.Module) -> Iterator[None]:
    """Embeddings with dense gradients: sparse ones have no derivatives of their own."""
    kinds = nn.Embedding | nn.EmbeddingBag
    switched = [m for m in model.modules() if isinstance(m, kinds) and m.sparse]
    try:
        for module in switched:
            module.sparse = False
        yield
    finally:
        for module in switched:
            module.sparse = True


@contextlib.contextmanager
def batch_norm_mode(model: nn.Module, batch_stats: bool | None) -> Iterator[None]:
    """BatchNorm by each batch's own statistics (True), by the running ones (False), or as it is.

    The running statistics never change.
    """
    norms = [] if batch_stats is None else list(batch_norms(model).values())
    before = [(norm, norm.training, norm.track_running_stats) for norm in norms]
    try:
        for norm in norms:
            norm.training = bool(batch_stats)
            if batch_stats:
                # without tracking, neither the running statistics nor their counter is touched
                norm.track_running_stats = False
        yield
    finally:
        for norm, training, tracking in before:
            norm.training = training
            norm.track_running_stats = tracking


@contextlib.contextmanager
def twice_differentiable_attention(model: nn.Module) -> Iterator[None]:
    """Models of transformers use a kernel of PyTorch where theirs has no second derivative."""
    with _switched(model, "_attn_implementation", ONCE_DIFFERENTIABLE_ATTENTION, "sdpa"):
        yield


@contextlib.contextmanager
def twice_differentiable_experts(model: nn.Module) -> Iterator[None]:
    """Mixtures of experts of transformers compute one expert after the other.

    Their grouped products, the default since transformers 5, have no second derivative.
    """
    with _switched(model, "_experts_implementation", ONCE_DIFFERENTIABLE_EXPERTS, "eager"):
        yield


@contextlib.contextmanager
def _switched(
    model: nn.Module,
    setting: str,
    from_any: Collection[str],
    to: str,
) -> Iterator[None]:
    # the setting itself is a property that would also be set in all configs below
    place = f"{setting}_internal"
    configs = [config for config in transformers_configs(model) if hasattr(config, place)]
    before = [(config, getattr(config, place)) for config in configs]
    switched = [(config, value) for config, value in before if value in from_any]
    try:
        for config, _ in switched:
            setattr(config, place, to)
        yield
    finally:
        for config, value in switched:
            setattr(config, place, value)


def _writes_states_in_place(model: nn.Module) -> bool:
    kinds = [getattr(config, "model_type", None) for config in transformers_configs(model)]
    return any(kind in STATES_IN_PLACE for kind in kinds)


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """No cache of keys, values or states in models of transformers.

    Not where there is no need: without one they look into the data for packed sequences, and a
    device makes the host wait.
    """
    configs = transformers_configs(model)
    caching = [config for config in configs if getattr(config, "use_cache", None) is True]
    try:
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True


@contextlib.contextmanager
def dense_flex_attention() -> Iterator[None]:
    """PyTorch's flex_attention by the products that define it, on the CPU as well.

    Its kernels have one derivative on a GPU and none on a CPU.
    """
    module: Any = sys.modules.get("torch.nn.attention.flex_attention")
    # nothing can have called it, or a version of PyTorch that keeps it in another way refuses
    if module is None or not hasattr(module, "_validate_device"):
        yield
        return
    operator = module.flex_attention_hop
    kernels = operator.py_kernels
    whole, check = kernels[DispatchKey.Autograd], module._validate_device
    try:
        kernels[DispatchKey.Autograd] = kernels[DispatchKey.CompositeExplicitAutograd]
        operator._dispatch_cache.clear()
        module._validate_device = lambda *_: None
        yield
    finally:
        kernels[DispatchKey.Autograd] = whole
        operator._dispatch_cache.clear()
        module._validate_device = check


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """What torch.compile has compiled runs as it was written: its backward pass has no other."""
    # nothing is compiled where the compiler is not even loaded, which takes seconds
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        # counting operations puts hooks on modules, which matters only where something is compiled
        warnings.filterwarnings("ignore", message="Using `torch.compile.module.` when there are")
        yield


@contextlib.contextmanager
def fast_path_off() -> Iterator[None]:
    """Without the fused inference kernels of nn.MultiheadAttention and nn.TransformerEncoder."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


class _NotReentrant:
    """Stands for torch's Function of reentrant checkpointing, and checkpoints the other way."""

    @staticmethod
    def apply(function: Callable[..., object], keep_random_state: bool, *args: object) -> object:
        return checkpoint.checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=keep_random_state
        )


@contextlib.contextmanager
def reentrant_checkpoints_off() -> Iterator[None]:
    """``torch.utils.checkpoint`` without reentrant passes, even where a model asks for them.

    Their backward is a pass of its own, of which ``autograd.grad`` and second derivatives see
    nothing.
    """
    reentrant = checkpoint.CheckpointFunction
    checkpoint.CheckpointFunction = _NotReentrant  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        checkpoint.CheckpointFunction = reentrant  # type: ignore[misc]


@contextlib.contextmanager
def cudnn_off() -> Iterator[None]:
    """Without cuDNN, whose recurrent layers have no second derivative."""
    # torch.backends.cudnn.flags would also switch TF32 on, and raises where the process has set
    # TF32 by operation
    enabled = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


def transformers_configs(model: nn.Module) -> list[Any]:
    """The configs that modules of transformers share; Any, as that library is optional."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    return list({id(config): config for config in configs if config is not None}.values())


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers of ``model`` by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}


def stated_batch_stats(model: nn.Module, batch_stats: bool | None) -> bool | None:
    """``batch_stats`` as it applies to ``model``: None without BatchNorm.

    Where no BatchNorm layer has running statistics, batch statistics are the only choice. Raises
    ValueError where there is a choice and ``batch_stats`` is None.
    """
    norms = batch_norms(model)
    if not norms:
        return None
    if batch_stats is not None:
        if not isinstance(batch_stats, bool):  # a word such as "running" would count as True
            raise ValueError(
                f"batch_stats is {batch_stats!r}; pass True (each batch's own statistics, as in "
                "training) or False (the running ones)"
            )
        return batch_stats
    if any(norm.track_running_stats for norm in norms.values()):
        first = next(iter(norms)) or "the model itself"
        raise ValueError(
            f"model has BatchNorm ({first} and {len(norms) - 1} more); say batch_stats=True (each "
            "batch's own statistics, as in training) or batch_stats=False (the running ones)"
        )
    return True
