"""The help pages, as plain text.

Typer would draw them with rich, which takes 0.1 s to import and breaks words at 80 columns. Plain text is the same in a
terminal, a pipe and a bug report.
"""

import sys
import textwrap
from collections.abc import Sequence

from critic_train_cli.options import Option
from critic_train_cli.terminal import BOLD, CYAN, paint, width_of

FLAG_COLUMN = 28
"""Columns of flag and metavar, beside which the help stands."""
NO_BREAK = "\x00"
"""Replaces a space at which a line may not break."""
COMMON_PANEL = "Configuration and output"

COMMON_FLAGS: tuple[tuple[str, str, str], ...] = (
    ("--config", "FILE", "Read settings from a TOML file; flags and environment variables win over it."),
    ("--print-config", "", "Print each setting and where it came from, as TOML for --config; do nothing else."),
    ("--json", "", "Print the result as one JSON object on stdout, an error as one on stderr."),
    ("--quiet, -q", "", "No progress and no notices; warnings and the result remain."),
    ("--debug", "", "Show the traceback of an error."),
    ("--help, -h", "", "Show this page."),
)
"""(flag, metavar, help) of the flags that every command has."""


def command_page(path: str, about: str, options: Sequence[Option], examples: Sequence[str]) -> str:
    """The help page of one command.

    Args:
        path: how it is called: "critic-train fit".
        about: what it does.
        options: its options, by panel.
        examples: command lines.
    """
    width = width_of(sys.stdout)
    lines = [heading("Usage:") + f" {usage(path, options)}", "", *wrap(about, width), ""]
    lines += [heading("Examples"), *(f"  {example}" for example in examples)]
    panels: dict[str, list[str]] = {}
    for option in options:
        default = default_of(option)
        shown = f"[default: {default}]".replace(" ", NO_BREAK if len(default) < 20 else " ")
        text = f"{option.help} {shown}" if default else option.help
        panels.setdefault(option.panel, []).extend(
            entry(option.flag, "" if option.positional else option.metavar, text, width)
        )
    panels[COMMON_PANEL] = [line for flag, metavar, text in COMMON_FLAGS for line in entry(flag, metavar, text, width)]
    for panel, entries in panels.items():
        lines += ["", heading(panel), *entries]
    variables = (
        "Every setting can also come from the environment: CRITIC_TRAIN_BATCH_SIZE is --batch-size. "
        "CRITIC_TRAIN_PROGRESS=live, plain or 0 says how progress is shown."
    )
    return "\n".join([*lines, "", *wrap(variables, width)])


def usage(path: str, options: Sequence[Option]) -> str:
    """The usage line: `critic-train fit --data PATH [OPTIONS]`."""
    given = next((f"{option.metavar}..." for option in options if option.positional), "--data PATH")
    return f"{path} {given} [OPTIONS]"


def program_page(about: str, commands: Sequence[tuple[str, str]], flags: Sequence[tuple[str, str]]) -> str:
    """The help page of the program.

    Args:
        about: what the program does.
        commands: (name, summary) of each.
        flags: (flag, help) of the program's own.
    """
    width = width_of(sys.stdout)
    lines = [heading("Usage:") + " critic-train COMMAND [OPTIONS]", "", *wrap(about, width)]
    for panel, rows in (("Commands", commands), ("Options", flags)):
        lines += ["", heading(panel)]
        for name, text in rows:
            lines += entry(name, "", text, width)
    codes = (
        "Exit codes: 0 done, 1 a check said no, 2 command or configuration, 3 data, 4 model or checkpoint, "
        "5 diverged, 6 disk, memory, lock or device, 70 a bug of ours, 130 and 143 interrupted, "
        "141 the reader of stdout went away."
    )
    more = "critic-train COMMAND --help tells more of each."
    return "\n".join([*lines, "", *wrap(more, width), *wrap(codes, width)])


def default_of(option: Option) -> str:
    """The default as the page shows it; an empty string for flags without a value and for lists."""
    if option.default is None:
        return option.unset
    if option.kind is bool or option.repeatable:
        return ""
    return f"{option.default:g}" if isinstance(option.default, float) else str(option.default)


def entry(flag: str, metavar: str, text: str, width: int) -> list[str]:
    """A flag and its help, side by side where there is room, else one below the other."""
    left = f"{flag} {metavar}".rstrip()
    painted = paint(flag, CYAN, sys.stdout) + left[len(flag) :]
    if width < 2 * FLAG_COLUMN:
        return [f"  {painted}", *wrap(text, width, indent=6)]
    rest = wrap(text, width, indent=FLAG_COLUMN)
    if len(left) + 4 > FLAG_COLUMN:
        return [f"  {painted}", *rest]
    return [f"  {painted}" + rest[0][2 + len(left) :], *rest[1:]]


def wrap(text: str, width: int, indent: int = 0) -> list[str]:
    """The text in lines of at most `width` columns, indented; at least 12 columns remain for it."""
    margin = " " * indent
    lines = textwrap.wrap(
        text,
        max(width, indent + 12),
        initial_indent=margin,
        subsequent_indent=margin,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(NO_BREAK, " ") for line in lines]


def heading(text: str) -> str:
    """A heading, in bold where the terminal has colours."""
    return paint(text, BOLD, sys.stdout)
