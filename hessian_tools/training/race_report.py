"""A race in words: its table, what it tells, and what it does not."""

import math
import textwrap
from itertools import pairwise

from hessian_tools.results import JsonObject
from hessian_tools.tables import plus_minus, table
from hessian_tools.training.races import Race, RaceEntry

COSTLY = 2.0  # times the cheapest step, from which on equal steps are not about equal time
_MEBI = 2**20
HEADER = (
    "optimizer",
    "batch",
    "best rate",
    "loss ± seeds",
    "validation",
    "steps to level",
    "ms a step",
    "state",
)


def race_table(race: Race) -> str:
    """A row an optimizer and batch size, the lowest loss first."""
    return table(HEADER, race_rows(race))


def race_rows(race: Race) -> list[list[str]]:
    """The cells of :func:`race_table`."""
    return [_row(entry) for size in race.batch_sizes for entry in race.ranking(size)]


def race_text(race: Race) -> str:
    """What the race tells, and what it does not, in lines of 100 characters."""
    paragraphs = [*findings(race), *(f"note: {note}" for note in notes(race))]
    return "\n".join(
        textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)
        for text in paragraphs
    )


def findings(race: Race) -> list[str]:
    """Who leads at every batch size, and whether that changes between them."""
    found = [_who_leads(race, size) for size in race.batch_sizes]
    return [*found, _crossover(race)] if len(race.batch_sizes) > 1 else found


def notes(race: Race) -> list[str]:
    """What to know about the numbers, and what they do not tell."""
    found = []
    for entry in race.entries:
        label = f"{entry.optimizer} in batches of {_batch(entry)}"
        if not math.isfinite(entry.loss):
            found.append(f"{label} diverged at every rate that reached the last round")
        elif entry.at_edge:
            found.append(f"{label}: the best rate is the last one tried, a better may lie beyond")
    lengths = sorted({entry.num_steps for entry in race.entries})
    shown = " and ".join(f"{length:,}" for length in lengths)
    found.append(
        f"the order holds after {shown} steps of this model; a longer run, with other rates, may "
        "turn it round"
    )
    found += [_costs(race, size) for size in race.batch_sizes]
    found += [_held_out(race, size) for size in race.batch_sizes]
    if len(race.batch_sizes) == 1:
        found.append(
            "it holds at this batch size; --batch-sizes 8 64 512 looks for where the order changes"
        )
    if len(race.seeds) == 1:
        found.append("one seed: how far the losses differ by chance is not known; --seeds 3 tells")
    found.append(
        "only the rate is tuned: momentum, weight decay and the schedule are the same or at each "
        "optimizer's default"
    )
    return [note for note in found if note]


def _costs(race: Race, size: int | None) -> str:
    """What equal steps hide; "" where steps cost about the same."""
    ranking = sorted(race.ranking(size), key=lambda entry: entry.seconds_a_step)
    fast, slow = ranking[0], ranking[-1]
    if slow.seconds_a_step < COSTLY * fast.seconds_a_step:
        return ""
    return (
        f"losses are compared after equal steps, not equal time: in batches of {_batch(fast)} a "
        f"step of {slow.optimizer} takes {1000 * slow.seconds_a_step:.3g} ms, one of "
        f"{fast.optimizer} {1000 * fast.seconds_a_step:.3g} ms"
    )


def _held_out(race: Race, size: int | None) -> str:
    """Where the order on data that were held out is another; "" where it is not, or none are."""
    ranking = race.ranking(size)
    first = ranking[0]
    held_out = [(float(entry.validations.mean()), entry.optimizer) for entry in ranking]
    lowest, best = min((pair for pair in held_out if math.isfinite(pair[0])), default=(0.0, ""))
    if not best or best == first.optimizer:
        return ""
    return (
        f"the order is that of training losses; in batches of {_batch(first)} {best} has the "
        f"lowest validation loss, {lowest:.4g} against {held_out[0][0]:.4g} of {first.optimizer}"
    )


def summary(race: Race) -> JsonObject:
    """The numbers of the table and the words, JSON-able."""
    entries = [_numbers(entry) for size in race.batch_sizes for entry in race.ranking(size)]
    return {
        "data": race.described,
        "budget": race.budget,
        "seeds": list(race.seeds),
        "seconds": race.seconds,
        "entries": entries,
        "leaders": {str(size): name for size, name in race.leaders.items()},
        "notes": notes(race),
    }


def _row(entry: RaceEntry) -> list[str]:
    steps = "never" if entry.steps_to_level is None else f"{entry.steps_to_level:,}"
    validation = float(entry.validations.mean())
    return [
        entry.optimizer,
        _batch(entry),
        f"{entry.rate:.2g}",
        _loss(entry),
        "none" if math.isnan(validation) else f"{validation:.4g}",
        steps,
        f"{1000 * entry.seconds_a_step:.3g}",
        f"{entry.state_bytes / _MEBI:.3g} MiB",
    ]


def _loss(entry: RaceEntry) -> str:
    if not math.isfinite(entry.loss):
        return "diverged"
    if math.isnan(entry.spread):
        return f"{entry.loss:.4g}"
    return plus_minus(entry.loss, max(entry.spread, 1e-6 * abs(entry.loss)))


def _batch(entry: RaceEntry) -> str:
    return "as given" if entry.batch_size is None else str(entry.batch_size)


def _who_leads(race: Race, size: int | None) -> str:
    """The first of a batch size, and whether the second is behind by more than chance."""
    ranking = race.ranking(size)
    first = ranking[0]
    where = f"batches of {_batch(first)}"
    if not math.isfinite(first.loss):
        return f"{where}: every optimizer diverged"
    level = f"the level is {first.level:.4g}, the highest loss that any came to without diverging"
    if len(ranking) == 1:
        return f"{where}: {first.optimizer} comes to {first.loss:.4g} after {first.num_steps} steps"
    second = ranking[1]
    gap = second.loss - first.loss
    noise = math.hypot(first.spread, second.spread)
    told = (
        f"{first.optimizer} leads {second.optimizer} by {gap:.3g} after {first.num_steps:,} steps"
    )
    if not math.isnan(noise):
        is_clear = gap > 2 * noise / math.sqrt(len(race.seeds))
        told += ", more than seeds explain" if is_clear else ", no more than seeds explain"
    return f"{where}: {told}; {level}"


def _crossover(race: Race) -> str:
    """Where the leader changes with the batch size."""
    leaders = [(size, name) for size, name in race.leaders.items() if size is not None]
    leaders.sort()
    changes = [
        f"between {size} and {larger}, from {name} to {other}"
        for (size, name), (larger, other) in pairwise(leaders)
        if name != other
    ]
    if not changes:
        return f"crossover: none, {leaders[0][1]} leads at every batch size tried"
    return f"crossover: the leader changes {'; '.join(changes)}"


def _numbers(entry: RaceEntry) -> JsonObject:
    return {
        "optimizer": entry.optimizer,
        "batch_size": entry.batch_size,
        "steps": entry.num_steps,
        "rate": entry.rate,
        "loss": _number(entry.loss),
        "losses": [_number(loss) for loss in entry.losses.tolist()],
        "spread": _number(entry.spread),
        "validation": _number(float(entry.validations.mean())),
        "level": _number(entry.level),
        "steps_to_level": entry.steps_to_level,
        "seconds_a_step": entry.seconds_a_step,
        "state_bytes": entry.state_bytes,
        "at_edge": entry.at_edge,
        "rounds": [
            {
                "steps": tried.num_steps,
                "rates": tried.rates.tolist(),
                "losses": [_number(loss) for loss in tried.losses.tolist()],
            }
            for tried in entry.rounds
        ],
    }


def _number(value: float) -> float | str | None:
    """``value``; None where there is none, and a word where JSON has no such number."""
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else "diverged"
