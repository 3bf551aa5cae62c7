"""Rollouts in the terminal: lines cut by columns, figures beside them, shades."""

import io

import pytest
from rich.console import Console

from critic_train_cli.rollout_view import ABOVE, BELOW, columns_of, cut, draw_rollouts, shade, shades_of

ROLLOUT = {
    "uid": "17",
    "file": "a.parquet",
    "row": 3,
    "of": 4,
    "mean_value": 0.5,
    "mean_return": 1.0,
    "texts": ["What", " is", " 2+2?", " It", " is", " 4", "\n", "Yes"],
    "response_mask": [False, False, False, True, True, True, False, True],
    "values": [None, None, None, 0.2, 0.4, 0.6, None, 0.8],
    "old_values": [None, None, None, 0.1, 0.1, 0.1, None, 0.3],
    "returns": [None, None, None, 1.0, 1.0, 1.0, None, 1.0],
}


def drawn(rollouts, monkeypatch, *, colour=False, width=60):
    monkeypatch.setenv("NO_COLOR" if not colour else "FORCE_COLOR", "1")
    stream = io.StringIO()
    draw_rollouts(Console(file=stream, width=width), rollouts)
    return stream.getvalue()


def test_text_and_the_means_of_each_line(monkeypatch):
    assert drawn([ROLLOUT], monkeypatch) == (
        "\n"
        "uid 17 (4 rollouts)  a.parquet row 3  mean value 0.500, mean return 1.000\n"
        f"{'':35}{'value':>8}{'old':>8}{'return':>8}\n"
        "What is 2+2?\n"
        f"{' It is 4':35}{'0.400':>8}{'0.100':>8}{'1.000':>8}\n"
        f"{'Yes':35}{'0.800':>8}{'0.300':>8}{'1.000':>8}\n"
    )


def test_what_is_not_there_has_no_column(monkeypatch):
    text = drawn([ROLLOUT | {"old_values": None, "returns": None, "mean_return": None, "file": None}], monkeypatch)
    assert text.splitlines()[1:3] == ["text  mean value 0.500", f"{'':51}{'value':>8}"]


def test_tokens_are_shaded_about_the_mean(monkeypatch):
    text = drawn([ROLLOUT], monkeypatch, colour=True)
    assert text.startswith("0.200 ")
    assert f"\x1b[38;5;16;48;5;{BELOW[-1]}m It\x1b[0m" in text, "the lowest value has the full shade"
    assert f"\x1b[38;5;16;48;5;{ABOVE[-1]}mYes\x1b[0m" in text
    assert "\x1b[2mWhat is 2+2?\x1b[0m" in text


@pytest.mark.parametrize(
    ("value", "colour"),
    [(0.5, None), (0.52, None), (0.6, ABOVE[1]), (1.0, ABOVE[-1]), (9.0, ABOVE[-1]), (0.4, BELOW[1])],
)
def test_shades(value, colour):
    assert shade(value, 0.5, 0.5) == colour


def test_equal_values_have_no_shade():
    middle, span = shades_of([ROLLOUT | {"values": [None, 0.3, 0.3]}])
    assert span == pytest.approx(0.0, abs=1e-12)
    assert shade(0.3, middle, 0.0) is None


def test_lines_are_cut_by_columns_and_line_ends():
    lines = [["".join(piece.text for piece in line)] for line in cut(["abc", "日本語", "\n", "e\u0301f"], 0, 5)]
    assert [line[0] for line in lines] == ["abc日", "本語", "e\u0301f"]
    assert max(columns_of(line[0]) for line in lines) <= 5


def test_what_moves_the_cursor_is_not_printed(monkeypatch):
    text = drawn([ROLLOUT | {"texts": ["\x1b[2J"] * 8, "uid": "\x1b[H"}], monkeypatch)
    assert "\x1b" not in text


def test_a_long_prompt_shows_its_end(monkeypatch):
    texts = [f"line {number}\n" for number in range(9)] + ["answer"]
    rollout = ROLLOUT | {"texts": texts, "response_mask": [False] * 9 + [True], "values": [None] * 9 + [1.0]}
    rollout |= {"old_values": None, "returns": None}
    lines = drawn([rollout], monkeypatch).splitlines()
    assert lines[3:8] == ["...", "line 5", "line 6", "line 7", "line 8"]
