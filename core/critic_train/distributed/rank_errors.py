"""A fault of one rank in a form that another can raise: the same class, the same words, and whose it was."""

import traceback
from typing import Any

from critic_train import errors
from critic_train.errors import CriticTrainError, MachineError


class RankError(Exception):
    """Another rank met what nobody foresaw: a bug. Its traceback is a note of this error."""


def as_record(error: BaseException, rank: int) -> dict[str, Any]:
    """The fault as JSON can hold it."""
    record: dict[str, Any] = {"rank": rank, "kind": type(error).__name__, "message": str(error), "hint": ""}
    if isinstance(error, CriticTrainError):
        return record | {"message": error.message, "hint": error.hint}
    if isinstance(error, OSError) and error.errno is not None:
        where = error.filename if isinstance(error.filename, str) else str(error.filename or "")
        return record | {"errno": error.errno, "message": error.strerror or "", "where": where}
    if isinstance(error, GeneratorExit | KeyboardInterrupt):
        return record | {"kind": "MachineError", "message": "was told to leave before the run's end"}
    return record | {"traceback": "".join(traceback.format_exception(error))}


def as_error(record: dict[str, Any]) -> BaseException:
    """The fault again, to be raised here."""
    whose, words = f"rank {record['rank']}", str(record["message"])
    if record.get("errno") is not None:
        return OSError(int(record["errno"]), f"{words} (on {whose})", record["where"] or None)
    kind = getattr(errors, str(record["kind"]), None)
    if isinstance(kind, type) and issubclass(kind, CriticTrainError):
        return kind(f"{whose}: {words}", hint=str(record["hint"]))
    if "out of memory" in words.lower() or record["kind"] in ("MemoryError", "OutOfMemoryError"):
        return MachineError(
            f"{whose}: out of memory: {words.splitlines()[0][:200] if words else 'no more was given'}",
            hint="lower --max-tokens (it never changes the result), or use --precision bf16",
        )
    error = RankError(f"{whose}: {record['kind']}: {words}")
    error.add_note(str(record.get("traceback", "")))
    return error


LOST = (
    "connection closed",
    "connection reset",
    "connection refused",
    "connection was closed",
    "broken pipe",
    "timed out",
    "timeout",
    "failed to recv",
    "failed to send",
)


def looks_lost(error: BaseException) -> bool:
    """Whether an error tells that another rank is gone, rather than of something that happened here."""
    import torch.distributed as dist

    words = str(error).lower()
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(w in words for w in LOST))
