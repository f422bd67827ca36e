"""The experiment on model families: its referee, its judgement, and what is committed of it."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "results" / "families"


@pytest.fixture
def families(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    spec = importlib.util.spec_from_file_location("families", ROOT / "experiments/families.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "families", module)
    spec.loader.exec_module(module)
    return module


def quadratic(families: ModuleType, matrix: torch.Tensor) -> object:
    """L = w' A w / 2, pooled over two batches of which the second counts three times."""
    model = nn.Linear(len(matrix), 1, bias=False)

    def loss(model: nn.Module, batch: tuple[torch.Tensor]) -> torch.Tensor:
        w = model.weight[0]
        return w @ batch[0] @ w / 2

    batches = [(4 * matrix,), (torch.zeros_like(matrix),)]
    return families.Setting(model, loss, batches, [1.0, 3.0])


def test_the_difference_of_a_quadratic_is_its_matrix(families):
    a = torch.randn(5, 5)
    found = families.difference(quadratic(families, a + a.T), torch.arange(5.0))
    expected = (a + a.T).double() @ torch.arange(5.0).double()
    assert torch.allclose(found.product, expected, rtol=1e-7)
    assert found.uncertainty < 1e-7 and not found.kinks


def test_the_difference_of_a_smooth_network_is_double_backward(families):
    from family_models.setting import cross_entropy, vectors

    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    batches = vectors((7,))
    setting = families.Setting(model, cross_entropy, batches, [7.0])
    v = torch.randn(83)
    twin = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    twin.load_state_dict(model.state_dict())
    parameters = list(twin.parameters())
    x, y = batches[0]
    loss = nn.functional.cross_entropy(twin(x.double()), y)
    slopes = torch.autograd.grad(loss, parameters, create_graph=True)
    flat = torch.cat([slope.flatten() for slope in slopes])
    rows = torch.autograd.grad(flat, parameters, v.double())
    expected = torch.cat([row.flatten() for row in rows])
    assert torch.allclose(families.difference(setting, v).product, expected, rtol=1e-6, atol=1e-9)


def test_a_kink_within_reach_is_seen(families):
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)

    def loss(model: nn.Module, batch: tuple[torch.Tensor]) -> torch.Tensor:
        w = model.weight[0, 0]
        return w.square() + 10 * torch.relu(w - 1 - 1e-4).square()

    found = families.difference(
        families.Setting(model, loss, [(torch.ones(1),)], [1.0]), torch.ones(1)
    )
    assert found.kinks and abs(found.product.item() - 2) < 1e-6


RIGHT = {
    "errors": {}, "uncertainty": 1e-9, "product": 1e-7, "after": 1e-7, "failed": [], "changed": [],
}  # fmt: skip
OWN = {"own": True, "message": "ValueError: reentrant checkpoint"}


@pytest.mark.parametrize(
    ("change", "refusal", "expected"),
    [
        ({}, "", "right"),
        ({"product": 0.1}, "", "wrong"),
        ({"after": float("nan")}, "", "wrong"),
        ({"uncertainty": 0.01, "product": 0.04}, "", "right"),
        ({"uncertainty": 0.1}, "", "undecided"),
        ({"errors": {"referee": {"own": False, "message": "no float64"}}}, "", "undecided"),
        ({"failed": ["symmetry"]}, "", "false alarm"),
        ({"changed": ["mode of head"]}, "", "left changed"),
        ({"errors": {"product": OWN}}, "", "refused needlessly"),
        ({"errors": {"product": OWN}}, "checkpoint", "refused"),
        ({"errors": {"product": OWN}}, "complex", "refused needlessly"),
        ({"errors": {"verify": {**OWN, "own": False}}}, "checkpoint", "crashed"),
        ({"failed": ["FAILED gradient"], "product": 1.0}, "gradient", "refused"),
        ({"product": 1.0}, "gradient", "wrong"),
    ],
)
def test_outcomes_follow_the_protocol(families, change, refusal, expected):
    outcome, message = families.judged({**RIGHT, **change}, refusal, 2e-3)
    assert outcome == expected
    assert bool(message) == (expected != "right")


def test_objects_are_cast_by_their_attributes(families):
    from family_models.difference import in_float64
    from family_models.graphs import EdgeList, Graph

    x, y = torch.ones(2, 2), torch.ones(2, dtype=torch.long)
    for batch in (Graph(x, x.to_sparse(), y), EdgeList(x, y, y), {"x": [x, (y,)], "n": 3}):
        cast = in_float64(batch)
        assert type(cast) is type(batch)
        seen = cast["x"][0] if isinstance(cast, dict) else cast.x
        assert seen.dtype == torch.float64 and x.dtype == torch.float32
    assert in_float64(Graph(x, x.to_sparse(), y)).adjacency.dtype == torch.float64


def test_a_line_torn_by_a_kill_is_left_out_and_the_last_counts(families, tmp_path):
    journal = tmp_path / "lines.jsonl"
    journal.write_text('{"name": "b", "n": 1}\n{"name": "a"}\n{"name": "b", "n": 2}\n{"name": "c')
    kept = families.Lines(tmp_path).finish(["a", "b", "c"])
    assert kept == [{"name": "a"}, {"name": "b", "n": 2}]
    assert not journal.exists()
    again = families.Lines(tmp_path)
    again.add({"name": "a", "n": 3})  # of a run that goes on
    assert families.Lines(tmp_path).finish("ab") == [{"name": "a", "n": 3}, kept[1]]


def test_what_is_committed_is_of_these_configurations(families):
    lines = list(families.Lines(FOLDER).by_name.values())
    assert [line["name"] for line in lines] == list(families.CONFIGURATIONS)
    assert families.table(lines) == (FOLDER / "table.txt").read_text().rstrip("\n")
    assert sum(line["outcome"] == "right" for line in lines) >= 60


@pytest.mark.slow
def test_a_process_that_dies_takes_no_other_configuration_with_it(families):
    worker = families.Worker()
    worker.process.kill()
    worker.process.join()
    line = worker.tried("mlp/smooth")
    assert line["outcome"] == "crashed" and "died" in line["message"]
    assert worker.tried("mlp/smooth")["outcome"] == "right"
    worker.stop()
