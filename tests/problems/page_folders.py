"""Folders for the report page: runs with numbers that are known, some of them hostile."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

import hessian_tools as ht
from hessian_tools.app.run_folder import RunFolder
from hessian_tools.curvature.symmetric import DiagonalOperator
from hessian_tools.heterogeneity.block_heterogeneity import JSHeterogeneity, Reading, ScaleSpread
from hessian_tools.heterogeneity.readings import READINGS
from hessian_tools.heterogeneity.verdict import Verdict
from hessian_tools.page.found import FoundRun
from hessian_tools.spectra.quadrature import Quadrature
from hessian_tools.training.races import Race, RaceEntry, RaceRound
from hessian_tools.training.trajectory import Trajectory

HOSTILE = "<script>document.title='broken'</script>.weight"
EIGENVALUES = {  # by block
    "layers.0.query.weight": [-0.01, 0.01, 0.02],
    "layers.0.value.weight": [-2.0, 1.0, 30.0],
    "layers.1.query.weight": [-0.02, 0.03],
    "layers.1.value.weight": [-1.0, 5.0],
    HOSTILE: [0.5, 0.6, 0.7, 0.8],
    "head.weight": [100.0, 200.0],
}
CONFIG = {"command": "js0", "model": "known", "seed": 0, "probes": 2}
COMMANDS = {"repeat": "hessian-tools js0 --model known", "race": "hessian-tools race --model known"}


def exact_spectra(blocks=EIGENVALUES):
    """Spectra of diagonal blocks with the given eigenvalues."""
    quadratures = {
        name: ht.slq(
            DiagonalOperator(torch.tensor(values, dtype=torch.float64)),
            num_probes=2,
            num_steps=3,
            exact=True,
        )
        for name, values in blocks.items()
    }
    return ht.BlockSpectra(quadratures, 2, 3, 0, "rademacher", "full", "the route")


def js0_folder(path, readings=("curvature", "log")):
    """A finished run of js0 on EIGENVALUES."""
    spectra = exact_spectra()
    js = ht.js_heterogeneity(spectra, readings=list(readings))
    RunFolder(path, CONFIG, COMMANDS).finish({"spectra": spectra, "heterogeneity": js})
    return spectra, js


def small_problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return ht.Problem(model, ht.cross_entropy, [(torch.randn(32, 6), torch.randint(3, (32,)))])


def partition_folder(path):
    """A finished check of the neuron partition of a small network."""
    problem = small_problem()
    report = ht.check_partition(problem, "neuron", seed=0)
    tensors = ht.partition(problem.model, "tensor")
    drawn = ht.coupling(problem, tensors, num_probes=2, seed=0)
    config = {"command": "partition", "model": "small"}
    folder = RunFolder(path, config, {"repeat": "hessian-tools partition --model small"})
    folder.finish({"report": report, "drawn": drawn, "conditioning": None})
    return report


def tracker_journal(path):
    """Of a few steps of gradient descent; returns the tracker."""
    problem = small_problem()
    optimizer = torch.optim.SGD(problem.model.parameters(), 0.5)
    readings = ["loss", "largest", "scale"]
    tracker = ht.Tracker(problem, every=2, readings=readings, journal=path).attach(optimizer)
    for _ in range(6):
        optimizer.zero_grad()
        ht.cross_entropy(problem.model, problem.batches[0]).backward()
        optimizer.step()
    tracker.detach()
    return tracker


def trajectory(losses, num_steps=None):
    losses = np.array(losses, dtype=float)
    steps = len(losses)
    rates = np.full(steps, 0.1)
    at = np.array([steps])
    return Trajectory(
        losses, rates, np.ones(steps), at, losses[-1:], num_steps or steps, False, False, 1.0, 64
    )


def entry(optimizer, start, end, steps=40):
    run = trajectory(np.geomspace(start, end, steps))
    rates = np.array([0.01, 0.1, 1.0])
    rounds = tuple(
        RaceRound(steps // share, rates, np.array([start, end * share, np.inf]), np.isinf(rates))
        for share in (2, 1)
    )
    finals = np.array([run.final])
    return RaceEntry(
        optimizer, 8, steps, 0.1, finals, finals, 2.0, 9, 64, 1e-3, False, rounds, (run,)
    )


def race_folder(path):
    entries = (entry("sgd", 3.0, 1.0), entry("adam", 3.0, 0.5))
    race = Race("known data", "40 steps", (0,), entries, 2.0)
    RunFolder(path, {"command": "race", "model": "small"}, {}).finish({"race": race})
    return race


def every_run(folder: Path):
    """One of each, in folders of their own."""
    js0_folder(folder / "js0")
    partition_folder(folder / "partition")
    race_folder(folder / "race")
    tracker_journal(folder / "curvature.jsonl")


def many_blocks(count=400, readings=None):
    """A run with all readings of many blocks, as noisy as they come."""
    rng = np.random.default_rng(0)
    names = [f"transformer.h.{k // 10}.mlp.experts.{k % 10}.weight" for k in range(count)]

    def quadrature(scale):
        nodes = np.sort(scale * rng.standard_normal((4, 40)) ** 3, axis=1)
        weights = rng.dirichlet(np.ones(40), 4)
        residuals = np.abs(nodes) * rng.uniform(0, 0.3, nodes.shape)
        steps = np.full(4, 40)
        rest = (steps, 5_000, 160, "complete", "rademacher", "full")
        return Quadrature(nodes, weights, residuals, *rest)

    def matrix():
        half = rng.exponential(size=(count, count))
        return np.where(np.eye(count, dtype=bool), 0.0, half + half.T)

    blocks = {name: quadrature(10 ** rng.uniform(-4, 1)) for name in names}
    spectra = ht.BlockSpectra(blocks, 4, 40, 0, "rademacher", "full", "the route")
    over_pairs = [m for m in READINGS.values() if m.over_pairs and m.name in (readings or READINGS)]
    found = {m.name: Reading(1.0, 0.1, matrix(), m.unit, m.description) for m in over_pairs}
    verdict = Verdict("undecided", "A reason.", "", "", "")
    scale = ScaleSpread(1.0, 0.1, np.zeros(count))
    settings = (verdict, 64_000, 4, 0.1, 1e-6, {}, ())
    js = JSHeterogeneity(tuple(names), found, scale, *settings)
    return FoundRun("large", "js0", {"spectra": spectra, "heterogeneity": js})
