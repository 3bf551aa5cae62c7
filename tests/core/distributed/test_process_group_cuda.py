"""On two GPUs: NCCL gives the loss curve of one GPU, a fault of one rank ends both, and so does memory that runs out.

Skipped with fewer.
"""

import json
from pathlib import Path

import pytest
import ranks
import torch
from ranks import on_ranks
from support import readable_rollouts, write_shard

from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]


@pytest.fixture
def settings(tmp_path) -> FitSettings:
    shard = write_shard(tmp_path / "data" / "a.parquet", readable_rollouts(32, seed=1))
    return FitSettings(
        data=[str(shard)],
        out=str(tmp_path / "one"),
        preset="tiny",
        batch_size=16,
        max_tokens=120,
        max_steps=20,
        lr=5e-4,
        no_clip=True,
        device="cuda",
    )


def losses(out: str) -> list[float]:
    found = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [record["value_loss"] for record in found if record["event"] == "step"]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_two_gpus_give_the_loss_curve_of_one(settings, tmp_path, precision, tolerance):
    alone, ours = (settings.replace(out=str(tmp_path / name), precision=precision) for name in ("one", "two"))
    list(fit(alone, StopRequest()))
    assert [end.get("status", end) for end in on_ranks(2, ranks.fit_run, ours)] == ["finished"] * 2
    assert losses(ours.run.out) == pytest.approx(losses(alone.run.out), rel=tolerance)


def test_a_fault_of_one_gpus_rank_ends_both(settings, tmp_path):
    """A collective of NCCL waits for a partner that is gone; the fault ends it."""
    leader, other = on_ranks(2, ranks.failing_run, settings.replace(out=str(tmp_path / "out")), 1, 3, "DataError")
    assert leader == {"fault": "DataError", "message": "rank 1: no such thing"}
    assert other["fault"] == "DataError"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("rank", [0, 1])
def test_memory_that_runs_out_on_one_gpu_ends_both_with_the_last_step_saved(settings, tmp_path, rank, kind):
    """The other's NCCL kernels wait for a partner that never comes; its weights are copied beside them."""
    list(fit(settings, StopRequest()))
    ours = settings.replace(out=str(tmp_path / "two"))
    leader, *_ = on_ranks(2, ranks.short_run, ours, [(rank, kind, 5)])
    assert leader["fault"] == "MachineError"
    assert "step 2 is saved as" in leader["message"]
    assert [end.get("status", end) for end in on_ranks(2, ranks.short_run, ours, [])] == ["finished"] * 2
    assert losses(ours.run.out) == pytest.approx(losses(settings.run.out), rel=1e-4)
