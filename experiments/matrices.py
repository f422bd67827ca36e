"""Is every matrix what it says, on every kind of model? Held against dense float64 ones.

Protocol, fixed before any result: six networks of 150 to 3,000 parameters, two batches of different
length each, at initialisation. The oracle is dense and in float64, and shares nothing with the
engine: the Hessian by differentiating the gradient entry by entry; J by a backward pass for every
output; between the outputs torch's own Hessian of the loss (Gauss-Newton), the closed forms
(Fisher), the gradients of single examples' losses (empirical Fisher), those of the targets that the
operator drew (Monte Carlo); P^-1/2 from an Adam that has made three steps. The operator's dense
matrix is made in float64 and float32, by recorded graphs and by a tangent program. Given is the
Frobenius norm of the difference over that of the oracle; "-" where a model cannot be traced.

`python experiments/matrices.py [--smoke]` writes results/matrices: table.txt and all numbers.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from script import Script
from torch import Tensor, nn
from tqdm import tqdm

import hessian_tools as ht
from hessian_tools.app import report
from hessian_tools.curvature import EmpiricalFisherOperator, MonteCarloFisherOperator
from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.problem.networks import MLP, NanoGPT, SmallResNet
from hessian_tools.problem.vision import repair

OUT = Path("results/matrices")
ROUTES = ("double backward", "tangent program")
HEADER = (
    "matrix",
    "model",
    "parameters",
    "float64",
    "float64 compiled",
    "float32",
    "float32 compiled",
)
TINY = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
}
Batches = list[tuple[Tensor, Tensor]]


# -------------------------------------------------------------------------------------- networks


def vectors() -> Batches:
    return [(torch.randn(n, 6), torch.randint(4, (n,))) for n in (5, 3)]


def images(side: int) -> Batches:
    return [(torch.randn(n, 3, side, side), torch.randint(4, (n,))) for n in (4, 3)]


def tokens() -> Batches:
    drawn = [torch.randint(11, (n, 7)) for n in (2, 1)]
    return [(t[:, :-1], t[:, 1:]) for t in drawn]


def hf_gpt2() -> nn.Module:
    import transformers

    config = transformers.GPT2Config(vocab_size=11, n_positions=6, n_embd=8, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config).eval()


def hf_vit() -> nn.Module:
    import transformers

    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=4, **TINY)
    return transformers.ViTForImageClassification(config).eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batches], bool | None]] = {
    "MLP": (lambda: MLP((6, 8, 8, 4)), vectors, None),
    "ResNet, batch statistics": (lambda: SmallResNet((4, 6), 4), lambda: images(6), True),
    "ResNet, running statistics": (lambda: SmallResNet((4, 6), 4), lambda: images(6), False),
    "GPT": (lambda: NanoGPT(11, 6, 2, 8, 2), tokens, None),
    "GPT-2 of transformers": (hf_gpt2, tokens, None),
    "ViT of transformers": (hf_vit, lambda: images(8), None),
}


def problem(name: str) -> ht.Problem:
    make, data, batch_stats = MODELS[name]
    torch.manual_seed(0)
    model = make().double()
    batches = [(x.double() if x.is_floating_point() else x, y) for x, y in data()]
    return ht.Problem(model, ht.cross_entropy, batches, batch_stats=batch_stats)


def in_float32(case: ht.Problem) -> ht.Problem:
    model = copy.deepcopy(case.model).float()
    batches = [(x.float() if x.is_floating_point() else x, y) for x, y in case.batches]
    return ht.Problem(model, ht.cross_entropy, batches, batch_stats=case.batch_stats)


# ---------------------------------------------------------------------------------------- oracles


def flat(pieces: tuple[Tensor | None, ...], parameters: list[nn.Parameter]) -> Tensor:
    pairs = zip(pieces, parameters, strict=True)
    filled = [torch.zeros_like(p) if g is None else g for g, p in pairs]
    return torch.cat([piece.flatten() for piece in filled])


def rows(outputs: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """The gradient of every entry of ``outputs``."""
    found = []
    for entry in outputs.flatten():
        pieces: tuple[Tensor | None, ...] = (None,) * len(parameters)
        if entry.requires_grad:
            pieces = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
        found.append(flat(pieces, parameters))
    return torch.stack(found)


def logits_of(case: ht.Problem, inputs: Tensor) -> Tensor:
    answer = case.model(inputs)
    return getattr(answer, "logits", answer).flatten(0, -2)


def dense_hessian(case: ht.Problem) -> Tensor:
    parameters = list(case.parameters.values())
    count = sum(y.numel() for _, y in case.batches)
    with case.evaluating():
        losses = [
            nn.functional.cross_entropy(logits_of(case, x), y.flatten(), reduction="sum")
            for x, y in case.batches
        ]
        loss = torch.stack(losses).sum() / count
        pieces = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        return rows(flat(pieces, parameters), parameters)


def pulled_back(case: ht.Problem, between: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
    """sum over batches of J' M J / N, M = between(logits, targets, number of the batch)."""
    parameters = list(case.parameters.values())
    count = sum(y.numel() for _, y in case.batches)
    total = torch.zeros(case.num_parameters, case.num_parameters, dtype=torch.float64)
    for number, (x, y) in enumerate(case.batches):
        with case.evaluating():
            logits = logits_of(case, x)
            jacobian = rows(logits, parameters)
        middle = between(logits.detach(), y.flatten(), number)
        total += jacobian.T @ middle @ jacobian / count
    return total


def dense_ggn(case: ht.Problem) -> Tensor:
    def between(logits: Tensor, targets: Tensor, _: int) -> Tensor:
        def loss(z: Tensor) -> Tensor:
            return nn.functional.cross_entropy(z.view_as(logits), targets, reduction="sum")

        return torch.autograd.functional.hessian(loss, logits.flatten())

    return pulled_back(case, between)


def dense_fisher(case: ht.Problem) -> Tensor:
    def between(logits: Tensor, *_: object) -> Tensor:
        of_rows = [torch.diag(p) - torch.outer(p, p) for p in logits.softmax(-1)]
        return torch.block_diag(*of_rows)

    return pulled_back(case, between)


def outer(logits: Tensor, targets: Tensor) -> Tensor:
    """Of every row the outer product of its score, p less the target's indicator."""
    scores = logits.softmax(-1) - nn.functional.one_hot(targets, logits.shape[-1])
    return torch.block_diag(*(torch.outer(s, s) for s in scores))


def dense_empirical(case: ht.Problem) -> Tensor:
    return pulled_back(case, lambda logits, targets, _: outer(logits, targets))


def dense_drawn(case: ht.Problem, operator: MonteCarloFisherOperator) -> Tensor:
    def between(logits: Tensor, _: Tensor, number: int) -> Tensor:
        noise = operator._drawn.batches[number][1].flatten(0, -2)
        edges = logits.softmax(-1).cumsum(-1)
        draws = [(edges < drawn[:, None]).sum(-1) for drawn in noise.T]
        return torch.stack([outer(logits, targets) for targets in draws]).mean(0)

    return pulled_back(case, between)


# --------------------------------------------------------------------------------------- matrices


def adam(case: ht.Problem) -> torch.optim.Adam:
    """After three steps on a copy of the network, its state moved to the network itself."""
    kept = copy.deepcopy(case.model.state_dict())
    optimizer = torch.optim.Adam(case.parameters.values(), lr=1e-3, eps=1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        with case.evaluating():
            torch.stack([case.batch_loss(batch) for batch in case.batches]).mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    case.model.load_state_dict(kept)
    return optimizer


def diagonal(optimizer: torch.optim.Adam, case: ht.Problem) -> Tensor:
    """P by the published formula."""
    state = [optimizer.state[p] for p in case.parameters.values()]
    v = torch.cat([s["exp_avg_sq"].flatten() for s in state])
    return (v / (1 - 0.999**3)).sqrt() + 1e-4


def draws(case: ht.Problem, **options: object) -> MonteCarloFisherOperator:
    return MonteCarloFisherOperator(case, num_samples=3, seed=1, **options)


Made = Callable[..., CurvatureOperator]


def matrices(case: ht.Problem) -> Iterator[tuple[str, Tensor, Made]]:
    """Names, oracles, and the operator of a Problem like ``case``."""
    hessian, ggn = dense_hessian(case), dense_ggn(case)
    yield "Hessian", hessian, ht.HessianOperator
    yield "Gauss-Newton", ggn, ht.GaussNewtonOperator
    yield "Fisher", dense_fisher(case), ht.FisherOperator
    yield "Fisher, 3 draws", dense_drawn(case, draws(case)), draws
    yield "empirical Fisher", dense_empirical(case), EmpiricalFisherOperator
    optimizer = adam(case)
    preconditioner = ht.preconditioner_of(optimizer, case)
    root = diagonal(optimizer, case).rsqrt()
    scale = root[:, None] * root

    def scaled(kind: Made) -> Made:
        def made(other: ht.Problem, **options: object) -> CurvatureOperator:
            return ht.PreconditionedOperator(kind(other, **options), preconditioner)

        return made

    yield "Adam's Hessian", scale * hessian, scaled(ht.HessianOperator)
    yield "Adam's Gauss-Newton", scale * ggn, scaled(ht.GaussNewtonOperator)


def errors(case: ht.Problem, oracle: Tensor, made: Made) -> dict[str, float]:
    found = {}
    for dtype, like in (("float64", case), ("float32", in_float32(case))):
        for route in ROUTES:
            try:
                dense = made(like, route=route).to_dense().double()
            except ValueError as error:
                if route not in str(error):
                    raise
                continue
            key = f"{dtype} {route}"
            found[key] = float((dense - oracle).norm() / oracle.norm())
    return found


def row_of(key: str, numbers: dict[str, float]) -> list[str]:
    matrix, model = key.split("|")
    keys = [f"{dtype} {route}" for dtype in ("float64", "float32") for route in ROUTES]
    cells = [f"{numbers[k]:.0e}" if k in numbers else "-" for k in keys]
    return [matrix, model, f"{numbers['parameters']:,.0f}", *cells]


def main() -> None:
    run = Script(__doc__, OUT, smoke="the MLP alone: seconds").run()
    repair()  # beside a CPU-only torch, the registry's torchvision breaks transformers
    names = ("MLP",) if run.smoke else tuple(MODELS)
    lines: dict[str, dict[str, float]] = {}
    for name in tqdm(names, disable=None):
        case = problem(name)
        for matrix, oracle, made in matrices(case):
            numbers = errors(case, oracle, made)
            lines[f"{matrix}|{name}"] = {"parameters": case.num_parameters, **numbers}
    run.save(lines, {"models": names, "seed": 0})
    order = dict.fromkeys(key.split("|")[0] for key in lines)
    keys = [key for matrix in order for key in lines if key.startswith(f"{matrix}|")]
    run.print_table(report.table(HEADER, [row_of(key, lines[key]) for key in keys], left=2))


if __name__ == "__main__":
    main()
