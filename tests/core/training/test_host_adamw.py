"""Moments that wait on the host: parameters, moments, files and runs are those of torch's own AdamW, to the bit."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rank_work import ONE, critic_of, gradients, step_on_ranks
from ranks import on_ranks
from safetensors.torch import load_file
from support import StopAfter, readable_rollouts, write_shard

from critic_train.events import Event, Notice, StepEnded
from critic_train.model import compute
from critic_train.run.checkpoint import checkpoints
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training import dry_run as training_dry_run
from critic_train.training import fit as training_fit
from critic_train.training import host_adamw as offloading
from critic_train.training.dry_run import dry_run
from critic_train.training.fit import fit
from critic_train.training.host_adamw import HostAdamW
from critic_train.training.optimizer import build_optimizer, load_optimizer, save_optimizer
from critic_train.weights.saving import save_critic

RATES: dict[str, float] = {"lr": 1e-3, "head_lr": 1e-2, "weight_decay": 0.1}


def groups(seed: int) -> list[dict[str, object]]:
    """Parameters of every awkward kind: large, tiny, empty, transposed, and one that never gets a gradient."""
    draw = torch.Generator().manual_seed(seed)
    shapes = [(33, 65), (7,), (0, 5), (), (129,), (64, 64), (3, 3)]
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]
    parameters[5] = torch.nn.Parameter(parameters[5].detach().T)
    return [
        {"params": parameters[:4], "lr": 1e-2, "weight_decay": 0.1},
        {"params": parameters[4:], "lr": 3e-3, "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("piece", [64, 1000, 10**6])
def test_parameters_and_moments_are_those_of_adamw(piece):
    ours, theirs = groups(0), groups(0)
    optimizers = [HostAdamW(ours, piece), torch.optim.AdamW(theirs, fused=True)]
    every = [[p for group in made for p in group["params"]] for made in (ours, theirs)]
    draw = torch.Generator().manual_seed(1)
    for step in range(5):
        for one, other in zip(*every, strict=True):
            one.grad = other.grad = None
            if one.shape != (3, 3) and (one.shape != (7,) or step % 2):
                # In the parameter's own order, as autograd leaves it.
                other.grad = torch.empty_like(other).copy_(torch.randn(other.shape, generator=draw))
                one.grad = other.grad.clone()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
            optimizer.step()
    for one, other in zip(*every, strict=True):
        assert torch.equal(one, other)
        assert optimizers[0].state[one].keys() == optimizers[1].state[other].keys()
        for key, value in optimizers[1].state[other].items():
            assert torch.equal(optimizers[0].state[one][key], value), key
    assert optimizers[1].state[every[1][0]]["step"] == 5


def test_no_more_than_a_piece_visits_the_device_at_a_time(monkeypatch):
    sizes = []

    class Watched(offloading._Traffic):
        def __init__(self, device: torch.device, size: int) -> None:
            sizes.append(size)
            super().__init__(device, size)

    monkeypatch.setattr(offloading, "_Traffic", Watched)
    for piece, largest in ((64, 64), (1000, 1000), (10**6, 33 * 65 + 7 + 1)):
        made = groups(0)
        for group in made:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        made[1]["params"] = made[1]["params"][:1]
        HostAdamW(made, piece).step()
        assert sizes.pop() == largest


def one_step(critic, optimizer, seed):
    draw = torch.Generator().manual_seed(seed)
    for parameter in critic.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw)
    optimizer.step()


def test_a_file_of_either_is_that_of_the_other_and_goes_on_with_either(tmp_path):
    files = []
    for first, second in (("none", "none"), ("none", "optimizer"), ("optimizer", "none"), ("optimizer", "optimizer")):
        critic = critic_of("Llama")
        optimizer = build_optimizer(critic, **RATES, offload=first)
        one_step(critic, optimizer, 0)
        before, after = (tmp_path / f"{first}-{second}-{when}" for when in ("before", "after"))
        before.mkdir()
        after.mkdir()
        save_optimizer(optimizer, dict(critic.named_parameters()), before)
        optimizer = build_optimizer(critic, **RATES, offload=second)
        load_optimizer(optimizer, critic, before)
        one_step(critic, optimizer, 1)
        save_optimizer(optimizer, dict(critic.named_parameters()), after)
        weights = torch.cat([p.detach().flatten() for p in critic.parameters()]).numpy().tobytes()
        files.append([(folder / "optimizer.safetensors").read_bytes() for folder in (before, after)] + [weights])
    assert all(found == files[0] for found in files)


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_ranks_take_the_same_steps_and_write_the_same_files(size, tmp_path):
    for offload in ("none", "optimizer"):
        (tmp_path / offload).mkdir()
        assert on_ranks(size, step_on_ranks, str(tmp_path / offload), offload) == [None] * size
    for file in (tmp_path / "none").iterdir():
        assert (tmp_path / "optimizer" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_weights_that_wait_on_the_host_take_the_same_steps_on_one_rank_and_on_two(size, tmp_path):
    """The files of torch's own AdamW on one process, rounding aside; on as many ranks without the flag, to the bit."""
    source, alone = tmp_path / "source", tmp_path / "alone"
    for folder in (source, alone):
        folder.mkdir()
    critic = critic_of("Llama")
    save_critic(critic, source, None)
    optimizer = build_optimizer(critic, **RATES)
    for _ in range(3):
        gradients(critic, ONE, rollouts=21, forest=True, mode="token-mean")
        optimizer.step()
    save_critic(critic, alone, None)
    found = {}
    for name, offload, read in (("none", "none", None), ("all", "all", None), ("read", "all", str(source))):
        (tmp_path / name).mkdir()
        assert on_ranks(size, step_on_ranks, str(tmp_path / name), offload, read) == [None] * size
        found[name] = load_file(tmp_path / name / "model.safetensors")
    for file in (tmp_path / "none").iterdir():
        assert (tmp_path / "all" / file.name).read_bytes() == file.read_bytes(), file.name
    for name, expected in load_file(alone / "model.safetensors").items():
        for ours in found.values():
            torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-5, msg=name)


def settings_for(tmp_path: Path, out: str, **more: object) -> FitSettings:
    shard = tmp_path / "data" / "a.parquet"
    if not shard.exists():
        write_shard(shard, readable_rollouts(16))
    given = {"preset": "tiny", "batch_size": 16, "epochs": 3, "device": "cpu", "no_report": True}
    return FitSettings(data=[str(shard)], out=str(tmp_path / out), **given | more)


def state(out: Path) -> dict[str, torch.Tensor]:
    last = checkpoints(out / "checkpoints")[-1]
    return load_file(last / "model.safetensors") | load_file(last / "optimizer.safetensors")


def test_a_run_is_the_same_and_resumes(tmp_path, monkeypatch):
    list(fit(settings_for(tmp_path, "none"), StopRequest()))
    # There is nothing to offload on a CPU; here it is done all the same.
    monkeypatch.setattr(compute, "resolve_offload", lambda settings: settings.offload)
    list(fit(settings_for(tmp_path, "whole", offload="optimizer"), StopRequest()))
    *_, stopped = fit(settings_for(tmp_path, "parts", offload="optimizer"), StopAfter(40))
    assert stopped.status == "interrupted"
    list(fit(settings_for(tmp_path, "parts", offload="optimizer"), StopRequest()))
    expected = state(tmp_path / "none")
    for name in ("whole", "parts"):
        found = state(tmp_path / name)
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def test_a_run_of_one_process_is_a_group_of_its_own_where_its_weights_wait_on_the_host(tmp_path, monkeypatch):
    expected = losses(fit(settings_for(tmp_path, "none"), StopRequest()))
    for module in (compute, training_fit):
        monkeypatch.setattr(module, "resolve_offload", lambda settings: settings.offload)
    assert losses(fit(settings_for(tmp_path, "whole", offload="all"), StopRequest())) == pytest.approx(expected, 1e-5)
    *_, stopped = fit(settings_for(tmp_path, "parts", offload="all"), StopAfter(40))
    assert stopped.status == "interrupted"
    list(fit(settings_for(tmp_path, "parts", offload="all"), StopRequest()))
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert [key for key in whole if not torch.equal(whole[key], parts[key])] == []
    assert not torch.distributed.is_initialized()


def losses(events: Iterator[Event]) -> list[float]:
    return [event.metrics["value_loss"] for event in events if isinstance(event, StepEnded)]


def test_a_dry_run_counts_what_waits_on_the_host(tmp_path, monkeypatch):
    for module in (compute, training_dry_run):
        monkeypatch.setattr(module, "resolve_offload", lambda settings: settings.offload)
    for offload in ("none", "optimizer", "all"):
        *_, ended = dry_run(settings_for(tmp_path, "out", offload=offload), tmp_path / "out", StopRequest())
        assert ended.result["offload"] == offload
        assert ended.result["memory"]["moments"] == 8 * ended.result["parameters"]


def test_a_cpu_is_told_that_there_is_nothing_to_offload(tmp_path):
    events = fit(settings_for(tmp_path, "out", max_steps=1, offload="optimizer"), StopRequest())
    said = [event.message for event in events if isinstance(event, Notice)]
    assert "--offload optimizer changes nothing on a CPU: all is in host memory already" in said
