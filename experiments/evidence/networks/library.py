"""Networks of transformers, made small by their configurations.

The library is imported when a network is made, so that the suite's names are known without it.
"""

from collections.abc import Callable

from torch import nn

from hessian_tools.problem.vision import repair

# no special tokens: they lie outside of small vocabularies, and a padding token has no gradient
PLAIN = {"use_cache": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
NO_DROPOUT = {
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def library(network: str, **sizes: object) -> Callable[[], nn.Module]:
    """The builder of ``network``, a class of transformers, from its own configuration's class."""

    def build() -> nn.Module:
        repair()
        import transformers

        kind = getattr(transformers, network)
        return kind(kind.config_class(**sizes))

    return build


def llama(network: str, vocabulary: int, context: int, d: int, **sizes: object):
    """One of the many that name their sizes as LLaMA does: two layers, four heads."""
    shape = {
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "hidden_size": d,
        "intermediate_size": 2 * d,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": d // 4,
    }
    return library(network, **(shape | PLAIN | sizes))


def gpt2(vocabulary: int, context: int, d: int, layers: int, **sizes: object):
    shape = {
        "vocab_size": vocabulary,
        "n_positions": context,
        "n_embd": d,
        "n_layer": layers,
        "n_head": 4,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    return library("GPT2LMHeadModel", **(shape | PLAIN | sizes))


def encoder(network: str, vocabulary: int, context: int, d: int, **sizes: object):
    """One of the many that name their sizes as BERT does: two layers, four heads."""
    shape = {
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "hidden_size": d,
        "intermediate_size": 4 * d,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pad_token_id": None,
    }
    return library(network, **(shape | NO_DROPOUT | sizes))
