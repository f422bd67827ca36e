"""The layout of an attention module, learnt by running a copy of it on a few random tokens.

Leaves of autograd stand in for its linear layers. A *query* feature acts on its own position only;
*key* and *value* features act on other positions too; where all tokens are alike the result depends
on *value* alone (a mean of equal values is that value, whatever the weights); the query features
behind one feature of the attention's result are one head.

Letters: T tokens, F features of all linear layers together, d features of the attention's result.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import groupby, islice

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hessian_tools.blocks.projection import Projection, linear_features
from hessian_tools.blocks.trial_runs import first_tensor, undisturbed

# Relative; derivatives below are rounding (some models compute in float32 whatever comes in).
TOLERANCE = 1e-6
TOKENS = ((3,), (2, 2))  # tokens to try: a sequence, an image
# A feature's role by what it reaches: 4 its own position, 2 others, 1 its own where all are alike.
_ROLE_OF_CODE = {4: "q", 4 + 2: "k", 4 + 2 + 1: "v"}


def layout_by_behaviour(
    module: nn.Module,
    linears: Mapping[str, nn.Module],
) -> dict[str, Projection]:
    """The projections of ``linears`` (by their paths inside ``module``), with ".weight" or ".bias".

    Empty if the module is no attention.
    """
    for shape in TOKENS:
        # A foreign forward may fail in any way on input that it does not expect.
        with suppress(Exception):
            with undisturbed():
                several = _Trial(module, linears, shape, alike=False)
                alike = _Trial(module, linears, shape, alike=True)
                roles = _feature_roles(several, alike)
                size = _head_size(several, roles)
            return _layout(several, roles, size)
    return {}


class _Leaf(nn.Module):
    """Stands in for a linear layer: keeps its input and gives a random leaf (1, ..., out).

    The leaf is the same at every token if ``alike``.
    """

    def __init__(
        self,
        features: tuple[int, int],
        calls: list["_Leaf"],
        generator: torch.Generator,
        alike: bool,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = features
        self.calls = calls
        self.generator = generator
        self.alike = alike
        # What a forward that takes the tensors themselves finds; only their identity counts.
        self.weight = torch.zeros(()).expand(self.out_features, self.in_features)
        self.bias = torch.zeros(self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(self)
        self.input = x
        tokens = x.shape[:-1]
        drawn = (1,) * len(tokens) if self.alike else tokens
        shape = (*drawn, self.out_features)
        # Small, so that the softmax is far from saturated even where scores are not scaled (T5).
        leaf = 0.3 * torch.randn(shape, generator=self.generator, dtype=x.dtype)
        self.output = leaf.expand(*tokens, -1).clone().requires_grad_()
        return self.output.clone()  # which the module may overwrite


class _Functional(TorchFunctionMode):
    """Sends ``F.linear`` on the weight of a stand-in to the stand-in.

    torchvision's Swin never calls its layers.
    """

    def __init__(self, leaves: Iterable[_Leaf]) -> None:
        super().__init__()
        self.leaves = {id(leaf.weight): leaf for leaf in leaves}

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if func is nn.functional.linear and len(args) > 1:
            leaf = self.leaves.get(id(args[1]))
            if leaf is not None:
                return leaf(args[0])
        return func(*args, **(kwargs or {}))


class _Trial:
    """A run of a copy of ``module`` on random tokens.

    Attributes: ``leaves`` by path; ``result`` (1, T, d), which depends on them; ``output``, the
    path of the output projection, "" if there is none.
    """

    def __init__(
        self,
        module: nn.Module,
        linears: Mapping[str, nn.Module],
        shape: tuple[int, ...],
        alike: bool,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        calls: list[_Leaf] = []
        stand_ins = {
            name: _Leaf(linear_features(linear), calls, generator, alike)
            for name, linear in linears.items()
        }
        twin = _twin(module, linears, stand_ins, generator)
        width = linear_features(next(iter(linears.values())))[0]
        x = torch.randn(1, *shape, width, generator=generator, dtype=torch.float64)
        with _Functional(stand_ins.values()):
            result = _forward(twin, x)
        # The output projection is the linear layer called last, if what it takes depends on others.
        last = calls[-1] if calls[-1].input.requires_grad else None
        self.output = ""
        if last is not None:
            result = last.input
            self.output = next(name for name, leaf in stand_ins.items() if leaf is last)
        self.result = result.flatten(1, -2)
        self.leaves: dict[str, Tensor] = {}
        for name, leaf in stand_ins.items():
            if leaf not in calls or leaf is last:
                continue
            # Some see no tokens (Swin V2 computes its position bias by linear layers).
            if leaf.output.shape[:-1].numel() == self.result.shape[1]:
                self.leaves[name] = leaf.output

    def reach(self, weights: Tensor) -> Tensor:
        """|d (last token's result @ weights) / d leaf|, (T, F)."""
        scalar = self.result[0, -1] @ weights
        gradients = torch.autograd.grad(
            scalar,
            list(self.leaves.values()),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        by_token = [gradient.flatten(1, -2) for gradient in gradients]  # (1, T, .) each
        return torch.cat(by_token, dim=-1)[0].abs()


def _twin(
    module: nn.Module,
    linears: Mapping[str, nn.Module],
    stand_ins: Mapping[str, _Leaf],
    generator: torch.Generator,
) -> nn.Module:
    """A copy of ``module`` in float64 with the stand-ins in place of its linear layers."""
    # What deepcopy believes to have copied already, it does not copy: so leaves take their place.
    replaced: dict[int, object] = {}
    for name, leaf in stand_ins.items():
        replaced[id(linears[name])] = leaf
    twin = copy.deepcopy(module, replaced)
    twin = twin.to("cpu", torch.float64).eval().requires_grad_(False)
    # A gain that starts at zero would hide what it multiplies.
    for parameter in twin.parameters():
        parameter.uniform_(0.5, 1.5, generator=generator)
    return twin


def _forward(module: nn.Module, x: Tensor) -> Tensor:
    """First output of ``module.forward`` (past any compiled call) on tokens x.

    Its other arguments are neutral.
    """
    _, *parameters = inspect.signature(module.forward).parameters.values()
    required = []
    for p in parameters:
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD:
            required.append(p.name)
    ones = torch.ones(1, x.shape[1], 1, dtype=x.dtype)
    zeros = torch.zeros(1, 1, 1, dtype=x.dtype)
    # What the transformers library calls its arguments: no rotation (cos, sin), positions, and
    # tokens to attend to.
    known = {
        "position_embeddings": (ones, 0 * ones),
        "position_ids": torch.arange(x.shape[1])[None],
    }
    names = {p.name for p in parameters}
    usual = {name: value for name, value in known.items() if name in names}
    attended = {name: x for name in ("encoder_hidden_states",) if name in names}
    for extra in ({}, attended):
        for value in (None, x, zeros):
            with suppress(Exception):  # the next arguments may fit
                arguments = dict.fromkeys(required, value) | usual | extra
                return first_tensor(module.forward(x, **arguments))
    raise ValueError(f"{type(module).__name__} takes no such arguments")


def _feature_roles(several: _Trial, alike: _Trial) -> list[str]:
    """(F,) the role of every feature: "q", "k", "v", or "" for anything else."""
    width = several.result.shape[-1]
    # Four random combinations of result features, so that no derivative vanishes by accident.
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(4, width, generator=generator, dtype=torch.float64)
    among = torch.stack([several.reach(w) for w in weights]).amax(0)
    alone = torch.stack([alike.reach(w) for w in weights]).amax(0)
    tolerance = TOLERANCE * among.max()
    reaches_own = among[-1] > tolerance
    reaches_others = among[:-1].amax(0) > tolerance
    matters_alike = alone[-1] > tolerance
    codes = 4 * reaches_own + 2 * reaches_others + matters_alike
    return [_ROLE_OF_CODE.get(code, "") for code in codes.tolist()]


def _head_size(trial: _Trial, roles: Sequence[str]) -> int:
    """Features of one head.

    0 unless heads are equal runs of neighbouring features in query and result alike.
    """
    width = trial.result.shape[-1]
    is_query = torch.tensor([role == "q" for role in roles])

    def queries_behind(feature: int) -> list[int]:
        unit = (torch.arange(width) == feature).double()
        reach = trial.reach(unit)[-1]
        reached = reach[is_query] > TOLERANCE * reach.max()
        return reached.nonzero().flatten().tolist()

    size = len(queries_behind(0))
    if not size or width % size or int(is_query.sum()) != width:
        return 0
    # the first and last feature of the first and the last head
    for feature in (0, size - 1, width - size, width - 1):
        first = feature - feature % size
        if queries_behind(feature) != list(range(first, first + size)):
            return 0
    return size


def _layout(
    trial: _Trial,
    roles: Sequence[str],
    head_size: int,
) -> dict[str, Projection]:
    """Projections by parameter; empty unless there is query, key and value."""
    features = iter(roles)
    layout: dict[str, Projection] = {}
    for name, leaf in trial.leaves.items():
        inside = list(islice(features, leaf.shape[-1]))
        projection = _projection(inside, head_size)
        if projection is not None:
            layout[f"{name}.weight"] = projection
            layout[f"{name}.bias"] = projection
    seen = {role for projection in layout.values() for role in projection.roles}
    if not {"q", "k", "v"} <= seen:
        return {}
    if trial.output:
        width = trial.result.shape[-1]
        layout[f"{trial.output}.weight"] = Projection(("o",), (width,), head_size)
    return layout


def _projection(roles: Sequence[str], head_size: int) -> Projection | None:
    """What the roles of one tensor's features say; None if they do not repeat in groups."""
    runs = [(role, len(list(run))) for role, run in groupby(roles)]
    names, sizes = zip(*runs, strict=True)
    count = len(set(names))
    groups = len(runs) // count
    repeats = runs == runs[:count] * groups
    if "" in names or not repeats:
        return None
    if head_size and any(size % head_size for size in sizes):
        head_size = 0
    if groups > 1:
        # Grouped queries: in each group several query heads share one head of key and of value.
        are_shared = names[:3] == ("q", "k", "v") and sizes[1] == sizes[2] == head_size
        if not are_shared:
            return None
    return Projection(
        roles=names[:count],
        sizes=tuple(size * groups for size in sizes[:count]),
        head_size=head_size,
        groups=groups,
    )
