"""JSON in and out, and the check that blocks are disjoint."""

import itertools
import json

import pytest
import torch
from torch import nn

import hessian_tools as ht
from hessian_tools.blocks.block import Cut, Part
from hessian_tools.blocks.ownership import check_disjoint
from hessian_tools.blocks.partition import Partition
from hessian_tools.blocks.presets import partition


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))


def saved(tmp_path, change):
    """A saved partition with something changed."""
    path = partition(model(), "neuron").to_json(tmp_path / "blocks.json")
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return path


def test_a_saved_partition_is_the_same_and_readable(tmp_path):
    blocks = partition(model(), "neuron", only="*[row=?]")
    path = blocks.to_json(tmp_path / "blocks.json")
    assert Partition.from_json(path, model()) == blocks and not list(tmp_path.glob("*.tmp"))
    chunk = Partition((blocks.cuts[0].chunk(2, 5),), notes=("three rows",))
    assert Partition.from_json(chunk.to_json(path), model()) == chunk
    assert json.loads(path.read_text())["cuts"][0]["parts"][0]["window"] == [2, 5]


@pytest.mark.parametrize("change, words", [
    (lambda d: d.update(format=7), "format is 7"),
    (lambda d: d.pop("cuts"), "KeyError"),
    (lambda d: d["cuts"][0]["parts"][0].update(shape=[6, 5]), "do not fit its shape"),
    (lambda d: d["cuts"][0]["parts"][0].update(shape=[4, 6]), r"has it in shape \(6, 4\)"),
    (lambda d: d["cuts"][0]["parts"][0].update(parameter="9.weight"), "does not train such a tensor"),
    (lambda d: d["cuts"][0]["parts"][0].update(index=[[0, 7], [0, 4]]), "do not fit"),
    (lambda d: d["cuts"][0]["parts"][0].update(axes=[2]), "no distinct axes of the view"),
    (lambda d: d["cuts"][0]["parts"][0].update(window=[0, 9]), "outside its blocks"),
    (lambda d: d["cuts"][3].update(name="0.bias"), "several blocks named '0.bias'"),
    (lambda d: d["cuts"][0].update(per_label=2), "fewer labels"),
    (lambda d: d["cuts"].append({**d["cuts"][0], "name": "copy"}), r"0.weight\[row=(.)\]' and 'copy\[row=\1\]'.*lap"),
    (lambda d: d["cuts"].append(d["cuts"][0]), "overlap; blocks must be disjoint, and each is passed once"),
])  # fmt: skip
def test_a_file_that_does_not_fit_is_refused(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        Partition.from_json(saved(tmp_path, change), model())


def test_a_file_that_is_none_of_ours_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("[1, 2")
    with pytest.raises(ValueError, match=r"x.json is no partition"):
        Partition.from_json(tmp_path / "x.json", model())
    with pytest.raises(FileNotFoundError):
        Partition.from_json(tmp_path / "y.json", model())


def random_part(generator, shape=(4, 6)):
    view = [(4, 6), (2, 2, 6), (4, 3, 2), (24,)][int(torch.randint(4, (), generator=generator))]
    index = []
    for size in view:
        start, stop = sorted(torch.randperm(size + 1, generator=generator)[:2].tolist())
        index.append(slice(start, stop))
    axes = tuple(axis for axis in range(len(view)) if torch.rand((), generator=generator) < 0.5)
    part = Part("w", shape, view, tuple(index), axes)
    last = int(torch.randint(1, part.num_blocks + 1, (), generator=generator))
    return part.chunk(int(torch.randint(last, (), generator=generator)), last)


def test_overlaps_are_found_exactly():
    generator, found = torch.Generator().manual_seed(0), 0
    for trial in range(400):
        parts = [random_part(generator) for _ in range(2)]
        cuts = [Cut((part,), f"w{i}", counter="n", per_label=99) for i, part in enumerate(parts)]
        owned = []
        for cut in cuts:
            entries = torch.arange(24).view(4, 6)
            owned += [
                (name, set(row.tolist()))
                for name, row in zip(cut.names, cut.rows({"w": entries}), strict=True)
            ]
        clashes = [{a, b} for (a, x), (b, y) in itertools.combinations(owned, 2) if x & y]
        if clashes:
            with pytest.raises(ValueError, match="overlap") as raised:
                check_disjoint(cuts)
            assert set(str(raised.value).split("'")[1::2]) in clashes, trial
        else:
            check_disjoint(cuts)
        found += bool(clashes)
    assert 100 < found < 390


def test_one_cut_of_a_tensor_costs_no_memory():
    huge = (2**40, 2**20)  # nobody could hold its entries
    rows = Part("w", huge, huge, tuple(slice(0, n) for n in huge), (0,))
    check_disjoint([Cut((rows,), "w", counter="row", per_label=2**40)])
    halves = [
        Part("w", huge, huge, (slice(a, b), slice(0, huge[1])), ()) for a, b in ((0, 5), (5, 2**40))
    ]
    check_disjoint([Cut((part,), str(i)) for i, part in enumerate(halves)])
    check_disjoint(
        [Cut((rows.chunk(a, b),), "w", counter="row", per_label=2**40) for a, b in ((0, 7), (7, 9))]
    )


def test_views_that_merge_axes_are_read_and_written():
    part, w = (
        Part("w", (4, 6), (8, 3), (slice(0, 8), slice(0, 3)), (0,)),
        torch.arange(24.0).view(4, 6),
    )
    assert torch.equal(part.rows(w), w.view(8, 3)) and torch.equal(
        part.rows(w.t().contiguous().t()), w.view(8, 3)
    )
    out = torch.zeros(2, 4, 6)
    part.place(w.view(8, 3).expand(2, 8, 3), out)
    assert torch.equal(out[1], w)


def test_partitions_are_results_too(tmp_path):
    blocks = partition(model(), "adam_mini")
    ht.save({"suggestion": blocks}, tmp_path / "report")
    assert ht.load(tmp_path / "report") == {"suggestion": blocks}
