"""The pages of docs/commands are those that the commands declare."""

from pathlib import Path

from critic_train_cli.manual import pages

ROOT = Path(__file__).parents[2]


def test_the_manual_is_what_the_code_makes_of_it():
    """`./dev manual` writes the pages anew."""
    written = {page.name: page.read_text() for page in (ROOT / "docs" / "commands").glob("*.md")}
    assert written == pages()
