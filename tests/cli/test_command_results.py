"""The end of a run on one screen."""

import io

import pytest
from rich.console import Console

from critic_train.events import RunEnded
from critic_train.settings import FitSettings
from critic_train_cli.command_results import draw_next, draw_summary

RESULT = {
    "status": "finished",
    "out": "runs/x",
    "steps": 120,
    "total_steps": 120,
    "best_step": 90,
    "checkpoint": "runs/x/checkpoints/step-00000120",
    "best": "runs/x/best",
    "report": "runs/x/report.html",
    "training": {"value_loss": 0.021},
    "explained_variance": 0.409,
    "explained_variance_interval": [0.359, 0.449],
    "explained_variance_within_group": 0.12,
    "baselines": {
        "constant": {"explained_variance": 0.0, "explained_variance_interval": [0.0, 0.0]},
        "group_mean": {"explained_variance": 0.352, "explained_variance_interval": [0.3, 0.4]},
    },
    "elapsed_seconds": 403.2,
}


def summary(result=RESULT, *, status="finished", losses=(0.1, 0.05, 0.02), width=100, encoding="utf-8", **settings):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=stream, width=width, color_system=None, highlight=False, markup=False)
    settings.setdefault("data", ["rollouts/"])
    ended = RunEnded(status=status, result=result)
    draw_summary(console, ended, list(losses))
    draw_next(console, ended, FitSettings(**settings))
    stream.flush()
    return [line.rstrip() for line in stream.buffer.getvalue().decode(encoding).splitlines()]


def test_a_finished_run():
    assert summary() == [
        "Finished: 120 steps in 6:43.",
        "",
        "training loss                 0.1 █▄▁ 0.02",
        "explained variance, held out",
        "  this critic                 0.409 [0.359, 0.449]  at step 90",
        "  constant mean               0.000",
        "  prompt group's mean         0.352 [0.300, 0.400]",
        "within prompts                0.120",
        "best                          runs/x/best",
        "newest checkpoint             runs/x/checkpoints/step-00000120",
        "report                        runs/x/report.html",
        "",
        "Next: critic-train eval --data rollouts/ --model runs/x/best",
        "(it was trained on most of these; rollouts it has not seen say more)",
    ]


def test_held_out_data_is_what_to_judge_on_next():
    lines = summary(val_data=["my val", "b"])
    assert lines[-1] == "Next: critic-train eval --data 'my val' --data b --model runs/x/best"


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"returns": "mc", "gamma": 0.9}, " --returns mc --gamma 0.9"),
        ({"returns": "gae", "lam": 0.95}, " --returns mc --lam-policy 0.95"),
        ({"column": ["returns=r"], "on_bad_rows": "skip"}, " --column returns=r --on-bad-rows skip"),
    ],
)
def test_the_next_command_carries_how_rollouts_are_read(settings, flags):
    """Without --returns mc, shards that store rewards alone cannot be judged."""
    [line] = [line for line in summary(**settings) if line.startswith("Next:")]
    assert line == f"Next: critic-train eval --data rollouts/{flags} --model runs/x/best"


def test_an_interrupted_run():
    result = {"steps": 7, "total_steps": 120, "checkpoint": "runs/x/checkpoints/step-00000007"}
    lines = summary(result, status="interrupted", losses=[0.1])
    assert lines[0] == "Interrupted after step 7 of 120."
    assert lines[-1] == "The same command goes on from there."
    assert summary({}, status="interrupted", losses=[]) == ["Interrupted before the first step."]


def test_a_run_that_was_finished_before():
    lines = summary(status="already finished", losses=[])
    assert lines[0] == "Already finished: 120 steps. Nothing was done."
    assert "training loss                 0.021" in lines
    assert lines[-1] == "Another run: the same command with another --out"


def test_a_run_without_held_out_rollouts():
    result = {"steps": 1, "best": None, "checkpoint": "runs/x/checkpoints/step-00000001", "elapsed_seconds": None}
    lines = summary(result, losses=[])
    assert lines[0] == "Finished: 1 step in -."
    assert not any("explained variance" in line for line in lines)
    assert any(line.endswith("--model runs/x/checkpoints/step-00000001") for line in lines)


def test_the_next_command_is_never_broken():
    assert "Next: critic-train eval --data rollouts/ --model runs/x/best" in summary(width=30)


@pytest.mark.parametrize("width", [20, 60, 200])
def test_any_width(width):
    assert summary(width=width)[-1].startswith("(it was trained")


def test_ascii():
    assert all(line.isascii() for line in summary(encoding="ascii"))
