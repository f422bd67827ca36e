"""The configurations of experiments/families.py, each in a builder of its own."""

from family_models import (
    constructions,
    convolutions,
    graphs,
    image_libraries,
    kinds_of_losses,
    kinds_of_training,
    plain_networks,
    sequences,
    transformers_beyond_text,
    transformers_text,
)
from family_models.setting import CONFIGURATIONS, Setting

__all__ = [
    "CONFIGURATIONS",
    "Setting",
    "constructions",
    "convolutions",
    "graphs",
    "image_libraries",
    "kinds_of_losses",
    "kinds_of_training",
    "plain_networks",
    "sequences",
    "transformers_beyond_text",
    "transformers_text",
]
