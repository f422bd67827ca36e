"""Own networks: recurrent layers, attention as PyTorch has it, mixtures of experts."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attention
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from family_models.setting import Setting, configuration, cross_entropy, tokens
from family_models.shared_networks import CLASSES, classifier, sequence


@configuration("recurrent/lstm")
def lstm() -> Setting:
    return sequence(nn.LSTM(8, 8, batch_first=True))


@configuration("recurrent/lstm-two-layers-both-ways")
def lstm_both() -> Setting:
    return sequence(nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True))


@configuration("recurrent/lstm-projected")
def lstm_projected() -> Setting:
    return sequence(nn.LSTM(8, 8, proj_size=4, batch_first=True))


@configuration("recurrent/gru")
def gru() -> Setting:
    return sequence(nn.GRU(8, 8, batch_first=True))


@configuration("recurrent/elman")
def elman() -> Setting:
    return sequence(nn.RNN(8, 8, batch_first=True))


@configuration("recurrent/lstm-cell-loop")
def cells() -> Setting:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTMCell(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            state = None
            outputs = []
            for step in x.unbind(1):
                state = self.cell(step, state)
                outputs.append(state[0])
            return torch.stack(outputs, 1)

    return sequence(Loop())


@configuration("recurrent/packed-inside-the-model")
def packed_inside() -> Setting:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20, 8)
            self.lstm = nn.LSTM(8, 8, batch_first=True)
            self.head = nn.Linear(8, CLASSES)

        def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
            ids, sizes = inputs
            embedded = self.embedding(ids)
            packed = pack_padded_sequence(embedded, sizes, batch_first=True, enforce_sorted=False)
            _, (last, _) = self.lstm(packed)
            return self.head(last[-1])

    batches = [
        ((torch.randint(20, (n, 6)), torch.randint(1, 7, (n,))), torch.randint(CLASSES, (n,)))
        for n in (5, 3)
    ]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        return nn.functional.cross_entropy(model(inputs), targets)

    return Setting(Packed(), loss, batches, [5.0, 3.0])


@configuration("recurrent/packed-sequences-as-batches")
def packed_batches() -> Setting:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(4, 8)
            self.head = nn.Linear(8, CLASSES)

        def forward(self, inputs: PackedSequence) -> Tensor:
            outputs, sizes = pad_packed_sequence(self.gru(inputs)[0])
            mask = torch.arange(len(outputs))[:, None] < sizes
            return self.head((outputs * mask[..., None]).sum(0) / sizes[:, None])

    batches = []
    for n in (5, 3):
        sizes = torch.randint(1, 7, (n,))
        packed = pack_padded_sequence(torch.randn(6, n, 4), sizes, enforce_sorted=False)
        batches.append((packed, torch.randint(CLASSES, (n,))))
    counted = {"num_examples": lambda batch: len(batch[1])}
    return Setting(Packed(), cross_entropy, batches, [5.0, 3.0], options=counted)


@configuration("attention/nn-transformer-encoder")
def encoder() -> Setting:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, activation="gelu", batch_first=True)
    return sequence(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval())


@configuration("attention/nn-transformer-encoder-padded")
def encoder_padded() -> Setting:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
            self.embedding = nn.Embedding(20, 8)
            self.encoder = nn.TransformerEncoder(layer, 2)
            self.head = nn.Linear(8, CLASSES)

        def forward(self, ids: Tensor) -> Tensor:
            padded = ids == 0
            out = self.encoder(self.embedding(ids), src_key_padding_mask=padded)
            return self.head(out[:, 0])

    batches = []
    for n in (5, 3):
        ids = torch.randint(1, 20, (n, 6))
        ids[:, 4:] = 0
        ids[0, 3] = 0
        batches.append((ids, torch.randint(CLASSES, (n,))))
    return classifier(Padded().eval(), batches)


@configuration("attention/nn-transformer-encoder-decoder")
def transformer() -> Setting:
    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20, 8)
            self.transformer = nn.Transformer(8, 2, 1, 1, 16, 0.0, batch_first=True)
            self.head = nn.Linear(8, 20)

        def forward(self, ids: Tensor) -> Tensor:
            embedded = self.embedding(ids)
            mask = nn.Transformer.generate_square_subsequent_mask(
                ids.shape[1], dtype=embedded.dtype
            )
            return self.head(self.transformer(embedded, embedded.flip(1), tgt_mask=mask))

    return classifier(Translator().eval(), tokens())


@configuration("attention/fused-kernel-causal")
def fused() -> Setting:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            heads = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            out = attention(heads[0], heads[1], heads[2], is_causal=True)
            return out.transpose(1, 2).flatten(2)

    return sequence(Causal())


@configuration("attention/linear-with-cumulative-sums")
def linear_attention() -> Setting:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            q, k = (nn.functional.elu(layer(x)) + 1 for layer in (self.q, self.k))
            state = torch.einsum("btk,btv->btkv", k, self.v(x)).cumsum(1)
            normal = torch.einsum("btk,btk->bt", q, k.cumsum(1))
            return torch.einsum("btk,btkv->btv", q, state) / normal[..., None]

    return sequence(Linear())


@configuration("experts/top-1-by-indices")
def experts() -> Setting:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(8, 4)
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            flat = x.flatten(0, 1)
            weights, chosen = self.router(flat).softmax(-1).max(-1)
            out = torch.zeros_like(flat)
            for index, expert in enumerate(self.experts):
                rows = torch.where(chosen == index)[0]
                out = out.index_add(0, rows, torch.tanh(expert(flat[rows])))
            return (out * weights[:, None]).view_as(x)

    return sequence(Experts())


@configuration("experts/soft-dense")
def soft_experts() -> Setting:
    class Soft(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(8, 4)
            self.weight = nn.Parameter(torch.randn(4, 8, 8) / 3)

        def forward(self, x: Tensor) -> Tensor:
            outputs = torch.tanh(torch.einsum("btd,edh->bteh", x, self.weight))
            return (outputs * self.router(x).softmax(-1)[..., None]).sum(2)

    return sequence(Soft())
