"""Adapters on several ranks: the draw, the files and the run of one process."""

import json
from pathlib import Path

import numpy as np
import pytest
import rank_work
import ranks
import torch
from rank_work import critic_of, drawn_adapters, load_and_save_adapters, load_and_save_measured
from ranks import on_ranks
from safetensors.numpy import load_file
from support import readable_rollouts, small_config, write_shard

from critic_train.model.critic import Critic
from critic_train.run.checkpoint import newest_checkpoint
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.fit import fit
from critic_train.weights.loading import build_critic, load_critic, read_model
from critic_train.weights.saving import save_critic

pytest.importorskip("peft")
STEPS = 20


def base_and_adapted(family: str, folder: Path) -> tuple[Critic, Path, Path]:
    """A critic with adapters that do something, the directory it was made from, and the one it was saved to."""
    base, source = folder / "base", folder / "source"
    base.mkdir()
    source.mkdir()
    save_critic(critic_of(family), base, None)
    critic = load_critic(read_model(base), adapt=rank_work.adapted)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in critic.trunk.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.05, generator=draw)
    save_critic(critic, source, None)
    return critic, base, source


def test_ranks_draw_the_adapters_of_one_process_and_keep_their_part(tmp_path):
    save_critic(critic_of("Llama"), tmp_path, None)
    alone = load_critic(read_model(tmp_path), adapt=rank_work.adapted)
    expected = {name: p.detach().numpy() for name, p in alone.named_parameters() if ".lora_" in name}
    assert any(np.abs(a).max() > 0.1 for a in expected.values())
    for found in on_ranks(3, drawn_adapters, str(tmp_path)):
        assert found.pop("share") < 0.4
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("family", "size"), [("Llama", 3), ("GPT2", 2), pytest.param("GPTNeoX", 2, marks=pytest.mark.slow), ("Mixtral", 2)]
)
def test_what_ranks_fold_and_write_is_byte_for_byte_what_one_process_wrote(family, size, tmp_path):
    _, base, source = base_and_adapted(family, tmp_path)
    target = tmp_path / "target"
    target.mkdir()
    assert on_ranks(size, load_and_save_adapters, str(base), str(source), str(target)) == [None] * size
    assert {p.name for p in target.iterdir()} == {p.name for p in source.iterdir()}
    for file in source.iterdir():
        assert (target / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.slow
def test_no_rank_holds_the_whole_model_while_it_is_loaded_or_folded(tmp_path):
    """A model of 386 MB on 4 ranks: its quarter, a few tensors of 17 MB that are whole while they are folded, and what
    gloo needs to gather them."""
    config = small_config("Llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, vocab_size=2048)
    critic = build_critic(config, seed=0)
    base, target = tmp_path / "base", tmp_path / "target"
    base.mkdir()
    target.mkdir()
    save_critic(critic, base, None)
    whole_bytes = sum(p.numel() * 4 for p in critic.parameters())
    del critic
    for part, grown in on_ranks(4, load_and_save_measured, str(base), str(target)):
        assert part <= 0.27 * whole_bytes
        assert grown < whole_bytes
    assert (target / "model.safetensors").stat().st_size > 3e8


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> FitSettings:
    """A run with adapters on one process, done; the others differ in `out`."""
    folder = tmp_path_factory.mktemp("lora")
    write_shard(folder / "data" / "a.parquet", readable_rollouts(32, seed=1))
    base = folder / "base"
    base.mkdir()
    save_critic(critic_of("Llama"), base, None)
    alone = FitSettings(
        data=[str(folder / "data")],
        model=str(base),
        train="lora",
        lora_rank=4,
        out=str(folder / "alone"),
        batch_size=16,
        max_tokens=120,
        max_steps=STEPS,
        eval_every=10,
        checkpoint_every=100,
        lr=1e-3,
        no_clip=True,
        no_report=True,
        device="cpu",
    )
    assert list(fit(alone, StopRequest()))[-1].status == "finished"
    return alone


def last_checkpoint(out: str) -> Path:
    newest, _ = newest_checkpoint(Path(out) / "checkpoints")
    assert newest is not None
    return newest


def steps_of(out: str) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if record["event"] == "step"]


def assert_is_that_of_one(out: str, alone: str) -> None:
    """The loss curve to 1e-5, and the directory to rounding."""
    ours, theirs = steps_of(out), steps_of(alone)
    assert len(ours) == len(theirs) == STEPS
    for name in ("value_loss", "grad_norm"):
        assert [step[name] for step in ours] == pytest.approx([step[name] for step in theirs], rel=1e-5), name
    mine, other = last_checkpoint(out), last_checkpoint(alone)
    assert {p.name for p in mine.iterdir()} == {p.name for p in other.iterdir()}
    for file in ("model.safetensors", "adapter.safetensors", "optimizer.safetensors"):
        tensors, expected = load_file(mine / file), load_file(other / file)
        assert {name: t.shape for name, t in tensors.items()} == {name: t.shape for name, t in expected.items()}
        whole, there = (np.concatenate([t[name].ravel() for name in sorted(t)]) for t in (tensors, expected))
        assert np.linalg.norm(whole - there) <= 1e-4 * np.linalg.norm(there), file


def test_two_ranks_give_the_loss_curve_of_one_and_its_checkpoint(settings, tmp_path):
    ours = settings.replace(out=str(tmp_path / "two"))
    assert [end.get("status", end) for end in on_ranks(2, ranks.fit_run, ours)] == ["finished"] * 2
    assert_is_that_of_one(ours.run.out, settings.run.out)
    base = load_file(Path(settings.model.model or "") / "model.safetensors")
    saved = load_file(last_checkpoint(ours.run.out) / "model.safetensors")
    assert {name for name in base if np.array_equal(base[name], saved[name])} >= {"model.embed_tokens.weight"}
    moments = load_file(last_checkpoint(ours.run.out) / "optimizer.safetensors")
    assert all(".lora_" in name or ".head." in name for name in moments)


def test_three_ranks_and_then_one_go_on_with_what_two_began(settings, tmp_path):
    ours = settings.replace(out=str(tmp_path / "elastic"))
    for size, until in ((2, 5), (3, 11)):
        ended = on_ranks(size, ranks.fit_run, ours, (1, until))
        assert [(end.get("status", end), end.get("step")) for end in ended] == [("interrupted", until)] * size
    assert list(fit(ours, StopRequest()))[-1].status == "finished"
    assert_is_that_of_one(ours.run.out, settings.run.out)


@pytest.mark.slow
def test_two_ranks_go_on_with_what_one_began(settings, tmp_path):
    ours, stop = settings.replace(out=str(tmp_path / "grown")), StopRequest()
    for event in fit(ours, stop):
        if getattr(event, "step", 0) == 4:
            stop.signal_number = ranks.SIGTERM
    assert [end.get("status", end) for end in on_ranks(2, ranks.fit_run, ours)] == ["finished"] * 2
    assert_is_that_of_one(ours.run.out, settings.run.out)
