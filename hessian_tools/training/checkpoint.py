"""The state of a run on disk, so that a killed one goes on bit by bit as if it had not been.

One file, written atomically: weights, optimizer, random numbers, and all that was recorded. It is
read without running any code that it may hold.
"""

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from hessian_tools.results import Json, write_atomically


@dataclass
class Record:
    """What a run has recorded so far; the number of losses is its position in the stream."""

    num_steps: int
    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    validation_steps: list[int] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    high: int = 0  # losses in a row, up to the last, that were far above the start
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        return len(self.losses)


@dataclass(frozen=True)
class Checkpoint:
    """The file at ``path`` of the run ``key``; a file of another run is passed over."""

    path: Path
    key: str

    def save(self, record: Record, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Writes the state.

        Raises:
            OSError: the file cannot be written; the one before it is still whole then.
        """
        state = {
            "key": self.key,
            "record": vars(record),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": _random_states(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, buffer.getvalue())

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Record | None:
        """Puts model, optimizer and random numbers back; None where this run has left no file.

        Raises:
            ValueError: a file that cannot be read, or that does not fit the model or optimizer.
        """
        if not self.path.exists():
            return None
        state = self._read()
        if state.get("key") != self.key:
            return None
        self._fitting(lambda: model.load_state_dict(state["model"]))
        self._fitting(lambda: optimizer.load_state_dict(state["optimizer"]))
        _set_random_states(state["random"])
        return Record(**state["record"])

    def remove(self) -> None:
        """May be repeated."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Json]:
        try:
            state: dict[str, Json] = torch.load(self.path, weights_only=True)
        except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{self.path} is no state of a training run, or is damaged; delete it, and the run "
                "begins again"
            ) from error
        return state

    def _fitting(self, load: Callable[[], object]) -> None:
        try:
            load()
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{self.path} holds the state of another model or optimizer ({reason}); delete it, "
                "and the run begins again"
            ) from error


def _random_states() -> list[Tensor]:
    """The CPU's, and those of the CUDA devices in use."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return states


def _set_random_states(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])
