"""The live view, driven by a script of events."""

import contextlib
import io

import pytest
from rich.console import Console
from support import lines_executed

from critic_train.events import CheckpointSaved, EvaluationEnded, Notice, Progress, RunStarted, StepEnded
from critic_train_cli.live import LiveView
from critic_train_cli.output import Output
from critic_train_cli.run_state import RunState


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def live(width, *, unicode=True):
    console = Console(file=io.StringIO(), width=width, height=30, force_terminal=True, color_system=None)
    view = LiveView(Output(), stopping="stopping after this micro-batch", console=console)
    view.state = RunState(Clock())
    view.unicode = unicode
    return view


def step(number, loss=0.04213):
    metrics = {"value_loss": loss, "clipfrac": 0.031, "saturation": 0.012, "grad_norm": 0.82, "lr": 4.7e-4}
    timing = {"rollout_tokens_per_second": 12345.0, "computed_tokens_per_second": 5123.0, "memory_bytes": 1.2e9}
    timing["step_seconds"] = 4.97
    return StepEnded(step=number, epoch=0, metrics=metrics, timing=timing)


def evaluation(number, value, best):
    metrics = {
        "explained_variance": value,
        "explained_variance_interval": [value - 0.04, value + 0.03],
        "explained_variance_within_group": 0.12,
    }
    return EvaluationEnded(step=number, metrics=metrics, best=best)


STARTED = RunStarted(out="runs/x", total_steps=200, steps_per_epoch=[100, 100], first_step=0, summary={"model": "m"})


def picture(view):
    return view.frame().plain.splitlines()


def follow(view, *events):
    for event in events:
        view.state.update(event)
    return picture(view)


def test_before_the_run_the_stage_is_shown():
    view = live(100)
    assert [line.strip() for line in picture(view)] == ["starting"]
    (line,) = follow(view, Progress(stage="reading rollouts", done=512, total=2048))
    assert line.split() == ["reading", "rollouts", "━" * 5 + "·" * 18, "512/2,048", "rollouts", "25", "%"]


def test_everything_worth_watching():
    view = live(100)
    follow(view, STARTED, *(step(n, 0.1 - n / 10_000) for n in range(1, 150)), evaluation(100, 0.41, True))
    view.state._clock.now = 745.0
    lines = follow(view, step(150), CheckpointSaved(step=100, path="p", size_bytes=1))
    assert lines[0] == "step      " + "━" * 37 + "·" * 13 + "  150/200  75 %"
    assert lines[1] == "epoch 2/2 " + "━" * 25 + "·" * 25 + "  50/100  50 %"
    assert lines[2].startswith("loss      0.04213  █")
    assert lines[2].endswith("▁   grad norm 0.82   lr 0.00047")
    assert lines[3:] == [
        "clip      clipfrac 3.1 %   saturation 1.2 %",
        "held out  explained variance 0.410 [0.370, 0.440]   within prompts 0.120   the best so far",
        "speed     12.3k rollout tokens/s   5.12k computed tokens/s   memory 1.2 GB",
        "time      12:25 elapsed   4:08 left   checkpoint at step 100",
    ]


def test_a_worse_evaluation_stands_beside_the_best():
    lines = follow(live(100), STARTED, evaluation(50, 0.41, True), evaluation(60, 0.39, False))
    assert "held out  explained variance 0.390 [0.350, 0.420]   within prompts 0.120   best 0.410 at step 50" in lines


def test_an_evaluation_shows_its_progress_below():
    lines = follow(live(100), STARTED, step(1), Progress(stage="evaluating", done=82, total=204))
    assert lines[-1].split()[0] == "evaluating"
    assert "82/204 rollouts  40 %" in lines[-1]


def test_figures_that_are_missing_are_dashes():
    lines = follow(live(100), STARTED, StepEnded(step=1, epoch=0, metrics={"clipfrac": None}, timing={}))
    assert "clip      clipfrac -   saturation -" in lines
    assert "speed     - rollout tokens/s   - computed tokens/s   memory -" in lines


@pytest.mark.parametrize("width", [20, 39, 60, 100, 240])
def test_no_line_is_wider_than_the_terminal(width):
    view = live(width)
    view.stopping()
    losses = (step(n, 1 / n) for n in range(1, 100))
    lines = follow(view, STARTED, *losses, evaluation(99, 0.4, True), Progress(stage="evaluating", done=1, total=9))
    assert max(map(len, lines)) < width
    assert len(lines) <= 40


def test_ascii():
    view = live(100, unicode=False)
    lines = follow(view, STARTED, step(1, 0.2), step(2, 0.1), step(100, 0.1))
    assert "\n".join(lines).isascii()
    assert "#" * 25 + "." * 25 in lines[0]


def test_a_signal_shows_in_the_next_picture():
    view = live(100)
    view.stopping()
    assert picture(view)[-1] == "stopping after this micro-batch (again to leave at once)"


def test_lines_worth_keeping_are_printed_above():
    view = live(100)
    written = view.console.file
    with view:
        for event in (Notice(message="a head was created"), STARTED, step(1), evaluation(1, 0.41, True)):
            view.show(event)
        assert "note: a head was created" in written.getvalue()
        assert "run: runs/x   model: m" in written.getvalue()
        assert "step 1 held out: explained variance 0.410" in written.getvalue()
    assert written.getvalue().count("\x1b[?25l") == written.getvalue().count("\x1b[?25h") == 1


def test_an_error_leaves_the_last_picture_standing():
    view = live(100)
    with contextlib.suppress(ValueError), view:
        view.show(STARTED)
        raise ValueError("words")
    assert "0/200  0 %" in view.console.file.getvalue().split("\x1b[?25l")[-1]


def test_redrawing_is_cheap():
    """Four pictures a second take as much of a core late in a run as early in it."""

    def cost(steps):
        view = live(100)
        follow(view, STARTED, *(step(n, 1 / n) for n in range(1, steps)), evaluation(99, 0.4, True))
        return lines_executed(lambda: view.console.print(view.frame()))

    assert cost(3000) < 1.2 * cost(300) < 12_000
