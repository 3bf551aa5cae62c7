"""What trackers wrote, read back by their own readers; and what happens where one fails."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import readable_rollouts, write_shard
from warm import program

from critic_train.callbacks.trackers import evaluation_metrics, step_metrics
from critic_train.data import row_checks
from critic_train.errors import ConfigError
from critic_train.events import EvaluationEnded, Notice, RunEnded, StepEnded
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit

STEPS = 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rollouts")
    write_shard(folder / "a.parquet", readable_rollouts(20, seed=1))
    return folder


def settings_for(shards: Path, out: Path, **changes: object) -> FitSettings:
    defaults = {"data": [str(shards)], "out": str(out), "preset": "tiny", "batch_size": 16, "device": "cpu"}
    defaults |= {"max_steps": STEPS, "eval_every": 2, "no_report": True}
    return FitSettings(**(defaults | changes))  # type: ignore[arg-type]


def losses(out: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["value_loss"] for record in records if record["event"] == "step"}


def explained(out: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["explained_variance"] for record in records if record["event"] == "evaluation"}


def test_names_are_the_fields():
    step = StepEnded(
        step=1, epoch=0, metrics={"value_loss": 0.5, "clipfrac": 0.1, "lr": 1e-3, "grad_norm": 2.0}, timing={}
    )
    assert step_metrics(step) == {
        "critic/vf_loss": 0.5,
        "critic/vf_clipfrac": 0.1,
        "critic/lr": 1e-3,
        "critic/grad_norm": 2.0,
        "training/epoch": 0,
    }
    metrics = {
        "explained_variance": 0.3,
        "explained_variance_interval": [0.2, 0.4],
        "mse": 0.1,
        "spearman": None,
        "by_position": [{"mse": 1.0}],
        "baselines": {"stored": {"explained_variance": 0.1}},
    }
    assert evaluation_metrics(EvaluationEnded(step=1, metrics=metrics, best=True)) == {
        "critic/vf_explained_var": 0.3,
        "critic/vf_explained_var_low": 0.2,
        "critic/vf_explained_var_high": 0.4,
        "val/mse": 0.1,
        "val/baselines/stored/explained_variance": 0.1,
    }


def test_tensorboard_reads_every_step_and_evaluation(shards, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    list(fit(settings_for(shards, tmp_path, log_to=["tensorboard"]), StopRequest()))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    read = {scalar.step: scalar.value for scalar in events.Scalars("critic/vf_loss")}
    assert read == pytest.approx(losses(tmp_path), rel=1e-6)
    read = {scalar.step: scalar.value for scalar in events.Scalars("critic/vf_explained_var")}
    assert read == pytest.approx(explained(tmp_path), rel=1e-6, abs=1e-9)


def test_tensorboard_shows_how_many_steps_were_skipped(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setattr(row_checks, "LARGEST", math.inf)  # reading would refuse returns that no gradient survives
    rollouts = readable_rollouts(6, seed=1)
    rollouts.returns[rollouts.offsets[6] : rollouts.offsets[7]] = 3e19
    write_shard(tmp_path / "data" / "a.parquet", rollouts)
    changes = {"on_non_finite": "skip", "no_clip": True, "val_fraction": 0.0, "batch_size": 4, "max_steps": 12}
    settings = settings_for(tmp_path / "data", tmp_path / "out", log_to=["tensorboard"], **changes)
    taken = {event.step: event.skipped_steps for event in fit(settings, StopRequest()) if isinstance(event, StepEnded)}
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    skipped = [record["step"] for record in map(json.loads, lines) if record["event"] == "skip"]
    assert len(skipped) == 2
    events = accumulator.EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    read = {scalar.step: scalar.value for scalar in events.Scalars("critic/skipped_steps")}
    assert read == taken == {step: sum(s < step for s in skipped) for step in range(1, 13) if step not in skipped}


def test_steps_of_a_run_that_may_not_skip_carry_no_count(shards, tmp_path):
    events = list(fit(settings_for(shards, tmp_path), StopRequest()))
    assert {event.skipped_steps for event in events if isinstance(event, StepEnded)} == {None}


def test_trackio_keeps_every_step_in_its_database(shards, tmp_path):
    """In processes of their own: Trackio reads its folder when it is imported."""
    pytest.importorskip("trackio")
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "HOME": str(tmp_path)}
    arguments = ["--data", str(shards), "--out", "run", "--preset", "tiny", "--no-report", "--json"]
    arguments += ["--max-steps", str(STEPS), "--log-to", "trackio", "--log-project", "mine"]
    done = program("fit", *arguments, cwd=tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == STEPS
    script = (
        "import json, trackio.sqlite_storage as storage\n"
        "runs = storage.SQLiteStorage.get_runs('mine')\n"
        "print(json.dumps([runs, storage.SQLiteStorage.get_logs('mine', runs[0])]))\n"
    )
    shown = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    runs, logs = json.loads(shown.stdout)
    assert len(runs) == 1
    seen = {log["step"]: log["critic/vf_loss"] for log in logs if "critic/vf_loss" in log}
    assert seen == pytest.approx(losses(tmp_path / "run"), rel=1e-9)


def wandb_records(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB; crc, length, type) behind a 7-byte head."""
    data, at, pending = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        pending += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield pending
            pending = b""


def wandb_losses(file: Path) -> dict[int, float]:
    """Step -> value loss, as far as the file has been written."""
    from wandb.proto.wandb_internal_pb2 import Record

    seen: dict[int, float] = {}
    for data in wandb_records(file):
        record = Record.FromString(data)
        items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if "critic/vf_loss" in items:
            seen[items["global_step"]] = items["critic/vf_loss"]
    return seen


def test_wandb_offline_holds_every_step(shards, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    list(fit(settings_for(shards, tmp_path, log_to=["wandb"]), StopRequest()))
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    expected, seen = losses(tmp_path), {}
    # W&B's service writes the file from a process of its own: on a busy machine, some of it after `finish`.
    for _ in range(600):
        seen = wandb_losses(file)
        if len(seen) == len(expected):
            break
        time.sleep(0.1)
    assert seen == pytest.approx(expected, rel=1e-9)


def test_a_tracker_that_fails_warns_once_and_the_run_goes_on(shards, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    def broken(*_: object, **__: object) -> None:
        raise OSError("disk quota exceeded")

    monkeypatch.setattr(SummaryWriter, "add_scalar", broken)
    events = list(fit(settings_for(shards, tmp_path, log_to=["tensorboard"]), StopRequest()))
    warnings = [e for e in events if isinstance(e, Notice) and e.level == "warning" and "tensorboard" in e.message]
    assert len(warnings) == 1
    assert "disk quota exceeded" in warnings[0].message
    assert isinstance(events[-1], RunEnded)
    assert events[-1].status == "finished"
    assert len(losses(tmp_path)) == STEPS


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="wandb is not installed") as fault:
        list(fit(settings_for(tmp_path / "nowhere", tmp_path / "run", log_to=["wandb"]), StopRequest()))
    assert fault.value.hint == "pip install wandb"
    assert not (tmp_path / "run").exists()
