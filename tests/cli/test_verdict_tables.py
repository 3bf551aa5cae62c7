"""The verdict as tables."""

import io

import pytest
from rich.console import Console

from critic_train_cli.verdict_tables import draw_verdict


def metrics(value, *, by=None):
    return {
        "explained_variance": value,
        "explained_variance_interval": None if value is None else [value - 0.04, value + 0.03],
        "explained_variance_within_group": 0.12,
        "mse": 0.0708,
        "mae": 0.21,
        "bias": -0.004,
        "pearson": None,
        "spearman": 0.61,
        "value_loss": 0.0354,
        "clipfrac": 0.031,
        "by_position": [
            {
                "from": i / 10,
                "to": (i + 1) / 10,
                "tokens": 12_034,
                "explained_variance": value,
                "mse": 0.1,
                "bias": 0.01,
                "mean_value": 0.4,
                "mean_return": 0.41,
            }
            for i in range(10)
        ],
        "by": by or {},
    }


def verdict(**critics):
    critics = critics or {"runs/a/best": metrics(0.41)}
    baselines = {"constant": metrics(0.0), "stored": metrics(0.301), "group_mean": metrics(0.352)}
    return {
        "words": ["It beats the constant mean."],
        "rollouts": 2048,
        "prompt_groups": 256,
        "response_tokens": 312_034,
        "returns": {"mean": 0.4127, "std": 0.36, "min": 0.0, "max": 1.0},
        "rows_left_out": {"count": 3},
        "critics": critics,
        "baselines": baselines,
    }


def drawn(result, width=200, encoding="utf-8"):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=stream, width=width, color_system=None, highlight=False, markup=False)
    draw_verdict(console, result)
    stream.flush()
    return [line.rstrip() for line in stream.buffer.getvalue().decode(encoding).splitlines()]


def test_words_come_first_then_the_data():
    lines = drawn(verdict())
    assert lines[:3] == [
        "- It beats the constant mean.",
        "",
        "2,048 rollouts, 256 prompt groups, 312,034 response tokens; returns 0.4127 on average, std 0.36, "
        "from 0 to 1; 3 rows left out",
    ]


def test_a_row_for_each_critic_and_baseline():
    rows = [line.split() for line in drawn(verdict())]
    rest = ["0.120", "-", "0.610", "0.0708", "0.210", "-0.0040", "0.0354", "3.1", "%"]
    assert ["runs/a/best", "0.410", "[0.370,", "0.440]", *rest] in rows
    assert ["constant", "mean", "0.000", "[-0.040,", "0.030]", *rest] in rows
    assert ["stored", "values", "0.301", "[0.261,", "0.331]", *rest] in rows
    assert ["prompt", "group's", "mean", "0.352", "[0.312,", "0.382]", *rest] in rows


def test_at_a_hundred_columns_the_figures_are_in_two_tables():
    lines = drawn(verdict(), width=100)
    assert sum(line.startswith("runs/a/best ") for line in lines) == 2
    assert max(map(len, lines)) <= 100


def test_narrow_terminals_get_a_block_each():
    lines = drawn(verdict(), width=60)
    assert "  explained variance 0.410 [0.370, 0.440]" in lines
    assert "  clipfrac           3.1 %" in lines
    assert max(map(len, lines)) <= 60


@pytest.mark.parametrize("width", [20, 30, 45, 74, 80, 120])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_any_width_and_encoding(width, encoding):
    by = {"task": {"math": {"tokens": 5, "rollouts": 1, "explained_variance": 0.2}}}
    critics = {f"runs/{name}/best": metrics(0.4, by=by) for name in "abc"}
    lines = drawn(verdict(**critics), width=width, encoding=encoding)
    assert max(map(len, lines)) <= width
    assert any("0.400" in line for line in lines)


def test_deciles_of_the_response():
    lines = drawn(verdict())
    rows = [line.split() for line in lines[lines.index("By position in the response: explained variance") :]]
    assert ["0-10", "%", "12.0k", "0.410", "0.400", "0.100", "+0.0100", "0.410", "0.301", "0.352"] in rows
    assert sum(row[1:2] == ["%"] for row in rows) == 10


def test_a_table_for_each_column():
    by = {
        "task": {
            "math": {"tokens": 500, "rollouts": 10, "explained_variance": 0.2, "mse": 0.1, "bias": 0.0},
            "code": {"tokens": 900, "rollouts": 20, "explained_variance": None},
        },
        "length": {"long": {"tokens": 1, "rollouts": 1, "explained_variance": 0.5}},
    }
    lines = drawn(verdict(critic=metrics(0.41, by=by)))
    rows = [line.split() for line in lines]
    assert ["code", "20", "900", "-", "-", "-", "-"] in rows
    assert ["math", "10", "500", "0.200", "-", "0.100", "+0.0000"] in rows
    assert rows.index(["code", "20", "900", "-", "-", "-", "-"]) < rows.index(
        ["math", "10", "500", "0.200", "-", "0.100", "+0.0000"]
    )
    assert "By length: explained variance" in lines


def test_a_column_shows_auc_where_a_value_has_one():
    row = {"tokens": 900, "rollouts": 20, "explained_variance": 0.1, "mse": 0.1, "bias": 0.0}
    by = {"task": {"code": row | {"auc_within_group": 0.7}, "chat": row | {"auc_within_group": None}}}
    rows = [line.split() for line in drawn(verdict(critic=metrics(0.41, by=by)))]
    assert ["code", "20", "900", "0.100", "-", "0.700", "0.100", "+0.0000"] in rows
    assert ["chat", "20", "900", "0.100", "-", "-", "0.100", "+0.0000"] in rows


def test_a_column_of_many_values_shows_the_largest():
    by = {"uid": {f"u{n:03}": {"tokens": n, "rollouts": 1, "explained_variance": 0.1} for n in range(500)}}
    lines = drawn(verdict(critic=metrics(0.41, by=by)))
    assert sum(line.startswith("u") and line[1:4].isdigit() for line in lines) == 20
    assert any(line.startswith("u499") for line in lines)
    assert "  and 480 more values; --json has them all" in lines


def test_differences_are_paired():
    critic = metrics(0.41) | {
        "explained_variance_minus": {
            "stored": {"difference": 0.109, "interval": [0.05, 0.15]},
            "group_mean": {"difference": None, "interval": None},
        }
    }
    result = verdict(a=critic, b=metrics(0.4)) | {"differences": {"a - b": {"difference": 0.01, "interval": None}}}
    lines = [" ".join(line.split()) for line in drawn(result)]
    assert "a - stored values +0.109 [0.050, 0.150]" in lines
    assert "a - b +0.010" in lines
    assert not any("prompt group's mean +" in line for line in lines)


DEEP = {
    "auc_within_group": 0.712,
    "auc_within_group_interval": [0.65, 0.77],
    "tells_apart_from": 0.3,
    "variance_reduction": 0.231,
    "variance_reduction_interval": [0.12, 0.314],
    "expected_calibration_error": 0.0412,
    "monte_carlo": None,
    "auc_by_position": [{"auc_within_group": 0.5 + i / 20} for i in range(10)],
}


def test_what_a_critic_is_worth_to_a_policy():
    rows = [line.split() for line in drawn(verdict(critic=metrics(0.41) | DEEP))]
    told = ["critic", "0.712", "[0.650,", "0.770]", "30", "%", "-23", "%", "[-31,", "-12]", "0.0412"]
    assert told in rows  # no column for Monte-Carlo returns: nobody has a figure
    assert ["90-100", "%", "12.0k", "0.410", "0.400", "0.950", "0.100", "+0.0100", "0.410", "0.301", "0.352"] in rows
    found = {"explained_variance": 0.2, "explained_variance_interval": [0.1, 0.3]}
    rows = [line.split() for line in drawn(verdict(critic=metrics(0.41) | DEEP | {"monte_carlo": found}))]
    assert [*told, "0.200", "[0.100,", "0.300]"] in rows
    other = {"auc_within_group": None, "tells_apart_from": None, "expected_calibration_error": 0.05}
    rows = [line.split() for line in drawn(verdict(a=metrics(0.4) | other, b=metrics(0.4) | DEEP))]
    assert ["a", "-", "-", "-", "0.0500"] in rows


def test_what_it_is_worth_on_a_narrow_terminal():
    lines = drawn(verdict(critic=metrics(0.41) | DEEP), width=60)
    assert "  advantage variance against GRPO's -23 % [-31, -12]" in lines
    assert max(map(len, lines)) <= 60


def test_two_critics_are_compared_in_four_figures():
    four = {"difference": 0.01, "interval": None} | {
        "explained_variance_within_group": {"difference": 0.02, "interval": [-0.1, 0.1]},
        "auc_within_group": {"difference": None, "interval": None},
        "mse": {"difference": -0.03, "interval": None},
    }
    result = verdict(a=metrics(0.41), b=metrics(0.4)) | {"differences": {"a - b": four}}
    lines = [" ".join(line.split()) for line in drawn(result)]
    at = lines.index("a - b +0.010")
    assert lines[at + 1 : at + 3] == ["within prompts +0.020 [-0.100, 0.100]", "MSE -0.030"]
    assert not any("AUC" in line for line in lines[at:])


def test_stored_values_that_are_judged_are_no_baseline_as_well():
    lines = drawn(verdict(stored=metrics(0.301)))
    table = lines[: lines.index("By position in the response: explained variance")]
    assert sum(line.startswith("stored values") for line in table) == 1


@pytest.mark.parametrize(
    "result",
    [
        {"critics": {"a": {}}, "baselines": {}},
        {"critics": {"a": metrics(None)}, "returns": None, "words": None},
        {"baselines": {"constant": {"explained_variance": None}}},
    ],
)
def test_what_is_missing_is_left_out(result):
    assert drawn(result)


def test_nothing_judged():
    assert drawn({}) == ["Interrupted: nothing was judged."]
