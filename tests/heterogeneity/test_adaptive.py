"""JS0 to a tolerance on prescribed spectra: when it stops, what it spends, what it goes on from."""

import numpy as np
import pytest
import torch
from problems.compared import same_quadrature
from problems.planted import FakeHessian, cut_of, random_symmetric
from scipy.stats import norm
from tqdm import tqdm

from hessian_tools.blocks.partition import Partition
from hessian_tools.curvature.symmetric import DenseOperator
from hessian_tools.errors import NumericalError
from hessian_tools.heterogeneity.adaptive import adaptive_js0
from hessian_tools.heterogeneity.block_heterogeneity import js_heterogeneity
from hessian_tools.heterogeneity.readings import pair_readings
from hessian_tools.spectra.gauss import truncated
from hessian_tools.spectra.growing import GrowingSpectra, Growth
from hessian_tools.spectra.settings import Settings
from hessian_tools.spectra.slq import blockwise_slq, slq

SIZES = {"tiny": 12, "low": 90, "mid": 200, "high": 260}


def setting(**options):
    """Four blocks a decade apart; "low" is one outlier in a flat spectrum, so its probes vary
    most."""
    rng = np.random.default_rng(1)
    spectra = {name: 10.0**i * (0.2 + rng.random(n)) for i, (name, n) in enumerate(SIZES.items())}
    spectra["low"] = np.r_[40.0, np.full(89, 0.5) + 0.3 * rng.random(89)]
    cuts = tuple(cut_of([name], n) for name, n in SIZES.items())
    matrices = {
        name: random_symmetric(values, i) for i, (name, values) in enumerate(spectra.items())
    }
    return FakeHessian(matrices, **options), Partition(cuts), spectra


def run(hessian, partition, **options):
    return adaptive_js0(
        hessian, partition, **{"reading": "wasserstein", "progress": False, **options}
    )


def spent(hessian):
    return sum(rows for _, rows in hessian.calls)


@pytest.mark.parametrize(
    "reading", ["curvature", "wasserstein", "log", "scale", ("curvature", "scale")]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_tolerance_is_met_against_the_true_spectra(reading, seed):
    """The truth is in the eigenvalues; three times the tolerance is allowed, as standard errors are
    part of it."""
    hessian, partition, spectra = setting()
    found = run(hessian, partition, reading=reading, tolerance=0.05, seed=seed)
    exact = {
        n: slq(DenseOperator(hessian.matrices[n]), num_probes=2, num_steps=2, exact=True)
        for n in spectra
    }
    truth = js_heterogeneity(exact, readings=pair_readings())
    truth = {name: truth.readings[name].mean for name in truth.readings} | {
        "scale": truth.scale_spread.value
    }
    assert found.met and all(u.total <= 0.05 for u in found.uncertainties.values())
    for name in found.reading:
        assert found.estimates[name] == pytest.approx(truth[name], rel=0.15)
    assert "met after" in str(found)


def test_products_are_counted_truthfully_and_history_tells():
    hessian, partition, _ = setting()
    told = []
    found = run(
        hessian,
        partition,
        tolerance=0.002,
        on_block=lambda name, q: told.append((name, q.num_matvecs)),
    )
    assert (
        found.spectra.num_matvecs
        == spent(hessian)
        == found.history[-1].num_matvecs
        == sum(dict(told).values())
    )
    assert found.heterogeneity.num_matvecs == spent(hessian)
    counts = [r.num_matvecs for r in found.history]
    assert counts == sorted(counts) and len(counts) > 1 and found.history[-1].grown == ()
    last = found.heterogeneity.readings["wasserstein"]
    assert found.history[-1].means == {"wasserstein": last.mean}
    part = found.uncertainties["wasserstein"]
    assert part.standard_error == pytest.approx(last.standard_error / last.mean)
    assert part.steps >= last.change / last.mean * (1 - 1e-12)
    assert part.bias == 0 and found.estimates["wasserstein"] == last.mean
    half = (last.high - last.low) / 2
    assert part.total >= half / norm.ppf(0.975) / last.mean * (1 - 1e-12)


def test_a_smaller_tolerance_costs_more_and_a_large_one_only_the_first_round():
    costs = []
    for tolerance in (10.0, 0.002, 0.0005):
        hessian, partition, _ = setting()
        run(hessian, partition, tolerance=tolerance)
        costs.append(spent(hessian))
    assert costs[0] == 12 + 3 * 32 < costs[1] < costs[2]


def test_products_go_where_the_uncertainty_is():
    """The block of one outlier decides the spread of scales: it grows, or becomes exact."""
    hessian, partition, _ = setting()
    found = run(hessian, partition, reading="scale", tolerance=0.004)
    cost = {name: q.num_matvecs for name, q in found.spectra.items()}
    assert found.met and cost["low"] > 4 * max(cost["high"], cost["mid"])
    assert found.spectra["low"].status == "exact"
    assert cost["low"] > 90  # what was spent before counts as well


@pytest.mark.parametrize("mode", ["full", "local", "none"])
def test_limits_force_what_a_fixed_run_gives(mode):
    hessian, partition, _ = setting()
    options = {"reorthogonalize": mode, "exact": False, "seed": 3, "progress": False}
    found = adaptive_js0(
        hessian, partition, tolerance=1e-9, reading="log", max_matvecs=96, max_steps=24, **options
    )
    assert not found.met and "not met within the limits" in str(found)
    for name, q in found.spectra.items():
        k, m = q.nodes.shape
        fixed = blockwise_slq(
            hessian, [b for b in partition if b.name == name], num_probes=k, num_steps=m, **options
        )
        assert q.num_matvecs == k * m <= 96
        if mode == "full":
            assert same_quadrature(q, fixed[name], 1e-7)
        # copies of converged eigenvalues share their weight by rounding, moments do not change
        for power in (1, 2, 5):
            moments = [one.per_probe(lambda x, p=power: x**p) for one in (q, fixed[name])]
            assert np.allclose(*moments, rtol=1e-7)
    assert max(q.nodes.shape[1] for q in found.spectra.values()) == 24


def test_runs_are_continued_not_repeated(monkeypatch):
    """Every product of the run is one of T's steps; nothing is made twice while vectors are
    kept."""
    hessian, partition, _ = setting()
    found = run(hessian, partition, exact=False, tolerance=1e-9, max_matvecs=200, max_steps=40)
    assert spent(hessian) == sum(q.nodes.size for q in found.spectra.values())
    assert not any("made again" in note for note in found.spectra.notes)


def test_without_memory_for_the_vectors_products_are_repeated_and_told():
    vector = 260 * 8
    plenty, partition, _ = setting()
    options = {"exact": False, "tolerance": 1e-9, "max_matvecs": 160, "max_steps": 24}
    expected = run(plenty, partition, **options)
    hessian, _, _ = setting(krylov_bytes=vector * 40)
    found = run(hessian, partition, **options)
    again = [note for note in found.spectra.notes if "made again" in note]
    assert again and found.spectra.num_matvecs == spent(hessian) > expected.spectra.num_matvecs
    assert all(same_quadrature(found.spectra[name], expected.spectra[name], 1e-9) for name in SIZES)
    starved, _, _ = setting(krylov_bytes=vector * 20)
    with pytest.warns(RuntimeWarning, match="does not fit the memory budget"):
        found = run(starved, partition, **options)
    assert (
        found.spectra["high"].reorthogonalize == "local"
        and found.spectra["tiny"].reorthogonalize == "full"
    )
    assert found.spectra.num_matvecs == spent(starved)


def growing_spectra(hessian, partition, on_block=None):
    settings = Settings(1000, 100, 0, "rademacher", "full", False)
    return GrowingSpectra(hessian, partition, settings, {}, on_block, tqdm(disable=True))


def test_kept_vectors_stay_within_the_budget_and_the_largest_go_first():
    """A block that needs more steps keeps its own vectors, as long as dropping others is enough."""
    hessian, partition, _ = setting(krylov_bytes=60_000)
    held = []
    growing = growing_spectra(hessian, partition, lambda *_: held.append(growing.kept.nbytes))

    def repeated():
        return [note.split(":")[0] for note in growing.notes]

    for name in ("mid", "tiny", "low"):
        growing.grow(name, Growth(2, 8))
    assert list(growing.kept.states) == ["mid", "tiny", "low"]
    growing.grow("low", Growth(2, 12))
    assert list(growing.kept.states) == ["tiny", "low"] and repeated() == []
    growing.grow("mid", Growth(2, 12))
    growing.grow("low", Growth(2, 30))
    assert list(growing.kept.states) == ["tiny", "low"] and repeated() == ["mid"]
    growing.grow("low", Growth(2, 45))  # old and new vectors exceed the budget by themselves
    assert repeated() == ["mid", "low"] and max(held) <= hessian.krylov_bytes
    assert growing.quadratures["low"].num_matvecs == 2 * 30 + 2 * 45
    low = [block for block in partition if block.name == "low"]
    fixed = blockwise_slq(hessian, low, num_probes=2, num_steps=45, exact=False, progress=False)
    assert same_quadrature(growing.quadratures["low"], fixed["low"], 1e-7)


def test_an_interrupted_run_goes_on_from_its_blocks():
    whole_hessian, partition, _ = setting()
    options = {"tolerance": 0.002, "seed": 5}
    whole = run(whole_hessian, partition, **options)
    kept, hessian = {}, setting()[0]

    def interrupt(name, quadrature):
        kept[name] = quadrature
        if len(kept) == 4 and sum(q.num_matvecs for q in kept.values()) > 250:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(hessian, partition, on_block=interrupt, **options)
    again = setting()[0]
    found = run(again, partition, finished=kept, **options)
    assert found.met and found.spectra.num_matvecs == spent(hessian) + spent(again)
    assert found.estimates["wasserstein"] == pytest.approx(whole.estimates["wasserstein"], rel=0.02)
    done = setting()[0]
    assert run(done, partition, finished=found.spectra, **options).met and done.calls == []


def test_fewer_steps_come_from_the_same_t():
    for mode in (
        "full",
        "none",
    ):  # without re-orthogonalisation copies of 50 and -9 may lie elsewhere, moments do not
        operator = DenseOperator(random_symmetric(np.r_[50.0, -9.0, np.linspace(-1, 1, 88)]))
        options = {"num_probes": 3, "seed": 1, "exact": False, "reorthogonalize": mode}
        long = slq(operator, num_steps=24, **options)
        short = truncated(long, 16)
        made = slq(operator, num_steps=16, **options)
        assert mode == "none" or same_quadrature(short, made, 1e-9)
        for p in range(32):
            assert np.allclose(
                short.per_probe(lambda x, p=p: x**p), made.per_probe(lambda x, p=p: x**p), rtol=1e-9
            )
        assert short.num_matvecs == 48
        assert truncated(long, 24) is long and short.status == "complete"
    broken = slq(
        DenseOperator(random_symmetric(np.r_[7.0, np.zeros(49)])),
        num_probes=2,
        num_steps=6,
        exact=False,
    )
    ended = slq(
        DenseOperator(random_symmetric(np.r_[7.0, np.zeros(49)])),
        num_probes=2,
        num_steps=4,
        exact=False,
    )
    assert same_quadrature(truncated(broken, 4), ended)


def test_blocks_that_are_all_alike_differ_by_nothing():
    hessian, partition, _ = setting()
    hessian.matrices = {name: np.zeros((n, n)) for name, n in SIZES.items()}
    found = run(hessian, partition)
    assert (
        found.met
        and found.estimates == {"wasserstein": 0}
        and found.uncertainties["wasserstein"].total == 0
    )


def test_nonfinite_products_name_block_and_step():
    hessian, partition, _ = setting(poison="mid")
    with pytest.raises(
        NumericalError, match="block mid is NaN or inf, first at Lanczos step 3 of 16"
    ):
        run(hessian, partition)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tolerance": 0}, "tolerance is 0"),
        ({"tolerance": float("nan")}, "tolerance is nan"),
        ({"tolerance": "5 %"}, "tolerance is '5 %'"),
        (
            {"reading": "js"},
            r"reading is \('js',\); a tolerance can be had of 'scale', 'curvature'",
        ),
        ({"reading": "unnormalised"}, "error of bounded, unnormalised is not known"),
        ({"reading": ()}, r"reading is \(\)"),
        ({"max_matvecs": 5}, "max_matvecs is 5; an integer of at least 6"),
        ({"max_steps": 2.5}, "max_steps is 2.5"),
        ({"exact": True}, "exact is True"),
        ({"seed": "a"}, "seed is 'a'"),
        ({"probes": "sphere"}, "probes is 'sphere'"),
        ({"reorthogonalize": "never"}, "reorthogonalize is 'never'"),
    ],
)
def test_bad_arguments(change, message):
    hessian, partition, _ = setting()
    with pytest.raises(ValueError, match=message):
        run(hessian, partition, **change)
    assert hessian.calls == []


def test_one_block_is_refused():
    hessian, partition, _ = setting()
    with pytest.raises(ValueError, match="holds 1 block; heterogeneity compares at least two"):
        run(hessian, list(partition)[:1])


def test_same_seed_same_probes_in_every_dtype():
    single, partition, _ = setting(dtype=torch.float32)
    double, _, _ = setting()
    a, b = (run(h, partition, tolerance=10.0).estimates["wasserstein"] for h in (single, double))
    assert a == pytest.approx(b, rel=1e-3)
