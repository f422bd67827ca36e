"""Losses that are more than a mean over examples, or hold derivatives of their own."""

from typing import Any

import torch
from torch import Tensor, nn

from family_models.setting import Setting, configuration, cross_entropy, lengths, tokens, vectors
from family_models.shared_networks import mlp

CLASSES = 3


def _smooth(inputs: int, outputs: int = 1, width: int = 12) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.Tanh(),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, outputs),
    )


def _standardised(values: Tensor) -> Tensor:
    return (values - values.mean(0)) / values.std(0, correction=0)


def _derivative(output: Tensor, at: Tensor) -> Tensor:
    return torch.autograd.grad(output.sum(), at, create_graph=True)[0]


@configuration("physics/first-order-residual")
def first_order() -> Setting:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        t = batch[0].clone().requires_grad_()
        u = model(t)
        return (_derivative(u, t) + u).square().mean()

    return Setting(_smooth(1), loss, [(torch.rand(9, 1),), (torch.rand(4, 1),)], [9.0, 4.0])


@configuration("physics/heat-equation-with-boundary")
def heat() -> Setting:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        points = batch["inside"].clone().requires_grad_()
        slope = _derivative(model(points), points)
        second = _derivative(slope[:, 0], points)[:, 0]
        residual = slope[:, 1] - 0.1 * second
        edge = model(batch["edge"])[:, 0] - batch["values"]
        return residual.square().mean() + edge.square().mean()

    batch = {"inside": torch.rand(9, 2), "edge": torch.rand(6, 2), "values": torch.randn(6)}
    return Setting(_smooth(2), loss, [batch], [9.0])


@configuration("physics/laplacian-by-vmapped-hessian")
def laplacian() -> Setting:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        def value(x: Tensor) -> Tensor:
            return model(x)[0]

        curvature = torch.vmap(torch.func.hessian(value))(batch[0])
        trace = curvature.diagonal(dim1=-2, dim2=-1).sum(-1)
        return (trace - batch[1]).square().mean()

    return Setting(_smooth(2), loss, [(torch.randn(8, 2), torch.randn(8))], [8.0])


@configuration("physics/forces-of-an-energy")
def forces() -> Setting:
    """A machine-learned potential: energies and their gradients are fitted."""

    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = _smooth(1)

        def forward(self, positions: Tensor) -> Tensor:
            i, j = torch.triu_indices(positions.shape[1], positions.shape[1], 1)
            distance = (positions[:, i] - positions[:, j]).norm(dim=-1, keepdim=True)
            return self.pair(distance).sum((1, 2))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        positions, energies, forces = batch
        moved = positions.clone().requires_grad_()
        energy = model(moved)
        force = -_derivative(energy, moved)
        return (energy - energies).square().mean() + (force - forces).square().mean()

    batches = [(torch.randn(n, 4, 3), torch.randn(n), torch.randn(n, 4, 3)) for n in (4, 2)]
    return Setting(Energy(), loss, batches, [4.0, 2.0])


@configuration("physics/hamiltonian-network")
def hamiltonian() -> Setting:
    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.energy = _smooth(2)

        def forward(self, state: Tensor) -> Tensor:
            with torch.enable_grad():
                state = state.clone().requires_grad_()
                slope = _derivative(self.energy(state), state)
            return torch.stack([slope[:, 1], -slope[:, 0]], 1)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    batches = [(torch.randn(n, 2), torch.randn(n, 2)) for n in (9, 4)]
    return Setting(Field(), loss, batches, [9.0, 4.0])


@configuration("adversarial/gradient-penalty")
def gradient_penalty() -> Setting:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        real, fake, mix = batch
        between = (mix * real + (1 - mix) * fake).requires_grad_()
        slope = _derivative(model(between), between)
        penalty = (slope.norm(dim=1) - 1).square().mean()
        return model(fake).mean() - model(real).mean() + 10 * penalty

    batches = [(torch.randn(n, 3), torch.randn(n, 3), torch.rand(n, 1)) for n in (9, 4)]
    return Setting(_smooth(3), loss, batches, [9.0, 4.0])


@configuration("adversarial/sharpness-aware-step")
def sharpness_aware() -> Setting:
    """The loss at a point moved along the gradient, differentiated through the move."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        named = dict(model.named_parameters())
        inner = cross_entropy(model, batch)
        slopes = torch.autograd.grad(inner, list(named.values()), create_graph=True)
        length = torch.stack([slope.square().sum() for slope in slopes]).sum().sqrt()
        moved = {
            name: parameter + 0.05 * slope / length
            for (name, parameter), slope in zip(named.items(), slopes, strict=True)
        }
        logits = torch.func.functional_call(model, moved, (batch[0],))
        return nn.functional.cross_entropy(logits, batch[1])

    batches = vectors((9,))
    return Setting(mlp(nn.Tanh(), width=8), loss, batches, [9.0])


@configuration("meta/inner-step-by-autograd")
def inner_step() -> Setting:
    """MAML: one step on the support set, then the loss of the query set."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        (support, labels), query = batch
        named = dict(model.named_parameters())
        inner = nn.functional.cross_entropy(model(support), labels)
        slopes = torch.autograd.grad(inner, list(named.values()), create_graph=True)
        stepped = {
            name: parameter - 0.3 * slope
            for (name, parameter), slope in zip(named.items(), slopes, strict=True)
        }
        logits = torch.func.functional_call(model, stepped, (query[0],))
        return nn.functional.cross_entropy(logits, query[1])

    batches = list(zip(vectors((6, 6)), vectors((6, 6)), strict=True))
    return Setting(mlp(nn.Tanh(), width=8), loss, batches, [6.0, 6.0])


@configuration("meta/inner-step-by-functional-gradient")
def functional_step() -> Setting:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        (support, labels), query = batch
        named = dict(model.named_parameters())

        def inner(parameters: dict[str, Tensor]) -> Tensor:
            logits = torch.func.functional_call(model, parameters, (support,))
            return nn.functional.cross_entropy(logits, labels)

        slopes = torch.func.grad(inner)(named)
        stepped = {name: named[name] - 0.3 * slopes[name] for name in named}
        logits = torch.func.functional_call(model, stepped, (query[0],))
        return nn.functional.cross_entropy(logits, query[1])

    batches = list(zip(vectors((6, 6)), vectors((6, 6)), strict=True))
    return Setting(mlp(nn.Tanh(), width=8), loss, batches, [6.0, 6.0])


def _views(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    return [(x := torch.randn(n, 6), x + 0.3 * torch.randn(n, 6)) for n in sizes]


@configuration("contrastive/info-nce")
def info_nce() -> Setting:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        first, second = (nn.functional.normalize(model(view), dim=1) for view in batch)
        logits = first @ second.T / 0.2
        target = torch.arange(len(logits))
        both = [nn.functional.cross_entropy(side, target) for side in (logits, logits.T)]
        return sum(both) / 2

    return Setting(_smooth(6, 4), loss, _views(7, 7), [7.0, 7.0])


@configuration("contrastive/barlow-twins-correlation")
def barlow() -> Setting:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        first, second = (_standardised(model(view)) for view in batch)
        correlation = first.T @ second / len(first)
        return (correlation - torch.eye(4, dtype=correlation.dtype)).square().sum()

    return Setting(_smooth(6, 4), loss, _views(9), [9.0])


@configuration("contrastive/variance-hinge")
def variance_hinge() -> Setting:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        first, second = (model(view) for view in batch)
        hinge = torch.relu(2 - first.std(0)).mean() + torch.relu(2 - second.std(0)).mean()
        return (first - second).square().mean() + hinge

    return Setting(_smooth(6, 4), loss, _views(9), [9.0])


@configuration("contrastive/pearson-correlation")
def pearson() -> Setting:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        prediction, target = model(batch[0])[:, 0], batch[1][:, 0]
        return 1 - (_standardised(prediction) * _standardised(target)).mean()

    return Setting(_smooth(6), loss, _views(9), [9.0])


@configuration("contrastive/siamese-triplets")
def siamese() -> Setting:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        anchor, near, far = (model(part) for part in batch)
        return nn.functional.triplet_margin_loss(anchor, near, far, margin=2.0)

    batches = [(torch.randn(n, 6), torch.randn(n, 6), torch.randn(n, 6)) for n in (9, 4)]
    return Setting(_smooth(6, 4), loss, batches, [9.0, 4.0])


@configuration("contrastive/frozen-teacher-distillation")
def distillation() -> Setting:
    teacher = _smooth(6, CLASSES).requires_grad_(False)

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = mlp(nn.Tanh())
            self.teacher = teacher

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                aim = self.teacher(x)
            return self.student(x), aim

    def loss(model: nn.Module, batch: Any) -> Tensor:
        student, aim = model(batch[0])
        soft = nn.functional.kl_div(
            (student / 2).log_softmax(1),
            (aim / 2).log_softmax(1),
            log_target=True,
            reduction="batchmean",
        )
        return 4 * soft + nn.functional.cross_entropy(student, batch[1])

    return Setting(Student(), loss, vectors(), [9.0, 5.0])


@configuration("classification/class-weights")
def class_weights() -> Setting:
    weight = torch.tensor([0.2, 1.0, 5.0])

    def loss(model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch[0])
        return nn.functional.cross_entropy(logits, batch[1], weight=weight.to(logits.dtype))

    batches = vectors()
    counts = [float(weight[y].sum()) for _, y in batches]
    counted = {"num_examples": lambda batch: float(weight[batch[1]].sum())}
    return Setting(mlp(nn.Tanh()), loss, batches, counts, options=counted)


@configuration("classification/label-smoothing-and-ignored")
def smoothed() -> Setting:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(
            model(batch[0]), batch[1], label_smoothing=0.1, ignore_index=-100
        )

    batches = vectors()
    for _, y in batches:
        y[::4] = -100
    counts = [float((y != -100).sum()) for _, y in batches]
    counted = {"num_examples": lambda batch: int((batch[1] != -100).sum())}
    return Setting(mlp(nn.Tanh()), loss, batches, counts, options=counted)


@configuration("classification/ignored-by-boolean-indexing")
def boolean_indexing() -> Setting:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        known = batch[1] >= 0
        return nn.functional.cross_entropy(model(batch[0])[known], batch[1][known])

    batches = vectors()
    for _, y in batches:
        y[::4] = -1
    counts = [float((y >= 0).sum()) for _, y in batches]
    counted = {"num_examples": lambda batch: int((batch[1] >= 0).sum())}
    return Setting(mlp(nn.Tanh()), loss, batches, counts, options=counted)


@configuration("classification/classes-along-axis-one")
def axis_one() -> Setting:
    """Logits (N, C, L) with as many classes as places, where the axis cannot be guessed."""
    import hessian_tools as ht

    model = nn.Sequential(nn.Conv1d(2, 8, 3, padding=1), nn.Tanh(), nn.Conv1d(8, 4, 1))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    batches = [(torch.randn(n, 2, 4), torch.randint(4, (n, 4))) for n in (5, 3)]
    return Setting(
        model,
        loss,
        batches,
        [20.0, 12.0],
        given=ht.cross_entropy,
        refusal="axis",
    )


@configuration("classification/focal-loss")
def focal() -> Setting:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        chosen = model(batch[0]).log_softmax(1).gather(1, batch[1][:, None])[:, 0]
        return -((1 - chosen.exp()).square() * chosen).mean()

    batches = vectors()
    return Setting(mlp(nn.Tanh()), loss, batches, lengths(batches))


@configuration("classification/binary-with-positive-weights")
def binary() -> Setting:
    weight = torch.tensor([1.0, 3.0, 0.5])

    def loss(model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch[0])
        return nn.functional.binary_cross_entropy_with_logits(
            logits, batch[1], pos_weight=weight.to(logits.dtype)
        )

    batches = [(torch.randn(n, 6), (torch.rand(n, 3) < 0.4).float()) for n in (9, 5)]
    return Setting(mlp(nn.Tanh()), loss, batches, [9.0, 5.0])


@configuration("classification/multi-margin")
def margin() -> Setting:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.multi_margin_loss(model(batch[0]), batch[1], p=2)

    return Setting(mlp(nn.Tanh()), loss, vectors(), [9.0, 5.0], refusal="multi_margin")


@configuration("classification/connectionist-temporal")
def temporal() -> Setting:
    """CTC: a dynamic programme over alignments, whose kernel is differentiated once only."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        frames, targets = batch
        steps = model(frames).log_softmax(-1).transpose(0, 1)
        inputs = torch.full((len(frames),), frames.shape[1])
        sizes = torch.full((len(frames),), targets.shape[1])
        return nn.functional.ctc_loss(steps, targets, inputs, sizes)

    batch = (torch.randn(4, 8, 6), torch.randint(1, CLASSES, (4, 2)))
    return Setting(mlp(nn.Tanh()), loss, [batch], [4.0], refusal="ctc")


@configuration("classification/conditional-random-field")
def random_field() -> Setting:
    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emission = mlp(nn.Tanh())
            self.transition = nn.Parameter(torch.randn(CLASSES, CLASSES) / 2)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        scores = model.emission(batch[0])  # (n, t, c)
        labels = batch[1]
        alpha = scores[:, 0]
        for step in scores[:, 1:].unbind(1):
            alpha = (alpha[:, :, None] + model.transition).logsumexp(1) + step
        gold = scores.gather(2, labels[..., None]).sum((1, 2))
        gold = gold + model.transition[labels[:, :-1], labels[:, 1:]].sum(1)
        return (alpha.logsumexp(1) - gold).mean()

    batches = [(torch.randn(n, 5, 6), torch.randint(CLASSES, (n, 5))) for n in (4, 2)]
    return Setting(Field(), loss, batches, [4.0, 2.0])


@configuration("regression/missing-labels-as-nan")
def missing() -> Setting:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        known = ~batch[1].isnan()
        errors = (model(batch[0]) - batch[1].nan_to_num()).square() * known
        return errors.sum() / known.sum()

    batches = [(torch.randn(n, 6), torch.randn(n, 3)) for n in (9, 5)]
    for _, y in batches:
        y[::3, 1] = float("nan")
    counts = [float((~y.isnan()).sum()) for _, y in batches]
    counted = {"num_examples": lambda batch: int((~batch[1].isnan()).sum())}
    return Setting(mlp(nn.Tanh()), loss, batches, counts, options=counted)


@configuration("regression/missing-labels-in-a-loader")
def missing_in_loader() -> Setting:
    from torch.utils.data import DataLoader, TensorDataset

    def loss(model: nn.Module, batch: Any) -> Tensor:
        known = ~batch[1].isnan()
        errors = (model(batch[0]) - batch[1].nan_to_num()).square() * known
        return errors.sum() / known.sum()

    y = torch.randn(12, 3)
    y[::3, 1] = float("nan")
    loader = DataLoader(TensorDataset(torch.randn(12, 6), y), batch_size=6)
    return Setting(mlp(nn.Tanh()), loss, loader, [6.0, 6.0])  # type: ignore[arg-type]


@configuration("regression/huber-and-absolute")
def huber() -> Setting:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        prediction = model(batch[0])
        smooth = nn.functional.huber_loss(prediction, batch[1])
        return smooth + 0.1 * nn.functional.l1_loss(prediction, batch[1])

    batches = [(torch.randn(n, 6), torch.randn(n, 3)) for n in (9, 5)]
    return Setting(mlp(nn.Tanh()), loss, batches, [9.0, 5.0])


@configuration("regression/quantiles")
def quantiles() -> Setting:
    levels = torch.tensor([0.1, 0.5, 0.9])

    def loss(model: nn.Module, batch: Any) -> Tensor:
        prediction = model(batch[0])
        error = batch[1] - prediction
        at = levels.to(prediction.dtype)
        return torch.maximum(at * error, (at - 1) * error).mean() + 0.1 * error.square().mean()

    batches = [(torch.randn(n, 6), torch.randn(n, 1)) for n in (9, 5)]
    return Setting(mlp(nn.Tanh()), loss, batches, [9.0, 5.0])


@configuration("regression/weight-decay-in-the-loss")
def decayed() -> Setting:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        decay = sum(p.square().sum() for p in model.parameters())
        return cross_entropy(model, batch) + 1e-2 * decay

    return Setting(mlp(nn.Tanh()), loss, vectors(), [9.0, 5.0])


@configuration("ranking/cox-partial-likelihood")
def cox() -> Setting:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, order, happened = batch
        risk = model(x)[:, 0][order]
        return -((risk - risk.logcumsumexp(0)) * happened).sum() / happened.sum()

    batch = (torch.randn(9, 6), torch.randperm(9), (torch.rand(9) < 0.7).float() + 0.01)
    return Setting(_smooth(6), loss, [batch], [9.0])


@configuration("ranking/direct-preference-optimisation")
def preference() -> Setting:
    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.live = self._network()
            self.reference = self._network().requires_grad_(False)

        @staticmethod
        def _network() -> nn.Module:
            return nn.Sequential(nn.Embedding(20, 8), nn.Tanh(), nn.Linear(8, 20))

        def forward(self, ids: Tensor) -> Tensor:
            def scored(network: nn.Module) -> Tensor:
                log_p = network(ids[:, :-1]).log_softmax(-1)
                return log_p.gather(-1, ids[:, 1:, None]).sum((1, 2))

            with torch.no_grad():
                base = scored(self.reference)
            return scored(self.live) - base

    def loss(model: nn.Module, batch: Any) -> Tensor:
        chosen, rejected = batch
        return -nn.functional.logsigmoid(0.5 * (model(chosen) - model(rejected))).mean()

    batches = tokens((4, 2))
    return Setting(Policy(), loss, batches, [4.0, 2.0])


@configuration("ranking/policy-gradient-with-entropy")
def policy_gradient() -> Setting:
    class ActorCritic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 12), nn.Tanh())
            self.actor, self.critic = nn.Linear(12, CLASSES), nn.Linear(12, 1)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        state, action, reward, old = batch
        h = model.body(state)
        log_p = model.actor(h).log_softmax(1)
        value = model.critic(h)[:, 0]
        advantage = (reward - value).detach()
        ratio = (log_p.gather(1, action[:, None])[:, 0] - old).exp()
        clipped = ratio.clamp(0.8, 1.2)
        gain = torch.minimum(ratio * advantage, clipped * advantage).mean()
        entropy = -(log_p.exp() * log_p).sum(1).mean()
        return -gain + 0.5 * (reward - value).square().mean() - 0.01 * entropy

    # a detached advantage makes the gradient no derivative of the loss, and its matrix lopsided
    batches = [
        (torch.randn(n, 6), torch.randint(CLASSES, (n,)), torch.randn(n), torch.full((n,), -1.1))
        for n in (9, 5)
    ]
    return Setting(ActorCritic(), loss, batches, [9.0, 5.0], refusal="gradient")
