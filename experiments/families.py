"""Are products right on whatever people bring? Some 300 small models, each against a difference.

Protocol, fixed before any result:

- A configuration is a model of at most some 20 thousand variables, a loss and one to three batches
  (experiments/family_models), in float32 unless it says otherwise. Every tensor whose entries are
  all equal gets a little noise, so that no ReLU sits on its kink and no LayerNorm divides by zero.
- The referee shares nothing with the package (experiments/family_models/difference.py): a copy in
  float64, gradients by ``backward()``, a five-point difference along one random direction at eight
  steps. Its own uncertainty is the distance of the two neighbouring steps that agree best. Above
  5 % nothing is decided. "Kinks" means that a step of 1e-3 of the weights' norm crosses some.
- The package is asked for three things: the product in that direction (``hessian @ v``); the same
  after ``hessian.expect(10**12)``, by which ``route="auto"`` changes to a tangent program where it
  can; and ``verify()`` of a fresh operator.
- *right*: both products within max(allowed, 5 uncertainties) of the referee's, and ``verify()``
  passes. Allowed are 1e-6 in float64, 2e-3 in float32, 1e-1 in bfloat16. Distances are those of the
  worst parameter tensor, relative to its own part of the product and a hundredth of the whole. (A
  first run took norms of whole products, in which a wrong formula of one layer, at 8e-4, passed.)
- *refused*: the configuration is one that has no right answer (or a stated limitation), and the
  package says so: an error of its own, or a failed check of ``verify()``, that names the cause.
- *wrong*: a product off; *false alarm*: products right and ``verify()`` fails; *refused
  needlessly*: an error of the package where an answer exists, or one that does not name the cause;
  *crashed*: any other exception, a dead process, more than five minutes; *left changed*: the model
  is not as it was (values, modes, gradients, attention and expert kernels); *undecided*: the
  referee fails or is uncertain; *skipped*: a library is not installed (timm, peft and diffusers are
  the extra ``families``).

`python experiments/families.py [--smoke] [--only GLOB ...]` prints a line a configuration and at
the end the counts, and writes results/families: lines.jsonl.gz (everything measured), table.txt and
result.json. Configurations run in a process of their own, which another replaces when it dies or
hangs. What is known for the present code and libraries is not computed again, so an interrupted run
goes on; ``--only`` computes what it names in any case.
"""

import fnmatch
import gzip
import hashlib
import json
import multiprocessing
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from family_models import CONFIGURATIONS, Setting
from family_models.difference import Difference, apart, difference
from family_models.setting import moved_from_zero
from script import Script
from torch import Tensor, nn
from tqdm import tqdm

import hessian_tools as ht
from hessian_tools.app import report

OUT = Path("results/families")
SMOKE = ("mlp/smooth", "graph/objects-dense-adjacency", "hf/gpt2")
SEED = 0
ALLOWED = {"float64": 1e-6, "float32": 2e-3, "bfloat16": 0.1}
CONCLUSIVE = 0.05  # a referee less certain decides nothing
LIMIT = 300  # seconds for one configuration
MANY = 10**12  # products announced, so that any model is worth tracing
OUTCOMES = (
    "right",
    "refused",
    "wrong",
    "false alarm",
    "refused needlessly",
    "crashed",
    "left changed",
    "undecided",
    "skipped",
)
LIBRARIES = ("torch", "torchvision", "transformers", "timm", "peft", "diffusers")
PACKAGE = Path(ht.__file__).parent
Line = dict[str, Any]  # what is known of a configuration, JSON-able


def tried(name: str) -> Line:
    """Everything about one configuration; no exception leaves."""
    started = time.perf_counter()
    line: Line = {"name": name, "errors": {}}
    try:
        torch.manual_seed(SEED)
        setting = CONFIGURATIONS[name]()
        moved_from_zero(setting.model)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name in LIBRARIES
        outcome = "skipped" if missing else "undecided"
        return line | {"outcome": outcome, "message": f"cannot be built: {_told(error)}"}
    line["variables"] = sum(p.numel() for p in setting.model.parameters() if p.requires_grad)
    direction = torch.randn(line["variables"], generator=torch.Generator().manual_seed(SEED))
    reference = _referee(line, setting, direction)
    before = _state(setting.model)
    _package(line, setting, direction, reference)
    changed = [key for key, value in _state(setting.model).items() if before.get(key) != value]
    line["changed"] = changed
    line["outcome"], line["message"] = judged(line, setting.refusal, ALLOWED[setting.accuracy])
    return line | {"seconds": round(time.perf_counter() - started, 2)}


def judged(line: Line, refusal: str, allowed: float) -> tuple[str, str]:
    """The outcome by the protocol, and what is to be said of it.

    ``refusal`` is a word that names the cause, where a refusal is right; "" elsewhere.
    """
    told = [error["message"] for error in line["errors"].values() if error["own"]]
    told += line.get("failed", [])
    if refusal and any(refusal.lower() in message.lower() for message in told):
        return "refused", next(m for m in told if refusal.lower() in m.lower())
    for stage in ("product", "after", "verify"):
        if stage in line["errors"]:
            error = line["errors"][stage]
            kind = "refused needlessly" if error["own"] else "crashed"
            return kind, f"{stage}: {error['message']}"
    if "referee" in line["errors"]:
        return "undecided", f"referee: {line['errors']['referee']['message']}"
    if not line["uncertainty"] < CONCLUSIVE:
        return "undecided", f"the difference's own uncertainty is {line['uncertainty']:.0e}"
    tolerance = max(allowed, 5 * line["uncertainty"])
    for stage in ("product", "after"):
        if not line[stage] <= tolerance:
            return "wrong", f"{stage}: off by {line[stage]:.1e}, allowed {tolerance:.1e}"
    if line["failed"]:
        return "false alarm", "; ".join(line["failed"])
    if line["changed"]:
        return "left changed", ", ".join(line["changed"][:4])
    return "right", ""


def _referee(line: Line, setting: Setting, direction: Tensor) -> Difference | None:
    try:
        found = difference(setting, direction)
    except Exception as error:
        line["errors"]["referee"] = {"own": False, "message": _told(error)}
        return None
    line |= {"uncertainty": found.uncertainty, "step": found.step, "kinks": found.kinks}
    return found


def _package(line: Line, setting: Setting, direction: Tensor, reference: Difference | None) -> None:
    """Asks for the two products and for verification; what is raised is written down."""

    def stage(name: str, job: Callable[[], Any]) -> Any:
        try:
            return job()
        except Exception as error:
            line["errors"][name] = {"own": _is_own(error), "message": _told(error)}
            return None

    def compared(product: Tensor) -> float | None:
        if reference is None:
            return None
        return apart(product, reference.product, reference.sizes)

    hessian = stage("product", lambda: ht.HessianOperator(_problem(setting)))
    if hessian is None:
        return
    v = direction.to(hessian.dtype)
    product = stage("product", lambda: hessian @ v)
    if product is None:
        return
    line |= {"product": compared(product), "route": hessian.route}
    hessian.expect(MANY)
    product = stage("after", lambda: hessian @ v)
    if product is not None:
        line |= {"after": compared(product), "route_after": hessian.route}
    verification = stage("verify", lambda: ht.HessianOperator(hessian.problem).verify(seed=SEED))
    if verification is not None:
        line["verify"] = "passed" if verification.passed else "failed"
        line["checks"] = str(verification)
        line["failed"] = [str(check) for check in verification.failures]


def _problem(setting: Setting) -> ht.Problem:
    loss = setting.given or setting.loss
    return ht.Problem(setting.model, loss, setting.batches, **setting.options)


def _is_own(error: Exception) -> bool:
    """Whether the package raised it itself, rather than let it through."""
    named = isinstance(error, ValueError | TypeError | ht.NumericalError)
    if not named and not type(error).__module__.startswith("hessian_tools"):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return Path(frames[-1].filename).is_relative_to(PACKAGE)


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:2000]


def _state(model: nn.Module) -> dict[str, Any]:
    """What must be as before: values, modes, gradients, and the kernels that configs name."""
    state: dict[str, Any] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        state[f"value of {name}"] = _digest(tensor)
        state[f"gradient of {name}"] = tensor.grad is None
        state[f"requires_grad of {name}"] = tensor.requires_grad
    for name, module in model.named_modules():
        state[f"mode of {name}"] = module.training
        config = getattr(module, "config", None)
        for kernel in ("_attn_implementation", "_experts_implementation"):
            state[f"{kernel} of {name}"] = str(getattr(config, kernel, None))
    return state


def _digest(tensor: Tensor) -> str:
    values = tensor.detach().contiguous().flatten()
    return hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


class Worker:
    """A process that tries configurations; another takes its place when it dies or hangs."""

    def __init__(self) -> None:
        self._start()

    def tried(self, name: str) -> Line:
        try:
            self.pipe.send(name)
            if self.pipe.poll(LIMIT):
                line: Line = self.pipe.recv()
                return line
            message = f"took more than {LIMIT} s"
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join()
            message = f"the process died with exit code {self.process.exitcode}"
        self.stop()
        self._start()
        return {"name": name, "outcome": "crashed", "message": message, "errors": {}}

    def stop(self) -> None:
        self.process.kill()
        self.process.join()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()


def _serve(pipe: Connection) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    while True:
        pipe.send(tried(pipe.recv()))


class Lines:
    """A line a configuration: lines.jsonl while a run lasts, lines.jsonl.gz in order after it."""

    def __init__(self, folder: Path) -> None:
        self.journal = folder / "lines.jsonl"
        self.packed = folder / "lines.jsonl.gz"
        self.by_name: dict[str, Line] = {}
        packed = gzip.decompress(self.packed.read_bytes()) if self.packed.exists() else b""
        begun = self.journal.read_bytes() if self.journal.exists() else b""
        for text in [*packed.splitlines(), *begun.splitlines()]:
            try:
                line = json.loads(text)
            except ValueError:  # torn by a kill
                continue
            self.by_name[line["name"]] = line

    def add(self, line: Line) -> None:
        self.by_name[line["name"]] = line
        with self.journal.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def finish(self, names: Iterable[str]) -> list[Line]:
        """The lines of ``names`` that are known, in that order, which are then the packed file."""
        kept = [self.by_name[name] for name in names if name in self.by_name]
        ordered = "".join(json.dumps(line) + "\n" for line in kept)
        scratch = self.packed.with_suffix(".tmp")
        scratch.write_bytes(gzip.compress(ordered.encode(), mtime=0))
        scratch.replace(self.packed)
        self.journal.unlink(missing_ok=True)
        return kept


def code() -> str:
    """A name for all that a line depends on: the package, this experiment, the libraries."""
    sources = sorted(PACKAGE.rglob("*.py"))
    sources += [Path(__file__), *sorted((Path(__file__).parent / "family_models").glob("*.py"))]
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.read_bytes())
    for library in LIBRARIES:
        try:
            digest.update(version(library).encode())
        except PackageNotFoundError:
            digest.update(b"none")
    return digest.hexdigest()[:12]


def printed(line: Line) -> str:
    """One configuration on one line."""
    cells = row(line)
    message = f" | {line['message'][:160]}" if line["message"] else ""
    return f"{cells[-1]:18} {cells[0]:50} " + " ".join(f"{c:>9}" for c in cells[1:-1]) + message


def row(line: Line) -> list[str]:
    uncertainty = _short(line.get("uncertainty")) + ("k" if line.get("kinks") else "")
    verify = line.get("verify", "error" if "verify" in line["errors"] else "-")
    after = str(line.get("route_after", ""))
    route = "tangent" if after.startswith("tangent") else "double" if after else "-"
    return [
        line["name"],
        str(line.get("variables", "-")),
        verify,
        _short(line.get("product")),
        route,
        _short(line.get("after")),
        uncertainty,
        line["outcome"],
    ]


def _short(number: float | None) -> str:
    return "-" if number is None else f"{number:.0e}"


HEADER = (
    "configuration",
    "variables",
    "verify",
    "error",
    "route after",
    "error after",
    "uncertainty",
    "outcome",
)


def table(lines: list[Line]) -> str:
    """All configurations, the counts, and what there is to say of those that are not right."""
    counts = Counter(line["outcome"] for line in lines)
    summary = ", ".join(f"{counts[kind]} {kind}" for kind in OUTCOMES if counts[kind])
    said = [
        f"{line['outcome']}: {line['name']}: {line['message'][:400]}"
        for kind in OUTCOMES[1:]
        for line in lines
        if line["outcome"] == kind
    ]
    head = f"{len(lines)} configurations: {summary}"
    body = report.table(HEADER, [row(line) for line in lines])
    return "\n".join([head, "", body, "", *said])


def main() -> None:
    script = Script(__doc__, OUT, smoke="three configurations: under a minute")
    told = "such as 'hf/*' 'graph/*'; computed in any case"
    script.add_argument("--only", metavar="GLOB", nargs="+", help=told)
    run = script.run()
    run.out.mkdir(parents=True, exist_ok=True)
    names = [
        name
        for name in (SMOKE if run.smoke else CONFIGURATIONS)
        if any(fnmatch.fnmatch(name, glob) for glob in run.options.only or "*")
    ]
    if not names:
        script.error(f"--only {run.options.only} names none of {len(CONFIGURATIONS)}")
    lines = Lines(run.out)
    present = code()
    worker = Worker()
    for name in tqdm(names, unit="configuration"):
        known = lines.by_name.get(name, {})
        if known.get("code") == present and not run.options.only:
            continue
        line = worker.tried(name) | {"code": present}
        lines.add(line)
        tqdm.write(printed(line))
    worker.stop()
    everything = lines.finish(CONFIGURATIONS)
    outcomes = {line["name"]: line["outcome"] for line in everything}
    codes = sorted({line["code"] for line in everything})
    run.save(outcomes, {"seed": SEED, "code": codes, "allowed": ALLOWED, "smoke": run.smoke})
    run.print_table(table(everything))


if __name__ == "__main__":
    main()
