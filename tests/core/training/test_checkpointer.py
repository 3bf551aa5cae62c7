"""Which steps get a checkpoint, and how often one is written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import readable_rollouts, small_config, write_shard
from transformers import AutoModelForCausalLM

from critic_train.errors import ModelError
from critic_train.events import CheckpointSaved, Event, StepEnded
from critic_train.run.checkpoint import checkpoints
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit
from critic_train.weights.saving import save_critic


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rollouts")
    write_shard(folder / "a.parquet", readable_rollouts(16, seed=1))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(small_config("Llama")).save_pretrained(folder)
    return folder


def run(shards: Path, out: Path, stop_after: int | None = None, **flags: object) -> list[Event]:
    """The events of a run; `stop_after` asks it to stop when that step has ended."""
    common = {"preset": "tiny", "batch_size": 16, "device": "cpu", "no_report": True, "val_fraction": 0.0, "keep": 9}
    stop, events = StopRequest(), []
    for event in fit(FitSettings(data=[str(shards)], out=str(out), **(common | flags)), stop):  # type: ignore[arg-type]
        events.append(event)
        if isinstance(event, StepEnded) and event.step == stop_after:
            stop.signal_number = 15
    return events


def saved(events: list[Event]) -> list[int]:
    return [event.step for event in events if isinstance(event, CheckpointSaved)]


def test_every_so_many_steps_and_the_last_one(shards, tmp_path):
    events = run(shards, tmp_path, max_steps=7, checkpoint_every=3)
    assert saved(events) == [3, 6, 7]
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == [f"step-{step:08d}" for step in (3, 6, 7)]


@pytest.mark.parametrize("step", [3, 5])
def test_a_stop_writes_the_checkpoint_of_the_step_once(step, shards, tmp_path):
    """Also where the step has one anyhow."""
    events = run(shards, tmp_path, stop_after=step, max_steps=7, checkpoint_every=3)
    assert saved(events) == [3] + [step] * (step != 3)
    assert events[-1].status == "interrupted"


def test_a_resumed_run_without_held_out_rollouts_has_no_best_either(shards, base, tmp_path):
    """Not that of step 0, whose head was solved: eval and PPO would take it for what the run has trained."""
    flags = {"preset": None, "model": str(base), "train": "full", "max_steps": 4, "checkpoint_every": 1}
    run(shards, tmp_path, stop_after=2, **flags)
    result = run(shards, tmp_path, **flags)[-1].result
    assert (result["status"], result["steps"], result["best_step"], result["best"]) == ("finished", 4, None, None)
    assert not (tmp_path / "best").exists()


def test_a_run_stopped_before_its_first_step_has_none(shards, tmp_path):
    stop = StopRequest(signal_number=15)
    settings = FitSettings(data=[str(shards)], out=str(tmp_path), preset="tiny", device="cpu", no_report=True)
    events = list(fit(settings, stop))
    assert events[-1].status == "interrupted"
    assert checkpoints(tmp_path / "checkpoints") == []


def test_a_first_checkpoint_that_cannot_be_loaded_ends_the_run(shards, tmp_path, monkeypatch):
    """As where an architecture is written in another form than it is read in."""

    def without_a_layer(critic: Any, directory: Path, tokenizer_from: Path | None) -> None:
        save_critic(critic, directory, tokenizer_from)
        tensors = load_file(directory / "model.safetensors")
        renamed = {name.replace("mlp.up_proj", "mlp.base_layer.up_proj"): t for name, t in tensors.items()}
        save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr("critic_train.training.state_files.save_critic", without_a_layer)
    with pytest.raises(ModelError, match=r"the first checkpoint cannot be loaded[\s\S]*mlp\.up_proj\.weight: missing"):
        run(shards, tmp_path, max_steps=9, checkpoint_every=1)
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-00000001"]
