"""Exceptions of this package; wrong arguments raise ValueError and TypeError."""


class NumericalError(ArithmeticError):
    """A computation produced NaN or inf; the message says in what and where it appeared first."""


def nonfinite_product(block: str, where: str) -> NumericalError:
    """The error for products with ``block`` ("": no name) that were NaN or inf ``where`` first."""
    matrix = f"block {block}" if block else "the operator"
    return NumericalError(
        f"a product with {matrix} is NaN or inf, first {where}; check the loss and the dtype's "
        "range"
    )


class NotTwiceDifferentiable(ValueError):
    """A model whose gradient cannot be differentiated again; the message names the operation."""
