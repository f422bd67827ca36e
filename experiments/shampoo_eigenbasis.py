"""Is Shampoo with power 1/2 Adafactor in Shampoo's eigenbasis, on real gradients?

Claim 1 of SOAP (Vyas et al., arXiv 2409.11321): with L = E[G G'] and R = E[G' G] of gradients G,
(r, c), the update sqrt(tr L) L^-1/2 G R^-1/2 of idealised Shampoo equals Adafactor's, run on
G~ = Q_L' G Q_R: G~_ij / sqrt(V_ij), V the rank-one matrix of the row and column means of E[G~^2],
rotated back. Both scale the rotated entry (i, j) by (lambda_i mu_j / tr L)^-1/2.

Protocol, fixed before any result. NanoGPT of 2 layers, width 32, 4 heads, context 32, on bytes of
the packaged plays, 8 sequences a batch, float64, all 14 weight matrices (two of them embeddings),
three seeds of weights and batches. 200 steps of Adam (rate 3e-3) make a trajectory; every method
is asked for its direction of the same gradients on it, and none of them trains.

1. Fixed weights. E is the mean over 32 batches, at initialisation and after the 200 steps, and for
   gpt-nano of the zoo at initialisation (one seed, its own context). Directions of four of these
   gradients: the largest relative difference |A - S| / |S| of Adafactor (A) from Shampoo (S).
   Expected: rounding, at most machine precision over the smallest eigenvalue kept, 2e-6. A control
   that must not agree: Adafactor without a rotation.
2. Running averages (b2 = 0.95, 0.99, debiased) in place of E, over steps 150 to 199, which are one
   cycle of the slowest refresh. Bases are refreshed every f = 1, 10, 50 steps from the current
   averages, after these took in the step's gradient (SOAP is one step later). Against Shampoo of
   the current averages, relative difference and cosine of
   - "basis": Adafactor in the stale basis, its moments those of the current averages in that basis
     (the diagonals of Q_L' L Q_L and Q_R' R Q_R). With f = 1 it is the claim for averages;
   - "kept": its moments averaged step by step, each in the basis of its time, as optimizers do.
     Eigenvectors are ordered by eigenvalue, so that a moment stays with its place in that order.
3. SOAP: Adam's full second moment in place of the rank-one one, by the cosine of the two directions
   in one basis: at fixed weights, and with kept moments on the trajectory.
4. How near the averages come to E: Shampoo of the averages against Shampoo of 64 new batches at the
   last weights, on one gradient, by the cosine; and of 32 of the new batches against the other 32,
   which is what E itself is uncertain by.

Rank: every method drops what is outside the range: rotated rows and columns whose mean square (or
eigenvalue) is below 1e-10 of the largest, which makes the inverse roots pseudo-inverses. Each
method judges by its own numbers. Medians over matrices (and steps), mean over seeds ± 2 standard
errors.

Added after the results: the differences of 1 as shares of their bound, machine precision over the
matrix's smallest eigenvalue kept; the table of cosines by the age of a basis; and a second run with
`--cut 1e-4 --out results/shampoo_eigenbasis/cut_1e-4`, which tells whether the smallest directions
decide.

`python experiments/shampoo_eigenbasis.py [--smoke] [--cut SHARE]` writes
results/shampoo_eigenbasis: table.txt, all numbers. Finished seeds are kept (seeds.jsonl), and the
same command goes on.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from script import Run, Script
from torch import Tensor, nn

from hessian_tools.problem import zoo
from hessian_tools.problem.data import TOKENIZERS
from hessian_tools.problem.losses import cross_entropy
from hessian_tools.problem.networks import NanoGPT
from hessian_tools.results import Journal
from hessian_tools.tables import plus_minus, table
from hessian_tools.training import Stream, zoo_stream

OUT = Path("results/shampoo_eigenbasis")
CONTEXT, LAYERS, WIDTH, HEADS, BATCH = 32, 2, 32, 4, 8
RATE = 3e-3
BETAS = (0.95, 0.99)
FREQUENCIES = (1, 10, 50)
AGES = (0, 1, 5, 10, 20, 49)  # steps since a refresh that the table shows
ASKED = 4  # gradients whose directions are compared at fixed weights
CUT = 1e-10  # of the largest eigenvalue: below it is outside the range
RANGE = {"cut": CUT}  # of this run, set once by the command
FIXED = ("difference", "plain cosine", "full cosine", "rank L", "rank R", "smallest kept")
STALE = ("basis difference", "basis cosine", "kept difference", "kept cosine", "full cosine")
EXPECTATION = ("averages", "halves")
Floats = np.ndarray
Fields = dict[str, Floats]


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    seeds: int
    steps: int  # of training
    watched: int  # of these, the last ones
    batches: int  # that E is the mean over


FULL = Size(seeds=3, steps=200, watched=50, batches=32)
SMOKE = Size(seeds=2, steps=6, watched=3, batches=4)


# ------------------------------------------------------------------------------------ the methods


def inside(values: Tensor) -> Tensor:
    """(n,) which of these eigenvalues or mean squares belong to the range."""
    return values > RANGE["cut"] * values.max()


def inverse_root(factor: Tensor) -> Tensor:
    """(n, n) the pseudo-inverse of the root of L or R."""
    values, vectors = torch.linalg.eigh(factor)
    kept = inside(values)
    some = vectors[:, kept]
    return (some / values[kept].sqrt()) @ some.T


def shampoo(gradient: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """sqrt(tr L) L^-1/2 G R^-1/2."""
    return left.trace().sqrt() * inverse_root(left) @ gradient @ inverse_root(right)


def adafactor(gradient: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """G over the root of the rank-one V of the means of its square, (r,) and (c,)."""
    second = torch.outer(rows / rows.mean(), columns)
    return divided(gradient, second, in_range(rows, columns))


def in_range(rows: Tensor, columns: Tensor) -> Tensor:
    """(r, c) which entries a rank-one moment divides."""
    return torch.outer(inside(rows), inside(columns))


def divided(gradient: Tensor, second: Tensor, kept: Tensor) -> Tensor:
    """G / sqrt(V), zero outside the range and where nothing was ever seen."""
    usable = kept & (second > 0)
    return torch.where(usable, gradient / second.where(usable, second.new_ones(())).sqrt(), 0.0)


@dataclass
class Averages:
    """L and R, running averages without the bias of their start."""

    beta: float
    left: Tensor  # (r, r)
    right: Tensor  # (c, c)

    def follow(self, gradient: Tensor, step: int) -> None:
        weight = newest(self.beta, step)
        self.left.lerp_(gradient @ gradient.T, weight)
        self.right.lerp_(gradient.T @ gradient, weight)


def newest(beta: float, step: int) -> float:
    """The weight of the gradient of ``step``, counted from 0, in a debiased average."""
    return (1 - beta) / (1 - beta ** (step + 1))


@dataclass
class Basis:
    """Eigenvectors of L and R, and moments kept in it."""

    left: Tensor  # (r, r)
    right: Tensor  # (c, c)
    second: Tensor  # (r, c) average of the squares of rotated gradients, in the bases of their time

    def refresh(self, left: Tensor, right: Tensor) -> None:
        self.left = torch.linalg.eigh(left).eigenvectors
        self.right = torch.linalg.eigh(right).eigenvectors

    def rotated(self, gradient: Tensor) -> Tensor:
        return self.left.T @ gradient @ self.right

    def back(self, direction: Tensor) -> Tensor:
        return self.left @ direction @ self.right.T

    def kept(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Directions with the rank-one and with the full moment."""
        rows, columns = self.second.mean(1), self.second.mean(0)
        rotated = self.rotated(gradient)
        of_rank_one = adafactor(rotated, rows, columns)
        of_all = divided(rotated, self.second, in_range(rows, columns))
        return self.back(of_rank_one), self.back(of_all)

    def of_averages(self, gradient: Tensor, averages: Averages) -> Tensor:
        """Adafactor's direction with the moments that the averages have in this basis."""
        (r, c) = gradient.shape
        rows = (self.left * (averages.left @ self.left)).sum(0) / c
        columns = (self.right * (averages.right @ self.right)).sum(0) / r
        return self.back(adafactor(self.rotated(gradient), rows, columns))


def difference(one: Tensor, reference: Tensor) -> float:
    return float((one - reference).norm() / reference.norm())


def cosine(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum() / (one.norm() * other.norm()))


# ---------------------------------------------------------------------------------- the gradients


def small_gpt(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        vocabulary = TOKENIZERS["byte"].size
        return NanoGPT(vocabulary, CONTEXT, LAYERS, WIDTH, HEADS).double()


def matrices(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight for name, weight in model.named_parameters() if weight.ndim == 2}


def gradients(model: nn.Module, stream: Stream, batches: range) -> list[list[Tensor]]:
    """For every matrix, one gradient a batch."""
    weights = list(matrices(model).values())
    of_batches = [
        torch.autograd.grad(cross_entropy(model, stream.batch(number)), weights)
        for number in batches
    ]
    return [list(of_one) for of_one in zip(*of_batches, strict=True)]


# -------------------------------------------------------------------------------------- measuring


def expectation(seen: list[Tensor]) -> tuple[Tensor, Tensor]:
    """L and R, means over gradients."""
    left = sum((g @ g.T for g in seen), torch.zeros(())) / len(seen)
    right = sum((g.T @ g for g in seen), torch.zeros(())) / len(seen)
    return left, right


def at_fixed_weights(seen: list[Tensor]) -> list[float]:
    """FIXED of a matrix, E being the mean over the gradients ``seen``."""
    left, right = expectation(seen)
    basis = Basis(left, right, torch.zeros_like(seen[0]))
    basis.refresh(left, right)
    basis.second = torch.stack([basis.rotated(g).square() for g in seen]).mean(0)
    plain = torch.stack([g.square() for g in seen]).mean(0)
    apart, without, full = [], [], []
    for gradient in seen[:ASKED]:
        reference = shampoo(gradient, left, right)
        of_rank_one, of_all = basis.kept(gradient)
        apart.append(difference(of_rank_one, reference))
        without.append(cosine(adafactor(gradient, plain.mean(1), plain.mean(0)), reference))
        full.append(cosine(of_all, of_rank_one))
    return [max(apart), float(np.mean(without)), float(np.mean(full)), *ranks(left, right)]


def ranks(left: Tensor, right: Tensor) -> tuple[float, float, float]:
    """Ranks of both factors, and the smallest share of the largest eigenvalue that is kept."""
    shares = []
    for factor in (left, right):
        values = torch.linalg.eigvalsh(factor)
        shares.append(values[inside(values)] / values.max())
    return len(shares[0]), len(shares[1]), float(min(share.min() for share in shares))


def fixed(model: nn.Module, stream: Stream, count: int) -> Floats:
    """(matrices, FIXED)."""
    seen = gradients(model, stream, range(count))
    return np.array([at_fixed_weights(of_matrix) for of_matrix in seen])


@dataclass
class Watch:
    """A matrix on the trajectory, with running averages of one b2."""

    averages: Averages
    bases: dict[int, Basis]  # by how often they are refreshed
    plain: Tensor  # (r, c) average of squared gradients, not rotated
    seen: dict[str, list[list[float]]] = field(default_factory=dict)

    def follow(self, gradient: Tensor, step: int) -> None:
        self.averages.follow(gradient, step)
        weight = newest(self.averages.beta, step)
        self.plain.lerp_(gradient.square(), weight)
        due = [basis for every, basis in self.bases.items() if step % every == 0]
        due[0].refresh(self.averages.left, self.averages.right)
        for basis in due[1:]:
            basis.left, basis.right = due[0].left, due[0].right
        for basis in self.bases.values():
            basis.second.lerp_(basis.rotated(gradient).square(), weight)

    def record(self, gradient: Tensor) -> None:
        """Everybody's direction of a gradient against Shampoo's."""
        reference = shampoo(gradient, self.averages.left, self.averages.right)
        for every, basis in self.bases.items():
            of_basis = basis.of_averages(gradient, self.averages)
            of_rank_one, of_all = basis.kept(gradient)
            row = [
                difference(of_basis, reference),
                cosine(of_basis, reference),
                difference(of_rank_one, reference),
                cosine(of_rank_one, reference),
                cosine(of_all, of_rank_one),
            ]
            self.seen.setdefault(str(every), []).append(row)
        plain = adafactor(gradient, self.plain.mean(1), self.plain.mean(0))
        row = [difference(plain, reference), cosine(plain, reference)]
        self.seen.setdefault("plain", []).append(row)


def watch(weight: Tensor, beta: float) -> Watch:
    r, c = weight.shape
    left, right, second = (weight.new_zeros(shape) for shape in ((r, r), (c, c), (r, c)))
    bases = {every: Basis(left, right, second.clone()) for every in FREQUENCIES}
    return Watch(Averages(beta, left.clone(), right.clone()), bases, second.clone())


def trained(model: nn.Module, stream: Stream, steps: int) -> Iterator[tuple[float, list[Tensor]]]:
    """Loss and gradients of the matrices at every step of Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    weights = list(matrices(model).values())
    for step in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(model, stream.batch(step))
        loss.backward()
        yield float(loss.detach()), [weight.grad for weight in weights]
        optimizer.step()


def trajectory(model: nn.Module, stream: Stream, size: Size) -> tuple[Fields, dict, Floats]:
    """By b2 and method, (steps, matrices, STALE); the watches; the losses."""
    weights = matrices(model).values()
    watches = {beta: [watch(weight.detach(), beta) for weight in weights] for beta in BETAS}
    losses = []
    for step, (loss, of_step) in enumerate(trained(model, stream, size.steps)):
        losses.append(loss)
        for of_beta in watches.values():
            for one, gradient in zip(of_beta, of_step, strict=True):
                one.follow(gradient, step)
                if step >= size.steps - size.watched:
                    one.record(gradient)
    found = {
        f"{beta} {method}": np.array([one.seen[method] for one in of_beta], np.float32).swapaxes(
            0, 1
        )
        for beta, of_beta in watches.items()
        for method in of_beta[0].seen
    }
    return found, watches, np.array(losses)


def near_expectation(
    model: nn.Module, streams: tuple[Stream, Stream], watches: dict, size: Size
) -> Fields:
    """By b2, (matrices, EXPECTATION): cosines of Shampoo's directions of one gradient."""
    ours, new = streams
    latest = [of_one[0] for of_one in gradients(model, ours, range(size.steps, size.steps + 1))]
    fresh = gradients(model, new, range(2 * size.batches))
    rows: dict[str, list[list[float]]] = {str(beta): [] for beta in BETAS}
    for number, (gradient, seen) in enumerate(zip(latest, fresh, strict=True)):
        best = shampoo(gradient, *expectation(seen))
        halves = [shampoo(gradient, *expectation(seen[start::2])) for start in (0, 1)]
        for beta, of_beta in watches.items():
            averages = of_beta[number].averages
            averages.follow(gradient, size.steps)
            of_averages = shampoo(gradient, averages.left, averages.right)
            rows[str(beta)].append([cosine(of_averages, best), cosine(*halves)])
    return {beta: np.array(of_beta) for beta, of_beta in rows.items()}


def measured(seed: int, size: Size) -> dict[str, object]:
    """Everything of one seed."""
    model = small_gpt(seed)
    settings = {"context": CONTEXT, "tokenizer": "byte", "batch_size": BATCH}
    stream = zoo_stream("gpt-nano", seed=seed, **settings)
    new = stream.with_seed(1000 + seed)
    places = {"initial": fixed(model, new, size.batches)}
    along, watches, losses = trajectory(model, stream, size)
    places["trained"] = fixed(model, new, size.batches)
    near = near_expectation(model, (stream, new), watches, size)
    return {"fixed": places, "along": along, "near": near, "losses": losses}


def of_gpt_nano(size: Size) -> Floats:
    """(matrices, FIXED) at initialisation."""
    model = zoo.load("gpt-nano", dtype=torch.float64).model
    return fixed(model, zoo_stream("gpt-nano", batch_size=4), size.batches)


# -------------------------------------------------------------------------------------- reporting


def over_seeds(values: list[float]) -> str:
    mean = float(np.mean(values))
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    if mean < 1e-6:
        return f"{mean:.0e} ± {2 * error:.0e}"
    return plus_minus(mean, float(2 * error))


def fixed_rows(found: dict) -> list[list[str]]:
    cases = {
        f"small GPT, {place}": np.stack([of["fixed"][place] for of in found["seeds"]])
        for place in ("initial", "trained")
    }
    cases["gpt-nano, initial"] = found["gpt-nano"][None]
    rows = []
    for name, values in cases.items():
        apart, plain, full, _, _, smallest = np.moveaxis(values, -1, 0)
        share = (apart * smallest).max() / np.finfo(float).eps
        cells = [f"{np.median(apart):.1e}", f"{apart.max():.1e}", f"{smallest.min():.1e}"]
        cells.append(f"{share:.2f}")
        for cosines in (plain, full):
            centre = np.median(cosines, axis=1)
            told = over_seeds(list(centre)) if len(centre) > 1 else f"{centre[0]:.3f}"
            cells += [told, f"{cosines.min():.3f}"]
        rows.append([name, *cells])
    return rows


def stale_rows(found: dict) -> list[list[str]]:
    rows = []
    for key in found["seeds"][0]["along"]:
        beta, method = key.split()
        seeds = [of["along"][key] for of in found["seeds"]]
        columns = [[np.median(of[..., at]) for of in seeds] for at in range(seeds[0].shape[-1])]
        cells = [over_seeds(column) for column in columns]
        if method == "plain":  # its moments are kept, in a basis that never changes
            cells = ["", "", *cells, ""]
        else:
            lowest = np.mean([np.median(of[..., 3], axis=0) for of in seeds], axis=0).min()
            cells.append(f"{lowest:.3f}")
        rows.append([beta, method, *cells, *[""] * (6 - len(cells))])
    return rows


def age_rows(found: dict) -> list[list[str]]:
    """Cosines with the slowest bases, 0, 1, ... steps after a refresh."""
    rows = []
    slowest = max(FREQUENCIES)
    steps = len(found["seeds"][0]["losses"])
    for beta in map(str, BETAS):
        seeds = [of["along"][f"{beta} {slowest}"] for of in found["seeds"]]
        ages = [step % slowest for step in range(steps - len(seeds[0]), steps)]
        for age in (age for age in AGES if age in ages):
            of_age = [np.median(of[ages.index(age)], axis=0) for of in seeds]
            cells = [over_seeds([of[column] for of in of_age]) for column in (1, 3)]
            rows.append([beta, str(age), *cells])
    return rows


def near_rows(found: dict) -> list[list[str]]:
    rows = []
    for beta in map(str, BETAS):
        seeds = [np.median(of["near"][beta], axis=0) for of in found["seeds"]]
        columns = zip(*seeds, strict=True)
        rows.append([beta, *(over_seeds(list(column)) for column in columns)])
    return rows


def told(found: dict) -> str:
    header = ("fixed weights", "difference", "largest", "smallest kept", "of bound")
    header += ("cos, no rotation", "lowest", "cos, full", "lowest")
    first = table(header, fixed_rows(found))
    header = ("b2", "refresh", "basis: difference", "cosine")
    header += ("kept: difference", "cosine", "cos, full", "worst matrix, kept")
    second = table(header, stale_rows(found), left=2)
    header = ("b2", "age", f"every {max(FREQUENCIES)}, basis: cosine", "kept: cosine")
    by_age = table(header, age_rows(found), left=2)
    third = table(("b2", "averages against E", "halves of E"), near_rows(found))
    losses = [over_seeds([of["losses"][at] for of in found["seeds"]]) for at in (0, -1)]
    note = f"± is two standard errors over seeds; loss {losses[0]} to {losses[1]} nats"
    return "\n\n".join((first, second, by_age, third, note))


def save_all(run: Run, size: Size) -> None:
    run.out.mkdir(parents=True, exist_ok=True)
    kind = "smoke" if run.smoke else "full"
    journal = Journal(run.out / "seeds.jsonl", run=f"{kind}, cut {RANGE['cut']:g}")
    for seed in range(size.seeds):
        if str(seed) not in journal.finished:
            journal.append(str(seed), measured(seed, size))
    if "gpt-nano" not in journal.finished:
        journal.append("gpt-nano", of_gpt_nano(size))
    finished = Journal(journal.path, journal.run).finished
    found = {
        "seeds": [finished[str(seed)] for seed in range(size.seeds)],
        "gpt-nano": finished["gpt-nano"],
        "matrices": list(matrices(small_gpt(0))),
    }
    run.save(found, {**vars(size), "cut": RANGE["cut"], "rate": RATE})
    run.print_table(told(found))


def main() -> None:
    smoke = "two seeds, six steps, four batches: some seconds"
    script = Script(__doc__, OUT, smoke=smoke)
    told_cut = f"share of the largest eigenvalue below which all is dropped (default {CUT:g})"
    script.add_argument("--cut", type=float, default=CUT, help=told_cut)
    run = script.run()
    if not 0 < run.options.cut < 1:
        script.error(f"--cut is {run.options.cut}; a share between 0 and 1 is needed")
    RANGE["cut"] = run.options.cut
    save_all(run, SMOKE if run.smoke else FULL)


if __name__ == "__main__":
    main()
