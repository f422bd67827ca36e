"""The published picture of an MLP's Hessian: block-diagonal, and more so when trained?

Claim (arXiv 2505.02809, which took CIFAR-100; 3072-8-100 without bias): W's Hessian has one dense
block a hidden neuron, V's one an output; stripes between the layers, present at initialisation, go
as the loss falls. No package carries CIFAR-100. Here: the packaged Fashion-MNIST, 2,000 grey images
resized to 32 x 32 and repeated in 3 channels, the 100 classes being ten k-means clusters inside
each of the ten real classes. So these are real images of the same shape with derived labels, and
the channels' Hessian entries are copies of each other. Where they would only be repeated, a pixel's
three weights are replaced by their sum over sqrt(3), an orthogonal change of variables that leaves
every norm as it is; training and ``ht.coupling`` see all 3,072 inputs.

W's Hessian, 24,576 x 24,576, is drawn at every fourth pixel of one channel in both directions (64
of 3,072 inputs of a neuron), V's whole. Masses (squared Frobenius norms) are of the whole Hessian,
in closed form (:mod:`relu_hessian`), checked against the dense matrix on what is drawn and against
``ht.coupling`` on all. H_wv is the sum of a Gauss-Newton part and a residual part, the mean of (p -
y) g x; the stripes are the residual part, between weights into and out of the same hidden neuron.

`python experiments/mlp_structure.py [--smoke]` writes results/mlp_structure: masses by epoch, heat
maps, checks, and table.txt. `python figures/mlp_structure.py` draws it.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from heat_map import heat_map
from relu_hessian import ReluHessian, worst_difference
from script import Script
from torch import Tensor, nn
from tqdm import tqdm

import hessian_tools as ht
from hessian_tools.app import report
from hessian_tools.blocks.block import Cut, Part
from hessian_tools.problem import data

IMAGES, SIDE, CHANNELS, HIDDEN = 2000, 32, 3, 8
CLUSTERS, ROUNDS = 10, 30  # of k-means in each class; classes of the network: 10 times as many
# when masses are taken; pictures: first, half and end
EPOCHS = (0, 2, 8, 30, 60, 100, 200, 300, 400)
BATCH, RATE, SEED = 128, 3e-4, 0  # Adam
GRID = 8  # pixels drawn in each direction
DRAWN_CLASSES = 12  # in the picture of H_wv
PROBES = 64  # of the check by ht.coupling
SEEDS = 10  # initialisations
FULL = {"images": IMAGES, "side": SIDE, "epochs": EPOCHS, "seeds": SEEDS}
SMOKE = {"images": 240, "side": 8, "epochs": (0, 1, 2), "seeds": 2}
OUT = Path("results/mlp_structure")
HEADER = (
    "epoch",
    "loss",
    "accuracy",
    "|H_ww|",
    "in neurons",
    "|H_vv|",
    "in outputs",
    "|H_wv|",
    "residual part",
    "|H_wv|/sqrt(|H_ww||H_vv|)",
    "all: in blocks",
    "in layers",
    "across",
)


def clustered(points: Tensor, stream: torch.Generator) -> Tensor:
    """(N,) numbers of k-means clusters (Lloyd 1982) of (N, d) points."""
    centres = points[torch.randperm(len(points), generator=stream)[:CLUSTERS]]
    for _ in range(ROUNDS):
        labels = torch.cdist(points, centres).argmin(1)
        means = [
            points[labels == i].mean(0) if (labels == i).any() else centres[i]
            for i in range(CLUSTERS)
        ]
        centres = torch.stack(means)
    return labels


def images(count: int, side: int) -> tuple[Tensor, Tensor]:
    """(N, 3 s s) float64 and (N,) labels 0 to 99."""
    ((pixels, classes),) = data.image_batches(
        data.image_source(),
        num_examples=count,
        batch_size=count,
        image_size=side,
        channels=CHANNELS,
        seed=SEED,
    )
    stream = torch.Generator().manual_seed(SEED)
    inputs = pixels.flatten(1).double()
    labels = classes.clone()
    for number in classes.unique().tolist():
        members = classes == number
        labels[members] = CLUSTERS * number + clustered(inputs[members], stream)
    return inputs, labels


def initial(inputs: Tensor, labels: Tensor, classes: int, seed: int) -> ReluHessian:
    """LeCun normal initialisation."""
    stream = torch.Generator().manual_seed(seed)
    shapes = ((HIDDEN, inputs.shape[1]), (classes, HIDDEN))
    w, v = (
        torch.randn(shape, generator=stream, dtype=torch.float64) / shape[1] ** 0.5
        for shape in shapes
    )
    return ReluHessian(inputs, labels, w, v, "CE")


def initial_shares(inputs: Tensor, labels: Tensor, classes: int, seeds: int) -> np.ndarray:
    """(seeds, 2) shares of H_ww's mass inside neurons and of H_vv's inside outputs, untrained."""
    shares = []
    for seed in range(seeds):
        net = in_one_channel(initial(inputs, labels, classes, seed))
        shares.append([diagonal_share(net.ww()), diagonal_share(net.vv())])
    return np.array(shares)


def diagonal_share(mass: Tensor) -> float:
    return float(mass.diagonal().sum() / mass.sum())


def trained(
    inputs: Tensor, labels: Tensor, epochs: tuple[int, ...]
) -> Iterator[tuple[int, ReluHessian]]:
    """(epoch, network) at each of ``epochs``."""
    start = initial(inputs, labels, 10 * CLUSTERS, SEED)
    stream = torch.Generator().manual_seed(SEED)
    w = start.w.requires_grad_()
    v = start.v.requires_grad_()
    optimizer = torch.optim.Adam([w, v], lr=RATE)
    for epoch in tqdm(range(epochs[-1] + 1), unit="epoch", disable=None):
        if epoch in epochs:
            yield epoch, ReluHessian(inputs, labels, w.detach().clone(), v.detach().clone(), "CE")
        for batch in torch.randperm(len(inputs), generator=stream).split(BATCH):
            loss = nn.functional.cross_entropy((inputs[batch] @ w.T).relu() @ v.T, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def in_one_channel(net: ReluHessian) -> ReluHessian:
    """The same masses from a third of the inputs: those of a grey image, times sqrt(3)."""
    size = net.inputs.shape[1] // CHANNELS
    scale = CHANNELS**0.5
    w = net.w.unflatten(1, (CHANNELS, size)).sum(1) / scale
    return replace(net, inputs=net.inputs[:, :size] * scale, w=w)


def masses(net: ReluHessian) -> dict[str, float]:
    """Norms of the layers' blocks, and shares of mass inside neurons, of the whole Hessian."""
    grey = in_one_channel(net)
    ww = grey.ww()
    vv = grey.vv()
    wv = float(grey.wv().sum())
    layers = float(ww.sum() + vv.sum())
    total = layers + 2 * wv
    inside = float(ww.diagonal().sum() + vv.diagonal().sum())
    accuracy = float(((net.hidden @ net.v.T).argmax(1) == net.labels).double().mean())
    return {
        "loss": net.mean_loss,
        "accuracy": accuracy,
        "ww": float(ww.sum()) ** 0.5,
        "inside ww": diagonal_share(ww),
        "vv": float(vv.sum()) ** 0.5,
        "inside vv": diagonal_share(vv),
        "wv": wv**0.5,
        "residual": float(grey.wv_residual().sum()) ** 0.5,
        "coupling": (wv / float(ww.sum() * vv.sum()) ** 0.5) ** 0.5,
        "blocks": inside / total,
        "layers": layers / total - inside / total,
        "across": 2 * wv / total,
    }


def drawn_inputs(net: ReluHessian, side: int) -> Cut:
    """GRID x GRID pixels of every hidden neuron's inputs, one block a neuron."""
    step = side // GRID
    view = (HIDDEN, GRID, step, GRID, step)
    pixels = (slice(0, GRID), slice(step // 2, step // 2 + 1)) * 2
    some = Part("1.weight", tuple(net.w.shape), view, (slice(0, HIDDEN), *pixels), (0,))
    return Cut((some,), "w", counter="neuron", per_label=HIDDEN)


def worst_of_layers(net: ReluHessian, inputs: Tensor, mass: Tensor) -> float:
    """How far the closed form's masses lie from ``mass``, measured on some ``inputs``."""
    layers = (slice(0, HIDDEN), slice(HIDDEN, None))
    closed = {(0, 0): net.ww(inputs), (1, 1): net.vv(), (0, 1): net.wv(inputs)}
    return max(
        worst_difference(masses, mass[layers[i], layers[j]]) for (i, j), masses in closed.items()
    )


def picture(net: ReluHessian, side: int) -> dict[str, Any]:
    """Heat maps, and checks of the closed form."""
    grey = in_one_channel(net)
    problem = grey.problem()
    cut = drawn_inputs(grey, side)
    blocks = [cut, *ht.partition(problem.model, {"3.*": "row"}).cuts]
    dense = ht.dense_block(problem, blocks, progress=False)
    first, last = (int(dense.offsets[HIDDEN + classes]) for classes in (0, DRAWN_CLASSES))
    columns = cut.parts[0].rows(torch.arange(grey.w.numel()).view_as(grey.w))[0]
    difference = worst_of_layers(grey, grey.inputs[:, columns], torch.from_numpy(dense.mass))
    coloured = net.problem()
    probed = ht.coupling(
        coloured, ht.partition(coloured.model, "tensor"), num_probes=PROBES, progress=False
    )
    return {
        "ww": heat_map(dense.matrix[:first, :first], 2),
        "vv": heat_map(dense.matrix[first:, first:], 2),
        "wv": heat_map(dense.matrix[:first, first:last]),
        "symmetry error": dense.symmetry_error,
        "difference": difference,
        "probed": probed.tensor_mass,
        "probed error": probed.tensor_mass_error,
    }


def masses_row(epoch: str, m: dict[str, float]) -> list[str]:
    return [
        epoch,
        f"{m['loss']:.3f}",
        f"{m['accuracy']:.0%}",
        f"{m['ww']:.3g}",
        f"{m['inside ww']:.1%}",
        f"{m['vv']:.3g}",
        f"{m['inside vv']:.1%}",
        f"{m['wv']:.3g}",
        f"{m['residual']:.3g}",
        f"{m['coupling']:.2f}",
        f"{m['blocks']:.1%}",
        f"{m['layers']:.1%}",
        f"{m['across']:.1%}",
    ]


def initial_line(classes: str, shares: np.ndarray) -> str:
    neurons, outputs = (
        f"{share.mean():.1%} ({share.min():.1%} to {share.max():.1%})" for share in shares.T
    )
    return (
        f"At initialisation, {classes} classes, {len(shares)} seeds, "
        f"inside neurons {neurons}, inside outputs {outputs}."
    )


def check_line(epoch: str, drawn: dict[str, Any], closed: dict[str, float]) -> str:
    probed = drawn["probed"]
    error = drawn["probed error"]
    return (
        f"Epoch {epoch}: on what is drawn, closed form and ht.dense_block differ by "
        f"{drawn['difference']:.1e} of the largest mass; "
        "squared norms, closed form and ht.coupling: "
        f"H_ww {closed['ww'] ** 2:.3g}, {probed[0, 0]:.3g} ± {error[0, 0]:.2g}; "
        f"H_wv {closed['wv'] ** 2:.3g}, {probed[0, 1]:.3g} ± {error[0, 1]:.2g}."
    )


def text(result: dict[str, Any]) -> str:
    rows = [masses_row(epoch, m) for epoch, m in result["masses"].items()]
    by_chance = (
        f"Without structure {1 / HIDDEN:.1%} of H_ww would lie inside neurons "
        f"and {1 / (10 * CLUSTERS):.1%} of H_vv inside outputs. Norms are Frobenius norms."
    )
    lines = [report.table(HEADER, rows), by_chance]
    lines += [initial_line(classes, shares) for classes, shares in result["initial"].items()]
    for epoch, drawn in result["pictures"].items():
        lines.append(check_line(epoch, drawn, result["masses"][epoch]))
    return "\n".join(lines)


def main() -> None:
    run = Script(__doc__, OUT, smoke="few images of 8 x 8, two epochs: seconds").run()
    config = SMOKE if run.smoke else FULL
    side = config["side"]
    epochs = config["epochs"]
    inputs, labels = images(config["images"], side)
    initials = {
        str(c): initial_shares(inputs, labels, c, config["seeds"]) for c in (10 * CLUSTERS, 10)
    }
    result: dict[str, Any] = {"masses": {}, "pictures": {}, "initial": initials}
    for epoch, net in trained(inputs, labels, epochs):
        result["masses"][str(epoch)] = masses(net)
        if epoch in (0, epochs[-1] // 2, epochs[-1]):
            result["pictures"][str(epoch)] = picture(net, side)
    result |= {
        "hidden": HIDDEN,
        "inputs": CHANNELS * side**2,
        "drawn": GRID**2,
        "classes": 10 * CLUSTERS,
    }
    run.save(result, {**config, "batch": BATCH, "rate": RATE, "seed": SEED, "probes": PROBES})
    run.print_table(text(result))


if __name__ == "__main__":
    main()
