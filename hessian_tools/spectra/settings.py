"""Arguments of stochastic Lanczos quadrature, and what they cost."""

from dataclasses import dataclass
from numbers import Integral

from hessian_tools.spectra.lanczos import REORTHOGONALIZE
from hessian_tools.spectra.probes import PROBE_KINDS

_CHOICES = {
    "probes": PROBE_KINDS,
    "reorthogonalize": REORTHOGONALIZE,
}


@dataclass(frozen=True)
class Settings:
    """Arguments of SLQ, validated once; see :func:`hessian_tools.slq`.

    Raises:
        ValueError: for one out of range, with its name and what is allowed.
    """

    num_probes: int
    num_steps: int
    seed: int
    probes: str
    reorthogonalize: str
    exact: bool | str | int  # a number: as "auto", and up to this size
    rows: int | None = None  # start vectors that go through at a time; None: all

    def __post_init__(self) -> None:
        _check_integer("num_probes", self.num_probes, least=1)
        _check_integer("num_steps", self.num_steps, least=1)
        _check_integer("seed", self.seed)
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                allowed = ", ".join(map(repr, choices))
                raise ValueError(f"{name} is {value!r}; allowed are {allowed}")
        if isinstance(self.exact, str | bool):
            if self.exact not in ("auto", True, False):
                raise ValueError(
                    f"exact is {self.exact!r}; allowed are 'auto', True, False and a size up to "
                    "which blocks are exact"
                )
        else:
            _check_integer("exact", self.exact, least=1)

    def is_exact(self, size: int) -> bool:
        """Whether an operator of this size is solved from its dense matrix."""
        if isinstance(self.exact, bool):
            return self.exact
        most = 0 if isinstance(self.exact, str) else self.exact
        return size <= max(most, self.num_probes * self.num_steps)

    def matvecs(self, size: int) -> int:
        """Products that an operator of this size takes."""
        if self.is_exact(size):
            return size
        return self.num_probes * min(self.num_steps, size)


def _check_integer(name: str, value: object, least: int | None = None) -> None:
    need = "any integer" if least is None else f"an integer of at least {least}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} is {value!r}; it must be {need}")
    if least is not None and int(value) < least:
        raise ValueError(f"{name} is {value!r}; it must be {need}")
