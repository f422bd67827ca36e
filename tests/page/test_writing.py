"""The page as a file: whole, alone, escaped, small; every kind of run, and the command."""

import html
import json
import math
import re
import sys
from pathlib import Path

import markupsafe
import numpy as np
import pytest
from problems.command_line import run
from problems.page_folders import (
    COMMANDS,
    CONFIG,
    HOSTILE,
    every_run,
    exact_spectra,
    js0_folder,
    many_blocks,
    partition_folder,
    race_folder,
    tracker_journal,
    trajectory,
)

import hessian_tools as ht
from hessian_tools.app.run_folder import RunFolder
from hessian_tools.page.writing import report_html
from hessian_tools.quadratic import case, compare, constants

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_results import SAMPLES

MOST_BYTES = 3 * 2**20


def page_of(folder):
    return ht.write_report(folder).read_text()


def words_of(page):
    """What is read, without tags, styles and scripts."""
    body = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def headline(page):
    (article,) = re.findall(r'<article class="headline.*?</article>', page, re.DOTALL)
    return words_of(article)


def test_one_file_that_asks_for_nothing(tmp_path):
    every_run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    page = page_of(tmp_path)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after.keys() - before.keys() == {tmp_path / "report.html"}
    assert all(after[path] == content for path, content in before.items())
    sources = re.findall(r"(?:src|href)=\"([^\"]*)\"", page)
    assert sources and all(re.match(r"#|data:image/png", source) for source in sources)
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1])
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy and "@import" not in page and "url(" not in page
    assert page == page_of(tmp_path)  # its own file is no run, and nothing is random


def test_links_lead_to_places_and_places_are_unique(tmp_path):
    every_run(tmp_path)
    page = page_of(tmp_path)
    places = re.findall(r' id="([^"]*)"', page)
    assert len(places) == len(set(places))
    assert set(re.findall(r'href="#([^"]*)"', page)) <= set(places)
    for labelled in re.findall(r'aria-(?:labelledby|controls)="([^"]*)"', page):
        assert labelled in places
    assert all(re.findall(r' for="([^"]*)"', page))


def test_names_are_escaped_wherever_they_stand(tmp_path):
    js0_folder(tmp_path)
    page = page_of(tmp_path)
    assert page.count("<script>") == 1  # the page's own
    assert HOSTILE not in page and str(markupsafe.escape(HOSTILE)) in page
    settings = {**CONFIG, "model": "<img src=x onerror=alert(1)>"}
    other = tmp_path / "<b>folder"
    RunFolder(other, settings, {"repeat": "x --model '<img src=x>'"}).finish({"a": 1})
    page = page_of(tmp_path)
    assert "<img" not in page and "<b>folder" not in page and "&lt;img src=x" in page


def test_the_verdict_comes_first_and_with_its_reason(tmp_path):
    _, js = js0_folder(tmp_path)
    page = page_of(tmp_path)
    told = headline(page)
    assert told.startswith("js0: known ? Undecided") and js.verdict.reason in told
    assert js.verdict.uncertainty in told and COMMANDS["race"] in told
    assert page.index("In short") < page.index("Spectra by block") < page.index("Configuration and")
    assert COMMANDS["repeat"] in page and "<dt>probes</dt><dd>2</dd>" in page


def test_every_number_of_a_block_stands_in_its_row(tmp_path):
    spectra, js = js0_folder(tmp_path)
    page = page_of(tmp_path)
    rows = re.findall(r'<tr data-words="[^"]* exact" data-number.*?</tr>', page, re.DOTALL)
    assert len(rows) == len(spectra)
    matrix = js.readings["curvature"].matrix
    for row, (place, block) in zip(rows, enumerate(spectra.values()), strict=True):
        values = [float(text) for text in re.findall(r'class="number" data-value="([^"]*)"', row)]
        others = np.delete(matrix[place], place).mean()
        ends = (block.smallest.value, block.largest.value)
        expected = [block.size, block.rms.value, *ends, block.trace.value, others]
        assert values == pytest.approx(expected)


def test_a_partition_and_its_evidence(tmp_path):
    report = partition_folder(tmp_path)
    page = page_of(tmp_path)
    told = headline(page)
    assert ("Contradicted" if report.contradicted else "ontradicted") in told
    for tensor in report.tensors:
        assert html.escape(tensor.reason[1:]) in page
        (row,) = re.findall(rf'<tr data-words="{re.escape(tensor.name)} .*?</tr>', page, re.DOTALL)
        assert f'data-kind="{tensor.verdict}"' in row
    for verdict, count in report.counts.items():
        assert (f"{count} {verdict}</button>" in page) == (count > 0)
    assert "Coupling between tensors" in page and str(report.savings) in words_of(page)


def test_a_race(tmp_path):
    race_folder(tmp_path)
    page = page_of(tmp_path)
    assert "adam leads" in headline(page) and "Batches of 8: adam leads sgd by" in headline(page)
    assert "No command is kept" in page  # of a run that the library wrote
    for label in ("sgd, rate 0.1", "adam, rate 0.1"):
        assert f'data-label="{label}"' in page
    assert "one seed: how far the losses differ by chance is not known" in page


def test_losses_that_are_no_numbers_stay_out_of_the_drawing(tmp_path):
    runs = {
        "sgd, rate 9": trajectory([2.0, 3.0, math.nan, math.inf]),
        "adam": trajectory([2.0, 1.0]),
    }
    ht.save(runs, tmp_path / "runs")
    page = page_of(tmp_path)
    data = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    curves = json.loads(data[0], parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert [len(curve["x"]) for curve in curves] == [2, 2]
    assert "nan" not in "".join(re.findall(r' d="([^"]*)"', page))


def test_a_tracker_beside_its_loss(tmp_path):
    track = tracker_journal(tmp_path / "curvature.jsonl").track
    page = page_of(tmp_path)
    told = headline(page)
    first, last = (track.readings["loss"][place] for place in (0, -1))
    assert "4 measurements" in told and f"loss {first:.3g} → {last:.3g}" in told
    assert page.index(">loss</text>") < page.index(">largest eigenvalue</text>")


def test_a_quadratic(tmp_path):
    problem = case(3, seed=0)
    runs = compare(problem, ["gd", "adam_frozen"], num_starts=3, num_steps=300, progress=False)
    exact = constants(problem, num_starts=3, seed=0)
    config = {"command": "quadratic", "source": "3", "tolerance": 1e-6}
    RunFolder(tmp_path, config).finish({"runs": runs, "constants": exact, "checks": ()})
    page = page_of(tmp_path)
    assert "adam_frozen is fastest" in headline(page) and "quadratic: 3" in headline(page)
    assert "Without momentum: adam_frozen beats gd" in headline(page)
    assert "max kappa_l" in page


def test_an_interrupted_run_says_what_is_missing_and_what_goes_on(tmp_path):
    folder = RunFolder(tmp_path, CONFIG, COMMANDS)
    for name, quadrature in list(exact_spectra().items())[:3]:
        folder.journal.append(name, quadrature)
    page = page_of(tmp_path)  # while it runs
    folder.close()
    told = headline(page)
    assert "Not finished" in told and "Finished so far: 3 blocks." in told
    assert "Missing: any blocks that are left, the readings and the verdict." in told
    assert f"To go on: {COMMANDS['repeat']}" in told
    assert "layers.1.query" in page and "Spectra by block" in page


def test_other_interrupted_runs(tmp_path):
    report = partition_folder(tmp_path / "finished")
    partition = RunFolder(tmp_path / "a", {"command": "partition"})
    partition.journal.append(report.tensors[0].name, report.tensors[0])
    race = RunFolder(tmp_path / "b", {"command": "race"})
    race.journal.append("sgd, rate 0.1, 2 steps, seed 0", trajectory([2.0, 1.0]))
    quadratic = RunFolder(tmp_path / "c", {"command": "quadratic"})
    runs = compare(case(3, seed=0), ["gd"], num_starts=2, num_steps=20, progress=False)
    quadratic.journal.append("gd", runs)
    begun = RunFolder(tmp_path / "d", {"command": "js0"})
    words = words_of(page_of(tmp_path))
    for folder in (partition, race, quadratic, begun):
        folder.close()
    for done in ("1 tensor", "1 training run", "1 method", "nothing"):
        assert f"Finished so far: {done}. Missing: " in words
    assert "The command that wrote the folder goes on" in words


@pytest.mark.parametrize("name", SAMPLES)
def test_every_result_that_can_be_saved_makes_a_page(name, tmp_path):
    ht.save(SAMPLES[name], tmp_path / "result")
    assert "</html>" in page_of(tmp_path)


def test_400_blocks_and_all_readings_stay_small():
    page = report_html("400 blocks", [many_blocks()])
    assert len(page.encode()) < MOST_BYTES and page.count('class="pick"') == 400


# ------------------------------------------------------------------------------------ the command


def test_the_command_prints_the_path(tmp_path, capsys):
    js0_folder(tmp_path / "run")
    assert run("report", tmp_path / "run") == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(tmp_path / "run" / "report.html")
    assert "open it in a browser" in captured.err and "note:" not in captured.err
    target = tmp_path / "mine.html"
    assert run("report", tmp_path / "run", "--to", target) == 0 and target.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere",), "there is no folder nowhere; name one that --out was given"),
        (("empty",), "empty holds no run of this package: neither what js0, spectrum, partition"),
        (("file",), "file is a file; name the folder that it lies in"),
        (("run", "--to", "empty"), "empty is a folder; name the file to write, such as empty/rep"),
        (("run", "--to", "no/page.html"), "there is no folder no to write page.html to"),
        ((), "the following arguments are required: DIR"),
    ],
)
def test_bad_command_lines(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file").write_text("words")
    js0_folder(Path("run"))
    assert run("report", *arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"hessian-tools: {words}")
