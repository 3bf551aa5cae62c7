"""A signal in every stage of a real job: heard before the next micro-batch, nothing lost, the end the same.

Signals come from within, at a chosen call, so that nothing here waits for a clock. Scenarios 9 and 10.
"""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from crashing import die_of_two_signals
from support import readable_rollouts, small_config, write_shard
from warm import context

from critic_train.data.reading import RolloutReader
from critic_train.evaluation.evaluate import evaluate
from critic_train.model.critic import Critic
from critic_train.predict.predict import predict
from critic_train.run import storage
from critic_train.run.checkpoint import checkpoints, inspect
from critic_train.settings import EvalSettings, FitSettings, PredictSettings
from critic_train.training.evaluator import Evaluator
from critic_train.training.fit import fit
from critic_train.training.old_values import OldValues
from critic_train.weights.loading import build_critic
from critic_train.weights.saving import save_critic
from critic_train_cli.job import exit_code_of, run_job
from critic_train_cli.output import Output
from critic_train_cli.plain_view import View


@dataclass(slots=True)
class Sender:
    """Sends a signal to this process at the n-th call of something, and counts the calls after it."""

    at: int
    number: signal.Signals = signal.SIGTERM
    calls: int = 0

    def call(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), self.number)

    @property
    def calls_after(self) -> int:
        assert self.calls >= self.at, "the stage was never reached"
        return self.calls - self.at


def on_forward(monkeypatch, sender: Sender, *, gradients: bool) -> None:
    """Count micro-batches: of training, or of passes without gradients."""
    forward = Critic.forward

    def counted(self, batch):
        if torch.is_grad_enabled() is gradients and sender.at:
            sender.call()
        return forward(self, batch)

    monkeypatch.setattr(Critic, "forward", counted)


def only_within(monkeypatch, part: type, name: str, sender: Sender) -> None:
    """Count only while a method of a part of the trainer is under way."""
    method, at = getattr(part, name), sender.at
    sender.at = 0

    def entered(self, *arguments, **more) -> Iterator[object]:
        sender.at = at
        yield from method(self, *arguments, **more)
        sender.at = sender.at if sender.calls >= at else 0

    monkeypatch.setattr(part, name, entered)


def on_batches(monkeypatch, sender: Sender) -> None:
    """Count batches of rows given by a reader."""
    read = RolloutReader.__iter__

    def counted(self):
        for batch in read(self):
            sender.call()
            yield batch

    monkeypatch.setattr(RolloutReader, "__iter__", counted)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    for name in "abc":
        write_shard(folder / "data" / f"{name}.parquet", readable_rollouts(4, seed=ord(name)))
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = small_config("Llama", **shape, num_attention_heads=1, num_key_value_heads=1)
    (folder / "model").mkdir()
    save_critic(build_critic(config, seed=0), folder / "model", None)
    return folder


def settings_for(folder: Path, out: Path) -> FitSettings:
    return FitSettings(
        data=[str(folder / "data")],
        model=str(folder / "model"),
        out=str(out),
        batch_size=16,
        max_tokens=60,
        max_steps=3,
        checkpoint_every=1,
        eval_every=2,
        val_fraction=0.4,
        old_values="epoch",
        device="cpu",
        no_report=True,
    )


def job(start):
    """A job under the program's own signal handlers; its last event and exit code."""
    output = Output(quiet=True)
    ended = run_job(start, View(output, stopping="stopping"), output)
    return ended, exit_code_of(ended)


def end_of(out: Path) -> dict[str, bytes]:
    last = checkpoints(out / "checkpoints")[-1]
    files = [last / "model.safetensors", last / "optimizer.safetensors", out / "metrics.jsonl"]
    return {path.name: path.read_bytes() for path in files} | {"step": last.name.encode()}


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed")
    assert job(lambda stop: fit(settings_for(folder, out), stop))[1] == 0
    return end_of(out)


def stopped_and_resumed(folder, out, undisturbed, monkeypatch, number=signal.SIGTERM) -> None:
    """Run into the signal, look at what stands, go on without it."""
    ended, code = job(lambda stop: fit(settings_for(folder, out), stop))
    assert (ended.status, ended.signal_number, code) == ("interrupted", number, 128 + number)
    assert all(inspect(path).kind == "complete" for path in checkpoints(out / "checkpoints"))
    monkeypatch.undo()
    assert job(lambda stop: fit(settings_for(folder, out), stop))[1] == 0
    assert end_of(out) == undisturbed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_in_training(number, folder, undisturbed, tmp_path, monkeypatch):
    sender = Sender(at=6, number=number)
    on_forward(monkeypatch, sender, gradients=True)
    stopped_and_resumed(folder, tmp_path, undisturbed, monkeypatch, number)
    assert sender.calls_after == 0


@pytest.mark.parametrize(
    ("part", "stage", "at"), [(Evaluator, "evaluate", 1), (Evaluator, "evaluate", 7), (OldValues, "take", 3)]
)
def test_in_evaluation_and_old_values(part, stage, at, folder, undisturbed, tmp_path, monkeypatch):
    sender = Sender(at=at)
    only_within(monkeypatch, part, stage, sender)
    on_forward(monkeypatch, sender, gradients=False)
    stopped_and_resumed(folder, tmp_path, undisturbed, monkeypatch)
    assert sender.calls_after == 0


def test_in_reading(folder, undisturbed, tmp_path, monkeypatch):
    sender = Sender(at=1)
    on_batches(monkeypatch, sender)
    stopped_and_resumed(folder, tmp_path, undisturbed, monkeypatch)
    assert sender.calls_after == 0


@pytest.mark.parametrize("operation", ["library", "sync", "rename"])
def test_in_saving(operation, folder, undisturbed, tmp_path, monkeypatch):
    """Scenario 10: the save is finished, or had not begun; the run then ends, unless that was its last step."""
    sender = Sender(at=1)

    def watch(found):
        if found.kind == operation and "step-00000002" in str(found.path):
            sender.call()

    with storage.watched(watch):
        stopped_and_resumed(folder, tmp_path, undisturbed, monkeypatch)


def test_a_second_signal_in_a_save_leaves_at_once_without_damage(folder, undisturbed, tmp_path):
    process = context.Process(target=die_of_two_signals, args=(settings_for(folder, tmp_path), "step-00000002.tmp"))
    process.start()
    process.join()
    assert process.exitcode == 143
    standing = [(p.name, inspect(p).kind) for p in checkpoints(tmp_path / "checkpoints")]
    assert standing == [("step-00000000", "complete"), ("step-00000001", "complete")]
    assert job(lambda stop: fit(settings_for(folder, tmp_path), stop))[1] == 0
    assert end_of(tmp_path) == undisturbed


@pytest.mark.parametrize("at", [1, 4])
def test_in_eval(at, folder, monkeypatch):
    sender = Sender(at=at)
    on_forward(monkeypatch, sender, gradients=False)
    settings = EvalSettings(data=[str(folder / "data")], model=[str(folder / "model")], max_tokens=60, device="cpu")
    ended, code = job(lambda stop: evaluate(settings, stop))
    assert (ended.status, code, sender.calls_after) == ("interrupted", 143, 0)


def test_in_eval_s_reading(folder, monkeypatch):
    sender = Sender(at=1)
    on_batches(monkeypatch, sender)
    settings = EvalSettings(data=[str(folder / "data")], device="cpu")
    ended, code = job(lambda stop: evaluate(settings, stop))
    assert (ended.status, code, sender.calls_after) == ("interrupted", 143, 0)


@pytest.mark.parametrize("at", [1, 6])
def test_in_predict(at, folder, tmp_path, monkeypatch):
    settings = PredictSettings(
        data=[str(folder / "data")], model=str(folder / "model"), to=str(tmp_path / "next"), max_tokens=60, device="cpu"
    )
    sender = Sender(at=at)
    on_forward(monkeypatch, sender, gradients=False)
    ended, code = job(lambda stop: predict(settings, stop))
    assert (ended.status, code, sender.calls_after) == ("interrupted", 143, 0)
    monkeypatch.undo()
    ended, code = job(lambda stop: predict(settings, stop))
    assert (ended.status, code) == ("finished", 0)
    assert json.dumps(ended.result)
