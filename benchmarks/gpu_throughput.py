"""How near Hessian products come to the device's rate of matrix products; kernels launched.

A product's operations are counted (``torch.utils.flop_counter``), its time is measured, and its
rate is given as a share of what large matrix products reach on the same device in the same
precision, measured in the same run.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import gpu_measure as measure
import torch
from torch import nn

import hessian_tools as ht
from hessian_tools.problem import data, zoo
from hessian_tools.problem.vision import repair, torchvision

PRODUCTS = ("full", "block")
PRECISION_OPTION = {"float32": {"precision": "ieee"}, "tf32": {"precision": "tf32"}, "bfloat16": {}}


@dataclass(frozen=True)
class Settings:
    """Knobs; the smoke run's are in SMOKE."""

    matrix_sizes: tuple[int, ...] = (4096, 8192, 16384)
    probes: tuple[int, ...] = (1, 8, 32)
    repeats: int = 10
    models: tuple[str, ...] = ("gpt2", "llama", "resnet50")
    small_models: tuple[str, ...] = (
        "mlp",
        "gpt-nano",
        "resnet-nano",
        "gpt2",
    )  # whose launches are counted
    sequences: int = 4
    context: int = 1024
    images: int = 64
    image_size: int = 224
    llama: tuple[int, int, int, int] = (1024, 2816, 16, 12)  # width, MLP width, heads, layers
    memory: str = "auto"
    seed: int = 0


SMOKE = Settings(
    matrix_sizes=(128, 256),
    probes=(1, 2),
    repeats=1,
    models=("gpt2-nano", "llama", "resnet-nano"),
    small_models=("mlp", "gpt-nano"),
    sequences=2,
    context=16,
    images=2,
    image_size=32,
    llama=(32, 64, 2, 2),
    memory="2GiB",
)


def measure_rates(results: measure.ResultFile, settings: Settings, device: torch.device) -> None:
    """A row a precision and size of the matrices."""
    for precision in measure.precisions(device):
        for size in settings.matrix_sizes:
            if not results.has(precision=precision, size=size):
                results.add(measure.matmul_rate(precision, size, device, settings.repeats))


def best_rates(results: measure.ResultFile) -> dict[str, float]:
    """The highest rate over sizes, by precision."""
    rates: dict[str, float] = {}
    for row in results.rows:
        rates[row["precision"]] = max(row["rate"], rates.get(row["precision"], 0.0))
    return rates


def measure_products(
    results: measure.ResultFile, settings: Settings, device: torch.device, rates: dict[str, float]
) -> None:
    """A row a model, precision, kind of product and number of probes."""
    for model in settings.models:
        for precision in rates:
            cases = [(kind, k) for kind in PRODUCTS for k in settings.probes]
            key = {"model": model, "precision": precision}
            missing = [
                (kind, k) for kind, k in cases if not results.has(**key, product=kind, probes=k)
            ]
            if not missing:
                continue
            problem = build(model, settings, device, precision)
            hessian = ht.HessianOperator(
                problem, memory=settings.memory, **PRECISION_OPTION[precision]
            )
            forward = forward_operations(problem)
            for kind, k in missing:
                row = {**key, "product": kind, "probes": k, "forward_operations": forward}
                results.add(
                    {**row, **_measured(hessian, kind, k, settings.repeats, rates[precision])}
                )
            del problem, hessian


def _measured(hessian: Any, kind: str, k: int, repeats: int, rate: float) -> dict[str, Any]:
    """Operations (a vector), time, rate and peak memory of k probes through the Hessian, or a few
    blocks in turn.
    """
    device = hessian.device
    operators = [hessian] if kind == "full" else sampled_blocks(hessian)
    try:
        vectors = [
            torch.randn(k, operator.size, device=device).to(operator.dtype)
            for operator in operators
        ]

        def products() -> None:
            for operator, rows in zip(operators, vectors, strict=True):
                operator.matmat(rows)

        for operator, rows in zip(operators, vectors, strict=True):
            operator.matmat(rows[:1])  # records the graphs, whose cost is not a product's
        count = measure.operations(products)
        measure.reset_peak(device)
        taken = measure.seconds(products, device, repeats)
    except torch.OutOfMemoryError as error:
        return {"error": str(error).splitlines()[0], "route": hessian.route}
    reached = count / taken["median"]
    return {
        "operations": count / k / len(operators),
        "seconds": taken,
        "rate": reached,
        "share": reached / rate,
        "peak_bytes": measure.peak_bytes(device),
        "route": hessian.route,
    }


def forward_operations(problem: ht.Problem) -> int:
    """F of all batches."""

    def forward() -> None:
        with problem.evaluating(), torch.no_grad():
            for batch in problem.batches:
                problem.batch_loss(batch)

    return measure.operations(forward)


def sampled_blocks(hessian: Any) -> list[Any]:
    """The first, the middle and the last weight matrix."""
    cuts = [block.as_cut() for block in ht.partition(hessian.problem.model, "weights")]
    return [hessian.stacked(cuts[i]) for i in (0, len(cuts) // 2, len(cuts) - 1)]


def measure_launches(results: measure.ResultFile, settings: Settings, device: torch.device) -> None:
    """A row a model and call: the forward pass and gradient for comparison, a full and a block
    product, one probe.
    """
    for model in settings.small_models:
        if results.has(model=model):
            continue
        problem = build(model, settings, device, "float32")
        hessian = ht.HessianOperator(problem, memory=settings.memory, **PRECISION_OPTION["float32"])
        for name, call in _calls(hessian):
            row = {"model": model, "call": name, **measure.launches(call, device)}
            row["seconds"] = measure.seconds(call, device, settings.repeats)
            results.add({**row, **replayed(call, hessian.release, device, settings.repeats)})


def _calls(hessian: Any) -> Iterator[tuple[str, Callable[[], object]]]:
    problem = hessian.problem
    block = sampled_blocks(hessian)[1]
    whole, part = (torch.randn(1, o.size, device=o.device).to(o.dtype) for o in (hessian, block))

    def gradient() -> None:
        with problem.evaluating():
            torch.autograd.grad(
                problem.batch_loss(problem.batches[0]), list(problem.parameters.values())
            )

    yield "gradient", gradient
    yield "full product", lambda: hessian.matmat(whole)
    yield "block product", lambda: block.matmat(part)


def replayed(
    call: Callable[[], object], release: Callable[[], None], device: torch.device, repeats: int
) -> dict[str, Any]:
    """The call's time when captured once as a CUDA graph and replayed, or why it cannot be
    captured.

    A backward pass runs on the stream that its graph was recorded on, so that is recorded anew on
    the captured one.
    """
    if device.type != "cuda":
        return {"replayed": None, "not_captured": "no CUDA device"}
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    try:
        release()
        with torch.cuda.stream(stream):
            call()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            call()
        return {"replayed": measure.seconds(graph.replay, device, repeats), "not_captured": ""}
    except RuntimeError as error:
        return {"replayed": None, "not_captured": str(error).splitlines()[0]}
    finally:
        release()


def build(model: str, settings: Settings, device: torch.device, precision: str) -> ht.Problem:
    """One of the models on packaged data, at initialisation, on the device and in the precision's
    dtype.
    """
    dtype = measure.DTYPES[precision]
    if model in zoo.SPECS:
        text = zoo.SPECS[model].data != "images"
        examples, size = (settings.sequences, settings.context) if text else (settings.images, None)
        loaded = zoo.load(
            model,
            seed=settings.seed,
            num_examples=examples,
            context=size if text else None,
            device=device,
            dtype=dtype,
        )
        return ht.Problem(
            loaded.model, loaded.loss_fn, loaded.batches, batch_stats=loaded.batch_stats
        )
    torch.manual_seed(settings.seed)
    if model == "llama":
        network: nn.Module = llama(
            *settings.llama, vocabulary=data.TOKENIZERS["bpe"].size, context=settings.context
        )
        batches = data.language_batches(
            data.text_tokens("bpe"),
            num_examples=settings.sequences,
            batch_size=settings.sequences,
            context=settings.context,
        )
        return ht.Problem(network.to(device, dtype).eval(), ht.cross_entropy, batches)
    network = torchvision().models.resnet50(num_classes=10)
    images = data.image_batches(
        data.image_source(),
        num_examples=settings.images,
        batch_size=settings.images,
        image_size=settings.image_size,
    )
    batches = [(x.to(dtype), y) for x, y in images]
    return ht.Problem(network.to(device, dtype).eval(), ht.cross_entropy, batches, batch_stats=True)


def llama(
    width: int,
    mlp: int,
    heads: int,
    layers: int,
    *,
    vocabulary: int,
    context: int,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """A Llama of transformers on torch's default device, at random initialisation, in evaluation
    mode.
    """
    repair()
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def header(settings: Settings, device: torch.device) -> dict[str, Any]:
    """What a results file of this module depends on."""
    return {"settings": asdict(settings), "hardware": measure.hardware(device)}
