"""The suite on which readings are held against training: (network, data) pairs in families.

Reading order: pair, sources, the networks (plain_networks, convolutions, transformers_plain,
sequences, other_networks, library_networks), the families. The interventions (the scaled-layer
dial, loss scale, initialisation scale) change one network step by step and are a set of their own,
never pooled with these.
"""

from evidence import families_of_images, families_of_others, families_of_text
from evidence.pair import BATCH_SIZE, Pair, by_family, by_name, held_out

SUITE = by_name([*families_of_images.PAIRS, *families_of_text.PAIRS, *families_of_others.PAIRS])
FAMILIES = by_family(SUITE.values())
HELD_OUT = held_out(FAMILIES)

__all__ = ["BATCH_SIZE", "FAMILIES", "HELD_OUT", "SUITE", "Pair"]
