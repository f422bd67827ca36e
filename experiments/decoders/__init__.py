"""Decoders of two sizes, the optimizers they are trained with, and the sweeps of each claim."""
