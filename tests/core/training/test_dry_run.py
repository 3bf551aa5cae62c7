"""A dry run says what the run then is, and leaves nothing behind."""

from pathlib import Path

import pytest
from support import readable_rollouts, write_shard

from critic_train.errors import DataError
from critic_train.events import RunEnded, RunStarted
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.dry_run import dry_run
from critic_train.training.fit import fit, run_path


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rollouts")
    write_shard(folder / "a.parquet", readable_rollouts(30, seed=1))
    return folder


def settings_for(shards: Path, out: Path, **changes: object) -> FitSettings:
    defaults = {"data": [str(shards)], "out": str(out), "preset": "tiny", "batch_size": 16, "device": "cpu"}
    defaults |= {"no_report": True}
    return FitSettings(**(defaults | changes))  # type: ignore[arg-type]


def estimated(settings: FitSettings, stop: StopRequest | None = None) -> RunEnded:
    ended = list(dry_run(settings, run_path(settings), stop or StopRequest()))[-1]
    assert isinstance(ended, RunEnded)
    return ended


@pytest.mark.parametrize(
    "changes", [{}, {"max_steps": 5}, {"epochs": 7, "eval_every": 3}, {"packing": "rows"}, {"val_fraction": 0.3}]
)
def test_it_says_what_the_run_then_is(shards, tmp_path, changes):
    settings = settings_for(shards, tmp_path / "run", **changes)
    found = estimated(settings).result
    assert not (tmp_path / "run").exists()
    events = list(fit(settings, StopRequest()))
    (started,) = [event for event in events if isinstance(event, RunStarted)]
    for name in ("rollouts", "held_out_rollouts", "parameters", "packing"):
        assert found[name] == started.summary[name], name
    assert found["steps"] == started.total_steps
    tensors = (tmp_path / "run" / "best").resolve().glob("*.safetensors")
    written = sum(path.stat().st_size for path in tensors)
    assert written < found["disk"]["checkpoint"] < written + 2**21


def test_its_figures_add_up(shards, tmp_path):
    found = estimated(settings_for(shards, tmp_path / "run")).result
    weights = 4 * found["parameters"]
    assert (found["memory"]["weights"], found["memory"]["moments"]) == (weights, 2 * weights)
    assert found["seconds"]["total"] == found["seconds"]["training"] + found["seconds"]["evaluating"] > 0
    assert 0 < found["computed_tokens"] < found["tokens"]
    assert found["disk"]["needed"] > 4 * found["disk"]["checkpoint"]


def test_it_finds_what_would_stop_the_run(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError):
        estimated(settings_for(tmp_path, tmp_path / "run"))


def test_it_can_be_stopped(shards, tmp_path):
    stop = StopRequest()
    stop.signal_number = 15
    assert estimated(settings_for(shards, tmp_path / "run"), stop).status == "interrupted"
