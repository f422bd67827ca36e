"""Saved results come back exactly, without pickle; crashes leave the old pair, or one that is found
out."""

import dataclasses
import errno
import hashlib
import io
import json
import math
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from problems.compared import same

import hessian_tools as ht
from hessian_tools import quadratic, results
from hessian_tools.curvature.symmetric import DiagonalOperator
from hessian_tools.curvature.verification import Check, Verification
from hessian_tools.heterogeneity.adaptive import Round, Uncertainty
from hessian_tools.results import Journal, load, registered, save, write_atomically
from hessian_tools.shown import Tabular
from hessian_tools.spectra.quadrature import Estimate, RitzValue
from hessian_tools.tracking import Track
from hessian_tools.training.races import Race, RaceEntry, RaceRound
from hessian_tools.training.sweeps import RateSweep
from hessian_tools.training.trajectory import Trajectory


def quadrature(seed=0, exact="auto"):
    values = torch.from_numpy(np.random.default_rng(seed).standard_normal(60))
    return ht.slq(DiagonalOperator(values), num_probes=2, num_steps=5, seed=seed, exact=exact)


def samples():
    """One result of every type, by the type's name."""
    blocks = {
        "a.weight": quadrature(0),
        "b[q,head=1]": quadrature(1, exact=True),
        "zero": quadrature(2),
    }
    blocks["zero"] = dataclasses.replace(blocks["zero"], nodes=0 * blocks["zero"].nodes)
    spectra = ht.BlockSpectra(
        blocks, 2, 5, 0, "rademacher", "full", "some route", ("a note", "another")
    )
    js = ht.js_heterogeneity(spectra, readings=["log", "unnormalised"])
    check = Check("symmetry", float("nan"), 1e-3, "remark")
    found = [
        blocks["b[q,head=1]"], spectra, Estimate(1.5, math.nan), RitzValue(-math.inf, 0.1, 1e-300),
        ht.spectral_density(spectra, grid="symlog"), js, js.scale_spread, js.verdict, js.readings["log"], check,
        Verification((check,), ("cut batches: cannot be cut",)),
    ]  # fmt: skip
    found.append(found[4].axis)
    operator = DiagonalOperator(torch.arange(1.0, 90))
    found += [ht.top_eigenpairs(operator, 2), ht.trace(operator), ht.diagonal(operator, 6)]
    uncertainty = Uncertainty(*np.arange(1.0, 1.0 + len(dataclasses.fields(Uncertainty))).tolist())
    history = Round(12, {"log": 0.5}, {"log": uncertainty}, ("a.weight",))
    found += [
        uncertainty,
        history,
        ht.heterogeneity.AdaptiveJS0(spectra, js, (history,), 0.05, ("log",), False),
    ]
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 4))
    partition = ht.partition(model, "neuron")
    arguments = ht.blocks.adam_mini_arguments(model, partition)
    found += [
        partition,
        partition.cuts[0].chunk(1, 2),
        partition.cuts[0].parts[0],
        arguments,
        arguments.keywords,
    ]
    found += [ht.blocks.state_savings(model, partition), ht.optimizers.StateBytes(10, 20)]
    report = ht.check_partition(
        ht.Problem(model, ht.mse, [(torch.randn(8, 4), torch.randn(8, 4))]), partition
    )
    found += [
        report,
        report.levels,
        report.tensors[0],
        report.tensors[0].evidence[0],
        report.tensors[0].tests[0],
    ]
    problem = ht.Problem(
        model.double(), ht.mse, [(torch.randn(8, 4).double(), torch.randn(8, 4).double())]
    )
    conditioning = ht.structure.block_conditioning(problem, "neuron")
    found += [
        ht.dense_block(problem, partition),
        ht.coupling(problem, partition, num_probes=2),
        conditioning,
    ]
    found += [conditioning.values, ht.structure.block_extremes(problem, partition)]
    progress = ht.predicted_progress(ht.HessianOperator(problem), rows=True)
    found += [progress, progress.row_rates]
    case, few = quadratic.case(3), {"num_starts": 2, "num_steps": 10}
    found += [
        quadratic.run(case, "gd", **few),
        quadratic.best_step(case, "sign", **few),
        quadratic.constants(case),
    ]
    found += [
        quadratic.check_gd_bound(case, num_steps=2)[0],
        quadratic.limit_cycle(case, beta2=0.9, **few, tail=4),
    ]
    found.append(quadratic.Scorecard("r", 1, 2, 3, 4))
    found += trained()
    return {type(result).__name__: result for result in found}


def trained():
    """Results of the training lab."""
    one = np.ones(2)
    run = Trajectory(one, one, one, np.array([1]), one[:1], 2, False, False, 0.5, 8)
    table, flags = np.ones((2, 1)), np.zeros((2, 1), bool)
    tried = RaceRound(2, one, one, flags[:, 0])
    entry = RaceEntry(
        "adam", None, 2, 0.1, one, one, 1.0, None, 8, 0.1, False, rounds=(tried,), runs=(run,)
    )
    return [
        run,
        RateSweep("sgd", 0.9, 2, (0,), one, table, table, flags, flags, (run,)),
        tried,
        entry,
        Race("data", "2 steps", (0,), (entry,), 0.5),
        Track(np.array([0, 5]), {"scale": np.array([0.5, math.nan])}, one),
    ]


def test_two_classes_are_not_saved_under_one_name():
    class Other:
        saved_as = "Trajectory"

    with pytest.raises(TypeError, match="would be saved as Trajectory, which is how"):
        registered(Other)


SAMPLES = samples()


def test_every_type_has_a_sample():
    assert set(SAMPLES) == set(results.TYPES)


@pytest.mark.parametrize("name", results.TYPES)
def test_every_result_comes_back_exactly(name, tmp_path):
    path = save(SAMPLES[name], tmp_path / "new" / "folder.v2" / "result", config={"seed": 3})
    assert path == tmp_path / "new" / "folder.v2" / "result.json"
    assert same(load(path), SAMPLES[name]) and same(load(path.with_suffix("")), SAMPLES[name])
    assert same(load(path.with_suffix(".npz")), SAMPLES[name])
    document = json.loads(path.read_text())
    assert document["config"] == {"seed": 3} and document["versions"]["torch"].startswith("2.")


@pytest.mark.parametrize(
    "value",
    [
        {"b": 1, "a": {"nested": (1, "two", None, True, [3.5, [], ()])}},
        {
            "nan": math.nan,
            "inf": (math.inf, -math.inf),
            "tiny": 5e-324,
            "third": 1 / 3,
            "big": 2**80,
        },
        {
            "array": np.array([[1.5, np.nan], [-np.inf, -0.0]], dtype=np.float32),
            "empty": np.zeros((0, 3), bool),
        },
        {
            "type": "not a type",
            "dict": [],
            "float": "1",
            "array": {},
        },  # keys that the format itself uses
        {"": (), "fortran": np.asfortranarray(np.arange(6).reshape(2, 3))},
    ],
)
def test_values_come_back_exactly(value, tmp_path):
    assert same(load(save(value, tmp_path / "x")), value)


def test_numpy_scalars_come_back_as_python_s(tmp_path):
    value = {
        "f": np.float32(0.1),
        "i": np.int64(7),
        "b": np.bool_(True),
        "n": np.float64("nan"),
        "s": np.str_("x"),
    }
    found = load(save(value, tmp_path / "x"))
    assert same(found, {"f": float(np.float32(0.1)), "i": 7, "b": True, "n": math.nan, "s": "x"})


def test_json_suffix_names_the_same_pair(tmp_path):
    save({"a": np.arange(3)}, tmp_path / "x.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.json", "x.npz"]
    assert load(tmp_path / "x")["a"].tolist() == [0, 1, 2]


@dataclasses.dataclass
class Verdict:  # of the same name as one of ours
    decision: str


@pytest.mark.parametrize(
    "value",
    [
        object(),
        {1: "a key that is no string"},
        {"a": {2, 3}},
        1j,
        np.array([object()]),
        Verdict("Adam"),
        b"x",
    ],
)
def test_other_things_are_refused_and_nothing_is_written(value, tmp_path):
    with pytest.raises(TypeError, match="cannot save a"):
        save({"first": np.arange(2), "then": value}, tmp_path / "x")
    with pytest.raises(TypeError):
        save({"a": 1}, tmp_path / "x", config={"path": tmp_path})
    assert not list(tmp_path.iterdir())


def test_no_pickle_in_and_none_out(tmp_path):
    path = save(SAMPLES["JSHeterogeneity"], tmp_path / "x")
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        assert archive.namelist() and all(name.endswith(".npy") for name in archive.namelist())
    with np.load(tmp_path / "x.npz", allow_pickle=False) as arrays:
        assert all(arrays[name].dtype != object for name in arrays.files)
    buffer = io.BytesIO()
    np.savez(buffer, a0=np.array([{}], dtype=object))
    document = json.loads(path.read_text()) | {"result": {"dict": [["a", {"array": "a0"}]]}}
    document["arrays_sha256"] = hashlib.sha256(buffer.getvalue()).hexdigest()
    del document["checksum"]
    path.write_text(json.dumps(document))
    (tmp_path / "x.npz").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="pickle"):
        load(path)


@pytest.mark.parametrize("step", ["npz", "json"])
def test_a_crash_leaves_the_old_pair_or_is_found_out(step, tmp_path, monkeypatch):
    path = save({"a": np.arange(3)}, tmp_path / "x")
    replace = os.replace

    def crash(source, target):
        if str(target).endswith(step):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save({"a": np.arange(4)}, path)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.json", "x.npz"]  # no rubbish
    if step == "npz":
        assert load(path)["a"].tolist() == [0, 1, 2]
    else:
        with pytest.raises(ValueError, match="do not belong together"):
            load(path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = write_atomically(tmp_path / "x", b"old")

    def crash(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", crash)  # the content is written by then, but not in place
    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, b"new and longer")
    assert target.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", "holds a list"),
        (b"{}", "not a saved result of format 1"),
        (b'{"format": 2}', "not a saved result of format 1"),
        (b'{"format": 1}', "do not belong together"),
    ],
)
def test_other_files_are_refused(content, message, tmp_path):
    save({"a": 1}, tmp_path / "x")
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "x")


@pytest.mark.parametrize(
    "change", [("Verdict", "Unknown"), ("decision", "renamed"), ('"fields"', '"else"')]
)
def test_results_of_another_version_are_refused(change, tmp_path):
    path = save(SAMPLES["Verdict"], tmp_path / "x")
    document = json.loads(path.read_text().replace(*change))
    del document["checksum"]  # version 0.1.0 wrote none
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="another version"):
        load(path)


def test_missing_results(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing")
    save({"a": 1}, tmp_path / "x")
    (tmp_path / "x.npz").unlink()
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "x")


def test_journal_drops_what_a_kill_tore_at_any_byte(tmp_path):
    path = tmp_path / "blocks.jsonl"
    kept, torn = quadrature(0), quadrature(1)
    journal = Journal(path)
    assert journal.finished == {}
    journal.append("a.weight", kept)
    first = path.stat().st_size
    journal.append("b[v]", torn)
    whole = path.read_bytes()
    for size in [*range(first, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:size])
        assert same(Journal(path).finished, {"a.weight": kept})
        assert path.stat().st_size == first
    journal = Journal(path)
    journal.append("b[v]", torn)
    assert (
        same(Journal(path).finished, {"a.weight": kept, "b[v]": torn})
        and path.read_bytes() == whole
    )


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def small_journal(path: Path, run: str = "r1") -> dict:
    """A journal of three short lines, and what it holds."""
    parts = {"a": 1.5, "b[q]": {"x": (1, 2.5, None)}, "c": np.arange(2, dtype=np.int16)}
    journal = Journal(path, run)
    for name, part in parts.items():
        journal.append(name, part)
    return parts


def test_every_changed_byte_of_a_journal_is_found_or_drops_its_last_line(tmp_path):
    path = tmp_path / "blocks.jsonl"
    parts = small_journal(path)
    whole = path.read_bytes()
    first, second, _ = lines(path)
    found = dropped = 0
    for place in range(len(whole)):
        for bit in (0, 3, 5):  # the last tells capitals from small letters
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            try:
                journal = Journal(path, "r1")
            except ValueError as error:
                number = 1 + (place >= len(first)) + (place >= len(first) + len(second))
                assert f"line {number} of {path}" in str(error)
                found += 1
            else:  # the last line lost its end, and with it its checksum's place
                assert place == len(whole) - 1 and len(journal.notes) == 1
                assert same(journal.finished, {name: parts[name] for name in ("a", "b[q]")})
                dropped += 1
    assert (found, dropped) == (3 * (len(whole) - 1), 3)


def test_no_other_byte_passes_for_the_right_one(tmp_path):
    path = tmp_path / "blocks.jsonl"
    small_journal(path)
    line = lines(path)[1].rstrip(b"\n")
    assert results._unsealed(line) is not None
    for place in range(len(line)):
        for byte in range(256):
            if byte != line[place]:
                changed = line[:place] + bytes([byte]) + line[place + 1 :]
                assert results._unsealed(changed) is None
                assert not results._is_of_first_version(changed)


def test_a_journal_cut_at_any_byte_keeps_its_whole_lines(tmp_path):
    path = tmp_path / "blocks.jsonl"
    parts = small_journal(path)
    whole = path.read_bytes()
    ends = [0, *np.cumsum([len(line) for line in lines(path)])]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        journal = Journal(path, "r1")
        kept = max(index for index, end in enumerate(ends) if end <= size)
        assert list(journal.finished) == list(parts)[:kept]
        assert len(journal.notes) == (size not in ends)
        for name in list(parts)[kept:]:
            journal.append(name, parts[name])
        assert path.read_bytes() == whole


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_damaged_line_can_be_deleted_as_the_message_says(number, tmp_path):
    path = tmp_path / "blocks.jsonl"
    parts = small_journal(path)
    whole = lines(path)
    whole[number - 1] = whole[number - 1].replace(b"r1", b"rl")
    path.write_bytes(b"".join(whole))
    with pytest.raises(ValueError, match=f"line {number} of .* delete this line"):
        Journal(path, "r1")
    del whole[number - 1]
    path.write_bytes(b"".join(whole))
    left = [name for index, name in enumerate(parts, start=1) if index != number]
    assert list(Journal(path, "r1").finished) == left


def test_lines_of_another_run_are_refused(tmp_path):
    path, other = tmp_path / "blocks.jsonl", tmp_path / "other.jsonl"
    small_journal(path)
    small_journal(other, "r2")
    path.write_bytes(path.read_bytes() + lines(other)[0])
    for run in ("r1", ""):
        with pytest.raises(ValueError, match=r"line 4 of .* of another run \(r2; this one is r1\)"):
            Journal(path, run)
    assert list(Journal(other).finished) == ["a", "b[q]", "c"]


def test_a_journal_of_the_first_version_goes_on(tmp_path):
    """[name, result] a line, without run and checksum; the torn last line is dropped."""
    path = tmp_path / "blocks.jsonl"
    path.write_text('["a", {"float": "nan"}]\n["b", [1, 2]]\n["c", {"ty')
    journal = Journal(path, "r1")
    assert same(journal.finished, {"a": math.nan, "b": (1, 2)})
    assert "cut short" in journal.notes[0] and "version 0.1.0" in journal.notes[1]
    journal.append("c", 3)
    again = Journal(path, "r1")
    assert same(again.finished, {"a": math.nan, "b": (1, 2), "c": 3}) and not again.notes
    path.write_bytes(b'["a", 1]\n' + lines(path)[2])  # old and new lines are no journal of ours
    with pytest.raises(ValueError, match="line 1"):
        Journal(path, "r1")


def test_a_journal_may_be_looked_at_while_another_process_writes_to_it(tmp_path):
    """What is torn now may be whole in a moment, and the writer knows how long its file is."""
    path = tmp_path / "blocks.jsonl"
    writing = Journal(path, "r1")
    writing.append("a", 1)
    whole = path.read_bytes()
    path.write_bytes(whole + b'["r1", "b", 2')
    looked_at = Journal(path, repair=False)
    assert looked_at.finished == {"a": 1} and "cut short" in looked_at.notes[0]
    assert path.read_bytes() == whole + b'["r1", "b", 2'
    path.write_bytes(whole)
    writing.append("b", 2)
    assert Journal(path, repair=False).finished == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("rubbish", "told"),
    [
        (b"\0" * 40 + b"\n", "line 2 .* checksum"),
        (b'["a", {"type": "Gone", "fields": {}}]\n', "line 2 .* checksum"),
        (b"\n", "line 2 .* checksum"),
    ],
)
def test_rubbish_in_a_journal_is_told_and_nothing_is_thrown_away(rubbish, told, tmp_path):
    path = tmp_path / "blocks.jsonl"
    Journal(path).append("a", quadrature(0))
    line = path.read_bytes()
    path.write_bytes(line + rubbish + line)
    with pytest.raises(ValueError, match=told):
        Journal(path)
    assert path.read_bytes() == line + rubbish + line


def test_a_type_that_this_version_lacks_is_told_as_such(tmp_path, monkeypatch):
    path = tmp_path / "blocks.jsonl"
    Journal(path).append("a", quadrature(0))
    monkeypatch.delitem(results.TYPES, "Quadrature")
    with pytest.raises(ValueError, match=r"line 1 of .* another version .*KeyError: 'Quadrature'"):
        Journal(path)


def test_two_writers_of_one_journal_are_found_out(tmp_path):
    path = tmp_path / "blocks.jsonl"
    one, other = Journal(path, "r"), Journal(path, "r")
    one.append("a", 1)
    with pytest.raises(ValueError, match="was changed while this run wrote to it"):
        other.append("a", 1)
    path.unlink()
    with pytest.raises(ValueError, match="was changed while this run wrote to it"):
        one.append("b", 2)


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "blocks.jsonl"
    journal = Journal(path, "r")
    journal.append("a", 1)
    before, opened = path.read_bytes(), Path.open

    class Full(io.FileIO):
        def write(self, content):
            if len(content) > 10:
                return super().write(content[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode, buffering: Full(path, "ab"))
        with pytest.raises(OSError, match=r"cannot be written .No space left.*make room"):
            journal.append("b", 2)
    assert Path.open is opened and path.read_bytes() == before
    journal.append("b", 2)
    assert Journal(path, "r").finished == {"a": 1, "b": 2}


def test_every_changed_byte_of_a_saved_pair_is_found_or_harmless(tmp_path):
    value = {"x": np.arange(3.0), "n": 12.5, "s": "t"}
    path = save(value, tmp_path / "x", config={"seed": 3})
    for file in (path, tmp_path / "x.npz"):
        whole = file.read_bytes()
        harmless = 0
        for place in range(len(whole)):
            changed = bytearray(whole)
            changed[place] ^= 1 + place % 7
            file.write_bytes(changed)
            try:
                assert same(load(path), value), whole[place - 9 : place + 9]
                harmless += 1
            except ValueError as error:
                assert str(tmp_path / "x") in str(error)
        file.write_bytes(whole)
        # white space between the JSON file's tokens, and the checksum's own key
        assert harmless < 100 if file == path else harmless == 0
    assert same(load(path), value)


def test_a_damaged_npz_and_one_of_another_run_are_told_apart(tmp_path):
    path = save({"x": np.arange(300.0)}, tmp_path / "x")
    other = save({"x": np.arange(301.0)}, tmp_path / "y").with_suffix(".npz").read_bytes()
    npz = tmp_path / "x.npz"
    whole = npz.read_bytes()
    npz.write_bytes(other)
    with pytest.raises(ValueError, match="do not belong together"):
        load(path)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    for content in (bytes(damaged), whole[:-5], b""):
        npz.write_bytes(content)
        with pytest.raises(ValueError, match=r"x.npz is damaged.*restore it"):
            load(path)
    npz.unlink()
    with pytest.raises(FileNotFoundError, match=r"not the arrays beside it, x\.npz"):
        load(path)


COMMITTED = sorted(Path(__file__).parents[1].glob("results/*/*.json"))


def test_a_result_of_the_first_version_still_loads():
    """Written before results registered themselves; the numbers are those that it printed."""
    result = load(Path(__file__).parent / "fixtures" / "js0_0.1.0")
    heterogeneity = result["heterogeneity"]
    assert set(heterogeneity.readings) == {"bounded", "unnormalised", "log", "wasserstein"}
    assert heterogeneity.js0 == pytest.approx(48.61019340972758, rel=1e-12)
    spectra = result["spectra"]
    assert spectra.num_matvecs == sum(q.num_matvecs for q in spectra.values())


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_results_still_load(path):
    if path.with_suffix(".npz").exists():
        load(path)
    else:
        json.loads(path.read_text())


def test_a_class_that_was_renamed_keeps_the_name_that_files_know(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Renamed:
        value: float
        saved_as = "Former"

    results.registered(Renamed)
    try:
        save(Renamed(2.5), tmp_path / "renamed")
        assert json.loads((tmp_path / "renamed.json").read_text())["result"]["type"] == "Former"
        assert load(tmp_path / "renamed") == Renamed(2.5)
    finally:
        del results.TYPES["Former"]


# ---------------------------------------------------------------------------- as tables

TABULAR = [name for name, result in SAMPLES.items() if isinstance(result, Tabular)]


@pytest.mark.parametrize("name", TABULAR)
def test_rows_become_a_dataframe_and_html(name):
    result = SAMPLES[name]
    rows = result.records()
    assert rows and all(row.keys() == rows[0].keys() for row in rows)
    json.dumps(rows)  # plain numbers and words
    frame = result.to_dataframe()
    assert list(frame.columns) == list(rows[0]) and len(frame) == len(rows)
    shown = result._repr_html_()
    assert shown.count("<tr>") == len(rows) + 1 and shown.count("<th>") == len(rows[0])


def test_rows_hold_the_results_numbers():
    spectra = SAMPLES["BlockSpectra"]
    row = spectra.records()[0]
    assert row["block"] == "a.weight" and row["trace"] == spectra["a.weight"].trace.value
    (measured,) = SAMPLES["Track"].records()  # what was not taken has no row
    assert measured == {"step": 0, "reading": "scale", "value": 0.5}
    cuts = SAMPLES["PartitionReport"].records()
    assert sum(cut["claimed"] for cut in cuts) == len(SAMPLES["PartitionReport"].tensors)


def test_names_are_escaped_and_long_tables_cut():
    class Long(Tabular):
        def records(self):
            return [{"<b>": "a & b", "x": 1 / 3}] * 250

    shown = Long()._repr_html_()
    assert "<th>&lt;b&gt;</th>" in shown and "<td>a &amp; b</td><td>0.3333</td>" in shown
    assert shown.endswith("<p>50 more rows: records()</p>")


def test_without_pandas_the_way_out_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        SAMPLES["Track"].to_dataframe()
