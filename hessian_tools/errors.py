"""Exceptions of this package that are more than a wrong argument (for those: ValueError and TypeError)."""


class NumericalError(ArithmeticError):
    """A computation produced NaN or inf; the message says in which quantity and where it appeared first."""


class NotTwiceDifferentiable(ValueError):
    """A model whose gradient cannot be differentiated again; the message names the operation."""
