"""Which checkpoint is the best, and when a run has waited long enough for a better one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support import readable_rollouts, small_config, write_shard
from transformers import LlamaForCausalLM

from critic_train.events import Event, Notice, RunEnded, StepEnded
from critic_train.run.checkpoint import checkpoint_name
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training import evaluator
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


def test_a_run_that_patience_ended_goes_on_where_it_is_given_more(patient, shards, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(patient[0], out, symlinks=True)
    ended = run(shards, out, patience=6)[-1]
    run(shards, tmp_path / "whole", patience=6)
    assert judged(out) == judged(tmp_path / "whole")
    assert len(judged(out)) > len(judged(patient[0]))
    assert ended.status == "finished"
    assert run(shards, out, patience=6)[-1].status == "already finished"


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


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A directory without a value head."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    LlamaForCausalLM(small_config("Llama", num_hidden_layers=1)).save_pretrained(folder)
    return folder


def from_exact_head(shards: Path, out: Path, model: Path, **changes: object) -> FitSettings:
    given = {"preset": None, "model": str(model), "epochs": 3, "train": "full"}
    return settings_for(shards, out, **(given | changes))


def test_the_exact_head_stays_the_best_where_training_does_not_beat_it_by_an_interval(shards, model, tmp_path):
    settings = from_exact_head(shards, tmp_path, model, lr=0.0, head_lr=0.0)
    events = list(fit(settings, StopRequest()))
    evaluations = [r for r in map(json.loads, (tmp_path / "metrics.jsonl").open()) if r["event"] == "evaluation"]
    assert "minus_step_0" not in evaluations[0]
    for record in evaluations[1:]:
        moved = record["explained_variance"] - evaluations[0]["explained_variance"]
        assert record["minus_step_0"]["difference"] == pytest.approx(moved, abs=1e-9)
    assert events[-1].result["best_step"] == 0
    assert [e for e in events if isinstance(e, Notice) and "`best` is step 0, the exact head" in e.message]


def test_a_better_critic_takes_the_place_of_the_exact_head(shards, model, tmp_path):
    settings = from_exact_head(shards, tmp_path, model, best_by="mse", lr=3e-3)
    steps = iter([[-0.2, 0.1], [-0.3, -0.1], [-0.3, 0.1]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            evaluator, "difference_to_start", lambda *_: {"difference": -0.2, "interval": next(steps, [-1.0, 1.0])}
        )
        events = list(fit(settings, StopRequest()))
    figures = dict(judged(tmp_path, "mse"))
    first, proven = sorted(figures)[:2]
    best = min((step for step in figures if step >= proven), key=figures.__getitem__)
    assert events[-1].result["best_step"] == best, "from the first that is proven on, the figure decides"
    assert best > first
    assert [e for e in events if isinstance(e, Notice) and e.message.endswith("training has beaten it")]


def test_fine_tuning_that_still_gets_further_goes_on_though_no_interval_proves_it(shards, model, tmp_path):
    settings = from_exact_head(shards, tmp_path, model, lr=3e-4, head_lr=3e-4, epochs=6, patience=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "difference_to_start", lambda *_: {"difference": -0.2, "interval": [-1.0, 1.0]})
        events = list(fit(settings, StopRequest()))
    figures = judged(tmp_path)
    assert events[-1].result["best_step"] == 0
    assert figures[-1][0] == steps_until(figures, 2) > 2, "step 0 is not what patience compares with"


def test_fine_tuning_that_gets_no_further_ends_early(shards, model, tmp_path):
    settings = from_exact_head(shards, tmp_path, model, lr=0.0, head_lr=0.0, epochs=None, patience=None)
    events = list(fit(settings, StopRequest()))
    result = events[-1].result
    assert (result["stopped_early"], result["best_step"], len(judged(tmp_path))) == (True, 0, 4)
    message = next(e.message for e in events if isinstance(e, Notice) and "stopping at step" in e.message)
    assert "has not improved in 3 evaluations" in message
    assert json.loads((tmp_path / "run.json").read_text())["recipe"]["patience"]["value"] == 3
