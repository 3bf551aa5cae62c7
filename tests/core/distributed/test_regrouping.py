"""Memory runs out on one rank: all go on together with less, and the run is the one it would have been."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import rank_work
import ranks
from ranks import on_ranks
from safetensors.numpy import load_file
from support import branching_rollouts, readable_rollouts, write_shard

from critic_train.run.checkpoint import newest_checkpoint
from critic_train.settings import FitSettings

pytestmark = pytest.mark.timeout(120)
STEPS = 8


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> FitSettings:
    """A run on two ranks that nothing disturbed, two micro-batches a step on each; the others differ in `out`."""
    folder = tmp_path_factory.mktemp("short")
    write_shard(folder / "data" / "a.parquet", readable_rollouts(32, seed=1))
    undisturbed = FitSettings(
        data=[str(folder / "data")],
        out=str(folder / "undisturbed"),
        preset="tiny",
        batch_size=16,
        max_tokens=60,
        max_steps=STEPS,
        eval_every=4,
        checkpoint_every=4,
        lr=5e-4,
        no_clip=True,
        no_report=True,
        device="cpu",
    )
    on_ranks(2, ranks.fit_run, undisturbed)
    return undisturbed


def records(out: str, event: str) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if record["event"] == event]


def require_the_same_run(ours: FitSettings, undisturbed: FitSettings) -> None:
    """Loss and norm of every step, and what was judged: sums of the same numbers in another order."""
    for event, names in (("step", ("value_loss", "grad_norm", "vpred_mean")), ("evaluation", ("explained_variance",))):
        pairs = list(zip(records(ours.run.out, event), records(undisturbed.run.out, event), strict=True))
        for name in names:
            far = max(abs(one[name] - other[name]) / abs(other[name]) for one, other in pairs if other[name])
            assert far <= 1e-6, name
    (mine, _), (theirs, _) = (newest_checkpoint(Path(run.run.out) / "checkpoints") for run in (ours, undisturbed))
    for file in ("model.safetensors", "optimizer.safetensors"):
        found, expected = load_file(mine / file), load_file(theirs / file)
        assert found.keys() == expected.keys()
        assert max(float(np.abs(found[name] - expected[name]).max()) for name in found) <= 1e-4, file


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("size", "shortages", "told"),
    [
        pytest.param(2, [(1, "forward", 5)], 1, id="in-the-forward-pass"),
        pytest.param(2, [(0, "backward", 4)], 1, id="with-gradients-not-yet-summed"),
        pytest.param(2, [(1, "backward", 5)], 1, id="while-gradients-are-summed", marks=slow),
        pytest.param(2, [(0, "forward", 4), (1, "forward", 4)], 1, id="on-both-at-once", marks=slow),
        pytest.param(2, [(1, "backward", 4), (0, "forward", 5)], 1, id="twice-in-a-row", marks=slow),
        pytest.param(2, [(1, "values", 1)], 1, id="while-judging", marks=slow),
        pytest.param(3, [(2, "forward", 1), (0, "backward", 7)], 2, id="on-three-ranks"),
    ],
)
def test_where_one_rank_runs_out_all_go_on_with_less(settings, tmp_path, size, shortages, told):
    ours = settings.replace(out=str(tmp_path / "out"))
    ended = on_ranks(size, ranks.short_run, ours, shortages)
    assert [end.get("status", end) for end in ended] == ["finished"] * size
    assert [len(end["told"]) for end in ended] == [told] * size
    require_the_same_run(ours, settings)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=slow)])
def test_a_single_rollout_that_is_too_much_on_one_rank_ends_all(settings, tmp_path, rank):
    ours = settings.replace(out=str(tmp_path / "out"))
    leader, other = on_ranks(2, ranks.short_run, ours, [(rank, "forward", 5)], always=True)
    assert leader["fault"] == other["fault"] == "MachineError"
    said = r"memory ran out on a single rollout of \d+ tokens: weights, gradients and moments take"
    assert re.search(rf"^{said} [^\n]*\nrank {rank}: CUDA out of memory", leader["message"])
    # Rank 0, and the store with it, may be gone before the other has asked what happened.
    assert re.search(said, other["message"]) or other["message"].startswith("rank 1 of 2 lost contact")


def test_what_runs_out_leaves_the_parts_where_they_were_and_nothing_whole():
    longest = int(branching_rollouts().lengths.max())
    for moved, whole_bytes, far, lowered in on_ranks(3, rank_work.run_out_and_go_on):
        assert (moved, whole_bytes, lowered) == ([], 0, max(longest, 70 // 2))
        assert far <= 1e-5


def test_a_rank_that_runs_out_waits_until_the_others_are_through_with_what_came_before():
    assert on_ranks(2, rank_work.run_out_before_rank_0_has_begun) == [True, True]


def test_the_self_check_goes_on_with_fewer_rollouts():
    for forest, (said,), far in on_ranks(2, rank_work.check_with_less):
        assert forest
        assert said.startswith("memory ran out while the packing was tried on rollouts of up to")
        assert far <= 1e-5


@slow
@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"train": "head", "lr": 1e-3}, "values"),
        ({"train": "last-1", "lr": 1e-3}, "forward"),
        ({"train": "lora"}, "backward"),
        ({"activation_checkpointing": "layer"}, "backward"),
    ],
    ids=["kept-states", "last-layer", "adapters", "checkpointed"],
)
def test_other_ways_to_train_go_on_with_less(settings, tmp_path, changes, kind):
    changes = {"model": settings.run.out, "max_steps": 4} | changes
    undisturbed, ours = (settings.replace(out=str(tmp_path / name), **changes) for name in ("undisturbed", "ours"))
    on_ranks(2, ranks.fit_run, undisturbed)
    ended = on_ranks(2, ranks.short_run, ours, [(1, kind, 0), (0, kind, 3)])
    assert [end.get("status", end) for end in ended] == ["finished"] * 2
    assert [len(end["told"]) for end in ended] in ([1, 1], [2, 2])
    require_the_same_run(ours, undisturbed)


@slow
def test_gradients_of_bf16_layers_that_were_kept_in_float32_are_forgotten(settings, tmp_path):
    """They are the only ones that FSDP2 keeps beside the weights, until they are summed."""
    changes = {"model": settings.run.out, "precision": "bf16", "max_steps": 1, "max_tokens": 30}
    undisturbed, ours = (settings.replace(out=str(tmp_path / name), **changes) for name in ("undisturbed", "ours"))
    on_ranks(2, ranks.fit_run, undisturbed)
    ended = on_ranks(2, ranks.short_run, ours, [(0, "backward", 1)])
    assert [len(end["told"]) for end in ended] == [1, 1]
    files = [Path(run.run.out) / "checkpoints/step-00000001/optimizer.safetensors" for run in (ours, undisturbed)]
    found, expected = (load_file(file) for file in files)
    matrices = [name for name in found if name.startswith("exp_avg.") and ".layers." in name and "proj" in name]
    far = {n: float(np.linalg.norm(found[n] - expected[n]) / np.linalg.norm(expected[n])) for n in matrices}
    assert far
    assert max(far.values()) <= 5e-2


@slow
def test_a_run_that_went_on_with_less_is_resumed(settings, tmp_path):
    ours = settings.replace(out=str(tmp_path / "out"))
    on_ranks(2, ranks.short_run, ours, [(1, "forward", 2), (0, "values", 1)], stop_at=(1, 5))
    ended = on_ranks(3, ranks.short_run, ours, [(2, "backward", 2)])
    assert [end.get("status", end) for end in ended] == ["finished"] * 3
    require_the_same_run(ours, settings)


@slow
def test_old_values_are_taken_with_less_too(settings, tmp_path):
    changes = {"old_values": "epoch", "no_clip": False}
    undisturbed, ours = (settings.replace(out=str(tmp_path / name), **changes) for name in ("undisturbed", "ours"))
    on_ranks(2, ranks.fit_run, undisturbed)
    ended = on_ranks(2, ranks.short_run, ours, [(0, "values", 1)])
    assert [len(end["told"]) for end in ended] == [1, 1]
    require_the_same_run(ours, undisturbed)


@slow
def test_rollouts_that_are_not_finite_are_found_with_less(settings, tmp_path):
    """Those of the attempt that ran out are not counted among them."""
    rollouts = readable_rollouts(6, seed=2)
    rollouts.returns[rollouts.offsets[6] : rollouts.offsets[7]] = 3e19  # float32 cannot hold its square
    shard = write_shard(tmp_path / "data" / "a.parquet", rollouts)
    changes = {"data": [str(shard)], "batch_size": 24, "val_fraction": 0.0, "max_steps": 1, "on_non_finite": "skip"}
    kept = []
    for name, shortages in (("undisturbed", []), ("ours", [(1, "backward", 6)])):
        ours = settings.replace(out=str(tmp_path / name), max_tokens=40, **changes)
        ended = on_ranks(2, ranks.short_run, ours, shortages, huge=True)
        assert [end.get("status", end) for end in ended] == ["finished"] * 2
        (file,) = Path(ours.run.out).glob("diverged-step-*.parquet")
        kept.append(pq.read_table(file).to_pylist())
    assert [(row["row"], row["finite"]) for row in kept[1] if not row["finite"]] == [(6, False)]
    assert len({row["row"] for row in kept[1]}) == len(kept[1]) <= len(kept[0])
