"""The families that read text: what is in them, and on which data.

Sizes are such that a step on 32 windows takes some ten milliseconds on one core. "Letters" are the
31 most frequent bytes and one for all others.
"""

from functools import partial

from torch import nn

from evidence.networks.library import encoder, gpt2, library, llama
from evidence.networks.plain import BagOfTokens, BagOfWindow, Bigram, TokenMLP
from evidence.networks.sequences import (
    gated_convolutions,
    gated_scan,
    plain_convolutions,
    recurrent,
    state_space,
    temporal_convolutions,
)
from evidence.networks.transformers import Design, EncoderDecoder, Transformer
from evidence.pair import Pair, Traits, family
from evidence.sources import masked_text, restored_text, text, text_by_play
from hessian_tools.problem.networks import NanoGPT

PLAIN = Traits(is_transformer=False, is_text=True)
TRANSFORMER = Traits(is_transformer=True, is_text=True)
BYTES = 257
LETTERS = 32
CONTEXT = 24
SHORT = 16  # tokens of large vocabularies, whose logits are what takes the time

by_bytes = partial(text, "byte", CONTEXT)
by_letters = partial(text, "byte", CONTEXT, LETTERS)
words_512 = partial(text, "bpe", SHORT, 512)
words_1024 = partial(text, "bpe", SHORT, 1024)
words_2048 = partial(text, "bpe", SHORT, 2048)
masked_bytes = partial(masked_text, "byte", CONTEXT)


def decoder(vocabulary: int, context: int = CONTEXT, **design: object):
    return partial(Transformer, vocabulary, context, Design(**design))


PAIRS: list[Pair] = [
    *family(
        "softmax-balanced",
        PLAIN,
        {"bag-of-words": (partial(BagOfWindow, 2048, 10), partial(text_by_play, "bpe", 32, 2048))},
    ),
    *family(
        "softmax-zipf",
        PLAIN,
        {
            "bigram-bytes": (partial(Bigram, BYTES), by_bytes),
            "bag-of-tokens": (partial(BagOfTokens, 512), words_512),
        },
    ),
    *family("mlp", PLAIN, {"bytes": (partial(TokenMLP, BYTES), by_bytes)}),
    *family(
        "decoder-pre-norm",
        TRANSFORMER,
        {
            "bytes": (decoder(BYTES), by_bytes),
            "nanogpt": (partial(NanoGPT, BYTES, CONTEXT, 2, 32), by_bytes),
            "gpt2-words": (gpt2(1024, SHORT, 32, 3), words_1024),
        },
    ),
    *family(
        "decoder-post-norm",
        TRANSFORMER,
        {
            "bytes": (decoder(BYTES, post_norm=True), by_bytes),
            "xavier": (decoder(BYTES, post_norm=True, std=None, layers=3), by_bytes),
            "words": (decoder(1024, SHORT, post_norm=True), words_1024),
        },
    ),
    *family(
        "decoder-qk-norm",
        TRANSFORMER,
        {
            "bytes": (decoder(BYTES, qk_norm=True), by_bytes),
            "qwen3": (llama("Qwen3ForCausalLM", BYTES, CONTEXT, 32), by_bytes),
            "words": (decoder(512, SHORT, qk_norm=True, layers=4), words_512),
        },
    ),
    *family(
        "decoder-untied",
        TRANSFORMER,
        {
            "bytes": (decoder(BYTES, tied=False), by_bytes),
            "llama": (llama("LlamaForCausalLM", BYTES, CONTEXT, 32), by_bytes),
            "words": (decoder(1024, SHORT, tied=False), words_1024),
        },
    ),
    *family(
        "decoder-grouped-queries",
        TRANSFORMER,
        {
            "bytes": (decoder(BYTES, key_heads=2), by_bytes),
            "one-key": (decoder(BYTES, key_heads=1, layers=3), by_bytes),
            "llama-words": (
                llama("LlamaForCausalLM", 1024, SHORT, 32, num_key_value_heads=2),
                words_1024,
            ),
        },
    ),
    *family(
        "decoder-small-vocabulary",
        TRANSFORMER,
        {
            "letters": (decoder(LETTERS, d=40), by_letters),
            "letters-deep": (decoder(LETTERS, d=24, layers=4), by_letters),
            "letters-untied": (decoder(LETTERS, d=32, tied=False, std=0.1), by_letters),
        },
    ),
    *family(
        "decoder-large-vocabulary",
        TRANSFORMER,
        {
            "2048": (decoder(2048, SHORT), words_2048),
            "2048-untied": (decoder(2048, SHORT, tied=False, d=24), words_2048),
            "4096": (decoder(4096, 8, d=24), partial(text, "bpe", 8, 4096)),
        },
    ),
    *family(
        "mixture-of-experts",
        TRANSFORMER,
        {
            "one-of-four": (decoder(BYTES, experts=4, d=24), by_bytes),
            "two-of-four": (decoder(BYTES, experts=4, chosen=2, d=24), by_bytes),
            "words": (decoder(512, SHORT, experts=8, d=24), words_512),
        },
    ),
    *family(
        "masked-encoder",
        TRANSFORMER,
        {
            "bert": (encoder("BertForMaskedLM", BYTES, CONTEXT, 32), masked_bytes),
            "pre-norm": (decoder(BYTES, causal=False), masked_bytes),
            "bert-words": (
                encoder("BertForMaskedLM", 513, SHORT, 32),
                partial(masked_text, "bpe", SHORT, 512),
            ),
        },
    ),
    *family(
        "encoder-decoder",
        TRANSFORMER,
        {
            "pre-norm": (
                partial(EncoderDecoder, BYTES, CONTEXT),
                partial(restored_text, "byte", CONTEXT),
            ),
            "post-norm": (
                partial(EncoderDecoder, LETTERS + 1, CONTEXT, norm_first=False),
                partial(restored_text, "byte", CONTEXT, LETTERS),
            ),
            "t5-words": (
                library(
                    "T5ForConditionalGeneration",
                    vocab_size=513,
                    d_model=32,
                    d_kv=8,
                    d_ff=64,
                    num_layers=1,
                    num_heads=4,
                    dropout_rate=0.0,
                    use_cache=False,
                    pad_token_id=None,
                    eos_token_id=None,
                    decoder_start_token_id=0,
                ),
                partial(restored_text, "bpe", SHORT, 512, names=("input_ids", "decoder_input_ids")),
            ),
        },
    ),
    *family(
        "recurrent",
        PLAIN,
        {
            "lstm": (partial(recurrent, BYTES, nn.LSTM, 40), by_bytes),
            "gru-two-layers": (partial(recurrent, LETTERS, nn.GRU, 32, 2), by_letters),
            "elman": (partial(recurrent, LETTERS, nn.RNN, 64), by_letters),
        },
    ),
    *family(
        "state-space",
        PLAIN,
        {
            "diagonal": (partial(state_space, BYTES, 24, 2), by_bytes),
            "diagonal-words": (partial(state_space, 512, 24, 3), words_512),
            "gated-scan": (partial(gated_scan, LETTERS, 40, 2), by_letters),
        },
    ),
    *family(
        "convolutional-lm",
        PLAIN,
        {
            "dilated": (partial(temporal_convolutions, BYTES, 32, (1, 2, 4)), by_bytes),
            "gated": (partial(gated_convolutions, BYTES, 32, 3), by_bytes),
            "plain": (partial(plain_convolutions, LETTERS, 40, 3), by_letters),
        },
    ),
]
