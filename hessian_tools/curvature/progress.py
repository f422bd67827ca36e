"""The progress bar of everything that spends products."""

from tqdm import tqdm


def product_bar(total: int | None, *, shown: bool, done: int = 0) -> tqdm:
    """A bar of products done and left, on stderr where that is a terminal; none unless ``shown``.

    ``total`` is None where it is not known; ``done`` were made by an earlier run.
    """
    hidden = None if shown else True  # None: hidden where stderr is no terminal
    return tqdm(total=total, initial=done, unit="HVP", disable=hidden, dynamic_ncols=True)
