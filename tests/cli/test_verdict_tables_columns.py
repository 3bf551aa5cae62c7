"""Parts of tables: headings, figures, and the first table that has room."""

import io

import pytest
from rich.console import Console

from critic_train_cli.verdict_tables import first_that_fits, fits, in_short, new_table


def drawn(table, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("name", "short"),
    [("runs/a/best", "a/\nbest"), ("/runs/", "runs"), ("constant mean", "constant\nmean"), ("critic", "critic")],
)
def test_a_path_is_cut_to_its_last_two_parts(name, short):
    assert in_short(name) == short


def test_the_first_table_with_room_is_taken_and_else_the_last_is_folded():
    wide, narrow = new_table("critic", ["explained variance", "mean squared error"]), new_table("critic", ["ev"])
    wide.add_row("a critic", "0.41", "0.07")
    narrow.add_row("a critic", "0.41")
    assert fits(Console(width=80), wide)
    assert not fits(Console(width=30), wide)
    assert first_that_fits(Console(width=80), [wide, narrow]) is wide
    assert first_that_fits(Console(width=30), [wide, narrow]) is narrow
    assert first_that_fits(Console(width=5), [wide, narrow]) is narrow


def test_figures_stand_right_and_a_bare_table_has_no_heading():
    table, bare = (new_table("critic", ["ev"], bare=bare) for bare in (False, True))
    for one in (table, bare):
        one.add_row("a", "0.41")
        one.add_row("b", "12.5")
    assert "critic" in drawn(table, 40)
    lines = [line.rstrip() for line in drawn(bare, 40).splitlines()]
    assert lines == ["a  0.41", "b  12.5"]
