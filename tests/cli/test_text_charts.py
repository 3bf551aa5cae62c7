"""Charts in characters."""

import io

import pytest
from rich.console import Console

from critic_train_cli.text_charts import NARROWEST, WIDEST, Line, draw_charts, marks, on_a_scale, plane

ASCII, BOXES = marks(unicode=False), marks(unicode=True)


def test_a_rising_line():
    assert plane([Line("o", [0, 10], [0.0, 1.0])], width=16, height=3, signs=ASCII) == [
        "1.00 |       ooo",
        "     |   oooo",
        "0.00 |ooo",
        "     +----------",
        "      0       10",
    ]


def test_a_line_is_drawn_where_it_is():
    """Read back: in each column the mark stands in the row nearest to the line."""
    width, height = 46, 9
    shown = plane([Line("o", [0, 4, 10], [0.0, 8.0, 2.0])], width=width, height=height, signs=ASCII)
    margin = shown[0].index("|") + 1
    columns = width - margin
    for column in range(columns):
        x = 10 * column / (columns - 1)
        y = 2 * x if x <= 4 else 8 - (x - 4)
        [row] = [r for r in range(height) if shown[r].ljust(width)[margin + column] == "o"]
        assert row == round((8 - y) / 8 * (height - 1))


def test_later_lines_are_on_top_and_gaps_stay_open():
    shown = plane(
        [Line("-", [0, 10], [0.5, 0.5]), Line("o", [0, 1, 9, 10], [0.5, 0.5, None, 1.0])],
        width=30,
        height=5,
        signs=ASCII,
    )
    assert "o" in "".join(shown)
    assert shown[4].count("o") >= 2


@pytest.mark.parametrize(
    "lines",
    [[], [Line("o", [], [])], [Line("o", [1, 2], [None, float("nan")])], [Line("o", [1], [float("inf")])]],
)
def test_nothing_to_draw(lines):
    assert plane(lines, width=40, height=8, signs=BOXES) == []


def test_no_room():
    assert plane([Line("o", [0, 1], [0, 1])], width=10, height=8, signs=BOXES) == []


def test_one_point_and_a_flat_line():
    assert "".join(plane([Line("o", [3], [0.25])], width=30, height=5, signs=ASCII)).count("o") > 0
    flat = plane([Line("o", [0, 5], [0.25, 0.25])], width=30, height=5, signs=ASCII)
    assert flat[2].count("o") == 30 - flat[0].index("|") - 1


def test_a_figure_on_a_scale():
    def drawn(figure, interval, aim):
        return on_a_scale(figure, interval, aim, low=0.0, high=1.0, width=11, signs=ASCII)

    assert drawn(0.5, [0.3, 0.8], 0.1) == " | --o---"
    assert drawn(0.0, None, None) == "o"
    assert drawn(1.0, None, 1.0) == " " * 10 + "o"
    assert drawn(7.0, [-3.0, 7.0], None) == "-" * 10 + "o"


BIN = {"tokens": 10, "rollouts": 3}
VERDICT = {
    "critics": {
        "runs/a": {
            "calibration": [
                BIN | {"mean_value": 0.1, "mean_return": 0.2, "interval": [0.1, 0.3]},
                BIN | {"mean_value": 0.8, "mean_return": 0.7, "interval": None},
            ],
            "by_position": [
                {"from": 0.0, "to": 0.5, "explained_variance": 0.1},
                {"from": 0.5, "to": 1.0, "explained_variance": 0.3},
            ],
            "auc_by_position": [
                {"from": 0.0, "to": 0.5, "pairs": 4, "auc_within_group": 0.5, "interval": [0.4, 0.6]},
                {"from": 0.5, "to": 1.0, "pairs": 4, "auc_within_group": 0.9, "interval": None},
                {"from": 0.5, "to": 1.0, "pairs": 0, "auc_within_group": None, "interval": None},
            ],
        }
    }
}
EVALUATIONS = [
    {"step": step, "explained_variance": step / 40, "baselines": {"group_mean": {"explained_variance": 0.3}}}
    for step in (0, 10, 20)
]


def drawn(width, encoding="utf-8", verdict=VERDICT, evaluations=EVALUATIONS):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=stream, width=width, color_system=None, highlight=False, markup=False)
    draw_charts(console, verdict, evaluations)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding).splitlines()


@pytest.mark.parametrize("width", [NARROWEST, 40, 60, 80, 120, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_charts_fit_any_width(width, encoding):
    lines = drawn(width, encoding)
    titles = ["Held-out explained variance by step", "Calibration", "From which part of the response on"]
    titles += ["Explained variance along the response"]
    text = "\n".join(lines)
    assert all(title in " ".join(text.split()) for title in titles)
    assert max(map(len, lines)) <= min(width, WIDEST)
    if encoding == "ascii":
        assert text.isascii()


def test_a_narrow_terminal_has_the_figures_alone():
    assert drawn(20) == []


def test_what_is_not_there_is_not_drawn():
    assert drawn(80, verdict={}, evaluations=EVALUATIONS[:1]) == []
    assert drawn(80, verdict={"critics": {"a": {"calibration": [], "auc_by_position": []}}}, evaluations=[]) == []


def test_figures_stand_beside_the_charts():
    lines = drawn(80)
    assert any(line.split()[:4] == ["0.100", "0.200", "[0.100,", "0.300]"] for line in lines)
    assert any(line.split()[:3] == ["50-100", "%", "0.900"] for line in lines)
    assert sum("50-100 %" in line for line in lines) == 2
    assert any(line.split()[:3] == ["50-100", "%", "0.300"] for line in lines)


def test_eval_has_its_tables_for_what_varies_along_the_response():
    stream = io.StringIO()
    draw_charts(Console(file=stream, width=80), VERDICT, [], beside_tables=True)
    assert "Explained variance along" not in stream.getvalue()
    assert "tells right from wrong" in stream.getvalue()
