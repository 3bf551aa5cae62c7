"""The help pages: what they name, and that any width will do."""

import pytest


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_program_page(program, flag):
    shown = program(flag)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "Usage: critic-train COMMAND" in shown.stdout
    assert "fit  " in shown.stdout
    assert "eval  " in shown.stdout
    assert "70 a bug of ours" in shown.stdout


def test_command_page_gives_choices_defaults_and_their_meaning(program):
    page = program("fit", "-h").stdout
    assert "--preset tiny|small|base" in page
    assert "[default: 64]" in page
    assert "[default: 1e-5 with --model, more by as much as it is narrower than 2048," in " ".join(page.split())
    assert "CRITIC_TRAIN_BATCH_SIZE is --batch-size" in page


def test_twenty_columns_are_enough_for_the_page(program):
    shown = program("fit", "--help", COLUMNS="20")
    assert shown.returncode == 0
    prose = [line for line in shown.stdout.splitlines() if not line.startswith("  ")]
    assert "Run" in prose
