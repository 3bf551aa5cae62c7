"""The manual's page of each command, as Markdown, made from what the command declares.

    python -m critic_train_cli.manual docs/commands     writes the pages anew

A test holds the written pages to the code.
"""

import sys
from pathlib import Path

from critic_train_cli.command import Command
from critic_train_cli.help_page import OWN_FLAGS, OWN_PANEL, default_of, usage
from critic_train_cli.main import COMMANDS
from critic_train_cli.options import options_of

INDEX = "README.md"


def pages() -> dict[str, str]:
    """File name -> text, an index among them."""
    listed = [f"| [{command.name}]({command.name}.md) | {first_sentence(command)} |" for command in COMMANDS]
    index = ["# The commands", "", "Made from the code; `./dev manual` writes these pages anew.", ""]
    index += ["| command | what it does |", "|---|---|", *listed]
    return {INDEX: "\n".join(index) + "\n"} | {f"{command.name}.md": page(command) for command in COMMANDS}


def first_sentence(command: Command) -> str:
    """What the program's page says of a command."""
    return command.about.split(". ")[0].rstrip(".") + "."


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
        takes = "" if option.positional else option.metavar.replace("|", ", ")
        name = f"`{option.flag}` {takes}".rstrip()
        lines.append(f"| {name} | {cell(default_of(option))} | {cell(option.help)} |")
    lines += ["", f"## {OWN_PANEL}", "", "| flag | what |", "|---|---|"]
    lines += [f"| `{' '.join((flag, metavar)).rstrip()}` | {cell(words)} |" for flag, metavar, words in OWN_FLAGS]
    return "\n".join(lines) + "\n"


def cell(words: str) -> str:
    """Words in a table."""
    return words.replace("|", "\\|")


def write(folder: Path) -> None:
    """Write every page, and remove those of commands that are gone."""
    folder.mkdir(parents=True, exist_ok=True)
    made = pages()
    for stale in folder.glob("*.md"):
        if stale.name not in made:
            stale.unlink()
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
