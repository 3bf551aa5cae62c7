"""Which checkpoint is the best, and when a run has waited long enough for a better one."""

import json
from pathlib import Path

import pytest
from support import readable_rollouts, write_shard

from critic_train.events import Event, Notice, RunEnded, StepEnded
from critic_train.run.checkpoint import checkpoint_name
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rollouts")
    write_shard(folder / "a.parquet", readable_rollouts(24, seed=1))
    return folder


def settings_for(shards: Path, out: Path, **changes: object) -> FitSettings:
    defaults = {"data": [str(shards)], "out": str(out), "preset": "tiny", "batch_size": 16, "device": "cpu"}
    defaults |= {"epochs": 12, "eval_every": 1, "lr": 3e-3, "lr_schedule": "constant", "val_fraction": 0.4}
    defaults |= {"no_report": True}
    return FitSettings(**(defaults | changes))  # type: ignore[arg-type]


def run(shards: Path, out: Path, **changes: object) -> list[Event]:
    return list(fit(settings_for(shards, out, **changes), StopRequest()))


def judged(out: Path, figure: str = "explained_variance") -> list[tuple[int, float]]:
    """(step, figure) of every evaluation but the first, at step 0."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r[figure]) for r in records if r["event"] == "evaluation" and r["step"] > 0]


def steps_until(figures: list[tuple[int, float]], patience: int) -> int:
    """The step at which `patience` evaluations in a row were no better than the best before them."""
    best, since = float("-inf"), 0
    for step, figure in figures:
        best, since = (figure, 0) if figure > best else (best, since + 1)
        if since == patience:
            return step
    return figures[-1][0]


@pytest.fixture(scope="module")
def patient(shards, tmp_path_factory) -> tuple[Path, list[Event]]:
    """A run with --patience 3: its directory and events."""
    out = tmp_path_factory.mktemp("patient")
    return out, run(shards, out, patience=3)


def test_patience_ends_a_run_that_gets_no_better(patient, shards, tmp_path):
    out, events = patient
    run(shards, tmp_path / "whole")
    whole = judged(tmp_path / "whole")
    expected = steps_until(whole, 3)
    assert expected < whole[-1][0], "the undisturbed run must get worse for so long"
    assert judged(out) == [(step, figure) for step, figure in whole if step <= expected]
    ended = events[-1]
    assert isinstance(ended, RunEnded)
    assert (ended.status, ended.result["stopped_early"], ended.result["steps"]) == ("finished", True, expected)
    assert (out / "checkpoints" / checkpoint_name(expected)).is_dir()
    assert any(isinstance(e, Notice) and "has not improved in 3 evaluations" in e.message for e in events)
    assert run(shards, out, patience=3)[-1].status == "already finished"


def test_patience_is_remembered_over_a_stop(patient, shards, tmp_path):
    for _ in range(200):
        stop = StopRequest()
        events: list[Event] = []
        for event in fit(settings_for(shards, tmp_path / "parts", patience=3), stop):
            events.append(event)
            if isinstance(event, StepEnded) and event.step % 2 == 0:
                stop.signal_number = 15
        if events[-1].status == "finished":
            break
    assert judged(tmp_path / "parts") == judged(patient[0])


def test_best_may_be_chosen_by_an_error(shards, tmp_path):
    events = run(shards, tmp_path, best_by="mse", epochs=6)
    errors = judged(tmp_path, "mse")
    assert events[-1].result["best_step"] == min(errors, key=lambda pair: pair[1])[0]
