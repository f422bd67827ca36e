"""JS0 by block on one card: GPT-2 124M at full context, Llama-2-7B's shapes at initialisation.

A run says beforehand what it will cost (:mod:`gpu_plan`) and what the engine has decided, keeps a
journal of finished blocks, so that the same command goes on where an earlier one stopped, and
splits its time into recording, products, Lanczos and JS.
"""

import functools
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_measure import DTYPES, Clock, hardware, peak_bytes, reset_peak, wait
from gpu_plan import Plan, counted
from gpu_throughput import PRECISION_OPTION, llama
from torch import Tensor, nn

import hessian_tools as ht
from hessian_tools.app.report import readings_table, summary
from hessian_tools.app.run_folder import RunFolder
from hessian_tools.curvature.engine.engine import Collect, Spread
from hessian_tools.curvature.engine.memory import format_bytes
from hessian_tools.problem import data, zoo
from hessian_tools.results import Journal, write_atomically


class Stopped(Exception):
    """The minutes allowed are over; the journal holds what was finished."""


@dataclass(frozen=True)
class Settings:
    """Knobs of a run; ``matrices`` are chosen from these layers."""

    model: str
    goal_minutes: float
    precision: str
    vocabulary: int
    width: int
    mlp: int
    heads: int
    layers: int
    chosen_layers: tuple[int, ...]
    sequences: int
    context: int  # tokens of a sequence
    probes: int  # k
    steps: int  # m
    memory: str = "auto"
    seed: int = 0


GPT2 = Settings(
    "gpt2",
    goal_minutes=3,
    precision="tf32",
    vocabulary=50257,
    width=768,
    mlp=3072,
    heads=12,
    layers=12,
    chosen_layers=(0, 3, 7, 11),
    sequences=8,
    context=1024,
    probes=4,
    steps=40,
)
GPT2_SMOKE = Settings(
    "gpt2-nano",
    goal_minutes=3,
    precision="float32",
    vocabulary=257,
    width=128,
    mlp=512,
    heads=4,
    layers=4,
    chosen_layers=(0, 1, 2, 3),
    sequences=2,
    context=16,
    probes=2,
    steps=3,
    memory="1GiB",
)
# Llama-2-7B (Touvron et al. 2023, arXiv 2307.09288); 1,024 tokens keep the recorded graph within
# half of such a card
LLAMA = Settings(
    "llama",
    goal_minutes=40,
    precision="bfloat16",
    vocabulary=32000,
    width=4096,
    mlp=11008,
    heads=32,
    layers=32,
    chosen_layers=(0, 10, 21, 31),
    sequences=2,
    context=512,
    probes=4,
    steps=40,
)
LLAMA_SMOKE = Settings(
    "llama",
    goal_minutes=40,
    precision="bfloat16",
    vocabulary=8192,
    width=32,
    mlp=88,
    heads=2,
    layers=3,
    chosen_layers=(0, 2),
    sequences=2,
    context=16,
    probes=2,
    steps=3,
    memory="1GiB",
)
LLAMA_MATRICES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def token_loss(model: nn.Module, batch: data.LabelledBatch) -> Tensor:
    """Mean cross-entropy (nats) in float32, also of logits in bfloat16."""
    inputs, targets = batch
    return F.cross_entropy(model(inputs).logits.flatten(0, 1).float(), targets.flatten())


def chosen_tensors(settings: Settings) -> dict[str, int]:
    """The tensors whose blocks are asked for, {parameter: how many blocks it is cut into}, in the
    model's order.
    """
    layers = settings.chosen_layers
    if settings.model == "llama":
        inner = {
            f"model.layers.{i}.{matrix}.weight": 1 for i in layers for matrix in LLAMA_MATRICES
        }
        return {"model.embed_tokens.weight": 1, **inner, "lm_head.weight": 1}
    inner = {"attn.c_attn": 3, "attn.c_proj": 1, "mlp.c_fc": 1, "mlp.c_proj": 1}
    return {"transformer.wte.weight": 1} | {
        f"transformer.h.{i}.{m}.weight": n for i in layers for m, n in inner.items()
    }


def build_model(settings: Settings, device: torch.device) -> nn.Module:
    """At random initialisation, drawn on the device itself: a Llama of 7 billion parameters never
    exists elsewhere.
    """
    torch.manual_seed(settings.seed)
    with device:
        if settings.model == "llama":
            shape = (settings.width, settings.mlp, settings.heads, settings.layers)
            return llama(
                *shape,
                vocabulary=settings.vocabulary,
                context=settings.context,
                dtype=DTYPES[settings.precision],
            )
        model = zoo.SPECS[settings.model].build(settings.vocabulary, settings.context)
    return model.to(DTYPES[settings.precision]).eval()


def build_problem(settings: Settings, device: torch.device) -> ht.Problem:
    """The model on windows of the packaged plays; tensors that are not chosen are frozen, and cost
    nothing.
    """
    model, chosen = build_model(settings, device), chosen_tensors(settings)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    tokenizer = "byte" if settings.vocabulary < data.TOKENIZERS["bpe"].size else "bpe"
    batches = data.language_batches(
        data.text_tokens(tokenizer),
        num_examples=settings.sequences,
        batch_size=settings.sequences,
        context=settings.context,
        seed=settings.seed,
    )
    return ht.Problem(model, token_loss, batches)


@functools.cache
def plan(settings: Settings) -> Plan:
    """Counted on meta tensors, so on any machine."""
    meta = torch.device("meta")
    tokens = torch.zeros(settings.sequences, settings.context, dtype=torch.int64, device=meta)
    model = build_model(settings, meta)
    model.config.use_cache = (
        True  # without, transformers looks at a value of its mask, and meta tensors have none
    )
    return counted(
        model,
        token_loss,
        (tokens, tokens),
        chosen_tensors(settings),
        probes=settings.probes,
        steps=settings.steps,
    )


class TimedHessian(ht.HessianOperator):
    """A Hessian whose products a Clock times."""

    clock: Clock

    def products(
        self,
        names: Sequence[str],
        count: int,
        spread: Spread,
        collect: Collect,
    ) -> None:
        with self.clock.running():
            super().products(names, count, spread, collect)


class Phases:
    """Seconds by phase, summed over the sessions of a run in a file beside its journal."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.device = path, device
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
        self.started = self._last = time.perf_counter()

    def lap(self, **parts: float) -> None:
        """Books the time since the last lap: ``parts`` under their names, what is left of it under
        the last one's.
        """
        wait(self.device)
        now = time.perf_counter()
        *named, rest = parts
        for name in named:
            self.seconds[name] = self.seconds.get(name, 0.0) + parts[name]
        remaining = now - self._last - sum(parts[name] for name in named)
        self.seconds[rest] = self.seconds.get(rest, 0.0) + remaining
        self._last = now
        write_atomically(self.path, json.dumps(self.seconds, indent=1).encode())


def folder(out: Path, settings: Settings) -> Path:
    """Where a run keeps its journal and its results."""
    return out / f"gpu_{settings.model}_{settings.precision}"


def run(
    settings: Settings, device: torch.device, out: Path, minutes: float | None
) -> dict[str, Any]:
    """Goes on until done and writes run.json, or until ``minutes`` are over (:class:`Stopped`)."""
    path = folder(out, settings)
    if (path / "run.json").exists():
        return json.loads((path / "run.json").read_text())
    path.mkdir(parents=True, exist_ok=True)
    reset_peak(device)
    phases = Phases(path / "seconds.json", device)
    problem = build_problem(settings, device)
    phases.lap(model=0.0)
    precision = PRECISION_OPTION[settings.precision]
    hessian = TimedHessian(problem, memory=settings.memory, **precision)
    hessian.clock = Clock(device)
    partition = ht.partition(problem.model, "tensor" if settings.model == "llama" else "official")
    phases.lap(planning=0.0)
    config = {
        "command": "gpu",
        "settings": asdict(settings),
        "hardware": hardware(device),
        "loss": f"{problem.loss:.4g}",
    }
    kept = RunFolder(path, config)
    print(f"{len(partition)} blocks; {hessian.route}", flush=True)
    spectra = _spectra(hessian, partition, settings, kept.journal, phases, minutes)
    peak = peak_bytes(device)
    js = ht.js_heterogeneity(spectra)
    phases.lap(js=0.0)
    kept.finish({"spectra": spectra, "js": js})
    print(readings_table({settings.model: js}))
    text = json.dumps(
        {
            **config,
            "seconds": phases.seconds,
            "total": sum(phases.seconds.values()),
            "peak_bytes": peak,
            "route": hessian.route,
            **summary(spectra, js),
        },
        indent=1,
    )
    write_atomically(path / "run.json", text.encode())
    return json.loads(text)


def _spectra(
    hessian: TimedHessian,
    partition: ht.Partition,
    settings: Settings,
    journal: Journal,
    phases: Phases,
    minutes: float | None,
) -> ht.BlockSpectra:
    """Recording, told by a first product that takes longer than the second, then all blocks."""
    block = hessian.stacked(partition.cuts[-1].chunk(0, 1))
    one = torch.ones(1, block.size, dtype=block.dtype, device=block.device)
    taken = []
    for _ in range(2):
        block.matmat(one)
        taken.append(hessian.clock.taken())
    phases.lap(recording=taken[0] - taken[1], products=2 * taken[1], lanczos=0.0)

    done = set(journal.finished)

    def on_block(name: str, quadrature: ht.Quadrature) -> None:
        journal.append(name, quadrature)
        done.add(name)
        phases.lap(products=hessian.clock.taken(), lanczos=0.0)
        if minutes is not None and time.perf_counter() - phases.started > 60 * minutes:
            raise Stopped(f"{len(done)} of {len(partition)} blocks")

    return ht.blockwise_slq(
        hessian,
        partition,
        num_probes=settings.probes,
        num_steps=settings.steps,
        seed=settings.seed,
        finished=journal.finished,
        on_block=on_block,
    )


def described(found: Mapping[str, Any]) -> str:
    """A finished run in a line."""
    seconds: Iterable[tuple[str, float]] = found["seconds"].items()
    split = ", ".join(f"{name} {value:.3g} s" for name, value in seconds)
    return f"{found['total'] / 60:.2f} minutes ({split}), peak {format_bytes(found['peak_bytes'])}"
