"""Everything that leaves the program goes through one object: results on stdout, all else on stderr."""

import contextlib
import json
import math
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from critic_train.text import without_secrets
from critic_train_cli.exit_codes import Fault, explain, write_crash_log
from critic_train_cli.terminal import BOLD, CYAN, RED, YELLOW, console_on, paint

if TYPE_CHECKING:
    from rich.console import Console


class Output:
    """Where words and results go, and in which form.

    Attributes:
        as_json: the result is one JSON object on stdout, an error one JSON object on stderr.
        quiet: no progress and no notices; warnings, errors and the result remain.
        debug: errors come with their traceback.
        silent: nothing is said at all: this is one of several ranks, and rank 0 speaks for all.
        run_directory: where a crash log belongs, once a run has one.
    """

    def __init__(
        self, *, as_json: bool = False, quiet: bool = False, debug: bool = False, silent: bool = False
    ) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.debug = debug
        self.silent = silent
        self.run_directory: str | None = None

    def result(self, result: dict[str, Any], draw: "Callable[[Console], None]") -> None:
        """Give the result of the command: as JSON, or as `draw` shows it on a console over stdout."""
        if self.silent:
            return
        if self.as_json:
            print(as_json_text(result), flush=True)
        else:
            draw(console_on(sys.stdout))

    def text(self, words: str) -> None:
        """Give a result that is already text."""
        if not self.silent:
            print(without_secrets(words), flush=True)

    def notice(self, message: str, level: str = "info") -> None:
        """Tell something worth hearing; a warning is told even when quiet."""
        if level == "warning":
            self.line(paint("warning:", YELLOW, sys.stderr) + " " + message)
        elif not self.quiet:
            self.line(paint("note:", CYAN, sys.stderr) + " " + message)

    def line(self, words: str) -> None:
        """Write one line to stderr. A reader who has gone away is no reason to stop a long job."""
        if self.silent:
            return
        with contextlib.suppress(OSError, ValueError):
            print(without_secrets(words), file=sys.stderr, flush=True)

    def error(self, error: BaseException) -> int:
        """Say what went wrong and what to do; returns the exit code."""
        fault = explain(error)
        if fault.is_bug and not self.silent:
            fault = self._with_crash_log(error, fault)
        if self.debug:
            self.line("".join(traceback.format_exception(error)).rstrip())
        if self.as_json and fault.message:
            told = {"message": fault.message, "hint": fault.hint, "exit_code": fault.exit_code}
            self.line(as_json_text({"error": told}))
        elif fault.message:
            self.line(paint("error:", RED, sys.stderr) + " " + fault.message.replace("\n", "\n       "))
            for hint in fault.hint.splitlines():
                self.line(paint("hint:", BOLD, sys.stderr) + " " + hint)
        return fault.exit_code

    def _with_crash_log(self, error: BaseException, fault: Fault) -> Fault:
        path = write_crash_log(error, self.run_directory)
        where = f"the traceback is in {path}; " if path else ""
        return Fault(
            exit_code=fault.exit_code,
            message=fault.message,
            hint=where + "please report it, with the command you ran",
            is_bug=True,
        )


def as_json_text(value: Any) -> str:
    """One line of strict JSON: a figure that is not finite becomes null, for NaN is no JSON."""
    return without_secrets(json.dumps(finite(value), allow_nan=False, default=plain))


def finite(value: Any) -> Any:
    """The same value with every non-finite float in it replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value


def plain(value: Any) -> Any:
    """What JSON has no form for: numpy scalars as numbers, all else as text."""
    return finite(value.item()) if hasattr(value, "item") else str(value)
