"""The loop: the order of evaluation, checkpoint and step, and a stop in the middle of a step."""

import json

import pytest
import torch
from support import readable_rollouts, write_shard

from critic_train.events import CheckpointSaved, EvaluationEnded, StepEnded
from critic_train.model.critic import Critic
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit


@pytest.fixture
def settings(tmp_path) -> FitSettings:
    write_shard(tmp_path / "data" / "a.parquet", readable_rollouts(16, seed=1))
    return FitSettings(
        data=[str(tmp_path / "data")],
        out=str(tmp_path / "out"),
        preset="tiny",
        batch_size=16,
        max_tokens=60,
        max_steps=3,
        eval_every=2,
        checkpoint_every=2,
        device="cpu",
        no_report=True,
    )


def names(events) -> list[tuple[str, int]]:
    kinds = {StepEnded: "step", EvaluationEnded: "evaluation", CheckpointSaved: "checkpoint"}
    return [(kinds[type(event)], event.step) for event in events if type(event) in kinds]


def test_a_step_is_evaluated_before_it_is_saved(settings):
    assert names(fit(settings, StopRequest())) == [
        ("evaluation", 0),
        ("checkpoint", 0),
        ("step", 1),
        ("step", 2),
        ("evaluation", 2),
        ("checkpoint", 2),
        ("step", 3),
        ("evaluation", 3),
        ("checkpoint", 3),
    ]


def test_a_stop_in_the_middle_of_a_step_takes_no_step(settings, tmp_path, monkeypatch):
    stop, forward, taken = StopRequest(), Critic.forward, 0

    def counted(self, batch):
        nonlocal taken
        taken += torch.is_grad_enabled() and stop.armed
        if taken == 2:
            stop.signal_number = 15
        return forward(self, batch)

    class Armed(StopRequest):
        armed = False

    stop = Armed()
    monkeypatch.setattr(Critic, "forward", counted)
    events = []
    for event in fit(settings, stop):
        events.append(event)
        stop.armed = stop.armed or isinstance(event, StepEnded)
    assert names(events) == [("evaluation", 0), ("checkpoint", 0), ("step", 1), ("checkpoint", 1)]
    assert taken == 2
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]
