"""The registry: optimizers by name, each with its source, its published settings and its grid.

    make("adamw", model, 3e-3)
    make("blockwise_sgd", problem, 1.0, partition=ht.partition(model, "tensor"))

``lr`` and ``betas`` of an entry are those published where anyone published them, most by Zhao et
al., "Deconstructing What Makes a Good Optimizer for Language Models" (arXiv 2407.07972), whose
half-decade grids these are too. A grid is where a sweep begins; it goes on beyond an edge that is
best.

Signum, Lion and SOAP are those of the library pytorch_optimizer, whose trajectories are those of
the papers. It comes with ``pip install 'hessian_tools[training]'``. Lion with two equal betas is
Signum: c <- b m + (1 - b) g is then the new average, whose sign is the step. SOAP is determined but
for the basis of the null space that the first gradient's factors have, which they do unless it is
square: there any two bases part by about a percent in 25 steps.

``momentum`` is b1 of an optimizer that has two, b of one that has one.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import nn

from hessian_tools.blocks.partition import Partition
from hessian_tools.optimizers.adafactor import Adafactor
from hessian_tools.optimizers.adam_family import PRESETS
from hessian_tools.optimizers.blockwise_adam import BlockwiseAdam
from hessian_tools.optimizers.blockwise_sgd import BlockwiseSGD
from hessian_tools.optimizers.muon import muon_with_adamw
from hessian_tools.optimizers.shampoo import Shampoo
from hessian_tools.problem.problem import Problem

Options = dict[str, object]
LIBRARY = "pytorch_optimizer"


@dataclass(frozen=True)
class Request:
    """What an optimizer is made of."""

    name: str
    model: nn.Module
    problem: Problem | None
    partition: Partition | None
    options: Options  # lr, weight_decay, betas or momentum, and the optimizer's own

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained."""
        return [p for p in self.model.parameters() if p.requires_grad]


Build = Callable[[Request], torch.optim.Optimizer]


@dataclass(frozen=True)
class Entry:
    """One optimizer."""

    name: str
    line: str  # what it is
    source: str
    lr: float
    betas: tuple[float, ...]  # (b1, b2), (b,), or () without momentum
    grid: tuple[float, ...]  # half-decades, ascending
    build: Build
    takes_partition: bool = False
    extra: str = ""  # of this package, that has to be installed for it


def make(
    name: str,
    model_or_problem: nn.Module | Problem,
    lr: float | None = None,
    *,
    partition: Partition | None = None,
    weight_decay: float = 0.0,
    momentum: float | None = None,
    **options: object,
) -> torch.optim.Optimizer:
    """The optimizer ``name`` of all trainable parameters of a model.

    Args:
        name: one of OPTIMIZERS.
        model_or_problem: "blockwise_sgd" needs the Problem, for its curvature.
        lr: default the entry's.
        partition: of those that have blocks.
        weight_decay: decoupled but for "sgd", "sgd_nesterov", "adam" and "adagrad", where torch
            adds it to the gradient.
        momentum: default the first of the entry's betas.
        options: the optimizer's own arguments; ``betas`` where it has two.

    Raises:
        ValueError: an unknown name; a partition or a Problem that is missing, or of no use;
            momentum where there is none; what the optimizer itself refuses.
        TypeError: an option that it does not have.
        ImportError: it needs a library that is not installed.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"no optimizer is named {name!r}; there are {', '.join(OPTIMIZERS)}")
    entry = OPTIMIZERS[name]
    if partition is not None and not entry.takes_partition:
        takers = [other.name for other in OPTIMIZERS.values() if other.takes_partition]
        raise ValueError(f"{name} has no blocks to take from partition; {', '.join(takers)} have")
    settings: Options = {"lr": entry.lr if lr is None else lr, "weight_decay": weight_decay}
    problem = model_or_problem if isinstance(model_or_problem, Problem) else None
    request = Request(
        name=name,
        model=problem.model if problem is not None else _model(model_or_problem),
        problem=problem,
        partition=partition,
        options=settings | _momenta(entry, momentum, options) | options,
    )
    return entry.build(request)


def half_decades(lowest: int, highest: int) -> tuple[float, ...]:
    """10^lowest to 10^highest."""
    return tuple(10 ** (half / 2) for half in range(2 * lowest, 2 * highest + 1))


def _model(given: object) -> nn.Module:
    if isinstance(given, nn.Module):
        return given
    raise TypeError(f"model_or_problem is a {type(given).__name__}; pass the model or a Problem")


def _momenta(entry: Entry, momentum: float | None, options: Mapping[str, object]) -> Options:
    """``betas`` or ``momentum``, as the optimizer takes them."""
    if momentum is not None and not entry.betas:
        raise ValueError(f"momentum is {momentum}, and {entry.name} has none; leave it out")
    if momentum is not None and "betas" in options:
        raise ValueError(
            f"momentum is {momentum} and betas {options['betas']}, whose first it is; pass one"
        )
    if not entry.betas or "betas" in options:
        return {}
    first = entry.betas[0] if momentum is None else momentum
    if len(entry.betas) == 1:
        return {"momentum": first}
    return {"betas": (first, *entry.betas[1:])}


def _checked(request: Request, target: Callable[..., object]) -> Options:
    """The options, all of them arguments of ``target``: libraries swallow what they do not know."""
    known = set(inspect.signature(target).parameters)
    unknown = sorted(request.options.keys() - known)
    if unknown:
        own = sorted(known - {"self", "params", "model", "kwargs", "options"})
        raise TypeError(
            f"{request.name} has no option {', '.join(unknown)}; it has {', '.join(own)}"
        )
    return request.options


# ------------------------------------------------------------------------------------- how made


def _over_parameters(kind: Callable[..., torch.optim.Optimizer], **fixed: object) -> Build:
    """A class that takes parameters, ``fixed`` being its defaults here."""

    def build(request: Request) -> torch.optim.Optimizer:
        return kind(request.parameters, **(fixed | _checked(request, kind)))

    return build


def _preset(name: str) -> Build:
    """Of BlockwiseAdam's family, which has its own defaults."""

    def build(request: Request) -> torch.optim.Optimizer:
        options = request.options
        if request.partition is not None:
            options = options | {"partition": request.partition}
        return PRESETS[name](request.model, **options)

    return build


def _blockwise_adam(request: Request) -> torch.optim.Optimizer:
    if request.partition is None:
        raise ValueError(
            "blockwise_adam needs partition=, such as ht.partition(model, 'adam_mini')"
        )
    options = _checked(request, BlockwiseAdam)
    make_one: Callable[..., torch.optim.Optimizer] = BlockwiseAdam
    return make_one(request.model, request.partition, **options)


def _blockwise_sgd(request: Request) -> torch.optim.Optimizer:
    if request.problem is None or request.partition is None:
        raise ValueError(
            "blockwise_sgd measures the curvature of blocks: pass a Problem in place of the model, "
            "and partition=, such as ht.partition(model, 'tensor')"
        )
    make_one: Callable[..., torch.optim.Optimizer] = BlockwiseSGD
    return make_one(request.problem, request.partition, **_checked(request, BlockwiseSGD))


def _muon(request: Request) -> torch.optim.Optimizer:
    make_one: Callable[..., torch.optim.Optimizer] = muon_with_adamw
    return make_one(request.model, **_checked(request, muon_with_adamw))


def _from_library(kind: str) -> Build:
    """A class of pytorch_optimizer."""

    def build(request: Request) -> torch.optim.Optimizer:
        return _over_parameters(getattr(_library(request.name), kind))(request)

    return build


def _signum(request: Request) -> torch.optim.Optimizer:
    lion = _library(request.name).Lion
    beta = request.options.pop("momentum")
    options = request.options | {"betas": (beta, beta)}
    made: torch.optim.Optimizer = lion(
        request.parameters, **_checked(Request(**(vars(request) | {"options": options})), lion)
    )
    return made


def _library(name: str) -> ModuleType:
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise ImportError(
            f"{name} is that of the library {LIBRARY}, which is not installed: "
            "pip install 'hessian_tools[training]'"
        ) from error
    found: ModuleType = pytorch_optimizer
    return found


# -------------------------------------------------------------------------------------- the list

ZHAO = "Zhao et al., arXiv 2407.07972"
MINI = "Zhang et al., arXiv 2406.16793"
_ADAM = half_decades(-4, 0)
_SIGN = half_decades(-5, -1)
_SGD = half_decades(-3, 1)
_BETAS = (0.9, 0.95)
_ENTRIES = (
    Entry(
        "sgd",
        "SGD with heavy-ball momentum",
        ZHAO,
        1.0,
        (0.98,),
        _SGD,
        _over_parameters(torch.optim.SGD),
    ),
    Entry(
        "sgd_nesterov",
        "SGD with Nesterov's momentum",
        "Sutskever et al., ICML 2013",
        1.0,
        (0.98,),
        _SGD,
        _over_parameters(torch.optim.SGD, nesterov=True),
    ),
    Entry(
        "adam",
        "Adam; weight decay, if any, in the gradient",
        "Kingma & Ba, arXiv 1412.6980; settings of " + ZHAO,
        3.16e-3,
        _BETAS,
        _ADAM,
        _over_parameters(torch.optim.Adam, eps=1e-15),
    ),
    Entry(
        "adamw",
        "Adam with decoupled weight decay",
        "Loshchilov & Hutter, arXiv 1711.05101; settings of " + ZHAO,
        3.16e-3,
        _BETAS,
        _ADAM,
        _over_parameters(torch.optim.AdamW, eps=1e-15),
    ),
    Entry(
        "adagrad",
        "Adagrad, diagonal",
        "Duchi, Hazan & Singer, JMLR 12 (2011); torch's rate",
        1e-2,
        (),
        _ADAM,
        _over_parameters(torch.optim.Adagrad),
    ),
    Entry(
        "muon",
        "Muon for matrices inside the model, AdamW at the same rate for the rest",
        "Jordan et al. 2024; Liu et al., arXiv 2502.16982; rate of Adam",
        3.16e-3,
        (0.95,),
        _ADAM,
        _muon,
    ),
    Entry(
        "signum",
        "the sign of an average of gradients",
        "Bernstein et al., arXiv 1802.04434; rate of " + ZHAO,
        3.16e-4,
        (0.9,),
        _SIGN,
        _signum,
        extra="training",
    ),
    Entry(
        "lion",
        "the sign of one average of gradients, while another is kept",
        "Chen et al., arXiv 2302.06675; settings of " + ZHAO,
        3.16e-4,
        _BETAS,
        _SIGN,
        _from_library("Lion"),
        extra="training",
    ),
    Entry(
        "soap",
        "Adam in Shampoo's eigenbasis; its first step only sets that up",
        "Vyas et al., arXiv 2409.11321",
        3e-3,
        (0.95, 0.95),
        _ADAM,
        _from_library("SOAP"),
        extra="training",
    ),
    Entry(
        "adafactor",
        "Adam with a second moment of rank one",
        ZHAO,
        3.16e-3,
        _BETAS,
        _ADAM,
        _over_parameters(Adafactor),
    ),
    Entry(
        "shampoo",
        "Shampoo, power 1/4, of averages",
        "Gupta, Koren & Singer, arXiv 1802.09568; no rate published",
        3.16e-3,
        _BETAS,
        _ADAM,
        _over_parameters(Shampoo),
    ),
    Entry(
        "shampoo2",
        "Shampoo, power 1/2, of averages, with the trace",
        "Morwani et al., arXiv 2406.17748; no rate published",
        3.16e-3,
        _BETAS,
        _ADAM,
        _over_parameters(Shampoo, power=0.5, trace=True),
    ),
    Entry(
        "blockwise_sgd",
        "SGD with a measured rate a block, lr / largest |Ritz value|",
        MINI + "; no rate published",
        1e-2,
        (0.9,),
        half_decades(-4, 0),
        _blockwise_sgd,
        takes_partition=True,
    ),
    Entry(
        "blockwise_adam",
        "Adam with a second moment a block of a partition",
        MINI,
        3.16e-3,
        _BETAS,
        _ADAM,
        _blockwise_adam,
        takes_partition=True,
    ),
    Entry(
        "adam_mini",
        "Adam with a second moment a block, Algorithm 3 unless partition is given",
        MINI + "; rate of Adam",
        3.16e-3,
        (0.9, 0.999),
        _ADAM,
        _preset("adam_mini"),
        takes_partition=True,
    ),
    Entry(
        "adalayer",
        "Adam with a second moment a tensor",
        ZHAO,
        3.16e-3,
        _BETAS,
        _ADAM,
        _preset("adalayer"),
    ),
    Entry(
        "adalayer_star",
        "Adalayer with query, key and value apart and a second moment a logit",
        ZHAO,
        3.16e-3,
        _BETAS,
        _ADAM,
        _preset("adalayer_star"),
    ),
    Entry(
        "sgd_adalayer",
        "SGD of averages; Adalayer* on last layer and norms at a rate of its own",
        ZHAO,
        1.0,
        _BETAS,
        _SGD,
        _preset("sgd_adalayer"),
    ),
    Entry(
        "frozen_adalayer",
        "Adalayer* whose second moments stay after 1000 steps at rest",
        ZHAO,
        3.16e-3,
        _BETAS,
        _ADAM,
        _preset("frozen_adalayer"),
    ),
)
OPTIMIZERS: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}
