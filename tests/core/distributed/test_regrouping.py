"""Memory runs out on one rank: all go on together with less, and the run is the one it would have been."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import ranks
from ranks import on_ranks
from support import readable_rollouts, write_shard

from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit

pytestmark = pytest.mark.timeout(100)
STEPS = 10


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> FitSettings:
    """A run on two ranks that nothing disturbed; the others differ in `out`."""
    folder = tmp_path_factory.mktemp("short")
    write_shard(folder / "data" / "a.parquet", readable_rollouts(32, seed=1))
    undisturbed = FitSettings(
        data=[str(folder / "data")],
        out=str(folder / "undisturbed"),
        preset="tiny",
        batch_size=16,
        max_tokens=120,
        max_steps=STEPS,
        eval_every=5,
        checkpoint_every=5,
        lr=5e-4,
        no_clip=True,
        device="cpu",
    )
    list(fit(undisturbed, StopRequest()))
    return undisturbed


def records(out: str, event: str) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if record["event"] == event]


@pytest.mark.parametrize(
    ("size", "shortages"),
    [
        (2, [(1, "forward", 3)]),
        (2, [(0, "backward", 3)]),
    ],
)
def test_where_one_rank_runs_out_all_go_on_with_less(settings, tmp_path, size, shortages):
    ours = replace(settings, out=str(tmp_path / "out"))
    ended = on_ranks(size, ranks.short_run, ours, shortages)
    print(ended)
    assert [end.get("status", end) for end in ended] == ["finished"] * size
    losses = [record["value_loss"] for record in records(ours.out, "step")]
    assert losses == pytest.approx([record["value_loss"] for record in records(settings.out, "step")], rel=1e-5)
