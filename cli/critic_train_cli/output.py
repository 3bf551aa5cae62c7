"""All output of the program: results go to stdout, everything else to stderr."""

import contextlib
import json
import math
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from critic_train.text import without_secrets
from critic_train_cli.exit_codes import Failure, explain, write_crash_log
from critic_train_cli.terminal import BOLD, CYAN, RED, YELLOW, console_on, paint

if TYPE_CHECKING:
    from rich.console import Console


class Output:
    """Prints results, notices and errors.

    Attributes:
        as_json: the result is one JSON object on stdout, an error one JSON object on stderr.
        quiet: no progress and no notices; warnings, errors and the result remain.
        debug: errors come with their traceback.
        silent: print nothing: this is one of several ranks, of which rank 0 prints.
        run_directory: where a crash log goes; None until a run has a directory.
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
        """Print the result of the command: as JSON, or as `draw` prints it on a console over stdout."""
        if self.silent:
            return
        if self.as_json:
            print(as_json_text(result), flush=True)
        else:
            draw(console_on(sys.stdout))

    def text(self, text: str) -> None:
        """Print a result that is already text."""
        if not self.silent:
            print(without_secrets(text), flush=True)

    def notice(self, message: str, level: str = "info") -> None:
        """Print a note, or a warning, which is printed with --quiet too."""
        if level == "warning":
            self.line(paint("warning:", YELLOW, sys.stderr) + " " + message)
        elif not self.quiet:
            self.line(paint("note:", CYAN, sys.stderr) + " " + message)

    def line(self, text: str) -> None:
        """Print one line on stderr. A closed stderr is ignored: it must not end a long job."""
        if self.silent:
            return
        with contextlib.suppress(OSError, ValueError):
            print(without_secrets(text), file=sys.stderr, flush=True)

    def error(self, error: BaseException) -> int:
        """Print an error and what to do about it; returns the exit code."""
        failure = explain(error)
        if failure.is_bug and not self.silent:
            failure = self._with_crash_log(error, failure)
        if self.debug:
            self.line("".join(traceback.format_exception(error)).rstrip())
        if self.as_json and failure.message:
            fields = {"message": failure.message, "hint": failure.hint, "exit_code": failure.exit_code}
            self.line(as_json_text({"error": fields}))
        elif failure.message:
            self.line(paint("error:", RED, sys.stderr) + " " + failure.message.replace("\n", "\n       "))
            for hint in failure.hint.splitlines():
                self.line(paint("hint:", BOLD, sys.stderr) + " " + hint)
        return failure.exit_code

    def _with_crash_log(self, error: BaseException, failure: Failure) -> Failure:
        path = write_crash_log(error, self.run_directory)
        where = f"the traceback is in {path}; " if path else ""
        return replace(failure, hint=where + "please report it, with the command you ran")


def as_json_text(value: Any) -> str:
    """One line of strict JSON, which has no NaN and no infinity: both become null."""
    return without_secrets(json.dumps(without_non_finite(value), allow_nan=False, default=to_json))


def without_non_finite(value: Any) -> Any:
    """The value with every float in it that is not finite replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): without_non_finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_non_finite(inner) for inner in value]
    return value


def to_json(value: Any) -> Any:
    """A value of a type that JSON lacks: a numpy scalar as a number, anything else as text."""
    return without_non_finite(value.item()) if hasattr(value, "item") else str(value)
