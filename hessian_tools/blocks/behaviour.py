"""The layout of an attention module, learnt by running a copy of it on a few random tokens.

Leaves of autograd stand in for its linear layers. A *query* feature acts on its own position only;
*key* and *value* features act on other positions too; where all tokens are alike the result depends
on *value* alone (a mean of equal values is that value, whatever the weights) and on *gates*, which
act on their own position even there. A head is a run of features of the result that depends on a
run of features of each role.

What mixes heads on the way is taken out of the copy: normalisations pass on what they are given,
and sinks (which take a share of the softmax, so that it is no mean) are given no share.

Letters: T tokens, F features of all linear layers together, d features of the attention's result,
H heads.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hessian_tools.blocks.projection import Projection, linear_features
from hessian_tools.blocks.trial_runs import first_tensor, undisturbed

# Relative; derivatives below are rounding (some models compute in float32 whatever comes in).
TOLERANCE = 1e-6
# Shapes of tokens to try: a sequence, an image; a module's own tables may ask for others.
TOKENS = ((1, 3), (1, 2, 2))
UNBATCHED = (3,)
MOST_TOKENS = 1024
MOST_DISTANCES = 2048  # rows of a table of distances, where a module asks for one
NO_SHARE = -1e4  # a score that the softmax gives nothing
# A feature's role by what it reaches: 4 its own position, 2 others, 1 its own where all are alike.
_ROLE_OF_CODE = {4: "q", 4 + 2: "k", 4 + 2 + 1: "v", 4 + 1: "gate"}


def layout_by_behaviour(
    module: nn.Module,
    linears: Mapping[str, nn.Module],
) -> dict[str, Projection]:
    """The projections of ``linears`` (by their paths inside ``module``), with ".weight" or ".bias".

    Other parameters that lie by heads are among them: sinks, biases and tables by distance. Empty
    if the module is no attention.
    """
    for shape in (*TOKENS, *_own_tokens(module), UNBATCHED):
        # A foreign forward may fail in any way on input that it does not expect.
        with suppress(Exception), undisturbed():
            return _learnt(module, linears, shape)
    return {}


def _own_tokens(module: nn.Module) -> Iterator[tuple[int, int]]:
    """Shapes of tokens that its tables of integers ask for: one entry a pair of tokens."""
    for buffer in module.buffers():
        tokens = math.isqrt(buffer.numel())
        is_square = 1 < tokens**2 == buffer.numel()
        if is_square and tokens <= MOST_TOKENS and not buffer.is_floating_point():
            yield 1, tokens


def _learnt(
    module: nn.Module,
    linears: Mapping[str, nn.Module],
    shape: tuple[int, ...],
) -> dict[str, Projection]:
    """The layout as runs on tokens of one shape show it; any exception means that there is none."""
    several = _Trial(module, linears, shape)
    roles = _feature_roles(several, _Trial(module, linears, shape, alike=True))
    if not _is_attention(roles) and _has_own(module):
        # Sinks are parameters of the module's own.
        silent = _Trial(module, linears, shape, own=NO_SHARE)
        alike = _Trial(module, linears, shape, own=NO_SHARE, alike=True)
        roles = _feature_roles(silent, alike)
    if not _is_attention(roles):
        return {}
    heads = _Heads.of(several, roles)
    layout = _layout(several, heads)
    if heads.count > 1:
        with suppress(Exception):  # what else lies by head is no condition for the rest
            layout |= _beside(_Trial(module, linears, shape, output=several.output), heads)
    return layout


def _has_own(module: nn.Module) -> bool:
    """Whether it has parameters beside those of the modules inside."""
    return next(module.parameters(recurse=False), None) is not None


def _is_attention(roles: Mapping[str, Sequence[str]]) -> bool:
    return {"q", "k", "v"} <= {role for of_one in roles.values() for role in of_one}


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
        self.outputs: list[Tensor] = []

    def forget(self) -> None:
        """As before any call, of this leaf or others: an attempt to run the module has failed."""
        self.calls.clear()
        self.outputs.clear()

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(self)
        self.input = x
        tokens = x.shape[:-1]
        drawn = (1,) * len(tokens) if self.alike else tokens
        shape = (*drawn, self.out_features)
        # Small, so that the softmax is far from saturated even where scores are not scaled (T5).
        leaf = 0.3 * torch.randn(shape, generator=self.generator, dtype=x.dtype)
        output = leaf.expand(*tokens, -1).clone().requires_grad_()
        self.outputs.append(output)
        return output.clone()  # which the module may overwrite


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
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
        if func is nn.functional.linear and "weight" in given:
            leaf = self.leaves.get(id(given["weight"]))
            if leaf is not None:
                output = leaf(given["input"])
                # EVA's bias is put together from parameters of its own.
                return output if given.get("bias") is None else output + given["bias"]
        return func(*args, **(kwargs or {}))


class _Trial:
    """A run of a copy of ``module`` on random tokens.

    Attributes: ``leaves`` by path, (1, T, features) each; ``result`` (1, T, d), which depends on
    them; ``output``, the path of the output projection, "" if there is none; ``beside``, other
    tensors that the result may depend on, by name, with ``parameters`` among them.
    """

    def __init__(
        self,
        module: nn.Module,
        linears: Mapping[str, nn.Module],
        shape: tuple[int, ...],
        alike: bool = False,
        own: float | None = None,
        output: str | None = None,
    ) -> None:
        """``own``: the value of the module's own parameters, if not random.

        ``output``: the path of the output projection, if known; then parameters are ``beside``.
        """
        generator = torch.Generator().manual_seed(0)
        calls: list[_Leaf] = []
        stand_ins = {
            name: _Leaf(linear_features(linear), calls, generator, alike)
            for name, linear in linears.items()
        }
        twin = _twin(module, linears, stand_ins, generator)
        if own is not None:
            for parameter in twin.parameters(recurse=False):
                parameter.fill_(own)
        twin.requires_grad_(output is not None)
        width = linear_features(next(iter(linears.values())))[0]
        x = torch.randn(*shape, width, generator=generator, dtype=torch.float64)
        with _Functional(stand_ins.values()):
            result = _forward(twin, x, list(stand_ins.values()))
        self.output = _last_of(stand_ins, calls) if output is None else output
        if self.output:
            result = stand_ins[self.output].input
        self.result = result.reshape(1, -1, result.shape[-1])
        # The parameters beside those of linear layers, if they are asked for.
        self.parameters = dict(twin.named_parameters()) if output is not None else {}
        self.leaves: dict[str, Tensor] = {}
        self.beside: dict[str, Tensor] = {**self.parameters}
        stand_ins.pop(self.output, None)
        for name, leaf in stand_ins.items():
            self._sort(name, leaf.outputs)

    def _sort(self, name: str, outputs: Sequence[Tensor]) -> None:
        """Notes what a stand-in gave: for tokens, or for other things."""
        # Some see no tokens (Swin V2 computes its position bias by linear layers), and some see
        # distances after the tokens (DeBERTa).
        tokens = self.result.shape[1]
        seen = [out for out in outputs if out.shape[:-1].numel() == tokens]
        if seen:
            self.leaves[name] = seen[0]
        elif outputs:
            self.beside[f"{name}.weight"] = outputs[0]

    def gradients(self, weights: Tensor, tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
        """|d (last token's result @ weights) / d tensor|, in the shape of each tensor."""
        scalar = self.result[0, -1] @ weights
        gradients = torch.autograd.grad(
            scalar,
            list(tensors),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return tuple(gradient.abs() for gradient in gradients)

    def reach(self, weights: Tensor) -> Tensor:
        """|d (last token's result @ weights) / d leaf|, (T, F)."""
        gradients = self.gradients(weights, self.leaves.values())
        by_token = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        return torch.cat(by_token, dim=-1)


def _last_of(stand_ins: Mapping[str, _Leaf], calls: Sequence[_Leaf]) -> str:
    """The output projection: the linear layer called last, if what it takes depends on others."""
    last = calls[-1]
    if not last.input.requires_grad:
        return ""
    return next(name for name, leaf in stand_ins.items() if leaf is last)


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
    for inner in twin.modules():
        if inner is not twin and _may_normalise(inner):
            inner.register_forward_hook(_passed_on)
    return twin


def _may_normalise(module: nn.Module) -> bool:
    """Whether its parameters are one or two vectors, as those of a normalisation."""
    own = list(module.parameters(recurse=False))
    is_leaf = next(module.children(), None) is None
    return is_leaf and 0 < len(own) < 3 and all(p.ndim == 1 for p in own)


def _passed_on(_: nn.Module, arguments: tuple[object, ...], output: object) -> object:
    """What a normalisation is given, in place of its result: features of heads are not mixed."""
    given = arguments[0] if arguments else None
    if isinstance(given, Tensor) and isinstance(output, Tensor) and given.shape == output.shape:
        return given
    return output


def _forward(module: nn.Module, x: Tensor, leaves: Sequence[_Leaf]) -> Tensor:
    """First output of ``module.forward`` (past any compiled call) on tokens x.

    Its other arguments are neutral.
    """
    _, *parameters = inspect.signature(module.forward).parameters.values()
    names = {p.name for p in parameters}
    required = []
    for p in parameters:
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD:
            required.append(p.name)
    # For other arguments that must be given: nothing, tokens, or what adds nothing.
    for value in (None, x, torch.zeros(1, 1, 1, dtype=x.dtype)):
        for usual in _usual_arguments(module, names, x):
            known = {name: value for name, value in usual.items() if name in names}
            for leaf in leaves:
                leaf.forget()
            with suppress(Exception):  # the next arguments may fit
                arguments = dict.fromkeys(required, value) | known
                return first_tensor(module.forward(x, **arguments))
    raise ValueError(f"{type(module).__name__} takes no such arguments")


def _usual_arguments(
    module: nn.Module,
    names: set[str],
    x: Tensor,
) -> Iterator[dict[str, object]]:
    """What the transformers library calls its arguments, in the kinds that there are.

    No rotation, positions, tables of distances, and tokens to attend to.
    """
    tokens = x.shape[1] if x.ndim > 2 else x.shape[0]
    ones = torch.ones(1, 1, tokens, tokens, dtype=x.dtype)
    usual: dict[str, object] = {
        "position_ids": torch.arange(tokens)[None],
        "rel_embeddings": torch.randn(1, x.shape[-1], dtype=x.dtype).expand(MOST_DISTANCES, -1),
        "cu_seqlens": torch.tensor([0, tokens], dtype=torch.int32),
        "relative_pos": (torch.arange(tokens)[:, None] - torch.arange(tokens))[None],
    }
    # Ones let every token attend whether they multiply or are added, since scores may be shifted.
    masked: dict[str, object] = {"attention_mask": ones}
    attended: dict[str, object] = {"encoder_hidden_states": x}
    rotations: Iterable[object] = (None,)
    if "position_embeddings" in names:
        rotations = _rotations(module, x)
    for rotation in rotations:
        for extra in ({}, attended, masked, attended | masked):
            if not extra.keys() <= names:
                continue
            yield usual | {"position_embeddings": rotation} | extra


def _rotations(module: nn.Module, x: Tensor) -> Iterator[object]:
    """What is called position embeddings: cosines and sines of no angle, none, complex, tokens."""
    tokens = x.shape[-2]
    before = () if x.ndim == 2 else (1,)
    # The features that are rotated must be told where neighbours are rotated together: their number
    # is among the module's own.
    own = {number for number in vars(module).values() if type(number) is int}
    widths = [1, *sorted(number for number in own if 1 < number <= x.shape[-1])]
    for width in widths:
        ones = torch.ones(*before, tokens, width, dtype=x.dtype)
        yield ones, 0 * ones
    yield None
    ones = torch.ones(*before, tokens, 1, dtype=x.dtype)
    yield torch.complex(ones, 0 * ones)
    yield torch.randn(1, 2 * tokens - 1, x.shape[-1], dtype=x.dtype)  # a row a distance


def _feature_roles(several: _Trial, alike: _Trial) -> dict[str, list[str]]:
    """The role of every feature of each leaf: "q", "k", "v", "gate", or "" for anything else."""
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
    sizes = [leaf.shape[-1] for leaf in several.leaves.values()]
    roles = {}
    for name, of_one in zip(several.leaves, codes.split(sizes), strict=True):
        roles[name] = [_ROLE_OF_CODE.get(code, "") for code in of_one.tolist()]
    return roles


@dataclass(frozen=True)
class _Heads:
    """Heads of the result, and features of a head by leaf and role (0 where no runs are seen)."""

    roles: dict[str, list[str]]  # of every feature of each leaf
    count: int  # H; 0 unless they are equal runs of neighbouring features in query and result
    sizes: dict[tuple[str, str], int]

    @classmethod
    def of(cls, trial: _Trial, roles: dict[str, list[str]]) -> "_Heads":
        """The heads that ``trial`` shows."""
        width = trial.result.shape[-1]
        unit = torch.eye(1, width, dtype=torch.float64)[0]
        queries = {name: found["q"] for name, found in _reached(trial, roles, unit).items()}
        of_all = sum(of_one.count("q") for of_one in roles.values())
        of_first = sum(map(len, queries.values()))
        count = of_all // of_first if of_first else 0
        if not count or width % count or count * of_first != of_all:
            return cls(roles, 0, {})
        size = width // count
        generator = torch.Generator().manual_seed(2)
        random = torch.randn(width, generator=generator, dtype=torch.float64)
        number = torch.arange(width) // size
        by_head = {}
        for head in sampled(count):
            by_head[head] = _reached(trial, roles, random * (number == head))
        sizes = {
            (name, role): _run_size([found[name][role] for found in by_head.values()], total)
            for name, role, total in _totals(roles)
        }
        heads = cls(roles, count, sizes)
        return heads if heads._are_exact(trial, by_head) else cls(roles, 0, {})

    def _are_exact(self, trial: _Trial, by_head: Mapping[int, "_Found"]) -> bool:
        """Whether the sampled heads have their own queries, at their first and last feature too."""
        width = trial.result.shape[-1]
        size = width // self.count
        for head, found in by_head.items():
            for name, positions in found.items():
                of_all = self.roles[name].count("q")
                run = of_all // self.count
                if run * self.count != of_all:
                    return False
                if positions["q"] != list(range(head * run, (head + 1) * run)):
                    return False
            for feature in (head * size, (head + 1) * size - 1):
                unit = (torch.arange(width) == feature).double()
                at_one = _reached(trial, self.roles, unit)
                if any(at_one[name]["q"] != found[name]["q"] for name in found):
                    return False
        return True


# For each leaf and role, which of the role's features are reached, by their order in the role.
_Found = dict[str, dict[str, list[int]]]


def sampled(count: int) -> list[int]:
    """The first, second, middle and last of ``count`` heads."""
    return sorted({0, min(1, count - 1), count // 2, count - 1})


def _totals(roles: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str, int]]:
    """(leaf, role, features of the role in it)."""
    for name, of_one in roles.items():
        for role in dict.fromkeys(of_one):
            yield name, role, of_one.count(role)


def _reached(trial: _Trial, roles: Mapping[str, Sequence[str]], weights: Tensor) -> _Found:
    """What the combination ``weights`` of the last token's result depends on."""
    reach = trial.reach(weights).amax(0)
    is_reached = reach > TOLERANCE * reach.max()
    found: _Found = {}
    sizes = [len(of_one) for of_one in roles.values()]
    for name, flags in zip(roles, is_reached.split(sizes), strict=True):
        positions: dict[str, list[int]] = {}
        counts: dict[str, int] = {}
        for role, flag in zip(roles[name], flags.tolist(), strict=True):
            position = counts.get(role, 0)
            counts[role] = position + 1
            if flag:
                positions.setdefault(role, []).append(position)
        found[name] = {role: positions.get(role, []) for role in ("q", *counts)}
    return found


def _run_size(by_head: Sequence[Sequence[int]], total: int) -> int:
    """The length of equal runs in ``total`` places that heads reach one each; 0 if they do not."""
    size = len(by_head[0])
    if not size or total % size:
        return 0
    for places in by_head:
        if len(places) != size:
            return 0
        first = places[0]
        if first % size or list(places) != list(range(first, first + size)):
            return 0
    return size


def _layout(trial: _Trial, heads: _Heads) -> dict[str, Projection]:
    """Projections by parameter."""
    layout: dict[str, Projection] = {}
    for name, inside in heads.roles.items():
        of_role = {role: heads.sizes.get((name, role), 0) for role in dict.fromkeys(inside)}
        projection = _projection(inside, of_role)
        if projection is not None:
            layout[f"{name}.weight"] = projection
            layout[f"{name}.bias"] = projection
    if not _is_attention({name: found.roles for name, found in layout.items()}):
        return {}
    if trial.output:
        width = trial.result.shape[-1]
        sizes = (width // heads.count,) if heads.count else ()
        layout[f"{trial.output}.weight"] = Projection(("o",), (width,), sizes)
    return layout


def _projection(roles: Sequence[str], head_size: Mapping[str, int]) -> Projection | None:
    """What the roles of one tensor's features say; None if they do not repeat in groups."""
    runs = [(role, len(list(run))) for role, run in groupby(roles)]
    count = len(set(roles))
    groups = len(runs) // count
    repeats = runs == runs[:count] * groups
    names = tuple(role for role, _ in runs[:count])
    if "" in names or not repeats:
        return None
    in_a_group = [size for _, size in runs[:count]]
    sizes = tuple(size * groups for size in in_a_group)
    of_heads = tuple(head_size[role] for role in names)
    if _are_whole(in_a_group, of_heads):
        projection = Projection(names, sizes, of_heads, groups)
        if projection.is_box:
            return projection
    # Without heads, groups and gates are not what they seem.
    if groups > 1 or "gate" in names:
        return None
    return Projection(names, sizes)


def _are_whole(in_a_group: Sequence[int], of_heads: Sequence[int]) -> bool:
    """Whether each group holds whole heads of every role."""
    return all(h and not size % h for size, h in zip(in_a_group, of_heads, strict=True))


def _beside(trial: _Trial, heads: _Heads) -> dict[str, Projection]:
    """Parameters, and weights of linear layers that see no tokens, of which a head has a part."""
    if not trial.beside:
        return {}
    names = list(trial.beside)
    tensors = list(trial.beside.values())
    width = trial.result.shape[-1]
    generator = torch.Generator().manual_seed(3)
    random = torch.randn(width, generator=generator, dtype=torch.float64)
    number = torch.arange(width) // (width // heads.count)
    by_head = []
    for head in sampled(heads.count):
        by_head.append(trial.gradients(random * (number == head), tensors))
    layout: dict[str, Projection] = {}
    for name, gradients in zip(names, zip(*by_head, strict=True), strict=True):
        is_linear = name not in trial.parameters
        shape = gradients[0].shape
        axes = [len(shape) - 1] if is_linear else range(len(shape))
        sizes = {axis: _size_along(gradients, axis, heads.count) for axis in axes}
        told = [axis for axis in axes if sizes[axis]]
        if len(told) != 1:
            continue
        (axis,) = told
        projection = Projection(
            ("",), (shape[axis],), (sizes[axis],), axis=None if is_linear else axis
        )
        layout[name] = projection
        if is_linear:
            layout[f"{name.removesuffix('weight')}bias"] = projection
    return layout


def _size_along(gradients: Sequence[Tensor], axis: int, count: int) -> int:
    """Places of a head along one axis; 0 if heads do not have runs of their own there.

    ``gradients``: by what the sampled heads depend on.
    """
    by_head = []
    for gradient in gradients:
        along = gradient.movedim(axis, 0).reshape(gradient.shape[axis], -1).amax(1)
        # None at all: the tensor plays no part in this head.
        reached = along > TOLERANCE * along.max()
        by_head.append(reached.nonzero().flatten().tolist())
    total = gradients[0].shape[axis]
    size = _run_size(by_head, total)
    if not size or count % (total // size) or total == size:
        return 0
    are_apart = by_head[0] != by_head[-1]
    return size if are_apart else 0
