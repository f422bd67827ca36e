"""The suite on which readings are held against training: (network, data) pairs in families.

Reading order: pair, sources, networks, the families; arms, tuning, gaps, lines: how pairs are
trained and what is kept of it; readings: the predictors. The interventions change one network step
by step and are a set of their own, never pooled with the suite.
"""

from evidence import families_of_images, families_of_others, families_of_text
from evidence.interventions import INTERVENTIONS
from evidence.pair import BATCH_SIZE, Pair, by_family, by_name, held_out

SUITE = by_name([*families_of_images.PAIRS, *families_of_text.PAIRS, *families_of_others.PAIRS])
FAMILIES = by_family(SUITE.values())
HELD_OUT = held_out(FAMILIES)
EVERY = SUITE | INTERVENTIONS  # by name

__all__ = ["BATCH_SIZE", "EVERY", "FAMILIES", "HELD_OUT", "INTERVENTIONS", "SUITE", "Pair"]
