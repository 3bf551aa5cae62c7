"""A run of three checkpoints is killed, refused or cut off at every operation on its storage, and goes on.

The method is SQLite's (https://www.sqlite.org/testing.html): loop over n until the run survives, and after each n ask
whether what stands is the old state or the new one, never neither, and whether the run resumed from it ends bit for
bit where the undisturbed one does.
"""

import errno
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from crashing import Dead, Dies, Fails, PowerCut, die
from support import readable_rollouts, small_config, write_shard
from warm import context

from critic_train.errors import MachineError
from critic_train.run.checkpoint import checkpoints, inspect, newest_checkpoint, read_state
from critic_train.run.storage import Operation, Watcher, watched
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit
from critic_train.weights.loading import build_critic
from critic_train.weights.saving import save_critic

View = tuple[object, ...]
ENDED = ("finished", "already finished")


@dataclass(frozen=True, slots=True)
class World:
    """The smallest run that does everything: old values, evaluations, a best, pruning, three checkpoints.

    `views[n]` is what stood before operation n (from 1); the last one is what stands at the end.
    """

    folder: Path
    views: list[View]
    operations: list[str]
    final: dict[str, bytes]

    def settings(self, out: Path) -> FitSettings:
        return settings_of(self.folder, out)


def settings_of(folder: Path, out: Path) -> FitSettings:
    return FitSettings(
        data=[str(folder / "data")],
        model=str(folder / "model"),
        out=str(out),
        batch_size=4,
        max_steps=3,
        checkpoint_every=1,
        eval_every=2,
        keep=1,
        val_data=[str(folder / "held_out")],
        old_values="epoch",
        lr=3e-3,
        device="cpu",
        no_report=True,
    )


def run(settings: FitSettings, watcher: Watcher | None = None) -> str:
    """Run to the end; how it ended."""
    if watcher is None:
        return list(fit(settings, StopRequest()))[-1].status
    with watched(watcher):
        return list(fit(settings, StopRequest()))[-1].status


def view(out: Path) -> View:
    """What a run directory is to somebody who opens it: its whole checkpoints, its best, its result."""
    standing = checkpoints(out / "checkpoints")
    link = out / "best"
    newest, _ = newest_checkpoint(out / "checkpoints")
    logged = (out / "metrics.jsonl").read_bytes() if newest else b""
    kept = read_state(newest)["position"]["metrics_bytes"] if newest else 0
    return (
        tuple((path.name, inspect(path).kind) for path in standing),
        link.readlink().name if link.is_symlink() else None,
        logged[:kept],
        readable(out / "run.json"),
        readable(out / "result.json"),
    )


def readable(path: Path) -> object:
    """Whether JSON stands there; anything else that stands there fails the test."""
    return sorted(json.loads(path.read_text())) if path.exists() else None


def final_state(out: Path) -> dict[str, bytes]:
    """What must be bit-identical at the end."""
    last = checkpoints(out / "checkpoints")[-1]
    names = ("model.safetensors", "optimizer.safetensors", "trainer.json", "config.json")
    return {
        **{name: (last / name).read_bytes() for name in names},
        "metrics": (out / "metrics.jsonl").read_bytes(),
        "best": (out / "best").readlink().name.encode(),
        "names": b" ".join(sorted(p.name.encode() for p in out.rglob("*") if p.name != ".lock")),
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    write_shard(folder / "data" / "a.parquet", readable_rollouts(4, seed=1, responses=2))
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    write_shard(folder / "held_out" / "a.parquet", readable_rollouts(2, seed=2, responses=2))
    config = small_config("Llama", **shape, num_attention_heads=1, num_key_value_heads=1)
    (folder / "model").mkdir()
    save_critic(build_critic(config, seed=0), folder / "model", None)
    out = folder / "undisturbed"
    views: list[View] = [()]
    operations: list[str] = [""]

    def watch(operation: Operation) -> None:
        views.append(view(out))
        operations.append(f"{operation.kind} {operation.path.name}")

    assert run(settings_of(folder, out), watch) == "finished"
    assert "rename .best.tmp" in operations
    views.append(view(out))
    return World(folder=folder, views=views, operations=operations, final=final_state(out))


def second_checkpoint(world: World) -> range:
    """From the first operation of the second checkpoint after step 0 to the third's: saving, `best`, pruning."""
    begins = [n for n, said in enumerate(world.operations) if said.startswith("mkdir .step-")]
    assert len(begins) == 4
    return range(begins[2], begins[3])


def killed_at(world: World, n: int, out: Path, *, torn: bool) -> None:
    with pytest.raises(Dead):
        run(world.settings(out), Dies(at=n, torn=torn))
    assert view(out) in (world.views[n], world.views[n + 1]), (
        f"{world.operations[n]}: neither the old state nor the new"
    )
    assert run(world.settings(out)) in ENDED, world.operations[n]
    assert final_state(out) == world.final, world.operations[n]


def test_killed_at_any_operation_of_a_save(world, tmp_path):
    """Scenario 1. Half of what the operation was to write is written."""
    for n in second_checkpoint(world)[::5]:
        killed_at(world, n, tmp_path / str(n), torn=True)
        shutil.rmtree(tmp_path / str(n))


@pytest.mark.slow
@pytest.mark.parametrize("torn", [True, False])
def test_killed_at_any_operation_of_a_run(torn, world, tmp_path):
    """Scenario 1, over everything a run writes."""
    for n in range(1, len(world.operations)):
        killed_at(world, n, tmp_path / str(n), torn=torn)
        shutil.rmtree(tmp_path / str(n))
    survives = Dies(at=len(world.operations))
    assert run(world.settings(tmp_path / "survives"), survives) == "finished"
    assert survives.count == len(world.operations) - 1


@pytest.mark.slow
def test_a_process_killed_by_the_kernel_at_any_operation(world, tmp_path):
    """Scenario 1 with SIGKILL: nothing of the process is left, no handler, no `finally`."""
    for n in range(1, len(world.operations)):
        out = tmp_path / str(n)
        process = context.Process(target=die, args=(world.settings(out), n))
        process.start()
        process.join()
        assert process.exitcode == -9
        assert view(out) in (world.views[n], world.views[n + 1]), world.operations[n]
        assert run(world.settings(out)) in ENDED
        assert final_state(out) == world.final, world.operations[n]
        shutil.rmtree(out)


@pytest.mark.slow
def test_killed_twice(world, tmp_path):
    """A kill while the run recovers from a kill, at 200 pairs of places drawn at random."""
    draw = np.random.default_rng(0)
    for number in range(200):
        out = tmp_path / str(number)
        first, second = draw.integers(1, len(world.operations), 2).tolist()
        with pytest.raises(Dead):
            run(world.settings(out), Dies(at=first))
        try:
            run(world.settings(out), Dies(at=second))
        except Dead:
            assert run(world.settings(out)) in ENDED
        assert final_state(out) == world.final, (first, second)
        shutil.rmtree(out)


def cut_at(world: World, n: int, out: Path) -> None:
    with pytest.raises(Dead):
        run(world.settings(out), PowerCut(at=n))
    assert all(kind == "complete" for _, kind in view(out)[0]), world.operations[n]
    assert run(world.settings(out)) in ENDED, world.operations[n]
    assert final_state(out) == world.final, world.operations[n]


def test_the_power_goes_during_a_save(world, tmp_path):
    """Scenario 2, prevented: what was renamed had been synced."""
    for n in second_checkpoint(world)[1::6]:
        cut_at(world, n, tmp_path / str(n))
        shutil.rmtree(tmp_path / str(n))


@pytest.mark.slow
def test_the_power_goes_at_any_operation_of_a_run(world, tmp_path):
    for n in range(1, len(world.operations)):
        cut_at(world, n, tmp_path / str(n))
        shutil.rmtree(tmp_path / str(n))


def refused_at(world: World, n: int, out: Path, number: int, times: int) -> str:
    """Run into a fault of the disk, see what stands, go on; how the run with the fault ended."""
    try:
        ended = run(world.settings(out), Fails(at=n, number=number, times=times))
    except MachineError:
        ended = "refused"
        hidden = [p.name for p in out.rglob(".*") if p.name != ".lock"]
        assert not hidden, f"{world.operations[n]}: left {hidden}"
        if world.views[n] != ((), None, b"", None, None):
            steps = [name for name, kind in view(out)[0] if kind == "complete"]
            assert steps[-1:] >= [name for name, _ in world.views[n][0]][-1:], world.operations[n]
        assert run(world.settings(out)) in ENDED, world.operations[n]
    assert final_state(out) == world.final, world.operations[n]
    return ended


@pytest.mark.parametrize(
    ("first", "number", "times"), [(0, errno.ENOSPC, 1), (1, errno.ENOSPC, 10_000), (2, errno.EIO, 1)]
)
def test_the_disk_refuses_during_a_save(first, number, times, world, tmp_path):
    """Scenario 5: exit code 6, nothing half done left, and what stood still stands. Each fault at other places."""
    ends = [refused_at(world, n, tmp_path / str(n), number, times) for n in second_checkpoint(world)[first::7]]
    assert "refused" in ends


@pytest.mark.slow
@pytest.mark.parametrize(("number", "times"), [(errno.ENOSPC, 1), (errno.ENOSPC, 10_000), (errno.EIO, 1)])
def test_the_disk_refuses_any_operation_of_a_run(number, times, world, tmp_path):
    for n in range(1, len(world.operations)):
        refused_at(world, n, tmp_path / str(n), number, times)
        shutil.rmtree(tmp_path / str(n))
