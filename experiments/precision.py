"""What does arithmetic coarser than float64 cost eigenvalues, moments and readings?

Three networks at initialisation on real data, each in float64, float32, TF32 and bfloat16 (Lanczos
vectors and sums in float32), with the same probes: what differs between two columns is rounding
alone. Beside the errors stands the standard error from the probes, which a user of so many probes
has in any case. Two more columns take bfloat16 apart: "rounded weights" has parameters and data
rounded to bfloat16 and everything computed in float64, so it is another network rather than a worse
computation of this one; "autocast" keeps parameters in float32 and lets ``torch.autocast`` choose,
as training does.

TF32 needs a CUDA card of Ampere or later (``--device cuda``). Elsewhere it is emulated, and called
so: operands of matrix products and convolutions are rounded to 10 explicit mantissa bits (to
nearest, ties to even), sums are float32.

What came out (results/precision/table.txt; one core, TF32 emulated):

- float32 is the default: no reading moves by more than 1e-4, no eigenvalue, moment or rms by more
  than 2e-6.
- Smooth networks (GELU, LayerNorm: GPT, ViT): bfloat16 keeps extreme eigenvalues and moments to
  1 %, readings to 3 %, the spread of block scales to 1e-4; TF32 is mostly ten times better. Both
  lie at or below the probes' error, except for extreme eigenvalues, on which all probes agree.
- ResNet with BatchNorm and ReLU: a rounded forward pass takes the other side of kinks, which is
  another Hessian. TF32 already moves extreme eigenvalues by 4 %, bfloat16 by 10 % (of single blocks
  by 30 %). The log reading and the spread of block scales survive best. PyTorch has TF32 on for
  convolutions on CUDA, this package only where asked for.
- Small eigenvalues are lost in bfloat16: block spectra move by 0.06 to 0.9 decades (median), single
  ones by up to 4. In the median of the Transformers' blocks that is below the distance between the
  spectra of two halves of the probes.

`python experiments/precision.py [--smoke] [--device cuda]` writes results/precision: errors by
network and arithmetic, table.txt, and the spectra, so that the command goes on where it was
stopped. `python figures/precision.py` draws the errors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from script import Script
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import hessian_tools as ht
from hessian_tools.app import report
from hessian_tools.app.run_folder import RunFolder
from hessian_tools.curvature.engine.engine import Collect, Spread
from hessian_tools.heterogeneity.readings import pair_readings
from hessian_tools.problem import zoo
from hessian_tools.problem.batches import to_device
from hessian_tools.spectra.quadrature import Estimate

# name -> knobs of zoo.load; data cut so that one core does a variant in minutes
MODELS = {
    "gpt-nano": {"num_examples": 2, "context": 32},
    "vit-nano": {"num_examples": 4, "image_size": 16},
    "resnet-nano": {"num_examples": 4, "image_size": 16},
}
PROBES, STEPS = 4, 30
SMOKE_MODELS: dict[str, dict[str, int]] = {"gpt-nano": {"num_examples": 1, "context": 8}}
FULL: dict[str, Any] = {"probes": PROBES, "steps": STEPS, "only": None}
SMOKE: dict[str, Any] = {"probes": 2, "steps": 6, "only": ["blocks.0.*"]}
MOMENTS = (1, 2, 3, 4)
SEED = 0
OUT = Path("results/precision")


@dataclass(frozen=True)
class Variant:
    """A way to compute."""

    dtype: torch.dtype  # in which products are computed
    weights: torch.dtype  # to which parameters and data are rounded before
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
# operator -> which of its arguments are multiplied
_OPERANDS = {
    "mm": (0, 1),
    "bmm": (0, 1),
    "addmm": (1, 2),
    "baddbmm": (1, 2),
    "convolution": (0, 1),
    "convolution_backward": (0, 1, 2),
}


class RoundedOperands(TorchDispatchMode):
    """Rounds the float32 operands of matrix products and convolutions as TF32 does."""

    def __torch_dispatch__(
        self,
        function: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),  # whatever the operator takes
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        rounded = list(args)
        for place in _OPERANDS.get(function.overloadpacket.__name__, ()):
            if rounded[place].dtype == torch.float32:
                rounded[place] = to_tf32(rounded[place])
        return function(*rounded, **(kwargs or {}))


def to_tf32(tensor: Tensor) -> Tensor:
    """float32 rounded to 10 explicit mantissa bits, to nearest, ties to even."""
    bits = tensor.view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


class EmulatedTF32(ht.HessianOperator):
    """A Hessian whose products, and nothing else, are rounded as TF32 rounds them."""

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
        self.loss_fn = loss_fn
        self.device = device
        self.num_examples = loss_fn.num_examples

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.loss_fn(model, batch)


def operator(
    name: str, knobs: dict[str, int], variant: Variant, device: torch.device
) -> ht.HessianOperator:
    """The Hessian of a network of the zoo, computed as ``variant`` says."""
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
    """Spectra of the whole Hessian and of the weight blocks.

    What an interrupted run has finished is read.
    """
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
    model = hessian.problem.model
    slq = {"num_probes": settings["probes"], "num_steps": settings["steps"], "seed": SEED}
    blocks = ht.blockwise_slq(
        hessian,
        ht.partition(model, "weights", only=settings["only"]),
        **slq,
        finished=folder.journal.finished,
        on_block=folder.journal.append,
    )
    whole = ht.blockwise_slq(hessian, ht.partition(model, "model"), **slq)
    result = {"blocks": blocks, "whole": next(iter(whole.values()))}
    folder.finish(result)
    return result


def errors(spectra: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """The error of every quantity against the reference.

    Relative, but for the spectra of blocks, which have :func:`moved` by so many decades; a moment's
    is relative to the moment of absolute values, for odd ones cancel.
    """
    whole = spectra["whole"]
    exact = reference["whole"]
    quantities = {
        "largest eigenvalue": _relative(whole.largest, exact.largest),
        "smallest eigenvalue": _relative(whole.smallest, exact.smallest),
    }
    for power in MOMENTS:
        difference = abs(whole.moment(power).value - exact.moment(power).value)
        quantities[f"moment {power}"] = difference / _absolute_moment(exact, power)
    quantities["rms eigenvalue"] = _relative(whole.rms, exact.rms)
    pairs = [(spectra["blocks"][name], exact) for name, exact in reference["blocks"].items()]
    quantities |= _over_blocks("rms", [_relative(q.rms, e.rms) for q, e in pairs])
    quantities |= _over_blocks("largest", [_relative(q.largest, e.largest) for q, e in pairs])
    quantities |= _over_blocks("spectrum", [moved(q, e) for q, e in pairs])
    expected = _readings(reference)
    for name, reading in _readings(spectra).items():
        quantities[name] = abs(reading.mean - expected[name].mean) / expected[name].mean
    return quantities


def standard_errors(reference: dict[str, Any]) -> dict[str, float]:
    """The probes' relative standard error of the same quantities, in float64.

    For spectra it is how far the two halves of the probes lie apart.
    """
    whole = reference["whole"]
    blocks = reference["blocks"].values()
    quantities = {
        "largest eigenvalue": _relative_error(whole.largest),
        "smallest eigenvalue": _relative_error(whole.smallest),
    }
    for power in MOMENTS:
        error = whole.moment(power).standard_error
        quantities[f"moment {power}"] = error / _absolute_moment(whole, power)
    quantities["rms eigenvalue"] = _relative_error(whole.rms)
    quantities |= _over_blocks("rms", [_relative_error(block.rms) for block in blocks])
    quantities |= _over_blocks("largest", [_relative_error(block.largest) for block in blocks])
    quantities |= _over_blocks("spectrum", [moved(*_halves(block)) for block in blocks])
    for name, reading in _readings(reference).items():
        quantities[name] = reading.standard_error / reading.mean
    return quantities


def moved(one: ht.Quadrature, other: ht.Quadrature) -> float:
    """1-Wasserstein distance of two spectra in decades.

    It shows where small eigenvalues went, which no moment does.
    """
    # the two may share their probes, so that nothing is to be taken off for them
    plain = [
        replace(block, status="exact", residuals=np.zeros_like(block.residuals))
        for block in (one, other)
    ]
    pair = ht.js_heterogeneity(dict(enumerate(plain)), readings=("wasserstein",))
    return pair.readings["wasserstein"].mean


def _halves(quadrature: ht.Quadrature) -> tuple[ht.Quadrature, ht.Quadrature]:
    """The first and the second half of its probes."""
    first = second = quadrature
    for _ in range(quadrature.num_probes // 2):
        first = first.without_probe(first.num_probes - 1)
        second = second.without_probe(0)
    return first, second


def _readings(run: dict[str, Any]) -> dict[str, Any]:
    js = run["heterogeneity"]
    readings = {f"{name} reading": reading for name, reading in js.readings.items()}
    return {**readings, "scale spread": js.scale_spread}


def _over_blocks(quantity: str, values: list[float]) -> dict[str, float]:
    return {
        f"blocks' {quantity}: median": float(np.median(values)),
        f"blocks' {quantity}: worst": max(values),
    }


def _relative(estimate: Estimate, exact: Estimate) -> float:
    return abs(estimate.value - exact.value) / abs(exact.value)


def _relative_error(estimate: Estimate) -> float:
    return estimate.standard_error / abs(estimate.value)


def _absolute_moment(quadrature: ht.Quadrature, power: int) -> float:
    return float(quadrature.per_probe(lambda x: np.abs(x) ** power).mean())


def compared(
    name: str, knobs: dict[str, int], settings: dict[str, Any], out: Path
) -> dict[str, dict[str, float]]:
    """Columns of a network's table: the probes' errors, then those of each arithmetic."""
    runs = {label: spectra(name, knobs, label, settings, out) for label in VARIANTS}
    for run in runs.values():
        run["heterogeneity"] = ht.js_heterogeneity(run["blocks"], readings=pair_readings())
    reference = runs.pop(REFERENCE)
    columns = {"standard error of probes": standard_errors(reference)}
    for label, run in runs.items():
        columns[_described(label, settings["device"])] = errors(run, reference)
    return columns


def table_of(name: str, columns: dict[str, dict[str, float]]) -> str:
    quantities = next(iter(columns.values()))
    rows = [
        [quantity, *(f"{column[quantity]:.0e}" for column in columns.values())]
        for quantity in quantities
    ]
    return report.table((f"{name}, error of", *columns), rows)


def main() -> None:
    script = Script(__doc__, OUT, smoke="one network, few products: under a minute")
    script.add_argument(
        "--device",
        default="cpu",
        help=f"cpu, or cuda for the real TF32, which writes to {OUT}/cuda (default: cpu)",
    )
    run = script.run()
    device = run.options.device
    card = device.startswith("cuda")
    if card and not run.smoke and run.options.out is None:
        run = replace(run, out=OUT / "cuda")
    models = SMOKE_MODELS if run.smoke else MODELS
    settings = {**(SMOKE if run.smoke else FULL), "device": device}
    tables = {}
    texts = []
    for name, knobs in models.items():
        tables[name] = compared(name, knobs, settings, run.out)
        texts.append(table_of(name, tables[name]))
        print(texts[-1] + "\n", flush=True)
    hardware = torch.cuda.get_device_name() if card else _cpu()
    config = {"models": models, **settings, "seed": SEED, "hardware": hardware}
    run.save(tables, config)
    (run.out / "table.txt").write_text("\n\n".join(texts) + "\n")


def _cpu() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    return f"CPU with {capability}, {torch.get_num_threads()} thread(s)"


def _described(label: str, device: str) -> str:
    real = "TF32" if device.startswith("cuda") else "TF32 emulated"
    return real if label == "tf32" else label


if __name__ == "__main__":
    main()
