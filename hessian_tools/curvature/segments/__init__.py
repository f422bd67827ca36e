"""Models in segments, which are computed again instead of kept; and on fake tensors."""
