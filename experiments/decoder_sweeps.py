"""The claims of "Deconstructing" and SOAP on small decoders: rates, momenta, layers, blocks.

Sources: Zhao et al., Deconstructing What Makes a Good Optimizer for Language Models (arXiv
2407.07972); Vyas et al., SOAP (arXiv 2409.11321); Zhang et al., Adam-mini (arXiv 2406.16793).

Protocol, fixed before any result:

- Decoders (experiments/decoders/networks.py) of 1.1 M and 5.8 M parameters, 2,048 tokens of BPE,
  windows of 128 tokens of the complete Shakespeare and the Brown corpus (experiments/corpora.py),
  of which the last tenth is held out. Variants: "standard", with QK-norm and a z-loss of 1e-4, and
  "plain" without both. Losses are without the z-loss.
- Batches of 128 windows. 1,000 steps for 1 M (16.4 M tokens, 14 a parameter, 4 passes over the
  text), 500 for 6 M (8.2 M tokens, 1.4 a parameter: far fewer than the paper's 20). Clip 1, 10 %
  warm-up, cosine to a tenth, no weight decay. One seed: same weights and batches for all.
- Rates on half decades from the published grid's middle, extended while the best lies at an end;
  hopeless runs are given up. The loss is the mean of the last tenth of the steps, beside it that of
  what is held out. *Width*: decades of rates within 5 % of the best loss.
- (a) SGD, AdamW, Adafactor, Lion, Signum, Muon, SOAP, Shampoo^2. (b) momenta 0 to 0.99 for SGD,
  AdamW, Signum and Adam with b2 = b1, 1 M, 400 steps. (c) Adalayer, Adalayer*, SGD + Adalayer on
  the last layer and norms (its own rate 3.16e-3), on the last layer only, frozen Adalayer* (200
  steps at rest in place of 1,000), and how AdamW's effective rates spread. (e) Adam-mini on
  Algorithm 3's blocks, on the checker's (experiments/decoder_suggestions.py), on one a tensor; all
  with betas (0.9, 0.95).
- ``--short`` is what two cores do in an hour: batches of 8 windows, 120 steps (0.12 M tokens, 0.1 a
  parameter), of the first 150,000 tokens. It is written to results/decoder_sweeps_short, and shows
  the first moments of training only.
- A difference of losses counts when it is above 1 %; between seeds the loss of AdamW at its best
  rate is measured with three more seeds, whose standard deviation is told beside it.

`python experiments/decoder_sweeps.py --text shakespeare.txt brown.txt [--claims abce] [--sizes ..]
[--only GLOB ..] [--device cuda] [--workers N] [--minutes M] [--short] [--smoke]` trains what
neither OUT/parts nor OUT/lines.jsonl.gz has to its end, after M minutes begins no further sweep,
packs the runs into these lines, and writes result.json and table.txt; `--report` does the latter
alone. A sweep that the lines have but for a better rate beyond its end goes on from its best rate.
"""

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import replace
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path

import torch
from decoders.claims import effective_rates, left, packed, text
from decoders.networks import SIZES, tokens_of
from decoders.optimizers import suggestion_of
from decoders.tasks import Place, Task, measured_rates, repeated, swept, tasks
from script import Run, Script
from tqdm import tqdm

from hessian_tools.problem.data import text_tokens

OUT = Path("results/decoder_sweeps")
SHORT_OUT = Path("results/decoder_sweeps_short")
BATCH_SIZE = 128
SHORT = {"batch_size": 8, "steps": 120, "tokens": 150_000}
SMOKE = {"batch_size": 2, "steps": 8}
SMOKE_BYTES, SMOKE_TASKS = 20_000, 2
CACHE = "tokens.npy"


def work(task: Task, place: Place) -> str:
    """A task in a process of its own."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # TF32 where there is one
    tokens = tokens_of([], place.out / CACHE)
    found = swept(task, tokens, place)
    if (task.claim, task.variant, task.optimizer) == ("a", "standard", "adamw"):
        measured_rates(task.size, found.best_rate, tokens, place)
        repeated(task, found.best_rate, tokens, place)
    return f"{task.name}: {found.loss:.4f} at {found.best_rate:.2g}, width {found.width:.2f}"


def die_with(parent: int) -> None:
    """Ends this process when ``parent`` is killed, or it would write on beside the next run."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def in_processes(
    todo: Sequence[Task],
    place: Place,
    workers: int,
    minutes: float,
) -> None:
    """All tasks, so many at a time; none is begun after so many minutes."""
    deadline = time.monotonic() + 60 * minutes
    waiting = list(todo)
    running: set[Future[str]] = set()
    bar = tqdm(total=len(todo), disable=None)
    context = get_context("spawn")  # CUDA does not survive a fork
    pool = ProcessPoolExecutor(workers, context, initializer=die_with, initargs=(os.getpid(),))
    with bar, pool:
        while waiting or running:
            while waiting and len(running) < workers and time.monotonic() < deadline:
                running.add(pool.submit(work, waiting.pop(0), place))
            if not running:
                break
            done = next(as_completed(running))
            running.remove(done)
            bar.update()
            print(done.result(), flush=True)
    if waiting:
        print(f"{len(waiting)} sweeps were not begun; the same command goes on")


def arguments() -> Run:
    script = Script(__doc__, OUT, smoke="8 steps of two optimizers on the packaged plays: a minute")
    script.add_argument("--text", nargs="+", type=Path, help="files of experiments/corpora.py")
    script.add_argument("--claims", default="abce")
    script.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    script.add_argument("--only", nargs="+", metavar="GLOB", default=["*"], help="names of tasks")
    script.add_argument("--report", action="store_true", help="train nothing")
    script.add_argument("--short", action="store_true", help="small batches, few steps")
    script.add_argument("--device", default="cpu")
    script.add_argument("--workers", type=int, default=1)
    script.add_argument("--minutes", type=float, default=float("inf"))
    return script.run()


def trained(run: Run) -> None:
    options = run.options
    cache = run.out / CACHE
    if run.smoke and not cache.exists():
        plays = run.out / "plays.txt"
        plays.write_bytes(bytes(text_tokens("byte")[:SMOKE_BYTES].tolist()))
        options.text = [plays]
    if not options.text and not cache.exists():
        raise SystemExit("--text is needed: the files that experiments/corpora.py makes")
    wanted = [
        task
        for task in tasks(options.claims, options.sizes)
        if any(fnmatch(task.name, glob) for glob in options.only)
    ]
    todo = list(left(wanted, packed(run.out)))
    sizes = {task.size for task in todo if task.optimizer == "adam_mini_suggested"}
    missing = sorted(size for size in sizes if not suggestion_of(size).exists())
    if missing and not run.smoke:
        raise SystemExit(
            f"claim e needs the checker's blocks for {', '.join(missing)}; run "
            f"experiments/decoder_suggestions.py --sizes {' '.join(missing)} first, or leave e out "
            "of --claims"
        )
    small = SMOKE if run.smoke else SHORT if options.short else {}
    tokens_of(options.text or [], cache, small.get("tokens"))
    batch_size = small.get("batch_size", BATCH_SIZE)
    place = Place(run.out, batch_size, options.device, small.get("steps"))
    if run.smoke:
        todo = [replace(task, rates=task.rates[1:2]) for task in todo[:SMOKE_TASKS]]
    in_processes(todo, place, options.workers, options.minutes)


def main() -> None:
    run = arguments()
    if run.options.short and not run.options.out:
        run = replace(run, out=SHORT_OUT)
    run.out.mkdir(parents=True, exist_ok=True)
    if not run.options.report:
        trained(run)
    lines = packed(run.out)
    effective = effective_rates(run.out)
    without_curves = [
        {name: value for name, value in line.items() if not name.startswith("curve")}
        for line in lines
    ]
    run.save({"lines": without_curves, "effective": effective}, {"short": run.options.short})
    run.print_table(text(lines, effective))


if __name__ == "__main__":
    main()
