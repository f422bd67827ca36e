"""A folder saved by transformers: what is in it, and the network with its weights.

Nothing is downloaded and no code of the folder's is run. Weights are read from safetensors or GGUF,
never from pickles.
"""

import contextlib
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from hessian_tools.problem.vision import repair

CAUSAL, MASKED = "next token", "masked tokens"
SEQUENCES, IMAGES = "classes of sequences", "classes of images"
# what a model is trained for -> the Auto class, and its list of architectures
AUTO = {
    CAUSAL: ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    MASKED: ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    SEQUENCES: (
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    ),
    IMAGES: (
        "AutoModelForImageClassification",
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    ),
}
LOCAL = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True)
class SavedModel:
    """What a folder holds, weights not read yet.

    Attributes:
        architecture: the class that was saved, such as "GPT2LMHeadModel".
        task: one of AUTO.
        config: of transformers; its attributes differ from model to model.
        source: what tells from_pretrained where to read.
    """

    folder: Path
    architecture: str
    task: str
    config: Any  # transformers names no common type of what a config holds
    source: dict[str, object]

    @property
    def longest(self) -> int | None:
        """The most tokens that its positions allow; None where the config does not say."""
        for name in ("max_position_embeddings", "n_positions"):
            found = getattr(self.config, name, None)
            if isinstance(found, int) and found > 0:
                return found
        return None


def library() -> ModuleType:
    """transformers, which takes seconds to import."""
    repair()
    import transformers

    found: ModuleType = transformers
    return found


def saved_model(folder: Path) -> SavedModel:
    """What ``folder`` holds.

    Raises:
        ValueError: no folder, no configuration or weights that can be read, or a model that is
            trained for something else than AUTO's.
    """
    if not folder.is_dir():
        raise ValueError("there is no such folder; give one that save_pretrained has written")
    source = _source(folder)
    config = _config(folder, source)
    architecture = _architecture(config, source)
    return SavedModel(folder, architecture, _task(architecture), config, source)


def _source(folder: Path) -> dict[str, object]:
    ggufs = sorted(file.name for file in folder.glob("*.gguf"))
    if any(folder.glob("*.safetensors")):
        return {"use_safetensors": True}
    if len(ggufs) == 1:
        return {"gguf_file": ggufs[0]}
    if ggufs:
        raise ValueError(
            f"it holds {len(ggufs)} GGUF files ({', '.join(ggufs)}); leave one in the folder"
        )
    names = ", ".join(sorted(file.name for file in folder.iterdir())[:6]) or "nothing"
    raise ValueError(
        f"no weights in safetensors or GGUF are in it, but {names}; save the model with "
        "save_pretrained (pickles are not read, for they may run code)"
    )


def _config(folder: Path, source: dict[str, object]) -> Any:
    gguf = {key: value for key, value in source.items() if key == "gguf_file"}
    if not gguf and not (folder / "config.json").is_file():
        raise ValueError("config.json is missing; save the model with save_pretrained")
    try:
        with quiet():
            return library().AutoConfig.from_pretrained(folder, **LOCAL, **gguf)
    except ImportError as error:
        way_out = "pip install 'hessian_tools[gguf]'" if gguf else "install that"
        raise ValueError(
            f"a library that it needs is missing: {first_line(error)}; {way_out}"
        ) from error
    except Exception as error:  # each model's configuration has errors of its own
        raise ValueError(
            f"its configuration cannot be read: {error}; it has to be one of transformers' own "
            "models, as code that comes with a folder is not run"
        ) from error


def _architecture(config: Any, source: dict[str, object]) -> str:
    names = getattr(config, "architectures", None) or []
    if names:
        return str(names[0])
    if "gguf_file" in source:  # these hold language models
        mapping = library().MODEL_FOR_CAUSAL_LM_MAPPING
        return str(mapping[type(config)].__name__)
    raise ValueError(
        'config.json names no architecture; add "architectures": ["GPT2LMHeadModel"], or whichever '
        "class the weights are of"
    )


def _task(architecture: str) -> str:
    names = library().models.auto.modeling_auto
    for task, (_, mapping) in AUTO.items():
        if architecture in getattr(names, mapping).values():
            return task
    raise ValueError(
        f"{architecture} has no loss that is known here: {', '.join(AUTO)}; write a function "
        "that returns ht.Problem(model, ht.huggingface, batches), and give FILE.py:FUNCTION"
    )


def network(saved: SavedModel, dtype: torch.dtype) -> nn.Module:
    """The network with its weights, in eval mode.

    Raises:
        ValueError: weights that cannot be read, or that are missing, so that they would be random.
    """
    kind = getattr(library(), AUTO[saved.task][0])
    try:
        with quiet():
            model, info = kind.from_pretrained(
                saved.folder, dtype=dtype, output_loading_info=True, **LOCAL, **saved.source
            )
    except Exception as error:  # each model's loading has errors of its own
        raise ValueError(
            f"its weights cannot be read: {first_line(error)}; save it again"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{len(missing)} tensors of {saved.architecture} are not among its weights, such as "
            f"{missing[0]}, and would start at random; save the model that was trained"
        )
    made: nn.Module = model
    return made.eval()


def first_line(error: Exception) -> str:
    """What an error of transformers says first; its kind, where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and warnings of transformers, which are about other uses."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
