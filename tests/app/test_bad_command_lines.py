"""What people get wrong on the command line: one sentence that names the cause and the way out."""

import shlex

import pytest
from problems.command_line import run

OWN = """
import torch
from torch import nn
import hessian_tools as ht

constant = 5

def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    return model, ht.cross_entropy, [(torch.randn(8, 4), torch.arange(8) % 2)]

def with_loss(loss):
    model, _, batches = net()
    return model, loss, batches

def raises(): raise RuntimeError("my own fault")
def needs(x): return x
def three(): return 3
def vector(): return with_loss(lambda model, batch: model(batch[0]))
def number(): return with_loss(lambda model, batch: 3.0)
def nothing(): return with_loss(lambda model, batch: None)
def nan(): return with_loss(lambda model, batch: model(batch[0]).sum() * float("nan"))
def detached(): return with_loss(lambda model, batch: model(batch[0]).sum().detach())
def ignores(): return with_loss(lambda model, batch: torch.ones(()))
def empty(): return (*net()[:2], [])
def single(): return (*net()[:2], torch.ones(3))
def shapes(): return (*net()[:2], [(torch.randn(8, 5), torch.arange(8) % 2)])

def frozen():
    model, loss, batches = net()
    return model.requires_grad_(False), loss, batches

def dropout():
    model, loss, batches = net()
    return nn.Sequential(model, nn.Dropout(0.5)), loss, batches

def norm():
    model, loss, batches = net()
    return nn.Sequential(nn.BatchNorm1d(4), model), loss, batches

def half():
    model, loss, batches = net()
    return model.half(), loss, [(batches[0][0].half(), batches[0][1])]

def complexed():
    model, loss, batches = net()
    model.w = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    return model, loss, batches
"""

FILES = {
    "own.py": OWN,
    "syntax.py": "def f(:",
    "imports.py": "import no_such_package",
    "text.txt": "text",
    "bad.json": "{",
    "words.json": '[[1, 2], "x"]',
    "negative.json": "[[1, -2]]",
    "nothing.json": '{"a": []}',
    "null.json": "[[1, null]]",
    "none.json": "[]",
    "three.json": "3",
    "infinite.json": "[[1e400, 1]]",
}

# a command line, and words that its one sentence must hold
BAD = [
    ("js0", "--model"),
    ("js0 --model", "at least one"),
    ("js0 --model nothing", "'nothing' is not in the zoo; it has resnet18"),
    ("js0 --model gpt-nano gpt-nano", "names gpt-nano twice"),
    ("js0 --model absent.py:net", "there is no file 'absent.py'"),
    ("js0 --model own.py", "the function's name is missing"),
    ("js0 --model own.py:absent", "no function absent"),
    ("js0 --model own.py:constant", "no function constant"),
    ("js0 --model own.py:raises", "line 17: RuntimeError: my own fault"),
    ("js0 --model own.py:needs", "missing 1 required positional argument: 'x'"),
    ("js0 --model own.py:three", "returned a int, not ht.Problem(...) or"),
    ("js0 --model own.py:vector", "shape (8, 2), not a real scalar tensor; return the mean"),
    ("js0 --model own.py:number", "a float, not a real scalar tensor"),
    ("js0 --model own.py:nothing", "a NoneType, not a real scalar tensor"),
    ("js0 --model own.py:detached", "without torch.no_grad() or .detach()"),
    ("js0 --model own.py:ignores", "does not depend on any parameter"),
    ("js0 --model own.py:empty", "batches is empty; pass at least one"),
    ("js0 --model own.py:single", "batches is a Tensor; pass an iterable"),
    ("js0 --model own.py:frozen", "no parameter that requires grad"),
    ("js0 --model own.py:dropout", "dropout is active in 1; call model.eval()"),
    ("js0 --model own.py:norm", "batch_stats=True"),
    ("js0 --model own.py:half", "float16"),
    ("js0 --model own.py:shapes", "(8x5 and 4x3)"),
    ("js0 --model own.py:complexed", "parameter w is complex"),
    ("js0 --model syntax.py:f", "line 1"),
    ("js0 --model imports.py:f", "No module named 'no_such_package'"),
    ("js0 --model text.txt:f", "not a Python file"),
    ("js0 --model own.py:net --blocks nonsense", "'nonsense' matches no block"),
    ("js0 --model own.py:net --blocks '*.nothing'", "'*.nothing' matches no block"),
    ("js0 --model own.py:net --blocks '0.*' 0.weight", "overlap"),
    ("js0 --model own.py:net --blocks model", "one block"),
    ("js0 --model own.py:net --probes 0", "'0' is not a whole number of at least 1"),
    ("js0 --model own.py:net --probes 2.5", "'2.5' is not a whole number"),
    ("js0 --model own.py:net --steps nan", "'nan' is not a whole number"),
    ("js0 --model own.py:net --seed -1", "'-1' is not a whole number of at least 0"),
    ("js0 --model own.py:net --memory lots", "memory is 'lots'; use \"auto\""),
    ("js0 --model own.py:net --memory 10B", "memory=10 B is too little"),
    ("js0 --model own.py:net --device tpu9", "'tpu9' is no device of this machine"),
    ("js0 --model own.py:net --dtype float16", "'float16' (choose from"),
    ("js0 --model own.py:net --precision tf33", "'tf33' (choose from"),
    ("js0 --model own.py:net --precision tf32 --dtype float64", "torch.float64; use"),
    ("js0 --model own.py:net --tolerance 0", "'0' is not a positive number, such as"),
    ("js0 --model own.py:net --tolerance inf", "'inf' is not a positive number"),
    ("js0 --model own.py:net --tolerance 1 --reading unknown", "'unknown' (choose from"),
    ("js0 --model own.py:net --probe-kind cauchy", "'cauchy' (choose from"),
    ("js0 --model own.py:net --reorthogonalize some", "'some' (choose from"),
    ("js0 --model own.py:net --out text.txt", "it is a file"),
    ("js0 --model own.py:net --num-examples 4", "brings its own data; leave it out"),
    ("js0 --model own.py:net --data text.txt", "brings its own data; leave it out"),
    ("js0 --model gpt-nano --data absent.txt", "'absent.txt'"),
    ("js0 --model gpt-nano --image-size 8", "reads text; leave it out"),
    ("js0 --model vgg-nano --context 8", "reads images; leave it out"),
    ("js0 --model vgg-nano --batch-stats maybe", "'maybe' (choose from"),
    ("js0 --model gpt-nano --num-examples 0", "'0' is not a whole number"),
    ("js0 --model gpt-nano --batch-size 0", "'0' is not a whole number"),
    ("js0 --model vgg-nano --data torchvision:Nothing:.", "Nothing"),
    ("js0 --model vgg-nano --data text.txt", "text.txt"),
    ("js0 --model own.py:net --nonsense", "--nonsense"),
    ("spectrum --model own.py:net --reading log", "--reading"),
    ("spectrum --model own.py:net --blocks 'nothing.*'", "'nothing.*' matches no block"),
    ("partition --model own.py:net --preset nothing", "nothing"),
    ("partition --model own.py:net --preset bad.json", "bad.json"),
    ("partition --model own.py:net --preset absent.json", "absent.json"),
    ("partition --model own.py:net --check 0.weight", "0.weight"),
    ("partition --model own.py:net --check 0.weight=9", "9"),
    ("partition --model own.py:net --check 0.weight=sideways", "sideways"),
    ("partition --model own.py:net --check absent=row", "absent"),
    ("partition --model own.py:net --only absent", "absent"),
    ("partition --model own.py:net --alpha 0", "0"),
    ("partition --model own.py:net --alpha 2", "2"),
    ("partition --model own.py:net --contrast 0.5", "0.5"),
    ("partition --model own.py:net --diagonal 2", "2"),
    ("partition --model own.py:net --probes 0", "'0' is not a whole number"),
    ("partition --model own.py:net --blocks 0", "'0' is not a whole number"),
    ("partition --model own.py:net --coupling -1", "-1"),
    ("quadratic", "CASE"),
    ("quadratic 5", "5"),
    ("quadratic absent.json", "absent.json"),
    ("quadratic bad.json", "bad.json"),
    ("quadratic words.json", "words.json"),
    ("quadratic negative.json", "-2"),
    ("quadratic nothing.json", "eigenvalues []"),
    ("quadratic null.json", "null.json"),
    ("quadratic none.json", "none.json"),
    ("quadratic three.json", "three.json"),
    ("quadratic infinite.json", "positive finite ones"),
    ("quadratic 3 --methods sgd", "'sgd'"),
    ("quadratic 3 --starts 0", "'0' is not a whole number"),
    ("quadratic 3 --tolerance 2", "2"),
    ("quadratic 3 --kappa 0.5", "0.5"),
    ("quadratic 3 --kappa nan", "nan"),
    ("quadratic 3 --from text.txt", "--from"),
    ("quadratic --from absent", "absent"),
    ("quadratic --from .", "give what `hessian-tools js0 --out`"),
    ("quadratic --from text.txt", "text.txt"),
    ("quadratic 3 --per-block 5", "--per-block"),
    ("quadratic 3 --blocks a", "--blocks"),
    ("quadratic 3 --device tpu", "'tpu' is no device"),
    ("models extra", "extra"),
    ("nothing", "'nothing' (choose from"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bad")
    for name, text in FILES.items():
        (path / name).write_text(text)
    return path


def sentence(errors: str) -> str:
    """The one line of error among what a run tells."""
    told = ("plan:", "note:", "verified")
    lines = [line for line in errors.splitlines() if not line.startswith(told)]
    assert "Traceback" not in errors
    assert len(lines) == 1, errors
    return lines[0]


def test_there_are_enough():
    assert len(BAD) >= 60
    assert len({line for line, _ in BAD}) == len(BAD)


@pytest.mark.parametrize("line, words", BAD, ids=[line for line, _ in BAD])
def test_one_sentence_names_the_cause(line, words, folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    assert run(*shlex.split(line)) == 2
    error = sentence(capfd.readouterr().err)
    assert error.startswith("hessian-tools: ")
    assert words in error


def test_a_numerical_failure_is_no_bad_input(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    assert run("js0", "--model", "own.py:nan") == 3
    assert "the loss of batch 0 is nan" in sentence(capfd.readouterr().err)
