"""What a log file gets."""

import pytest

from critic_train.events import CheckpointSaved, EvaluationEnded, Notice, Progress, RunEnded, RunStarted, StepEnded
from critic_train_cli.output import Output
from critic_train_cli.plain_view import PlainView, View, format_value
from critic_train_cli.run_state import RunState

FULL = StepEnded(
    step=1,
    epoch=0,
    metrics={"value_loss": 0.04213, "clipfrac": 0.031, "saturation": 0.012, "grad_norm": 0.82, "lr": 4.7e-4},
    timing={"rollout_tokens_per_second": 12345, "computed_tokens_per_second": 5123, "memory_bytes": 1.2e9}
    | {"step_seconds": 2.5},
)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def view(clock):
    view = PlainView(Output(), stopping="stopping")
    view.state = RunState(clock)
    return view


def lines_after(view, capsys, *events):
    for event in events:
        view.show(event)
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def started(steps, first_step=0):
    return RunStarted(out="o", total_steps=steps, steps_per_epoch=[steps], first_step=first_step, summary={})


def step(number):
    return StepEnded(step=number, epoch=0, metrics={}, timing={})


def test_a_step_in_one_line(view, capsys):
    assert lines_after(view, capsys, started(4), FULL)[-1] == (
        "step 1/4  epoch 1/1  loss 0.04213  clipfrac 3.1 %  saturation 1.2 %  grad norm 0.82  lr 0.00047  "
        "12.3k tokens/s (5.12k computed)  memory 1.2 GB  left 0:08"
    )


def test_steps_at_log_every_and_at_both_ends(view, capsys):
    view.log_every = 3
    lines = lines_after(view, capsys, started(8), *map(step, range(1, 9)))
    assert [line.split()[1] for line in lines[1:]] == ["1/8", "3/8", "6/8", "8/8"]


def test_a_resumed_run_says_where_it_goes_on(view, capsys):
    view.log_every = 100
    lines = lines_after(view, capsys, started(8, first_step=5), *map(step, range(6, 8)))
    assert lines[1] == "going on after step 5 of 8"
    assert [line.split()[1] for line in lines[2:]] == ["6/8"]


def test_evaluations_checkpoints_and_notices_have_a_line_each(view, capsys):
    metrics = {"explained_variance": 0.41, "explained_variance_interval": [0.37, 0.44]}
    lines = lines_after(
        view,
        capsys,
        EvaluationEnded(step=5, metrics={**metrics, "explained_variance_within_group": 0.1}, best=True),
        EvaluationEnded(step=6, metrics={"explained_variance": None}, best=False),
        CheckpointSaved(step=6, path="o/checkpoints/step-00000006", size_bytes=82_000_000),
        Notice(message="a head was created"),
        Notice(message="rows were left out", level="warning"),
        RunEnded(status="finished"),
    )
    assert lines == [
        "step 5 held out: explained variance 0.410 [0.370, 0.440], within prompts 0.100, the best so far",
        "step 6 held out: explained variance -",
        "step 6 checkpoint: o/checkpoints/step-00000006 (82.0 MB)",
        "note: a head was created",
        "warning: rows were left out",
    ]


def test_a_stage_has_at_most_a_line_in_ten_seconds(view, clock, capsys):
    shown = []
    for second in range(35):
        clock.now = float(second)
        lines = lines_after(view, capsys, Progress(stage="reading rollouts", done=second * 1000, total=35_000))
        shown += [(second, line) for line in lines]
    assert shown == [
        (10, "reading rollouts: 10,000/35,000 rollouts (29 %)"),
        (20, "reading rollouts: 20,000/35,000 rollouts (57 %)"),
        (30, "reading rollouts: 30,000/35,000 rollouts (86 %)"),
    ]


def test_a_stage_that_begins_after_a_silence_is_named_at_once(view, clock, capsys):
    """It may be what takes long; where lines were written a moment ago, ten seconds must pass."""
    shown = []
    for now, stage, done in [(0, "a", 0), (1, "b", 0), (3, "c", 0), (4, "d", 0), (9, "d", 2), (13, "d", 3)]:
        clock.now = float(now)
        shown += lines_after(view, capsys, Progress(stage=stage, done=done, total=9))
    assert shown == ["c: 0/9 rollouts (0 %)", "d: 3/9 rollouts (33 %)"]


def test_many_short_stages_have_a_line_now_and_then(view, clock, capsys):
    """As many small files, of which none takes ten seconds."""
    shown = []
    for second in range(9):
        clock.now = float(second)
        shown += lines_after(view, capsys, Progress(stage=f"predicting {second}", done=1, total=2))
    assert shown == [f"predicting {second}: 1/2 rollouts (50 %)" for second in (2, 4, 6, 8)]


def test_the_start_is_told_in_lines_no_wider_than_the_terminal(view, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    summary = {"prompt_groups": 230, "response_tokens": 312034, "held_out": None, "lr": 5e-4, "packing": "forest"}
    event = RunStarted(out="runs/x", total_steps=1, steps_per_epoch=[1], first_step=0, summary=summary)
    assert lines_after(view, capsys, event) == [
        "run: runs/x   prompt groups: 230",
        "response tokens: 312,034   lr: 0.0005",
        "packing: forest",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "yes"), (12345, "12,345"), (0.1, "0.1"), ({"a": 1, "b": None}, "a 1, b -"), (["x", 2], "x, 2")],
)
def test_values_of_the_summary(value, text):
    assert format_value(value) == text


def test_quiet_view_tells_warnings_only(capsys):
    view = View(Output(quiet=True), stopping="stopping")
    events = [started(1), FULL, Notice(message="a"), Notice(message="b", level="warning")]
    assert lines_after(view, capsys, *events) == ["warning: b"]
    assert view.state.losses.points == [0.04213]
