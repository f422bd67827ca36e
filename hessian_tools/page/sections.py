"""From a found run to its part of the page: the one place that knows which result becomes what."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from hessian_tools.heterogeneity.block_heterogeneity import JSHeterogeneity
from hessian_tools.heterogeneity.readings import READINGS
from hessian_tools.page.block_spectra import blocks_view, spectrum_headline, spectrum_view
from hessian_tools.page.found import FoundRun
from hessian_tools.page.heat_maps import coupling_map, dense_map, maps_view, reading_maps
from hessian_tools.page.partitions import partition_headline, partition_view, unfinished_view
from hessian_tools.page.quadratics import quadratic_headline, quadratic_view, tolerance_of
from hessian_tools.page.races import race_headline, race_view, trained_view
from hessian_tools.page.tracks import track_headline, track_view
from hessian_tools.page.views import (
    NUMBERS,
    Cell,
    Column,
    Fact,
    Headline,
    Limits,
    Row,
    Section,
    Table,
    TableView,
    number,
)
from hessian_tools.page.words import counted, sentence, shown
from hessian_tools.quadratic.practice import BoundCheck
from hessian_tools.quadratic.runs import Runs
from hessian_tools.quadratic.theory import Constants
from hessian_tools.results import Json
from hessian_tools.shown import Record, Tabular
from hessian_tools.spectra.quadrature import BlockSpectra, Quadrature
from hessian_tools.structure.coupling_result import Coupling
from hessian_tools.structure.dense import DenseBlock
from hessian_tools.structure.report import PartitionReport, TensorReport
from hessian_tools.tracking.track import Track
from hessian_tools.training.races import Race
from hessian_tools.training.trajectory import Trajectory

Kind = TypeVar("Kind")
MOST_RECORDS = 400  # rows of a result without a form of its own
_DEPTH = 3  # of dicts within dicts in a result
_LONGEST = 300  # letters of a setting
_SHOWN_ELSEWHERE = (BlockSpectra, JSHeterogeneity, PartitionReport, Race, Track)
_MISSING = {
    "js0": "any blocks that are left, the readings and the verdict",
    "spectrum": "any blocks that are left",
    "partition": "any tensors that are left, the suggestion and the coupling",
    "race": "any runs that are left, and the ranking",
    "quadratic": "any methods that are left, the theorems' constants and their bounds",
}


@dataclass(frozen=True)
class RunPage:
    """One run as the page shows it.

    Attributes:
        place: in the folder that is reported on.
        command: the line that repeats it; "" where it is not known.
        settings: its configuration; ``versions`` of packages.
    """

    key: str
    title: str
    place: str
    headlines: tuple[Headline, ...]
    sections: tuple[Section, ...]
    command: str
    settings: tuple[Fact, ...]
    versions: tuple[Fact, ...]
    notes: tuple[str, ...]


class Part(NamedTuple):
    """A result inside a run's results; ``label`` tells it from others of its type."""

    label: str
    result: Json


def run_page(run: FoundRun, key: str, limits: Limits) -> RunPage:
    """``key``: unique on the page."""
    parts = list(_parts(run.results))
    headlines = list(_headlines(run, parts))
    if not run.is_finished:
        headlines.insert(0, _unfinished(run, parts))
    made = [
        *_track_sections(run, parts),
        *_training_sections(parts),
        *_quadratic_sections(run, parts),
        *_partition_sections(parts, limits),
        *_spectra_sections(parts, limits),
        *_other_sections(parts),
    ]
    sections = [
        Section(f"{key}-{place}", title, template, view)
        for place, (title, template, view) in enumerate(made, start=1)
    ]
    return RunPage(
        key,
        _title(run),
        run.name,
        tuple(headlines),
        tuple(sections),
        run.commands.get("repeat", ""),
        tuple(Fact(name, _setting(value)) for name, value in run.config.items()),
        tuple(Fact(name, str(value)) for name, value in run.versions.items()),
        run.notes,
    )


def num_spectra(run: FoundRun) -> int:
    """Sets of block spectra, which share the room for rows."""
    return len(_of(BlockSpectra, list(_parts(run.results))))


def num_maps(run: FoundRun) -> int:
    """Heat maps with numbers, which share the room for cells."""
    parts = list(_parts(run.results))
    readings = [len(js.readings) for _, js in _of(JSHeterogeneity, parts)]
    return sum(readings) + len(_of(Coupling, parts))


def _parts(results: Json, label: str = "", depth: int = _DEPTH) -> Iterator[Part]:
    """Results inside dicts of results; what is a result itself is not opened."""
    yield Part(label, results)
    if type(results) is dict and depth:
        for name, inner in results.items():
            yield from _parts(inner, name, depth - 1)


def _of(kind: type[Kind], parts: list[Part]) -> list[tuple[str, Kind]]:
    return [(label, result) for label, result in parts if isinstance(result, kind)]


def _dicts_of(kind: type[Kind], parts: list[Part]) -> list[tuple[str, dict[str, Kind]]]:
    """Dicts whose values are all of ``kind``."""
    return [
        (label, result)
        for label, result in parts
        if type(result) is dict and result and all(isinstance(r, kind) for r in result.values())
    ]


def _tuples_of(kind: type[Kind], parts: list[Part]) -> list[tuple[Kind, ...]]:
    return [
        result
        for _, result in parts
        if isinstance(result, tuple) and result and all(isinstance(r, kind) for r in result)
    ]


def _title(run: FoundRun) -> str:
    """The command and what it was run on."""
    config = run.config
    what = config.get("model") or config.get("folder") or config.get("source")
    if "file" in config:
        what = f"{config['file']}:{config.get('function', '')}"
    what = what or config.get("measured")
    if run.command:
        return f"{run.command}: {what}" if what else run.command
    return f"tracker: {run.name}" if "track" in run.results else run.name


def _setting(value: Json) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    if value is None:
        return "default"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"


# --------------------------------------------------------------------------- what a run comes to


def _headlines(run: FoundRun, parts: list[Part]) -> Iterator[Headline]:
    for _, report in _of(PartitionReport, parts):
        yield partition_headline(report)
    methods = _dicts_of(Runs, parts)
    verdicts = [] if methods else _of(JSHeterogeneity, parts)  # of networks, which are trained
    for label, js in verdicts:
        yield _verdict_headline(js, run, label if len(verdicts) > 1 else "")
    for _, race in _of(Race, parts):
        yield race_headline(race)
    for _, runs in methods:
        yield quadratic_headline(runs, tolerance_of(runs, run.config.get("tolerance")))
    for _, track in _of(Track, parts):
        yield track_headline(track)
    if run.is_finished and not verdicts:
        for _, spectra in _of(BlockSpectra, parts):
            yield spectrum_headline(spectra)


def _verdict_headline(js: JSHeterogeneity, run: FoundRun, label: str) -> Headline:
    verdict = js.verdict
    is_open = verdict.decision == "undecided"
    told = sentence(verdict.decision).removesuffix(".")
    details = (verdict.uncertainty, verdict.scale_free)
    return Headline(
        "open" if is_open else "plain",
        f"{label}: {told}" if label else told,
        verdict.reason,
        tuple(text for text in details if text),
        verdict.calibration,
        run.commands.get("race", "") if is_open else "",
        "To decide",
    )


def _unfinished(run: FoundRun, parts: list[Part]) -> Headline:
    """What is there, what is missing, and the command that goes on."""
    done = ", ".join(_done(parts)) or "nothing"
    missing = _MISSING.get(run.command, "the result")
    reason = f"Interrupted, or still running. Finished so far: {done}. Missing: {missing}."
    command = run.commands.get("repeat", "")
    details = () if command else ("The command that wrote the folder goes on, given once more.",)
    return Headline("open", "Not finished", reason, details, "", command, "To go on")


def _done(parts: list[Part]) -> Iterator[str]:
    for _, spectra in _of(BlockSpectra, parts):
        yield counted(len(spectra), "block")
    for tensors in _tuples_of(TensorReport, parts):
        yield counted(len(tensors), "tensor")
    for _, trained in _dicts_of(Trajectory, parts):
        yield counted(len(trained), "training run")
    for _, runs in _dicts_of(Runs, parts):
        yield counted(len(runs), "method")


# ------------------------------------------------------------------------------ results by type

Made = tuple[str, str, object]  # title, template, view


def _track_sections(run: FoundRun, parts: list[Part]) -> Iterator[Made]:
    for _, track in _of(Track, parts):
        yield "Curvature along training", "track.html", track_view(track, run.log)


def _spectra_sections(parts: list[Part], limits: Limits) -> Iterator[Made]:
    found = _of(JSHeterogeneity, parts)
    several = len(found) > 1
    shown_names = set()
    for label, spectra in _of(BlockSpectra, parts):
        js = next((js for _, js in found if js.names == spectra.names), None)
        if len(spectra) == 1:
            (name,) = spectra.names
            yield "Spectrum", "spectrum.html", spectrum_view(name, spectra[name], spectra)
            continue
        title = f"Spectra by block{_of_label(label, len(_of(BlockSpectra, parts)) > 1)}"
        yield title, "blocks.html", blocks_view(spectra, js, limits.blocks)
        shown_names.add(spectra.names)
    for label, js in found:
        suffix = _of_label(label, several)
        yield f"Readings{suffix}", "table.html", _readings(js)
        if js.readings:
            maps = reading_maps(js, limits.side)
            joins = js.names in shown_names
            yield f"Distances between blocks{suffix}", "maps.html", maps_view(maps, joins)
    for _, quadrature in _of(Quadrature, parts):
        whole = BlockSpectra({"the operator": quadrature}, 0, 0, 0, "", "", "")
        yield "Spectrum", "spectrum.html", spectrum_view("the operator", quadrature, whole)


def _of_label(label: str, several: bool) -> str:
    return f": {label}" if several and label else ""


def _readings(js: JSHeterogeneity) -> TableView:
    """All readings, with their intervals or floors, and what they are."""
    columns = (
        Column("reading"),
        Column("95 % interval", NUMBERS),
        Column("unit"),
        Column("what it is", "prose"),
    )
    rows = []
    for name, reading in js.every_reading.items():
        label = READINGS[name].label if name in READINGS else name
        cells = (
            Cell(label, label),
            number(reading.mean, js.told(name)),
            Cell(reading.unit, reading.unit),
            Cell(reading.description, reading.description),
        )
        rows.append(Row(cells))
    return TableView(Table("Readings of heterogeneity", columns, tuple(rows)), js.notes)


def _partition_sections(parts: list[Part], limits: Limits) -> Iterator[Made]:
    for _, report in _of(PartitionReport, parts):
        view = partition_view(report, limits.tensors)
        yield "Evidence for the partition", "partition.html", view
    for tensors in _tuples_of(TensorReport, parts):
        view = unfinished_view(tensors, limits.tensors)
        yield "Evidence so far", "partition.html", view
    for _, coupling in _of(Coupling, parts):
        maps = [coupling_map(coupling, limits.side)]
        yield "Coupling between tensors", "maps.html", maps_view(maps)
    for _, block in _of(DenseBlock, parts):
        yield f"The dense {block.curvature}", "maps.html", maps_view([dense_map(block)])


def _training_sections(parts: list[Part]) -> Iterator[Made]:
    for _, race in _of(Race, parts):
        yield "The race", "race.html", race_view(race)
    for _, trained in _dicts_of(Trajectory, parts):
        yield "Training runs", "race.html", trained_view(trained)


def _quadratic_sections(run: FoundRun, parts: list[Part]) -> Iterator[Made]:
    exact = next((found for _, found in _of(Constants, parts)), None)
    checks = next(iter(_tuples_of(BoundCheck, parts)), ())
    for _, runs in _dicts_of(Runs, parts):
        tolerance = tolerance_of(runs, run.config.get("tolerance"))
        view = quadratic_view(runs, tolerance, exact, checks)
        yield "Methods on the quadratic", "quadratic.html", view


def _other_sections(parts: list[Part]) -> Iterator[Made]:
    """Results that are rows, without a form of their own on the page."""
    for label, result in parts:
        is_rows = isinstance(result, Tabular) and not isinstance(result, _SHOWN_ELSEWHERE)
        records = result.records() if is_rows else []
        if records:
            title = f"{type(result).__name__}{_of_label(label, True)}"
            yield title, "table.html", _records(records, title)


def _records(records: list[Record], caption: str) -> TableView:
    columns = tuple(Column(name, NUMBERS) for name in records[0])
    kept = records[:MOST_RECORDS]
    rows = tuple(Row(tuple(_cell(value) for value in record.values())) for record in kept)
    left_out = len(records) - len(kept)
    notes = (f"{left_out:,} more rows: records() of what ht.load gives",) if left_out else ()
    return TableView(Table(caption, columns, rows), notes)


def _cell(value: str | int | float | bool | None) -> Cell:
    if isinstance(value, str | bool):
        return Cell(str(value), str(value))
    return Cell(shown(value), value)
