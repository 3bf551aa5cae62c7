"""docs/commands: a page of Markdown for each command, generated from its settings.

    python -m critic_train_cli.manual docs/commands     writes the pages anew

A test compares the pages in the repository with what is generated.
"""

import sys
from pathlib import Path

from critic_train_cli.command import Command
from critic_train_cli.help_page import COMMON_FLAGS, COMMON_PANEL, default_of, usage
from critic_train_cli.main import COMMANDS
from critic_train_cli.options import options_of

INDEX = "README.md"


def pages() -> dict[str, str]:
    """File name -> text of every page and of the index."""
    listed = [f"| [{command.name}]({command.name}.md) | {command.summary} |" for command in COMMANDS]
    index = ["# The commands", "", "Made from the code; `./dev manual` writes these pages anew.", ""]
    index += ["| command | what it does |", "|---|---|", *listed]
    return {INDEX: "\n".join(index) + "\n"} | {f"{command.name}.md": page(command) for command in COMMANDS}


def page(command: Command) -> str:
    """The page of one command."""
    options = options_of(command.settings)
    lines = [f"# critic-train {command.name}", "", command.about, "", "```"]
    lines += [usage(f"critic-train {command.name}", options), "", *command.examples, "```"]
    panel = ""
    for option in options:
        if option.panel != panel:
            panel = option.panel
            lines += ["", f"## {panel}", "", "| flag | default | what |", "|---|---|---|"]
        metavar = "" if option.positional else option.metavar.replace("|", ", ")
        name = f"`{option.flag}` {metavar}".rstrip()
        lines.append(f"| {name} | {cell(default_of(option))} | {cell(option.help)} |")
    lines += ["", f"## {COMMON_PANEL}", "", "| flag | what |", "|---|---|"]
    lines += [f"| `{' '.join((flag, metavar)).rstrip()}` | {cell(text)} |" for flag, metavar, text in COMMON_FLAGS]
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return text.replace("|", "\\|")


def write(folder: Path) -> None:
    """Write every page, and remove pages of commands that no longer exist."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = pages()
    for stale in folder.glob("*.md"):
        if stale.name not in texts:
            stale.unlink()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
