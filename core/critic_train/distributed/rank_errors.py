"""An error of one rank in a form that another can raise: the same class and message, and which rank it was."""

import traceback
from typing import Any

from critic_train.errors import (
    ConfigError,
    CriticTrainError,
    DataError,
    DivergedError,
    MachineError,
    ModelError,
    out_of_memory_hint,
)

KINDS = {kind.__name__: kind for kind in (ConfigError, DataError, DivergedError, MachineError, ModelError)}


class RankError(Exception):
    """An unexpected error of another rank, a bug. Its traceback is a note of this error."""


def as_record(error: BaseException, rank: int) -> dict[str, Any]:
    """The error as JSON can hold it."""
    record: dict[str, Any] = {"rank": rank, "kind": type(error).__name__, "message": str(error), "hint": ""}
    if isinstance(error, CriticTrainError):
        return record | {"message": error.message, "hint": error.hint}
    if isinstance(error, OSError) and error.errno is not None:
        where = error.filename if isinstance(error.filename, str) else str(error.filename or "")
        return record | {"errno": error.errno, "message": error.strerror or "", "where": where}
    if isinstance(error, GeneratorExit | KeyboardInterrupt):
        return record | {"kind": "MachineError", "message": "was stopped before the run's end"}
    return record | {"traceback": "".join(traceback.format_exception(error))}


def as_error(record: dict[str, Any]) -> BaseException:
    """The error again, to be raised here."""
    whose, message = f"rank {record['rank']}", str(record["message"])
    if record.get("errno") is not None:
        return OSError(int(record["errno"]), f"{message} (on {whose})", record["where"] or None)
    kind = KINDS.get(str(record["kind"]))
    if kind is not None:
        return kind(f"{whose}: {message}", hint=str(record["hint"]))
    if "out of memory" in message.lower() or record["kind"] in ("MemoryError", "OutOfMemoryError"):
        return MachineError(
            f"{whose}: out of memory: {message.splitlines()[0][:200] if message else 'no details were given'}",
            hint=out_of_memory_hint(message),
        )
    error = RankError(f"{whose}: {record['kind']}: {message}")
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
    """Whether an error says that the connection to another rank is gone, rather than what happened here."""
    import torch.distributed as dist

    message = str(error).lower()
    lost = isinstance(error, RuntimeError) and any(phrase in message for phrase in LOST)
    return lost or isinstance(error, dist.DistError)
