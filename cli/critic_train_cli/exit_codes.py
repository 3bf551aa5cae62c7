"""From an exception to the exit code and the error message.

Typer's usage errors are recognised by their attributes (`format_message`, `exit_code`): its exception classes moved
between releases, the attributes did not.
"""

import errno
import os
import tempfile
import traceback
from dataclasses import dataclass

from critic_train.errors import (
    ConfigError,
    CriticTrainError,
    DataError,
    DivergedError,
    MachineError,
    ModelError,
    out_of_memory_hint,
)
from critic_train.text import without_secrets

DONE, REFUSED, USAGE, DATA, MODEL, DIVERGED, MACHINE, BUG, CLOSED = 0, 1, 2, 3, 4, 5, 6, 70, 141
INTERRUPTED = 128
"""128 + the signal's number is the exit code of an interrupted job."""

EXIT_CODES: dict[type[CriticTrainError], int] = {
    ConfigError: USAGE,
    DataError: DATA,
    ModelError: MODEL,
    DivergedError: DIVERGED,
    MachineError: MACHINE,
}

MACHINE_ERRNOS = {
    errno.ENOSPC: "free some space, or give another --out",
    errno.EDQUOT: "free some of the quota, or give another --out",
    errno.EACCES: "check who may read and write there",
    errno.EPERM: "check who may read and write there",
    errno.EROFS: "give a directory that can be written to",
    errno.EIO: "the disk failed to read or write; check it before going on",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "the machine has no open files left",
    errno.ENOMEM: "lower --max-tokens; it never changes the result",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The exit code for an exception, and what is printed of it.

    Attributes:
        exit_code: of the program.
        message: what happened and where.
        hint: what to do about it, or an empty string.
        is_bug: whether it is a bug of critic-train.
    """

    exit_code: int
    message: str
    hint: str = ""
    is_bug: bool = False


def explain(error: BaseException) -> Failure:
    """Find the exit code and the message of an exception. What is not listed here is a bug (exit code 70)."""
    if isinstance(error, CriticTrainError):
        code = next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), BUG)
        return Failure(exit_code=code, message=error.message, hint=error.hint)
    if isinstance(error, KeyboardInterrupt):
        return Failure(exit_code=INTERRUPTED + 2, message="interrupted")
    if isinstance(error, BrokenPipeError):
        return Failure(exit_code=CLOSED, message="")
    if is_out_of_memory(error):
        first = str(error).split("\n")[0][:200]
        return Failure(
            exit_code=MACHINE,
            message=f"out of memory: {first or 'no details were given'}",
            hint=out_of_memory_hint(first),
        )
    if isinstance(error, OSError) and error.errno in MACHINE_ERRNOS:
        where = f": {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes) else ""
        reason = (error.strerror or os.strerror(error.errno)).lower()
        return Failure(exit_code=MACHINE, message=f"{reason}{where}", hint=MACHINE_ERRNOS[error.errno])
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        return usage_failure(error)
    kind = type(error).__name__
    return Failure(exit_code=BUG, message=f"this is a bug in critic-train ({kind}: {error})", is_bug=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or a device. torch's class is recognised by name: torch is not imported."""
    if isinstance(error, MemoryError) or any(k.__name__ == "OutOfMemoryError" for k in type(error).__mro__):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in message or "can't allocate memory" in message)


def usage_failure(error: BaseException) -> Failure:
    """A usage error of Typer, reworded, with the flag or command that was probably meant."""
    from difflib import get_close_matches

    context = getattr(error, "ctx", None)
    path = getattr(context, "command_path", None) or "critic-train"
    listing = f"{path} --help lists every {'command' if path == 'critic-train' else 'flag'}"
    unknown = getattr(error, "option_name", None)
    if unknown is not None and "no such option" in str(error).lower():
        flags = [flag for param in getattr(context.command, "params", []) for flag in param.opts] if context else []
        close = get_close_matches(unknown, flags, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return Failure(exit_code=USAGE, message=f"no such option: {unknown}", hint=hint + listing)
    message = error.format_message().strip().rstrip(".")  # type: ignore[attr-defined]
    head, _, meant = message.partition(". Did you mean ")
    if meant:
        return Failure(exit_code=USAGE, message=lower_first(head), hint=f"did you mean {meant} {listing}")
    if "unexpected extra argument" in message:
        message = f"unexpected argument: {message.partition('(')[2].rpartition('(')[2].rstrip(')')}"
        listing = "values belong to flags, as in --data rollouts/; " + listing
    return Failure(exit_code=USAGE, message=lower_first(message), hint=listing)


def lower_first(text: str) -> str:
    """`No such command` -> `no such command`, because it follows `error: `."""
    return text[:1].lower() + text[1:]


def write_crash_log(error: BaseException, run_directory: str | None) -> str | None:
    """Write the traceback to `crash.log` in the run directory, else to a temporary file.

    Returns:
        The path, or None where neither could be written.
    """
    text = without_secrets("".join(traceback.format_exception(error)))
    try:
        if run_directory and os.path.isdir(run_directory):
            path = os.path.join(run_directory, "crash.log")
            with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            return path
    except OSError:
        pass
    try:
        handle, path = tempfile.mkstemp(prefix="critic-train-crash-", suffix=".log")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        return None
    return path
