"""The packaged data and the user's own: content, batches, and that the seed decides everything."""

import gzip
import hashlib
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from hessian_tools.problem import data

ASSETS = Path(data.__file__).parents[1] / "assets"


def plain_text() -> str:
    return bytes(data.text_tokens("byte").tolist()).decode("utf-8")


def flat(batches, side):
    return torch.cat([batch[side] for batch in batches])


def test_assets_are_the_files_their_readme_names_and_small():
    readme = (ASSETS / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `(\S+)` \| ([\d,]+) \| `([0-9a-f]{64})` \|$", readme, re.MULTILINE)
    assert {name for name, *_ in named} == {file.name for file in ASSETS.iterdir()} - {"README.md"}
    for name, size, digest in named:
        content = (ASSETS / name).read_bytes()
        assert (
            len(content) == int(size.replace(",", ""))
            and hashlib.sha256(content).hexdigest() == digest
        )
    assert sum(file.stat().st_size for file in ASSETS.iterdir()) < 5_000_000


def test_packaged_text_is_the_plays_and_nothing_else():
    text = plain_text()
    assert 1_000_000 < len(text.encode()) < 1_500_000
    assert "To be, or not to be" in text and "wherefore art thou Romeo" in text
    assert not re.search(r"gutenberg|\be-?text\b|copyright|http|www\.|@", text, re.IGNORECASE)


def test_bpe_codes_any_text_and_never_the_mask(tmp_path):
    from tokenizers import Tokenizer

    text = "Now is the winter — ‘naïve’ Ωμέγα 東京 🎭\n\ttabs, nul \x00, 3.14, <mask>\n"
    file = tmp_path / "own.txt"
    file.write_text(text, encoding="utf-8")
    tokens = data.text_tokens("bpe", file)
    bpe = Tokenizer.from_str(gzip.decompress((ASSETS / "bpe8192.json.gz").read_bytes()).decode())
    assert bpe.decode(tokens.tolist()) == text and 0 not in tokens
    assert data.TOKENIZERS["bpe"] == data.Vocabulary(
        bpe.get_vocab_size(), bpe.token_to_id("<mask>")
    )
    plays = data.text_tokens()
    assert plays.dtype == torch.int64 and plays.ndim == 1 and plays.min() > 0 and plays.max() < 8192
    # trained on this text, so it compresses it
    assert len(plays) < len(data.text_tokens("byte")) / 3
    assert data.text_tokens("byte", file).tolist() == list(text.encode())
    assert data.text_tokens("byte").max() < data.TOKENIZERS["byte"].mask


def test_packaged_tokens_cannot_be_spoilt_by_a_caller():
    data.text_tokens("byte").zero_()
    assert data.text_tokens("byte").any()


def test_language_windows_do_not_overlap_and_targets_are_the_next_tokens():
    tokens = torch.arange(1000)  # a token is its own position
    batches = data.language_batches(tokens, num_examples=33, batch_size=8, context=30, seed=1)
    assert [len(inputs) for inputs, _ in batches] == [8, 8, 8, 8, 1]
    inputs, targets = flat(batches, 0), flat(batches, 1)
    assert torch.equal(targets, inputs + 1)
    assert inputs.unique().numel() == inputs.numel() == 33 * 30
    whole = data.language_batches(torch.arange(31), num_examples=1, batch_size=1, context=30)
    assert whole[0][1].tolist() == [list(range(1, 31))]


@pytest.mark.parametrize("masked", [False, True])
def test_text_batches_follow_the_seed_and_grow_in_place(masked):
    tokens = data.text_tokens("byte")

    def batches(seed, count=12, size=4):
        knobs = {"num_examples": count, "batch_size": size, "context": 20, "seed": seed}
        if masked:
            return data.masked_language_batches(tokens, data.TOKENIZERS["byte"], **knobs)
        return data.language_batches(tokens, **knobs)

    for side in (0, 1):
        assert torch.equal(flat(batches(3), side), flat(batches(3, size=5), side))
        assert torch.equal(flat(batches(3, count=5), side), flat(batches(3), side)[:5])
        assert not torch.equal(flat(batches(3), side), flat(batches(4), side))


def test_masked_batches_follow_bert():
    vocabulary = data.TOKENIZERS["byte"]
    tokens = torch.arange(250).repeat(2000)  # never the mask
    batches = data.masked_language_batches(
        tokens, vocabulary, num_examples=1000, batch_size=300, context=100, seed=5
    )
    inputs, targets = flat(batches, 0), flat(batches, 1)
    chosen = targets != -100
    assert (chosen.sum(1) == 15).all()
    assert chosen.any(0).all()  # every position is chosen somewhere
    original = inputs.where(~chosen, targets)
    # targets are the text, the rest is unchanged
    assert ((original[:, 1:] - original[:, :-1]) % 250 == 1).all()
    count = int(chosen.sum())
    share_masked = float((inputs[chosen] == vocabulary.mask).sum()) / count
    share_kept = float((inputs[chosen] == targets[chosen]).sum()) / count
    assert share_masked == pytest.approx(0.8 + 0.1 / vocabulary.size, abs=5 * (0.16 / count) ** 0.5)
    assert share_kept == pytest.approx(0.1 + 0.1 / vocabulary.size, abs=5 * (0.09 / count) ** 0.5)
    replaced = inputs[chosen][
        (inputs[chosen] != vocabulary.mask) & (inputs[chosen] != targets[chosen])
    ]
    assert replaced.unique().numel() > 240
    short = data.masked_language_batches(
        tokens, vocabulary, num_examples=2, batch_size=2, context=2
    )
    assert (short[0][1] != -100).sum(1).tolist() == [1, 1]


def test_packaged_images_are_balanced_and_labelled():
    source = data.image_source()
    labels = np.array([source.read(number)[1] for number in range(source.size)])
    assert (
        source.size == 4000
        and np.bincount(labels).tolist() == [400] * 10
        and len(source.classes) == 10
    )
    means = (
        np.stack([source.read(number)[0] for number in range(source.size)]).mean((1, 2, 3)) / 255
    )
    assert means.mean() == pytest.approx(source.mean, abs=0.01)
    by_class = {name: means[labels == label].mean() for label, name in enumerate(source.classes)}
    assert (
        min(by_class, key=by_class.get) == "Sandal"
        and max(by_class, key=by_class.get) == "Pullover"
    )


def test_image_batches_at_the_images_own_size_are_the_pixels():
    source = data.image_source()
    [(images, labels)] = data.image_batches(
        source, num_examples=50, batch_size=50, image_size=28, seed=2
    )
    assert (
        images.shape == (50, 3, 28, 28)
        and images.dtype == torch.float32
        and labels.dtype == torch.int64
    )
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
    pixels = (images[:, 0] * source.std + source.mean) * 255
    known = {
        (source.read(number)[0][..., 0].tobytes(), source.read(number)[1])
        for number in range(source.size)
    }
    rounded = pixels.round().to(torch.uint8).numpy()
    drawn = {(image.tobytes(), int(label)) for image, label in zip(rounded, labels, strict=True)}
    assert drawn <= known and len(drawn) == 50
    [(grey, _)] = data.image_batches(
        source, num_examples=50, batch_size=50, image_size=28, channels=1, seed=2
    )
    torch.testing.assert_close(grey, images[:, :1])


def test_images_are_resized_bilinearly():
    ramp = np.repeat((np.arange(8, dtype=np.uint8) * 16)[None, :, None], 8, axis=0).repeat(
        3, axis=2
    )
    source = data.ImageSource("ramp", ("a", "b"), 1, lambda number: (ramp, 1), mean=0.5, std=0.25)
    [(wide, _)] = data.image_batches(source, num_examples=1, batch_size=1, image_size=16)
    # linear interpolation of a ramp is the ramp
    centres = ((torch.arange(16) + 0.5) / 2 - 0.5).clamp(0, 7) * 16
    torch.testing.assert_close(wide[0, 0, 3], (centres / 255 - 0.5) / 0.25)
    [(narrow, _)] = data.image_batches(source, num_examples=1, batch_size=1, image_size=1)
    torch.testing.assert_close(narrow[0, :, 0, 0], torch.full((3,), (56 / 255 - 0.5) / 0.25))


def test_image_batches_follow_the_seed():
    source = data.image_source()

    def draw(seed, count=20, size=20):
        return data.image_batches(
            source, num_examples=count, batch_size=size, image_size=8, seed=seed
        )

    for side in (0, 1):
        assert torch.equal(flat(draw(0), side), flat(draw(0, size=7), side))
        assert torch.equal(flat(draw(0, count=6), side), flat(draw(0), side)[:6])
        assert not torch.equal(flat(draw(0), side), flat(draw(1), side))


def image_folder(root: Path) -> Path:
    from PIL import Image

    for name, colour in (("zebra", (255, 0, 0)), ("ant", (0, 0, 255))):
        (root / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (10 + number, 7), colour).save(root / name / f"{number}.png")
    (root / "ant" / "notes.txt").write_text("no image")
    return root


def test_a_users_image_folder(tmp_path):
    source = data.image_source(image_folder(tmp_path))
    assert source.classes == ("ant", "zebra") and source.size == 6
    [(images, labels)] = data.image_batches(source, num_examples=6, batch_size=6, image_size=4)
    assert sorted(labels.tolist()) == [0, 0, 0, 1, 1, 1]
    for image, label in zip(images, labels, strict=True):
        colour = torch.tensor([1.0, 0, 0]) if label == 1 else torch.tensor([0, 0, 1.0])
        torch.testing.assert_close(
            image, ((colour - source.mean) / source.std)[:, None, None].expand(3, 4, 4)
        )


def test_a_torchvision_dataset_on_disk(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)
    labels = np.arange(30, dtype=np.uint8) % 10
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">4B3I", 0, 0, 8, 3, 30, 28, 28) + pixels.tobytes()
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">4BI", 0, 0, 8, 1, 30) + labels.tobytes()
        )
    source = data.image_source(f"torchvision:MNIST:{tmp_path}")
    assert source.size == 30 and len(source.classes) == 10
    image, label = source.read(13)
    assert label == 3 and np.array_equal(image[..., 1], pixels[13])


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("torchvision:FashionMNIST:nowhere", "Dataset not found"),
        ("torchvision:NoSuchData:.", "NoSuchData"),
        ("torchvision:FakeData:.", "labels"),
        ("missing", "missing"),
        ("one", "fewer than two classes"),
    ],
)
def test_unusable_image_data_is_one_clear_error(tmp_path, monkeypatch, path, reason):
    image_folder(tmp_path / "both")
    (tmp_path / "one").mkdir()
    (tmp_path / "both" / "ant").rename(tmp_path / "one" / "ant")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"^data must be a folder with .*{reason}") as caught:
        data.image_source(path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("nowhere*"))  # nothing was downloaded


def test_a_broken_image_is_named(tmp_path):
    (image_folder(tmp_path) / "ant" / "1.png").write_bytes(b"no png")
    with pytest.raises(ValueError, match=r"item 1 is no image .*1\.png"):
        data.image_source(tmp_path).read(1)


@pytest.mark.parametrize("content", [None, "folder", b"\xff\xfe\x00 not utf-8 \x80"])
def test_unreadable_text_is_one_clear_error(tmp_path, content):
    path = tmp_path / "text"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="data must be a UTF-8 text file"):
        data.text_tokens("byte", path)


def test_values_out_of_range_are_refused(tmp_path):
    (tmp_path / "empty").touch()
    tokens, source = torch.arange(100), data.image_source()
    text = {"num_examples": 2, "batch_size": 2, "context": 10}
    images = {"num_examples": 2, "batch_size": 2, "image_size": 8}
    for tokenizer in data.TOKENIZERS:
        empty = data.text_tokens(tokenizer, tmp_path / "empty")
        with pytest.raises(ValueError, match="0 tokens holds 0 windows"):
            data.language_batches(empty, **text)
    with pytest.raises(ValueError, match="holds 9 windows of 10"):
        data.language_batches(tokens, **{**text, "num_examples": 10})
    with pytest.raises(ValueError, match="holds 0 windows of 101"):
        data.masked_language_batches(tokens, data.TOKENIZERS["byte"], **{**text, "context": 101})
    for knob in text:
        for bad in (0, -1, 1.5, True):
            with pytest.raises(ValueError, match=f"{knob} must be a whole number of at least 1"):
                data.language_batches(tokens, **{**text, knob: bad})
    for knob in images:
        with pytest.raises(ValueError, match=f"{knob} must be a whole number of at least 1"):
            data.image_batches(source, **{**images, knob: 0})
    with pytest.raises(ValueError, match="ask for fewer"):
        data.image_batches(source, **{**images, "num_examples": 4001})
    with pytest.raises(ValueError, match="channels must be 1 or 3"):
        data.image_batches(source, channels=2, **images)
    with pytest.raises(ValueError, match="seed must be"):
        data.language_batches(tokens, seed=-1, **text)
    with pytest.raises(ValueError, match="tokenizer must be one of bpe, byte"):
        data.text_tokens("words")
