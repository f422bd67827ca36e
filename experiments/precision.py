"""What does arithmetic coarser than float64 cost: eigenvalues, moments, and every reading of heterogeneity?

Three networks at initialisation on real data, each in float64, float32, TF32 and bfloat16 (Lanczos vectors and sums in
float32), with the same probes: what differs between two columns is rounding alone. Beside the errors stands the
standard error from the probes, which a user of so many probes has in any case. Two more columns take bfloat16 apart:
"rounded weights" has parameters and data rounded to bfloat16 and everything computed in float64, so it is another
network rather than a worse computation of this one; "autocast" keeps parameters in float32 and lets
``torch.autocast`` choose, as training does.

TF32 needs a CUDA card of Ampere or later (``--device cuda``). Elsewhere it is emulated, and called so: operands of
matrix products and convolutions are rounded to 10 explicit mantissa bits (to nearest, ties to even), sums are float32.

What came out (results/precision/table.txt; one core, TF32 emulated):

- float32 is the default: no reading moves by more than 1e-4, no eigenvalue, moment or rms by more than 2e-6.
- Smooth networks (GELU, LayerNorm: GPT, ViT): bfloat16 keeps extreme eigenvalues and moments to 1 %, readings to 3 %,
  the spread of block scales to 1e-4; TF32 is mostly ten times better. Both lie at or below the probes' error, except
  for extreme eigenvalues, on which all probes agree.
- ResNet with BatchNorm and ReLU: a rounded forward pass takes the other side of kinks, which is another Hessian. TF32
  already moves extreme eigenvalues by 4 %, bfloat16 by 10 % (of single blocks by 30 %). The log reading and the spread
  of block scales survive best. PyTorch has TF32 on for convolutions on CUDA, this package only where asked for.
- Small eigenvalues are lost in bfloat16: block spectra move by 0.06 to 0.9 decades (median), single ones by up to 4.
  In the median of the Transformers' blocks that is below the distance between the spectra of two halves of the probes.

`python figures/precision.py` draws the errors.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import hessian_tools as ht
from hessian_tools.app import report
from hessian_tools.app.run_folder import RunFolder
from hessian_tools.curvature.engine.engine import Collect, Spread
from hessian_tools.problem import zoo
from hessian_tools.problem.batches import to_device

# name -> knobs of zoo.load; data cut so that one core does a variant in minutes
MODELS = {"gpt-nano": {"num_examples": 2, "context": 32}, "vit-nano": {"num_examples": 4, "image_size": 16},
          "resnet-nano": {"num_examples": 4, "image_size": 16}}  # fmt: skip
PROBES, STEPS = 4, 30
SMOKE_MODELS: dict[str, dict[str, int]] = {"gpt-nano": {"num_examples": 1, "context": 8}}
SMOKE_PROBES, SMOKE_STEPS, SMOKE_BLOCKS = 2, 6, ["blocks.0.*"]
SEED = 0
OUT = Path("results/precision")


@dataclass(frozen=True)
class Variant:
    """A way to compute: parameters and data in ``weights``, then cast to ``dtype``, in which products are computed."""

    dtype: torch.dtype
    weights: torch.dtype
    precision: str = "ieee"
    autocast: bool = False


VARIANTS = {
    "float64": Variant(torch.float64, torch.float32),
    "float32": Variant(torch.float32, torch.float32),
    "tf32": Variant(torch.float32, torch.float32, "tf32"),
    "bfloat16": Variant(torch.bfloat16, torch.bfloat16),
    "rounded weights": Variant(torch.float64, torch.bfloat16),
    "autocast": Variant(torch.float32, torch.float32, autocast=True),
}
REFERENCE = "float64"


_OPERANDS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "convolution": (0, 1),
             "convolution_backward": (0, 1, 2)}  # fmt: skip


class RoundedOperands(TorchDispatchMode):
    """Rounds the float32 operands of matrix products and convolutions to TF32's 10 explicit mantissa bits."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        chosen = _OPERANDS.get(function.overloadpacket.__name__, ())
        rounded = [
            to_tf32(a) if i in chosen and a.dtype == torch.float32 else a
            for i, a in enumerate(args)
        ]
        return function(*rounded, **(kwargs or {}))


def to_tf32(tensor: Tensor) -> Tensor:
    """float32 rounded to 10 explicit mantissa bits, to nearest, ties to even."""
    bits = tensor.view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


class EmulatedTF32(ht.HessianOperator):
    """A Hessian whose products, and nothing else, are computed in what TF32 would round."""

    @property
    def route(self) -> str:
        emulation = "TF32 emulated (operands rounded to 10 explicit mantissa bits)"
        return f"{super().route}; {emulation}"

    def products(
        self,
        names: Sequence[str],
        count: int,
        spread: Spread,
        collect: Collect,
    ) -> None:
        with RoundedOperands():
            super().products(names, count, spread, collect)


class Autocast:
    """A loss under ``torch.autocast`` to bfloat16; the parameters stay as they are."""

    def __init__(self, loss_fn: Any, device: torch.device) -> None:
        self.loss_fn, self.device, self.num_examples = loss_fn, device, loss_fn.num_examples

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.loss_fn(model, batch)


def operator(
    name: str, knobs: dict[str, int], variant: Variant, device: torch.device
) -> ht.HessianOperator:
    """The Hessian of a network of the zoo, computed so."""
    made = zoo.load(name, seed=SEED, dtype=variant.weights, device=device, **knobs)
    batches = [to_device(batch, device, variant.dtype) for batch in made.batches]
    loss_fn = Autocast(made.loss_fn, device) if variant.autocast else made.loss_fn
    problem = ht.Problem(
        made.model.to(variant.dtype), loss_fn, batches, batch_stats=made.batch_stats
    )
    if variant.precision == "tf32" and device.type != "cuda":
        return EmulatedTF32(problem, precision="ieee")
    return ht.HessianOperator(problem, precision=variant.precision)


def spectra(
    name: str, knobs: dict[str, int], label: str, settings: dict[str, Any], out: Path
) -> dict[str, Any]:
    """Spectra of the whole Hessian and of the weight blocks; what an interrupted run has finished is read."""
    config = {
        "command": "precision",
        "model": name,
        **knobs,
        "variant": label,
        **settings,
        "seed": SEED,
    }
    folder = RunFolder(out / "spectra" / f"{name}_{label.replace(' ', '_')}", config)
    if folder.result:
        return folder.result
    hessian = operator(name, knobs, VARIANTS[label], torch.device(settings["device"]))
    model, slq = (
        hessian.problem.model,
        {"num_probes": settings["probes"], "num_steps": settings["steps"], "seed": SEED},
    )
    blocks = ht.blockwise_slq(
        hessian, ht.partition(model, "weights", only=settings["only"]), **slq,
        finished=folder.journal.finished, on_block=folder.journal.append,
    )  # fmt: skip
    whole = ht.blockwise_slq(hessian, ht.partition(model, "model"), **slq)
    result = {"blocks": blocks, "whole": next(iter(whole.values()))}
    folder.finish(result)
    return result


def errors(found: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """The error of every quantity against the reference.

    Relative, but for the spectra of blocks, which have :func:`moved` by so many decades; a moment's is relative to the
    moment of absolute values, for odd ones cancel.
    """
    whole, exact = found["whole"], reference["whole"]
    out = {
        f"{end} eigenvalue": _relative(getattr(whole, end), getattr(exact, end))
        for end in ("largest", "smallest")
    }
    for power in (1, 2, 3, 4):
        difference = whole.moment(power).value - exact.moment(power).value
        out[f"moment {power}"] = abs(difference) / _absolute_moment(exact, power)
    out["rms eigenvalue"] = _relative(whole.rms, exact.rms)
    pairs = [(found["blocks"][name], exact) for name, exact in reference["blocks"].items()]
    out |= _over_blocks("rms", [_relative(q.rms, exact.rms) for q, exact in pairs])
    out |= _over_blocks("largest", [_relative(q.largest, exact.largest) for q, exact in pairs])
    out |= _over_blocks("spectrum", [moved(q, exact) for q, exact in pairs])
    expected = _readings(reference)
    return out | {
        name: abs(r.mean - expected[name].mean) / expected[name].mean
        for name, r in _readings(found).items()
    }


def standard_errors(reference: dict[str, Any]) -> dict[str, float]:
    """The probes' relative standard error of the same quantities, in float64; for spectra, how far halves lie apart."""
    whole, blocks = reference["whole"], reference["blocks"].values()
    out = {
        f"{end} eigenvalue": _relative_error(getattr(whole, end)) for end in ("largest", "smallest")
    }
    out |= {
        f"moment {p}": whole.moment(p).standard_error / _absolute_moment(whole, p)
        for p in (1, 2, 3, 4)
    }
    out["rms eigenvalue"] = _relative_error(whole.rms)
    out |= _over_blocks("rms", [_relative_error(block.rms) for block in blocks])
    out |= _over_blocks("largest", [_relative_error(block.largest) for block in blocks])
    out |= _over_blocks("spectrum", [moved(*_halves(block)) for block in blocks])
    return out | {
        name: reading.standard_error / reading.mean
        for name, reading in _readings(reference).items()
    }


def moved(one: ht.Quadrature, other: ht.Quadrature) -> float:
    """1-Wasserstein distance of two spectra in decades: where small eigenvalues went, which no moment shows."""
    pair = ht.js_heterogeneity({"one": one, "other": other}, readings=("wasserstein",))
    return pair.readings["wasserstein"].mean


def _halves(quadrature: ht.Quadrature) -> list[ht.Quadrature]:
    """The first and the second half of its probes."""
    halves = [quadrature, quadrature]
    for _ in range(quadrature.num_probes // 2):
        halves = [halves[0].without_probe(halves[0].num_probes - 1), halves[1].without_probe(0)]
    return halves


def _readings(run: dict[str, Any]) -> dict[str, Any]:
    js = run["heterogeneity"]
    return {
        **{f"{name} reading": reading for name, reading in js.readings.items()},
        "scale spread": js.scale_spread,
    }


def _over_blocks(quantity: str, values: list[float]) -> dict[str, float]:
    return {
        f"blocks' {quantity}: median": float(np.median(values)),
        f"blocks' {quantity}: worst": max(values),
    }


def _relative(found: Any, exact: Any) -> float:
    return abs(found.value - exact.value) / abs(exact.value)


def _relative_error(estimate: Any) -> float:
    return estimate.standard_error / abs(estimate.value)


def _absolute_moment(quadrature: ht.Quadrature, power: int) -> float:
    return float(quadrature.per_probe(lambda x: np.abs(x) ** power).mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--smoke", action="store_true", help="one network, few products: under a minute"
    )
    parser.add_argument(
        "--device", default="cpu", help="cpu, or cuda for the real TF32 (default: cpu)"
    )
    parser.add_argument(
        "--out", type=Path, help=f"default {OUT}; with --smoke {OUT}/smoke, on CUDA {OUT}/cuda"
    )
    arguments = parser.parse_args()
    card = arguments.device.startswith("cuda")
    out = arguments.out or OUT / ("smoke" if arguments.smoke else "cuda" if card else "")
    if arguments.smoke:
        models, settings = (
            SMOKE_MODELS,
            {"probes": SMOKE_PROBES, "steps": SMOKE_STEPS, "only": SMOKE_BLOCKS},
        )
    else:
        models, settings = MODELS, {"probes": PROBES, "steps": STEPS, "only": None}
    settings["device"] = arguments.device
    table, text = {}, []
    for name, knobs in models.items():
        found = {label: spectra(name, knobs, label, settings, out) for label in VARIANTS}
        for run in found.values():
            run["heterogeneity"] = ht.js_heterogeneity(run["blocks"])
        reference = found.pop(REFERENCE)
        columns = {
            _described(label, arguments.device): errors(run, reference)
            for label, run in found.items()
        }
        table[name] = {"standard error of probes": standard_errors(reference), **columns}
        rows = [
            [q, *(f"{c[q]:.0e}" for c in table[name].values())]
            for q in next(iter(columns.values()))
        ]
        text.append(report.table((f"{name}, error of", *table[name]), rows))
        print(text[-1] + "\n", flush=True)
    hardware = torch.cuda.get_device_name() if card else _cpu()
    config = {"models": models, **settings, "seed": SEED, "hardware": hardware}
    ht.save(table, out / "result", config=config)
    (out / "table.txt").write_text("\n\n".join(text) + "\n")


def _cpu() -> str:
    return (
        f"CPU with {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)"
    )


def _described(label: str, device: str) -> str:
    real = "TF32" if device.startswith("cuda") else "TF32 emulated"
    return real if label == "tf32" else label


if __name__ == "__main__":
    main()
