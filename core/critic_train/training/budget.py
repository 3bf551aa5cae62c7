"""The token budget over a run's stops: where memory ran out once, a resumed run starts with what was enough."""

from typing import Any

from critic_train.model.compute import Compute
from critic_train.settings import FitSettings


def budget_record(settings: FitSettings, compute: Compute) -> dict[str, int]:
    """What a checkpoint remembers of it.

    `asked` is --max-tokens and `max_tokens` what memory had room for, on each of `ranks` processes.
    """
    return {"asked": settings.max_tokens, "max_tokens": compute.max_tokens, "ranks": compute.ranks.size}


def take_up_budget(record: dict[str, Any] | None, settings: FitSettings, compute: Compute) -> str:
    """Lower `compute.max_tokens` to what a checkpoint remembers.

    Another --max-tokens than before is taken at its word, and so is the same one on another number of ranks: each then
    holds another part of the weights.

    Args:
        record: of `budget_record`; None where the checkpoint has none.
        settings: of this start.
        compute: its `max_tokens` is lowered.

    Returns:
        What to tell the user; nothing where nothing was lowered.

    Raises:
        KeyError, TypeError, ValueError: it is no such record.
    """
    if record is None:
        return ""
    asked, lowered, size = (record[name] for name in ("asked", "max_tokens", "ranks"))
    if not all(type(number) is int and number > 0 for number in (asked, lowered, size)):
        raise ValueError("a token budget that is no whole number")
    if (asked, size) != (settings.max_tokens, compute.ranks.size) or lowered >= compute.max_tokens:
        return ""
    compute.start_at(lowered)
    return (
        f"memory ran out with {asked:,} tokens at once before: starting with {lowered:,}; the result is the same. "
        f"Any other --max-tokens than {asked} is tried as it is"
    )
