"""The help pages, in plain text.

Typer would draw them with rich. That costs 0.1 s more than a help page may take, and breaks words at 80
columns; a page of plain text is instant, and reads the same in a terminal, a pipe and a bug report.
"""

import sys
import textwrap
from collections.abc import Sequence

from critic_train_cli.options import Option
from critic_train_cli.terminal import BOLD, CYAN, paint, width_of

FLAGS_WIDE = 28
GLUE = "\x00"
"""Stands for a space at which a line may not break."""
OWN_PANEL = "Configuration and output"

OWN_FLAGS: tuple[tuple[str, str, str], ...] = (
    ("--config", "FILE", "Read settings from a TOML file; flags and environment variables win over it."),
    ("--print-config", "", "Print each setting and where it came from, as TOML for --config; do nothing else."),
    ("--json", "", "Print the result as one JSON object on stdout, an error as one on stderr."),
    ("--quiet, -q", "", "No progress and no notices; warnings and the result remain."),
    ("--debug", "", "Show the traceback of an error."),
    ("--help, -h", "", "Show this page."),
)


def command_page(path: str, about: str, options: Sequence[Option], examples: Sequence[str]) -> str:
    """The help page of one command."""
    wide = width_of(sys.stdout)
    lines = [heading("Usage:") + f" {usage(path, options)}", "", *wrap(about, wide), ""]
    lines += [heading("Examples"), *(f"  {example}" for example in examples)]
    panels: dict[str, list[str]] = {}
    for option in options:
        default = default_of(option)
        shown = f"[default: {default}]".replace(" ", GLUE if len(default) < 20 else " ")
        words = f"{option.help} {shown}" if default else option.help
        panels.setdefault(option.panel, []).extend(
            entry(option.flag, "" if option.positional else option.metavar, words, wide)
        )
    panels[OWN_PANEL] = [line for flag, metavar, words in OWN_FLAGS for line in entry(flag, metavar, words, wide)]
    for panel, entries in panels.items():
        lines += ["", heading(panel), *entries]
    variables = (
        "Every setting can also come from the environment: CRITIC_TRAIN_BATCH_SIZE is --batch-size. "
        "CRITIC_TRAIN_PROGRESS=live, plain or 0 says how progress is shown."
    )
    return "\n".join([*lines, "", *wrap(variables, wide)])


def usage(path: str, options: Sequence[Option]) -> str:
    """The shape of a command line."""
    given = next((f"{option.metavar}..." for option in options if option.positional), "--data PATH")
    return f"{path} {given} [OPTIONS]"


def program_page(about: str, commands: Sequence[tuple[str, str]], flags: Sequence[tuple[str, str]]) -> str:
    """The help page of the program: its commands and few flags."""
    wide = width_of(sys.stdout)
    lines = [heading("Usage:") + " critic-train COMMAND [OPTIONS]", "", *wrap(about, wide)]
    for panel, rows in (("Commands", commands), ("Options", flags)):
        lines += ["", heading(panel)]
        for name, words in rows:
            lines += entry(name, "", words, wide)
    codes = (
        "Exit codes: 0 done, 1 a check said no, 2 command or configuration, 3 data, 4 model or checkpoint, "
        "5 diverged, 6 disk, memory, lock or device, 70 a bug of ours, 130 and 143 interrupted, "
        "141 nobody reads the output."
    )
    more = "critic-train COMMAND --help tells more of each."
    return "\n".join([*lines, "", *wrap(more, wide), *wrap(codes, wide)])


def default_of(option: Option) -> str:
    """The default as the page shows it; nothing where there is none to speak of."""
    if option.default is None:
        return option.unset
    if option.kind is bool or option.repeatable:
        return ""
    return f"{option.default:g}" if isinstance(option.default, float) else str(option.default)


def entry(flag: str, metavar: str, words: str, wide: int) -> list[str]:
    """A flag and its help: side by side where there is room, else one below the other."""
    left = f"{flag} {metavar}".rstrip()
    painted = paint(flag, CYAN, sys.stdout) + left[len(flag) :]
    if wide < 2 * FLAGS_WIDE:
        return [f"  {painted}", *wrap(words, wide, indent=6)]
    rest = wrap(words, wide, indent=FLAGS_WIDE)
    if len(left) + 4 > FLAGS_WIDE:
        return [f"  {painted}", *rest]
    return [f"  {painted}" + rest[0][2 + len(left) :], *rest[1:]]


def wrap(words: str, wide: int, indent: int = 0) -> list[str]:
    """Words in lines no wider than the page, but never narrower than a word or two."""
    margin = " " * indent
    lines = textwrap.wrap(
        words,
        max(wide, indent + 12),
        initial_indent=margin,
        subsequent_indent=margin,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(GLUE, " ") for line in lines]


def heading(words: str) -> str:
    """A heading stands out where the terminal can show it."""
    return paint(words, BOLD, sys.stdout)
