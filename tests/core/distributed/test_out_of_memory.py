"""Memory runs out on one rank: all end with a checkpoint of the last step, and the same command goes on with less."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import ranks
from ranks import on_ranks, records
from safetensors.numpy import load_file
from support import readable_rollouts, write_shard

from critic_train.run.checkpoint import checkpoints, newest_checkpoint
from critic_train.settings import EvalSettings, FitSettings

pytestmark = pytest.mark.timeout(900)
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
        shuffle="groups",
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
        for name in found:
            # A moment in 8 bits may be rounded to the next code.
            allowed = 1 if found[name].dtype == np.uint8 else 1e-4
            assert np.abs(found[name].astype(np.float64) - expected[name]).max() <= allowed, (file, name)


slow = pytest.mark.slow


def run_out(size: int, ours: FitSettings, shortages: list[tuple[int, str, int]], **more: object) -> str:
    """A run in which memory runs out; every rank ends with the same error, or was woken from a collective.

    Returns:
        The message with which rank 0 ended.
    """
    leader, *others = on_ranks(size, ranks.short_run, ours, shortages, **more)
    assert leader["fault"] == "MachineError"
    for other in others:
        assert other in (leader, {"fault": "gone", "message": "1"})
    assert not list((Path(ours.run.out) / "checkpoints").glob(".*"))
    return leader["message"]


def resume(size: int, ours: FitSettings, **more: object) -> list[str]:
    """The same command again, to its end; what it says about memory."""
    ended = on_ranks(size, ranks.short_run, ours, [], **more)
    assert [end.get("status", end) for end in ended] == ["finished"] * size
    assert all(end["told"] == ended[0]["told"] for end in ended)
    return ended[0]["told"]


def steps(ours: FitSettings) -> list[str]:
    return [path.name for path in checkpoints(Path(ours.run.out) / "checkpoints")]


@pytest.mark.parametrize(
    ("size", "shortages", "rank", "step"),
    [
        pytest.param(2, [(1, "forward", 5)], 1, 2, id="in-the-forward-pass"),
        pytest.param(2, [(0, "backward", 4)], 0, 2, id="on-rank-0-with-gradients-not-yet-summed"),
        pytest.param(2, [(1, "backward", 5)], 1, 2, id="while-gradients-are-summed", marks=slow),
        pytest.param(2, [(0, "forward", 4), (1, "forward", 4)], "[01]", 2, id="on-both-at-once", marks=slow),
        pytest.param(3, [(2, "backward", 4)], 2, 4, id="on-one-of-three", marks=slow),
    ],
)
def test_the_last_whole_step_is_saved_and_the_same_command_goes_on_with_less(
    settings, tmp_path, size, shortages, rank, step
):
    ours = settings.replace(out=str(tmp_path / "out"))
    message = run_out(size, ours, shortages)
    saved = ours.run.out + f"/checkpoints/step-{step:08d}"
    assert re.fullmatch(
        rf"memory ran out with 60 tokens at once; step {step} is saved as {saved}\nrank {rank}: CUDA out of memory.*",
        message,
    )
    assert steps(ours)[-1] == Path(saved).name
    (told,) = resume(size, ours)
    assert told.startswith("memory ran out with 60 tokens at once before: starting with 30; the result is the same.")
    require_the_same_run(ours, settings)


def test_memory_that_runs_out_before_the_first_step_leaves_the_smaller_budget_alone(settings, tmp_path):
    ours = settings.replace(out=str(tmp_path / "out"))
    message = run_out(2, ours, [(1, "forward", 0)])
    newest = Path(ours.run.out) / "checkpoints" / "step-00000000"
    assert message.startswith(f"memory ran out with 60 tokens at once; the newest checkpoint is {newest}\nrank 1: CUDA")
    budget = json.loads((Path(ours.run.out) / "token_budget.json").read_text())
    assert budget == {"asked": 60, "ranks": 2, "max_tokens": 30}
    (told,) = resume(2, ours)
    assert "starting with 30" in told
    require_the_same_run(ours, settings)


@slow
def test_memory_runs_out_again_and_again(settings, tmp_path):
    """Each start goes on from where the one before ended, with less."""
    ours = settings.replace(out=str(tmp_path / "out"))
    run_out(2, ours, [(1, "forward", 3)])
    run_out(2, ours, [(0, "backward", 3)])
    assert json.loads((Path(ours.run.out) / "token_budget.json").read_text())["max_tokens"] < 30
    resume(2, ours)
    require_the_same_run(ours, settings)


@slow
def test_held_out_rollouts_that_are_too_much_at_once(settings, tmp_path):
    """Judged at steps 0, 4 and 8: the second time, step 4 is not yet saved."""
    ours = settings.replace(out=str(tmp_path / "out"))
    undisturbed = on_ranks(2, ranks.short_run, settings.replace(out=str(tmp_path / "counted"), max_steps=1), [])
    judged_once = undisturbed[1]["seen"]["values"] // 2
    assert "step 4 is saved as" in run_out(2, ours, [(1, "values", judged_once)])
    resume(2, ours)
    require_the_same_run(ours, settings)


@slow
def test_another_budget_or_number_of_ranks_is_tried_as_it_is(settings, tmp_path):
    ours = settings.replace(out=str(tmp_path / "out"))
    run_out(2, ours, [(1, "forward", 5)])
    assert resume(3, ours, stop_at=None) == []
    require_the_same_run(ours, settings)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=slow)])
def test_a_single_rollout_that_is_too_much_on_one_rank_ends_all(settings, tmp_path, rank):
    """There is no smaller budget to remember; the step is saved all the same."""
    ours = settings.replace(out=str(tmp_path / "out"), max_tokens=1, sequence_parallel=1)
    message = run_out(2, ours, [(rank, "forward", 250)], always=True)
    assert re.match(
        r"memory ran out on a single rollout of \d+ tokens: weights, gradients and moments take [^\n]*\n"
        rf"rank {rank}: CUDA out of memory",
        message,
    )
    assert not (Path(ours.run.out) / "token_budget.json").exists()
    assert steps(ours) == ["step-00000000", "step-00000002"]


@pytest.mark.parametrize(
    ("kind", "killed", "part"),
    [
        pytest.param("ENOSPC", 1, "rank-00001", id="a-disk-that-is-full"),
        pytest.param("SIGKILL", 1, "rank-00001", id="a-rank-while-it-writes-its-part", marks=slow),
        pytest.param("SIGKILL", 0, "model.safetensors", id="rank-0-while-it-puts-parts-together", marks=slow),
    ],
)
def test_what_stood_still_stands_where_the_step_cannot_be_saved(settings, tmp_path, kind, killed, part):
    """Memory runs out at step 5; the checkpoint of step 4 stands."""
    ours = settings.replace(out=str(tmp_path / "out"))
    leader, _ = on_ranks(
        2, ranks.short_run, ours, [(1 - killed, "forward", 11)], disk=(kind, killed, part), rank_0_is_enough=True
    )
    if killed == 0:
        assert leader["fault"] == "gone"
    else:
        assert leader["message"].startswith("memory ran out with 60 tokens at once; step 5 could not be saved (")
        assert f"the newest checkpoint is {ours.run.out}/checkpoints/step-00000004" in leader["message"]
    assert steps(ours)[-1] == "step-00000004"
    (told,) = resume(2, ours)
    assert "starting with 30" in told
    require_the_same_run(ours, settings)


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=slow)])
def test_the_self_check_takes_fewer_rollouts_the_next_time(settings, tmp_path, rank):
    ours = settings.replace(out=str(tmp_path / "out"), max_steps=1)
    message = run_out(2, ours, [(rank, "check", 0)])
    assert re.match(
        r"memory ran out while the packing was tried on rollouts of up to \d+ tokens; the run has no", message
    )
    (told,) = resume(2, ours)
    assert told == "memory ran out in the self-check before: it takes 2 rollouts at most"


@slow
@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"train": "head", "lr": 1e-3}, "values"),
        ({"train": "last-1", "lr": 1e-3}, "forward"),
        ({"train": "lora"}, "backward"),
        ({"activation_checkpointing": "layer"}, "backward"),
        ({"optimizer": "adamw-8bit"}, "backward"),
        ({"old_values": "epoch", "no_clip": False}, "values"),
    ],
    ids=["cached-states", "last-layer", "adapters", "checkpointed", "8-bit-moments", "old-values"],
)
def test_other_ways_to_train_go_on_with_less(settings, tmp_path, changes, kind):
    changes = {"model": settings.run.out, "max_steps": 4} | changes
    undisturbed, ours = (settings.replace(out=str(tmp_path / name), **changes) for name in ("undisturbed", "ours"))
    on_ranks(2, ranks.fit_run, undisturbed)
    run_out(2, ours, [(1, kind, 0 if kind == "values" else 4)])
    resume(2, ours)
    require_the_same_run(ours, undisturbed)


@slow
def test_rollouts_that_are_not_finite_are_found_with_less(settings, tmp_path):
    """Memory runs out in the search for them: the step before it is saved, and found again is the same."""
    rollouts = readable_rollouts(6, seed=2)
    rollouts.returns[rollouts.offsets[6] : rollouts.offsets[7]] = 3e19  # float32 cannot hold its square
    shard = write_shard(tmp_path / "data" / "a.parquet", rollouts)
    changes = {"data": [str(shard)], "batch_size": 24, "val_fraction": 0.0, "max_steps": 1, "on_non_finite": "skip"}
    ours = settings.replace(out=str(tmp_path / "ours"), max_tokens=40, **changes)
    run_out(2, ours, [(1, "backward", 6)], huge=True)
    resume(2, ours, huge=True)
    (file,) = Path(ours.run.out).glob("diverged-step-*.parquet")
    assert file.name == "diverged-step-00000001.parquet"


@slow
def test_eval_on_several_ranks_ends_and_says_what_needs_less(settings):
    judged = EvalSettings(data=settings.reading.data, model=[settings.run.out], max_tokens=200, device="cpu")
    leader, _ = on_ranks(2, ranks.short_eval, judged, 1)
    assert leader["fault"] == "MachineError"
    assert leader["message"].startswith("memory ran out with 200 tokens at once\nrank 1: CUDA out of memory")
