"""Does SGD fall behind Adam as layers are scaled apart, and on an MLP-Mixer? (Examples 2 and 3)

Zhang et al., "Why Transformers Need Adam" (arXiv 2402.16788): with the layers of an MLP scaled
apart, SGD's final accuracy falls as heterogeneity grows while Adam's stays (Example 2); an
MLP-Mixer is heterogeneous, and SGD falls behind Adam on it (Example 3). Their widths, constants
and rates are not published.

Protocol, fixed before any result.

Dial: an MLP 196-64-64-64-10 (GELU) on packaged Fashion-MNIST (14 x 14, 3600 images to train on, 400
held out). Layer l's output is times c_l, its starting weights and bias are divided by c_l: the
function at the start stays, the Hessian's block (k, l) is times c_k c_l. Four patterns, six spreads
of 1 to 6 decades between the largest and the smallest c_l^2, and the network as it is:

- ramp: log c_l rises evenly from the first layer to the head, around 0;
- head, first: that layer alone, all others keep c = 1;
- alternating: the second and fourth layer above, the first and third below.

Beside it, on the same images at 16 x 16 in three channels: an MLP-Mixer (2 layers of width 48,
patch 4) and, as the network that the paper calls homogeneous, a CNN (3 convolutions).

Training: SGD with momentum 0.9 and Adam (0.9, 0.95), 300 steps (dial: batch 64, others: 32),
cosine schedule, no clipping. Each at each position over half-decades of the rate, extended while
the best is at an edge, tuned by the final training loss of seeds 0 and 1; then seeds 0 to 3 at the
best rate, where a run that diverges counts with its loss at the start. The grids begin at 10^-2 to
1 over max c^2 (SGD) and 10^-3.5 to 10^-1.5 over max c (Adam), where a step moves the function as
far as without factors. Gap: (L_sgd - L_adam) / (L_0 - L_adam) of training losses, L_0 at the start.

Readings at the start, seed 0, 256 training images in 4 batches, float64: all readings of
`ht.js_heterogeneity` of the Hessian's weight blocks (4 probes x 40 steps), and the best decrease
of the Gauss-Newton quadratic by a rate a layer, and by Adam's direction, over that of one rate.

Judgement:
- the change of validation accuracy from c = 1 to six decades, of one pattern and optimizer, with
  95 % limits (Student's t over 4 seeds; variance over seeds plus that over the 400 images). It
  "falls" where the limits lie below -1 point, "stays" where they lie above; Example 2 holds on a
  pattern where SGD falls and Adam stays, does not hold where SGD stays or Adam falls, and is else
  not decidable;
- Example 3: heterogeneous where the Mixer's interval of the curvature distance lies above the
  CNN's, SGD behind where the 95 % limits of Adam's accuracy less SGD's lie above 0, and of the gap,
  over seeds; the contrary does not hold where they lie below, else not decidable;
- rank correlation (Spearman) of every reading with the gap over the 25 positions of the dial, with
  percentiles of 2000 bootstrap draws of positions. These are positions of one network, and say
  nothing of other networks. Beside them, as a baseline, the dial itself.

`python experiments/scaled_layers.py [--smoke]` writes results/scaled_layers; the same command goes
on where it was stopped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata, t
from script import Run, Script
from torch import Tensor, nn

import hessian_tools as ht
from hessian_tools.app import report
from hessian_tools.descent import PredictedProgress
from hessian_tools.heterogeneity import JSHeterogeneity
from hessian_tools.heterogeneity.readings import READINGS, pair_readings
from hessian_tools.optimizers.named import half_decades, make
from hessian_tools.problem import data
from hessian_tools.problem.networks import MLPMixer, SmallVGG
from hessian_tools.results import Journal
from hessian_tools.tables import plus_minus
from hessian_tools.training import Stream, problem_stream, sweep, train

OUT = Path("results/scaled_layers")
SIZES = (196, 64, 64, 64, 10)
# where a layer stands on the dial: log10 c_l^2 is the dial's decades times this
PATTERNS = {
    "ramp": (-1 / 2, -1 / 6, 1 / 6, 1 / 2),
    "head": (0, 0, 0, 1),
    "first": (1, 0, 0, 0),
    "alternating": (-1 / 2, 1 / 2, -1 / 2, 1 / 2),
}
DECADES = (1, 2, 3, 4, 5, 6)
OPTIMIZERS = ("sgd", "adam")
MOMENTUM = 0.9
# exponents of the rates that a sweep begins with, over max c^2 and max c
GRIDS = {"sgd": half_decades(-2, 0), "adam": half_decades(-3, -1)}
GRIDS["adam"] = tuple(rate / 10**0.5 for rate in GRIDS["adam"])
POWERS = {"sgd": 2, "adam": 1}
START = "c = 1"
POINT = 0.01  # of accuracy: what counts as a fall
BATCHES = 4  # of the readings
Floats = np.ndarray


class Size(NamedTuple):
    """How much is done."""

    steps: int
    seeds: tuple[int, ...]
    decades: tuple[int, ...]
    images: int
    probes: int
    lanczos_steps: int
    batch: int  # images in each of the batches of the readings
    draws: int  # of the bootstrap


FULL = Size(300, (0, 1, 2, 3), DECADES, 4000, 4, 40, 64, 2000)
SMOKE = Size(2, (0, 1), (6,), 40, 2, 3, 4, 20)


# ----------------------------------------------------------------------------------- the networks


class ScaledLinear(nn.Linear):
    """c (W x + b), (b, n) -> (b, m), whose W and b start c times smaller."""

    def __init__(self, n: int, m: int, factor: float) -> None:
        super().__init__(n, m)
        self.factor = factor
        with torch.no_grad():
            self.weight /= factor
            self.bias /= factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * super().forward(x)


def factors(pattern: str, decades: float) -> list[float]:
    """c_l of the layers."""
    return [10 ** (decades * place / 2) for place in PATTERNS[pattern]]


def scaled_mlp(scales: Sequence[float], sizes: Sequence[int] = SIZES) -> nn.Module:
    """The same function for all ``scales``, at the same random numbers."""
    layers: list[nn.Module] = [nn.Flatten()]
    for (n, m), factor in zip(pairwise(sizes), scales, strict=True):
        layers.append(ScaledLinear(n, m, factor))
        layers.append(nn.GELU())
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class Position:
    """One network to train: a position of the dial, the Mixer or the CNN."""

    name: str
    build: Callable[[], nn.Module]
    stream: Stream
    pattern: str = ""
    decades: float = 0.0
    scales: tuple[float, ...] = (1.0,)

    def model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build()

    def rates(self, optimizer: str) -> list[float]:
        """Where a sweep begins: as far from instability as without factors."""
        largest = max(self.scales) ** POWERS[optimizer]
        return [rate / largest for rate in GRIDS[optimizer]]


def stream_of(size: Size, side: int, channels: int, batch_size: int) -> Stream:
    """Packaged images, a tenth held out."""
    batches = data.image_batches(
        data.image_source(),
        num_examples=size.images,
        batch_size=size.images,
        image_size=side,
        channels=channels,
    )
    any_model = nn.Sequential(nn.Flatten(), nn.Linear(channels * side**2, 10))
    pool = ht.Problem(any_model, ht.cross_entropy, batches)
    return problem_stream(pool, batch_size=batch_size)


def positions(size: Size) -> list[Position]:
    grey = stream_of(size, 14, 1, 64)
    colour = stream_of(size, 16, 3, 32)
    plain = (1.0,) * 4
    found = [Position(START, partial(scaled_mlp, plain), grey)]
    for pattern in PATTERNS:
        for decades in size.decades:
            scales = tuple(factors(pattern, decades))
            name = f"{pattern} {decades}"
            build = partial(scaled_mlp, scales)
            found.append(Position(name, build, grey, pattern, decades, scales))
    found.append(Position("mixer", lambda: MLPMixer(16, 4, 2, 48, 32, 192, 10), colour))
    found.append(Position("cnn", lambda: SmallVGG((16, 32, 64)), colour))
    return found


# ---------------------------------------------------------------------------------------- training


def swept(position: Position, optimizer: str, size: Size, journal: Journal) -> dict[str, Floats]:
    """The rates tried, ascending, and their final training losses, a mean over two seeds."""
    (found,) = sweep(
        position.model,
        position.stream,
        [optimizer],
        budget=size.steps,
        rates={optimizer: position.rates(optimizer)},
        momenta=[MOMENTUM],
        seeds=size.seeds[:2],
        clip=None,
        journal=journal,
    )
    return {"rates": found.rates, "losses": found.mean_losses}


def trained(position: Position, optimizer: str, rate: float, size: Size) -> dict[str, Floats]:
    """Runs at one rate, by seed: losses at the start and end, which held-out images are right."""
    runs: list[dict[str, object]] = []
    for seed in size.seeds:
        model = position.model(seed)
        stream = position.stream.with_seed(seed)
        stepper = make(optimizer, model, rate, momentum=MOMENTUM)
        run = train(model, stream, stepper, budget=size.steps, clip=None, validate_every=size.steps)
        outcome = {
            "start": run.losses[0],
            "loss": run.losses[0] if run.diverged else run.final,
            "validation": run.final_validation,
            "right": right(model, stream),
        }
        runs.append(outcome)
    return {what: np.array([run[what] for run in runs]) for what in runs[0]}


def right(model: nn.Module, stream: Stream) -> Floats:
    """(N,) whether each held-out image is put in its class."""
    with torch.no_grad():
        hits = [model(images).argmax(1) == labels for images, labels in stream.held_out()]
    return torch.cat(hits).numpy()


# ---------------------------------------------------------------------------------------- readings


def problem_of(position: Position, size: Size) -> ht.Problem:
    model = position.model(0).double().eval()
    stream = position.stream.with_batch_size(size.batch)
    batches = [(images.double(), labels) for images, labels in map(stream.batch, range(BATCHES))]
    return ht.Problem(model, ht.cross_entropy, batches)


def readings(position: Position, size: Size) -> JSHeterogeneity:
    problem = problem_of(position, size)
    spectra = ht.blockwise_slq(
        problem,
        ht.partition(problem.model, "weights"),
        num_probes=size.probes,
        num_steps=size.lanczos_steps,
    )
    return ht.js_heterogeneity(spectra, readings=pair_readings())


def progress(position: Position, size: Size) -> PredictedProgress:
    operator = ht.GaussNewtonOperator(problem_of(position, size))
    return ht.predicted_progress(operator, "layer", progress=False)


class Found(NamedTuple):
    """What was measured at one position."""

    sweeps: dict[str, dict[str, Floats]]  # by optimizer
    runs: dict[str, dict[str, Floats]]  # by optimizer
    readings: JSHeterogeneity
    progress: PredictedProgress


def measured(run: Run, position: Position, size: Size) -> Found:
    folder = run.out / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder / f"{position.name.replace(' ', '_')}.jsonl")

    def kept(name: str, compute: Callable[[], object]) -> object:
        if name not in journal.finished:
            journal.append(name, compute())
            # what was read back is what a resumed run has
            return Journal(journal.path).finished[name]
        return journal.finished[name]

    js = kept("readings", lambda: readings(position, size))
    gains = kept("progress", lambda: progress(position, size))
    sweeps = {}
    runs = {}
    for optimizer in OPTIMIZERS:
        sweeps[optimizer] = swept(position, optimizer, size, journal)
        rate = best_rate(sweeps[optimizer])
        compute = partial(trained, position, optimizer, rate, size)
        runs[optimizer] = kept(f"best {optimizer}", compute)
    return Found(sweeps, runs, js, gains)


def best_rate(tried: dict[str, Floats]) -> float:
    return float(tried["rates"][np.argmin(tried["losses"])])


# --------------------------------------------------------------------------------------- judgement


class Interval(NamedTuple):
    """A mean and its 95 % limits."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return plus_minus(self.mean, self.high - self.mean)


def over_seeds(values: Floats) -> Interval:
    """Of (S,) values."""
    return _limits(float(values.mean()), values.var(ddof=1) / len(values), len(values))


def over_seeds_and_images(differences: Floats) -> Interval:
    """Of (S, N) differences: the variance of their mean over seeds, plus that over images."""
    by_seed = differences.mean(axis=1)
    by_image = differences.mean(axis=0)
    variance = by_seed.var(ddof=1) / len(by_seed) + by_image.var(ddof=1) / len(by_image)
    return _limits(float(differences.mean()), variance, len(by_seed))


def _limits(mean: float, variance: float, count: int) -> Interval:
    reach = float(t.ppf(0.975, count - 1) * np.sqrt(variance))
    return Interval(mean, mean - reach, mean + reach)


@dataclass(frozen=True)
class Outcome:
    """What the runs at one position say."""

    found: Found

    @cached_property
    def gaps(self) -> Floats:
        """(S,) by seed."""
        sgd, adam = (self.found.runs[name] for name in OPTIMIZERS)
        return (sgd["loss"] - adam["loss"]) / (adam["start"] - adam["loss"])

    @property
    def gap(self) -> Interval:
        return over_seeds(self.gaps)

    def right(self, optimizer: str) -> Floats:
        """(S, N)"""
        return self.found.runs[optimizer]["right"].astype(float)

    def accuracy(self, optimizer: str) -> float:
        return float(self.right(optimizer).mean())

    def lead(self) -> Interval:
        """Adam's accuracy less SGD's."""
        return over_seeds_and_images(self.right("adam") - self.right("sgd"))

    def summary(self) -> dict[str, object]:
        """Gap and accuracies with limits over seeds, and what might predict the gap."""
        accuracies = {name: over_seeds(self.right(name).mean(axis=1)) for name in OPTIMIZERS}
        return {"gap": self.gap, "accuracy": accuracies, "predictors": self.predictors()}

    def predictors(self) -> dict[str, float]:
        """Every reading by its heading."""
        js = self.found.readings
        found = {READINGS[name].name: reading.mean for name, reading in js.every_reading.items()}
        found["block rates / one rate"] = self.found.progress.block_rates.ratio
        found["Adam's direction / one rate"] = self.found.progress.adam.ratio
        return found


def word(change: Interval) -> str:
    """What a change of accuracy is called."""
    if change.high < -POINT:
        return "falls"
    return "stays" if change.low > -POINT else "undecided"


def example_2(sgd: Interval, adam: Interval) -> str:
    words = word(sgd), word(adam)
    if words == ("falls", "stays"):
        return "holds here"
    if words[0] == "stays" or words[1] == "falls":
        return "does not hold here"
    return "not decidable at this scale"


def above(low: float, high: float) -> str:
    """Whether what has these limits lies above 0."""
    if low > 0:
        return "holds here"
    return "does not hold here" if high < 0 else "not decidable at this scale"


def rank_correlation(values: Floats, gaps: Floats) -> float:
    """Spearman's; nan where either is constant or missing."""
    if np.ptp(values) == 0 or np.ptp(gaps) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(values), rankdata(gaps))[0, 1])


def bootstrapped(values: Floats, gaps: Floats, count: int) -> Interval:
    """The rank correlation, with percentiles of bootstrap draws of positions."""
    generator = np.random.default_rng(0)
    draws = generator.integers(len(gaps), size=(count, len(gaps)))
    drawn = [rank_correlation(values[some], gaps[some]) for some in draws]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return Interval(rank_correlation(values, gaps), float(low), float(high))


# --------------------------------------------------------------------------------------- reporting


def training_table(outcomes: dict[str, Outcome]) -> str:
    header = (
        "position",
        "SGD rate",
        "Adam rate",
        "SGD loss",
        "Adam loss",
        "gap",
        "SGD val. loss",
        "Adam val. loss",
        "SGD acc. %",
        "Adam acc. %",
        "Adam less SGD",
    )
    rows = []
    for name, outcome in outcomes.items():
        runs = outcome.found.runs
        rates = [shown_rate(outcome.found.sweeps[o]) for o in OPTIMIZERS]
        losses = [f"{runs[o]['loss'].mean():.3f}" for o in OPTIMIZERS]
        validations = [f"{runs[o]['validation'].mean():.3f}" for o in OPTIMIZERS]
        accuracies = [f"{100 * outcome.accuracy(o):.1f}" for o in OPTIMIZERS]
        lead = points(outcome.lead())
        rows.append([name, *rates, *losses, str(outcome.gap), *validations, *accuracies, lead])
    return report.table(header, rows)


def readings_table(outcomes: dict[str, Outcome]) -> str:
    header = ("position", *READINGS, "block rates", "Adam's direction")
    rows = []
    for name, outcome in outcomes.items():
        js = outcome.found.readings
        gains = outcome.found.progress
        cells = [js.told(reading) for reading in READINGS]
        ratios = [
            plus_minus(gain.ratio, 2 * gain.ratio_error) for gain in (gains.block_rates, gains.adam)
        ]
        rows.append([name, *cells, *ratios])
    return report.table(header, rows)


def shown_rate(tried: dict[str, Floats]) -> str:
    """The best rate, marked where a better one may lie beyond those tried."""
    rate = best_rate(tried)
    at_edge = rate in (tried["rates"][0], tried["rates"][-1])
    return f"{rate:.2g}{'*' if at_edge else ''}"


def points(change: Interval) -> str:
    return plus_minus(100 * change.mean, 100 * (change.high - change.mean))


def dial(outcomes: dict[str, Outcome]) -> dict[str, Outcome]:
    return {name: o for name, o in outcomes.items() if name not in ("mixer", "cnn")}


def columns(outcomes: dict[str, Outcome]) -> tuple[dict[str, Floats], Floats]:
    """Of the positions of the dial: what might predict the gap, by its heading, and the gap."""
    names = list(dial(outcomes))
    gaps = np.array([outcomes[name].gap.mean for name in names])
    spreads = [0.0 if name == START else float(name.split()[1]) for name in names]
    found = {"the dial itself": np.array(spreads)}
    for what in outcomes[START].predictors():
        found[what] = np.array([outcomes[name].predictors()[what] for name in names])
    return found, gaps


def correlations(outcomes: dict[str, Outcome], draws: int) -> dict[str, Interval]:
    """Spearman's with the gap over all positions of the dial."""
    found, gaps = columns(outcomes)
    return {what: bootstrapped(values, gaps, draws) for what, values in found.items()}


def correlation_table(outcomes: dict[str, Outcome], whole: dict[str, Interval]) -> str:
    """Spearman with the gap, over all positions and within each pattern."""
    found, gaps = columns(outcomes)
    names = list(dial(outcomes))
    rows = []
    for what, values in found.items():
        mean, low, high = whole[what]
        cells = [f"{mean:.2f} ({low:.2f} to {high:.2f})"]
        for pattern in PATTERNS:
            some = [i for i, name in enumerate(names) if name == START or pattern in name]
            cells.append(f"{rank_correlation(values[some], gaps[some]):.2f}")
        rows.append([what, *cells])
    return report.table(("Spearman with the gap", "all positions", *PATTERNS), rows)


def example_2_table(outcomes: dict[str, Outcome], size: Size) -> str:
    header = ("pattern", "SGD changes by", "Adam changes by", "Example 2")
    rows = []
    for pattern in PATTERNS:
        far = outcomes[f"{pattern} {size.decades[-1]}"]
        changes = [
            over_seeds_and_images(far.right(name) - outcomes[START].right(name))
            for name in OPTIMIZERS
        ]
        said = [f"{points(change)}, {word(change)}" for change in changes]
        rows.append([pattern, *said, example_2(*changes)])
    return report.table(header, rows, left=4)


def example_3_table(outcomes: dict[str, Outcome]) -> str:
    curvature = [
        outcomes[name].found.readings.every_reading["curvature"] for name in ("mixer", "cnn")
    ]
    mixer, cnn = curvature
    more = above(mixer.low - cnn.high, mixer.high - cnn.low)
    gap = outcomes["mixer"].gap
    lead = outcomes["mixer"].lead()
    rows = [
        ["heterogeneous: curvature distance above the CNN's", more],
        ["SGD behind Adam by training loss", above(gap.low, gap.high)],
        ["SGD behind Adam by validation accuracy", above(lead.low, lead.high)],
    ]
    return report.table(("Example 3, the Mixer", "verdict"), rows, left=2)


def main() -> None:
    run = Script(__doc__, OUT, smoke="one spread, two steps: under half a minute").run()
    size = SMOKE if run.smoke else FULL
    run.out.mkdir(parents=True, exist_ok=True)
    outcomes = {}
    for position in positions(size):
        outcomes[position.name] = Outcome(measured(run, position, size))
        gap = outcomes[position.name].gap
        print(f"{position.name}: gap {gap}", flush=True)
    whole = correlations(outcomes, size.draws)
    found = {
        "positions": {name: o.found._asdict() | o.summary() for name, o in outcomes.items()},
        "correlations": whole,
    }
    run.save(found, size._asdict() | {"patterns": PATTERNS, "sizes": SIZES})
    tables = (
        example_2_table(outcomes, size),
        example_3_table(outcomes),
        training_table(outcomes),
        readings_table(outcomes),
        correlation_table(outcomes, whole),
    )
    note = "± is half a 95 % interval, of ratios two errors; *: at the edge of the rates tried"
    run.print_table("\n\n".join([*tables, note]))


if __name__ == "__main__":
    main()
