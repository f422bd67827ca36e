"""The engine against dense float64 Hessians, closed forms, finite differences, and its counted
cost."""

import functools

import pytest
import torch
from problems import NETWORKS, Cubed, OnceOnly, dense_hessian, gpt, network, relative_error
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import hessian_tools as ht
from hessian_tools.curvature.engine import engine
from hessian_tools.curvature.engine.double_backward import DoubleBackward
from hessian_tools.curvature.engine.memory import LiveBytes
from hessian_tools.curvature.engine.trials import _MEASURED
from hessian_tools.curvature.operators import _Sum
from hessian_tools.curvature.segments.recompute import LAYERED, NONE
from hessian_tools.curvature.tangent.program import Program


@pytest.fixture(params=list(NETWORKS))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def dense():
    """name -> dense Hessian, computed once."""
    return functools.cache(lambda name: dense_hessian(network(name)))


def test_full_hessian_is_the_dense_one(name, dense):
    assert (
        relative_error(ht.HessianOperator(network(name)).to_dense(), dense(name))
        < NETWORKS[name][3]
    )


@pytest.mark.parametrize("preset", ["tensor", "semantic", "layer", "head", "neuron"])
@pytest.mark.parametrize("network_name", ["hf-gpt2", "batchnorm-batch", "gpt"])
def test_every_block_is_a_slice_of_the_dense_hessian(network_name, preset, dense):
    problem = network(network_name)
    dense = dense(network_name)
    hessian = ht.HessianOperator(problem)
    sizes = [p.numel() for p in problem.parameters.values()]
    numbered = dict(zip(problem.parameters, torch.arange(sum(sizes)).split(sizes), strict=True))
    for cut in ht.partition(problem.model, preset).cuts:
        entries = cut.rows({n: numbered[n].view(p.shape) for n, p in problem.parameters.items()})
        stacked = hessian.stacked(cut)
        vectors = torch.randn(cut.num_blocks * 2, cut.block_size, dtype=torch.float64)
        products = stacked.matmat(vectors)
        for row in range(len(vectors)):
            index = entries[row // 2]
            expected = dense[index][:, index] @ vectors[row]
            assert torch.allclose(products[row], expected, atol=1e-10), cut.names[row // 2]


@pytest.mark.parametrize(
    "options", [{"record": False}, {"microbatch": 2}, {"microbatch": 1, "record": False}]
)
def test_no_route_changes_the_product(options):
    problem = network("gpt")
    vectors = torch.randn(3, problem.num_parameters, dtype=torch.float64)
    expected = ht.HessianOperator(problem, record=True).matmat(vectors)
    assert relative_error(ht.HessianOperator(problem, **options).matmat(vectors), expected) < 1e-12


def test_a_small_budget_cuts_the_batches_and_changes_nothing():
    model, inputs = gpt(d=16), torch.randint(11, (24, 7))
    problem = ht.Problem(model, ht.cross_entropy, [(inputs[:, :-1], inputs[:, 1:])])
    free = ht.HessianOperator(problem)
    tight = ht.HessianOperator(problem, memory=free.plan.graph_bytes, segments=NONE)
    assert free.plan.recorded and not tight.plan.recorded
    assert len(tight.plan.pieces) > 2
    vectors = torch.randn(2, problem.num_parameters)
    assert relative_error(tight.matmat(vectors), free.matmat(vectors)) < 1e-4
    with pytest.raises(ValueError, match=r"memory=.*too little.*allow at least"):
        ht.HessianOperator(problem, memory="10KiB")


def test_linear_regression_has_its_closed_form():
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 1, dtype=torch.float64)
    model = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    problem = ht.Problem(model, ht.mse, [(x[:2], y[:2]), (x[2:], y[2:])])  # uneven
    assert torch.allclose(ht.HessianOperator(problem).to_dense(), 2 * x.T @ x / 9)


def test_softmax_regression_has_its_closed_form():
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randint(3, (9,))
    model = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    p = torch.softmax(model(x), 1)
    s = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("nab,ni,nj->aibj", s, x, x).reshape(12, 12) / 9
    problem = ht.Problem(model, ht.cross_entropy, [(x[:8], y[:8]), (x[8:], y[8:])])
    assert torch.allclose(ht.HessianOperator(problem).to_dense(), expected)


def test_logistic_regression_with_own_loss_and_counts():
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randint(2, (7,)).double()
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)

    def loss_fn(model, batch):
        return nn.functional.binary_cross_entropy_with_logits(model(batch["x"])[:, 0], batch["y"])

    p = torch.sigmoid(model(x)[:, 0])
    problem = ht.Problem(model, loss_fn, [{"x": x[:5], "y": y[:5]}, {"x": x[5:], "y": y[5:]}])
    expected = (x * (p * (1 - p))[:, None]).T @ x / 7
    assert torch.allclose(ht.HessianOperator(problem).to_dense(), expected)


def test_unused_and_linear_parameters_give_zero_rows():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.shift = (
                nn.Linear(2, 1),
                nn.Linear(3, 1),
                nn.Parameter(torch.zeros(1)),
            )

        def forward(self, x):
            return self.used(x)

    model = Half()
    problem = ht.Problem(
        model, lambda m, x: (m(x) ** 2).mean() + m.shift.sum(), [torch.randn(4, 2)]
    )
    dense = ht.HessianOperator(problem).to_dense()
    names = [n for n, p in problem.parameters.items() for _ in range(p.numel())]
    zero = torch.tensor([not n.startswith("used") for n in names])
    assert (dense[zero] == 0).all() and (dense[:, zero] == 0).all() and dense[~zero].norm() > 0
    block = ht.partition(model, "tensor")["shift"]
    assert (ht.HessianOperator(problem).block(block).to_dense() == 0).all()


def test_fused_and_plain_attention_have_one_hessian(dense):
    assert relative_error(dense("hf-gpt2"), dense("hf-gpt2-eager")) < 1e-10


def test_groupnorm_falls_back_and_says_so():
    hessian = ht.HessianOperator(network("groupnorm"))
    hessian.to_dense()
    if "one by one" not in hessian.route:  # a torch that batches GroupNorm needs no fallback
        assert "batched over probes" in hessian.route


def test_a_route_that_fails_is_left_for_the_next(monkeypatch):
    problem = network("mlp")
    grad = torch.autograd.grad

    def without_batching(*args, is_grads_batched=False, **options):
        if is_grads_batched:
            raise RuntimeError("Batching rule not implemented for aten::made_up")
        return grad(*args, **options)

    expected = ht.HessianOperator(problem).to_dense()
    monkeypatch.setattr(torch.autograd, "grad", without_batching)
    hessian = ht.HessianOperator(problem)
    assert torch.allclose(hessian.to_dense(), expected)
    assert "one by one" in hessian.route and "made_up" in hessian.route


VARYING_OR_CONSTANT_GRADIENT = [ht.mse, lambda model, batch: model(batch[0]).sum()]


@pytest.mark.parametrize("loss_fn", VARYING_OR_CONSTANT_GRADIENT)
def test_a_function_without_second_derivative_is_named(loss_fn):
    x = torch.randn(4, 3, dtype=torch.float64)
    problem = ht.Problem(Cubed(OnceOnly), loss_fn, [(x, torch.zeros(4, 2, dtype=torch.float64))])
    with pytest.raises(
        ht.NotTwiceDifferentiable, match="backward of OnceOnly is once_differentiable"
    ):
        ht.HessianOperator(problem).to_dense()


def test_an_operation_without_second_derivative_is_named():
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def loss(model, x):
        tokens = model(x)[:, None]
        return fused(tokens, tokens, tokens)[0].square().mean()

    problem = ht.Problem(nn.Linear(3, 2), loss, [torch.randn(4, 5, 3)])
    with pytest.raises(ht.NotTwiceDifferentiable, match="flash_attention"):
        ht.HessianOperator(problem).to_dense()


def test_numpy_scipy_and_torch_views_agree():
    hessian = ht.HessianOperator(network("mlp"))
    dense = hessian.to_dense()
    v = torch.randn(hessian.size, dtype=torch.float64)
    assert torch.allclose(hessian @ v, dense @ v)
    assert torch.allclose(torch.as_tensor(hessian.matmat(v[None].numpy())), (dense @ v)[None])
    scipy = hessian.to_scipy()
    assert torch.allclose(torch.as_tensor(scipy @ v.numpy()), dense @ v)
    assert torch.allclose(
        torch.as_tensor(scipy @ torch.eye(hessian.size, dtype=torch.float64).numpy()), dense
    )


def test_an_optimizer_step_makes_no_product_stale():
    problem = network("mlp")
    hessian = ht.HessianOperator(problem)
    hessian.to_dense()
    with torch.no_grad():
        for p in problem.model.parameters():
            p.add_(0.1)
    assert relative_error(hessian.to_dense(), dense_hessian(problem)) < 1e-10


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def counted_gpt():
    """A 4-layer GPT large enough that matrix products dominate, and F, the count of its forward
    pass."""
    torch.manual_seed(0)
    model = gpt(vocabulary=64, context=32, d=64, layers=4, tied=False)
    tokens = torch.randint(64, (2, 33))
    problem = ht.Problem(model, ht.cross_entropy, [(tokens[:, :-1], tokens[:, 1:])])

    def forward():
        with problem.evaluating(), torch.no_grad():
            problem.batch_loss(problem.batches[0])

    return problem, counted(forward)


@pytest.mark.parametrize(("record", "limit"), [(True, 6.2), (False, 6.5)])
def test_counted_cost_of_a_full_product(counted_gpt, record, limit):
    problem, forward = counted_gpt
    hessian = ht.HessianOperator(problem, record=record)
    vectors = torch.randn(8, hessian.size)
    hessian.matmat(vectors)  # records
    assert counted(lambda: hessian.matmat(vectors)) / 8 / forward <= limit


def test_counted_cost_of_block_products(counted_gpt):
    problem, forward = counted_gpt
    hessian = ht.HessianOperator(problem)
    hessian.matmat(torch.randn(1, hessian.size))
    cuts = ht.partition(problem.model, "weights").cuts
    assert len(cuts) == 27
    costs = []
    for cut in cuts:
        stacked = hessian.stacked(cut)
        vectors = torch.randn(4 * stacked.num_blocks, stacked.size)
        costs.append(counted(lambda s=stacked, v=vectors: s.matmat(v)) / len(vectors) / forward)
    assert sum(costs) / len(costs) <= 1.45


@pytest.fixture(scope="module")
def deep_gpt():
    torch.manual_seed(0)
    model = gpt(vocabulary=16, context=48, d=8, layers=8, tied=False)
    tokens = torch.randint(16, (4, 49))
    return ht.Problem(model, ht.cross_entropy, [(tokens[:, :-1], tokens[:, 1:])])


def measured_peak(problem, **options) -> tuple[ht.HessianOperator, int]:
    """An operator, and the bytes alive at the peak of its first product, of as many probes as go
    together."""
    hessian = ht.HessianOperator(problem, **options)
    with LiveBytes() as live:
        hessian.matmat(torch.randn(hessian.plan.rows, hessian.size))
    return hessian, live.peak


@pytest.mark.parametrize("share", [8, 1.5, 0.7, 0.3, 0.2])
def test_the_stated_peak_is_the_measured_one_and_within_the_budget(deep_gpt, share):
    recorded = ht.HessianOperator(deep_gpt, record=True, segments=NONE).plan.graph_bytes
    hessian, peak = measured_peak(deep_gpt, memory=int(share * recorded))
    assert abs(hessian.plan.peak_bytes() / peak - 1) < 0.15, hessian.route
    assert peak < share * recorded


@pytest.mark.parametrize(
    "options", [{"record": True, "segments": LAYERED}, {"record": False, "microbatch": 1}]
)
def test_the_stated_peak_holds_for_every_way(deep_gpt, options):
    hessian, peak = measured_peak(deep_gpt, memory="100MiB", **options)
    told = f"{hessian.route}; {hessian.plan.needs}; measured {peak}; {_MEASURED[deep_gpt]}"
    assert abs(hessian.plan.peak_bytes() / peak - 1) < 0.15, told


def test_a_quarter_of_the_graph_is_enough_for_the_same_spectrum(deep_gpt):
    free = ht.HessianOperator(deep_gpt, memory="1GiB", record=True, segments=NONE)
    budget = free.plan.graph_bytes // 4
    expected = ht.slq(free, num_probes=1, num_steps=6, name="same")
    tight = ht.HessianOperator(deep_gpt, memory=budget)
    with LiveBytes() as live:
        tight.matmat(torch.randn(1, tight.size))
        found = ht.slq(tight, num_probes=1, num_steps=6, name="same", reorthogonalize="local")
    assert live.peak < budget
    assert relative_error(torch.tensor(found.nodes), torch.tensor(expected.nodes)) < 1e-3


def test_the_plan_is_told(deep_gpt):
    hessian = ht.HessianOperator(deep_gpt, memory="1GiB")
    assert hessian.plan.recorded and str(hessian.plan) in hessian.route
    lines = hessian.announcement(100, 5)
    assert all(line.startswith("plan: ") for line in lines.splitlines())
    for words in (
        "100 Hessian-vector products for 5 block",
        "about",
        "recorded once",
        "peak",
        "Lanczos",
    ):
        assert words in lines
    assert hessian.plan.peak_bytes(1) < hessian.plan.peak_bytes(2) < hessian.plan.peak_bytes()
    assert "layers" in str(ht.HessianOperator(deep_gpt, memory="1GiB", segments=LAYERED).plan)


def test_a_cut_of_many_blocks_rebuilds_the_graph_once_a_product():
    model, tokens = gpt(d=16), torch.randint(11, (2, 7))
    calls = []

    def loss_fn(model, batch):
        calls.append(1)
        return ht.cross_entropy(model, batch)

    problem = ht.Problem(model, loss_fn, [(tokens[:, :-1], tokens[:, 1:])])
    hessian = ht.HessianOperator(problem, record=False, segments=NONE, memory="1GiB")
    cut = next(c for c in ht.partition(model, "neuron").cuts if c.num_blocks == 64)
    rows = torch.randn(2 * cut.num_blocks, cut.block_size)
    assert len(rows) > hessian.plan.rows
    calls.clear()
    products = hessian.stacked(cut).matmat(rows)
    assert len(calls) == 1
    assert torch.allclose(products[-2:], hessian.block(cut[63]).matmat(rows[-2:]), atol=1e-5)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
]


def failing_passes(monkeypatch, error, fits) -> list[int]:
    """Second derivatives fail with ``error`` unless ``fits(rows, examples)``; the list gets the
    rows of those done."""
    done, gradient = [], DoubleBackward._differentiated

    def limited(self, gradients, names, cotangents):
        (batch,) = [batch for batch, _ in self._graphs.values()][-1:] or [None]
        if not fits(len(cotangents[0]), len(batch[0]) if batch else 0, self):
            raise error
        done.append(len(cotangents[0]))
        return gradient(self, gradients, names, cotangents)

    monkeypatch.setattr(DoubleBackward, "_differentiated", limited)
    return done


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_halves_the_probes_and_loses_nothing(monkeypatch, error):
    problem = network("gpt")
    vectors = torch.randn(16, problem.num_parameters, dtype=torch.float64)
    expected = ht.HessianOperator(problem).matmat(vectors)
    hessian = ht.HessianOperator(problem)
    done = failing_passes(monkeypatch, error, lambda rows, examples, route: rows <= 4)
    with pytest.warns(RuntimeWarning, match="goes on with 8 probes at once") as told:
        found = hessian.matmat(vectors)
    assert relative_error(found, expected) < 1e-12
    assert done == [4] * 8 and hessian.plan.rows == 4  # two batches; no row twice
    assert len([w for w in told if "probes at once" in str(w.message)]) == 1
    assert "out of memory once, from then on 4 probes at once" in hessian.route
    hessian.matmat(vectors)  # without another warning


def test_rows_that_are_done_stay_done(monkeypatch):
    problem = network("gpt")
    vectors = torch.randn(6, problem.num_parameters, dtype=torch.float64)
    expected = ht.HessianOperator(problem).matmat(vectors)
    hessian = ht.HessianOperator(
        problem, memory=int(ht.HessianOperator(problem).plan.peak_bytes(2) / 0.58)
    )
    assert hessian.plan.rows == 2
    passes = []
    done = failing_passes(
        monkeypatch, OUT_OF_MEMORY[0], lambda *_: passes.append(1) or len(passes) != 2
    )
    with pytest.warns(RuntimeWarning, match="goes on with 1 probes at once"):
        assert relative_error(hessian.matmat(vectors), expected) < 1e-12
    assert done == [2, 1, 1, 1, 1] + [1] * 6


def test_out_of_memory_cuts_batches_then_recomputes_and_at_last_gives_up(monkeypatch):
    problem = network("gpt")
    vectors = torch.randn(2, problem.num_parameters, dtype=torch.float64)
    expected = ht.HessianOperator(problem).matmat(vectors)
    hessian = ht.HessianOperator(problem)
    failing_passes(
        monkeypatch, OUT_OF_MEMORY[0], lambda rows, examples, route: bool(route.segments)
    )
    with pytest.warns(RuntimeWarning):
        assert relative_error(hessian.matmat(vectors), expected) < 1e-12
    assert [note.split("from then on ")[1][:14] for note in hessian.plan.notes] == [
        "1 probes at on", "graphs rebuilt", "micro-batches ", "recomputing at"
    ]  # fmt: skip
    failing_passes(monkeypatch, OUT_OF_MEMORY[0], lambda *_: False)
    with pytest.warns(RuntimeWarning), pytest.raises(MemoryError, match="most frugal plan"):
        ht.HessianOperator(problem).matmat(vectors)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_products_on_cuda_are_those_of_the_cpu(name):
    on_cpu, on_gpu = network(name), network(name, device="cuda")
    v = torch.randn(2, on_cpu.num_parameters, dtype=torch.float64)
    expected = ht.HessianOperator(on_cpu).matmat(v)
    assert relative_error(ht.HessianOperator(on_gpu).matmat(v).cpu(), expected) < 1e-5


@pytest.mark.parametrize("name", ["gpt", "batchnorm-batch", "hf-gpt2", "hf-vit"])
def test_a_tangent_program_takes_over_once_it_pays(name, monkeypatch):
    """All of the Hessian and a head's blocks, over uneven batches, before and after the change of
    route."""
    problem = network(name)
    vectors = torch.randn(2, problem.num_parameters, dtype=torch.float64)
    expected = vectors @ dense_hessian(problem)
    operator = ht.HessianOperator(problem, memory="1GiB")
    assert relative_error(operator.matmat(vectors), expected) < 1e-10
    assert operator.route.startswith("double backward")
    monkeypatch.setitem(engine._WORTH_TRACING, "cpu", operator._engine._made)
    assert relative_error(operator.matmat(vectors), expected) < 1e-10
    assert operator.route.startswith("tangent program") and operator.plan.recorded
    for cut in ht.partition(problem.model, "neuron").cuts[:3]:
        rows = torch.randn(2 * cut.num_blocks, cut.block_size, dtype=torch.float64)
        reference = (
            ht.HessianOperator(problem, memory="1GiB", route="double backward")
            .stacked(cut)
            .matmat(rows)
        )
        assert (operator.stacked(cut).matmat(rows) - reference).norm() <= 1e-10 * expected.norm()
    operator.release()
    assert relative_error(operator.matmat(vectors), expected) < 1e-10


def test_a_sums_first_term_is_written_over_whatever_was_in_memory():
    total = _Sum(torch.empty(3, 5), [2, 3])
    total.rows.fill_(float("nan"))
    one = torch.ones(2, 2, 1)
    total.add(slice(0, 2), [one, None], 0.5)
    total.add(slice(2, 3), [None, torch.ones(1, 3)], 1.0)
    total.add(slice(0, 3), [torch.ones(3, 2), None], 0.25)
    assert total.rows.tolist() == [[0.75, 0.75, 0, 0, 0]] * 2 + [[0.25, 0.25, 1, 1, 1]]


@pytest.mark.parametrize("blockwise", [False, True])
def test_long_runs_are_announced(blockwise, monkeypatch):
    """SLQ says how many products will come, so a tangent program takes over at once: a product of
    each micro-batch is left to compare."""
    operator, steps = ht.HessianOperator(network("mlp"), memory="1GiB"), 9
    blocks = list(ht.partition(operator.problem.model, "weights"))[:2] if blockwise else []
    whole_run = operator._engine._cost(steps * max(1, len(blocks)), not blockwise)
    monkeypatch.setitem(engine._WORTH_TRACING, "cpu", 0.9 * whole_run)
    asked, products = [], DoubleBackward.products
    monkeypatch.setattr(DoubleBackward, "products", lambda *a: asked.append(a[2]) or products(*a))
    options = {"num_probes": 1, "num_steps": steps, "exact": False}
    if blockwise:
        ht.blockwise_slq(operator, blocks, **options)
    else:
        ht.slq(operator, **options)
    assert operator.route.startswith("tangent program") and len(asked) == len(operator.plan.pieces)


class Detached(nn.Module):
    """A trace cannot tell this detach from those that autograd makes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, x):
        y = self.linear(x)
        return y * y.detach()


def test_a_tangent_program_with_another_product_is_refused():
    batches = [(torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64))]
    problem = ht.Problem(Detached(), ht.mse, batches)
    operator = ht.HessianOperator(problem, memory="1GiB")
    operator._engine._made = 1e30
    vectors = torch.randn(2, problem.num_parameters, dtype=torch.float64)
    assert relative_error(operator.matmat(vectors), vectors @ dense_hessian(problem)) < 1e-10
    assert (
        "double backward" in operator.route and "is not that of double backward" in operator.route
    )
    with pytest.raises(ValueError, match="route='tangent program' cannot be had: its product"):
        ht.HessianOperator(problem, memory="1GiB", route="tangent program").matmat(vectors)
    with pytest.raises(ValueError, match="route is 'fast'"):
        ht.HessianOperator(problem, route="fast")


def test_a_tangent_program_that_runs_out_of_memory_gives_way(monkeypatch):
    problem = network("gpt")
    vectors = torch.randn(4, problem.num_parameters, dtype=torch.float64)
    operator = ht.HessianOperator(problem, memory="1GiB", route="tangent program")
    expected, calls = operator.matmat(vectors), []

    def failing(self, cotangents, values):
        calls.append(len(cotangents[0]))
        raise torch.OutOfMemoryError("out of memory, says the test")

    monkeypatch.setattr(Program, "__call__", failing)
    with pytest.warns(RuntimeWarning, match="out of memory, says the test"):
        found = operator.matmat(vectors)
    assert calls == [4, 2, 1] and operator.route.startswith("double backward")
    assert relative_error(found, expected) < 1e-10


@pytest.mark.parametrize("route", ["double backward", "tangent program"])
def test_a_jobs_passes_and_operations(route, monkeypatch):
    """A longer blockwise job calls the model no more often, and each further product costs what a
    block's may."""
    torch.manual_seed(0)
    tokens = torch.randint(64, (2, 33))
    batches = [(tokens[:, :-1], tokens[:, 1:])]
    problem = ht.Problem(gpt(64, 32, 48, 3, tied=False), ht.cross_entropy, batches)
    blocks, calls, own = ht.partition(problem.model, "weights"), [], ht.Problem.batch_loss
    monkeypatch.setattr(
        ht.Problem, "batch_loss", lambda self, batch: (calls.append(1), own(self, batch))[1]
    )
    with problem.evaluating(), torch.no_grad(), FlopCounterMode(display=False) as forward:
        problem.batch_loss(batches[0])
    passes, operations = [], []
    for steps in (3, 6):
        hessian_ = ht.HessianOperator(problem, memory="1GiB", route=route)
        calls.clear()
        with FlopCounterMode(display=False) as counter:
            settings = {
                "exact": False,
                "reorthogonalize": "none",
                "progress": False,
            }  # Gram-Schmidt has operations too
            ht.blockwise_slq(hessian_, blocks, num_probes=2, num_steps=steps, **settings)
        passes.append(len(calls))
        operations.append(counter.get_total_flops())
    assert passes[0] == passes[1] <= 3
    further = (operations[1] - operations[0]) / (3 * 2 * len(blocks)) / forward.get_total_flops()
    assert 0.5 < further <= 1.45
