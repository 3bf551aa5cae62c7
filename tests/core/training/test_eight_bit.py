"""AdamW with 8-bit moments: as good as AdamW, a quarter of its moments, and resumed to the bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import readable_rollouts, write_shard

from critic_train.events import StepEnded
from critic_train.run.checkpoint import checkpoints
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rollouts")
    write_shard(folder / "a.parquet", readable_rollouts(16, seed=1))
    return folder


def run(shards: Path, out: Path, optimizer: str, stop_at: int | None = None) -> list[float]:
    small = {"preset": "tiny", "batch_size": 16, "epochs": 4, "device": "cpu", "no_report": True}
    settings = FitSettings(data=[str(shards)], out=str(out), optimizer=optimizer, **small)  # type: ignore[arg-type]
    stop = StopRequest()
    losses = []
    for event in fit(settings, stop):
        if isinstance(event, StepEnded):
            losses.append(event.metrics["value_loss"])
            if event.step == stop_at:
                stop.signal_number = 15
    return losses


def state(out: Path) -> dict[str, torch.Tensor]:
    last = checkpoints(out / "checkpoints")[-1]
    return load_file(last / "model.safetensors") | load_file(last / "optimizer.safetensors")


def test_it_learns_as_adamw_does_with_a_quarter_of_the_moments(shards, tmp_path):
    full, small = run(shards, tmp_path / "full", "adamw"), run(shards, tmp_path / "small", "adamw-8bit")
    assert small == pytest.approx(full, rel=0.05)
    sizes = [
        (checkpoints(tmp_path / name / "checkpoints")[-1] / "optimizer.safetensors").stat().st_size
        for name in ("full", "small")
    ]
    assert sizes[1] < 0.35 * sizes[0]


def test_it_resumes_to_the_bit(shards, tmp_path):
    run(shards, tmp_path / "whole", "adamw-8bit")
    run(shards, tmp_path / "parts", "adamw-8bit", stop_at=5)
    run(shards, tmp_path / "parts", "adamw-8bit")
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
